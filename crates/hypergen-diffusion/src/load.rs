//! From what a user names (or nothing) to a model that is ready to draw.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hypergen_tensor::{Checkpoint, DType, Device, DeviceConfig, Loader, Tensor, TorchGenerator};
use serde_json::Value;

use crate::conditioning::{TextConditioner, TextPart};
use crate::families::{self, Family, FamilyName, Traits};
use crate::files::ModelFiles;
use crate::lora::{self, Adapters, Component, DEFAULT_CACHE, Targets};
use crate::models::text_encoder::{HiddenState, TextEncoder, TextEncoderConfig};
use crate::models::unet::{UNet, UNetConfig};
use crate::models::vae::{Decoder, VaeConfig};
use crate::samplers::{Sampler, SamplerError, SamplerKind};
use crate::single_file::vae::{self, Vae};
use crate::tokenizer::Tokenizer;
use crate::{Error, ErrorKind, ModelInfo, ParameterError, Pipeline, STEPS, Size, embedded, recognise};

/// The number type that a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DTypeChoice {
    /// bfloat16 where the machine multiplies it in hardware, else float32.
    #[default]
    Auto,
    /// Single precision: what diffusers draws by default.
    Float32,
    /// Half the memory, several times the speed where the hardware has it.
    Bfloat16,
    /// A GPU's type: on the CPU it is computed as bfloat16, with a warning.
    Float16,
}

impl DTypeChoice {
    /// All, as users type them.
    pub const ALL: [DTypeChoice; 4] = [Self::Auto, Self::Float32, Self::Bfloat16, Self::Float16];

    /// The name that users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }

    /// What the user should know of the choice, if anything.
    pub fn caveat(self) -> Option<&'static str> {
        (self == Self::Float16).then_some("float16 is a GPU's type: the CPU computes in bfloat16 instead")
    }
}

impl fmt::Display for DTypeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DTypeChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|d| d.name() == text).ok_or_else(|| {
            Error::new(
                ErrorKind::Request,
                format!("unknown dtype '{text}': use auto, float32, bfloat16 or float16"),
            )
        })
    }
}

/// How to load a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Number type of weights and activations.
    pub dtype: DTypeChoice,
    /// Threads that share the work; `None`: all that the process may use.
    pub threads: Option<usize>,
    /// A VAE to use instead of the model's own: a single file or a folder.
    pub vae: Option<PathBuf>,
    /// The model's family, where its files do not say it.
    pub family: Option<FamilyName>,
    /// What the model is called, where its path does not say.
    pub name: Option<String>,
    /// Bytes of weights with LoRAs that are kept for their next request; `None`: 2 GiB.
    pub lora_cache: Option<usize>,
}

/// How far loading has come, in bytes of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes read and packed.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Loads a model: a folder in the diffusers layout, a single file in the
/// original one, or the embedded model where none is named. `progress` is called as the weights are packed.
///
/// # Errors
/// With [`ErrorKind::Model`]: the message names the file or tensor, what was
/// found and what was expected.
pub fn load(
    model: Option<&str>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Pipeline, Error> {
    let files = match model {
        None => ModelFiles::Embedded,
        Some(path) => ModelFiles::at(Path::new(path))?,
    };
    load_files(&files, model, options, progress)
}

/// Loads a model of whatever files, called `model`.
pub(crate) fn load_files(
    files: &ModelFiles,
    model: Option<&str>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Pipeline, Error> {
    let device = Device::cpu(&DeviceConfig { threads: options.threads })
        .map_err(|e| Error::new(ErrorKind::Request, e.to_string()))?;
    let dtype = match options.dtype {
        DTypeChoice::Float32 => DType::F32,
        DTypeChoice::Bfloat16 | DTypeChoice::Float16 => DType::Bf16,
        DTypeChoice::Auto if device.multiplies_bf16() => DType::Bf16,
        DTypeChoice::Auto => DType::F32,
    };
    let parts = Parts::open(files, options.vae.as_deref())?;
    let total = parts.bytes();
    let done = Cell::new(0);
    let progress = RefCell::new(progress);
    let report = |bytes: u64| {
        done.set(done.get() + bytes);
        (progress.borrow_mut())(LoadProgress { done: done.get().min(total), total });
    };
    let loading = Loading { files, device: &device, dtype, report: &report, changeable: RefCell::default() };

    let unet = loading.unet(&parts.unet)?;
    let text = loading.text(&parts, &unet)?;
    let vae = loading.vae(&parts)?;
    check_channels(unet.config(), vae.config())?;
    let (family, scheduler) = loading.family(options.family, parts.xl, &unet)?;
    let sampler = own_sampler(&scheduler, family.steps.unwrap_or(STEPS.default)).map_err(|e| {
        Error::new(ErrorKind::Model, format!("{}: {e}", files.show("scheduler/scheduler_config.json")))
    })?;
    let native_size = native_size(family, unet.config(), vae.config())
        .map_err(|e| Error::new(ErrorKind::Model, format!("{}: {e}", files.show("unet/config.json"))))?;
    let info = ModelInfo {
        name: options
            .name
            .clone()
            .unwrap_or_else(|| model.map_or_else(|| embedded::NAME.to_owned(), model_name)),
        family: family.name.into(),
        native_size,
        sampler,
        device: device.name().into(),
        isa: device.isa().to_string(),
        dtype: dtype.name().into(),
        threads: device.threads(),
        weight_bytes: parts.packed_bytes(dtype),
        default_steps: family.steps,
        default_guidance: family.guidance,
        min_guidance: family.min_guidance,
    };
    let changeable = loading.changeable.into_inner();
    let adapters = Adapters::new(Targets::new(changeable), options.lora_cache.unwrap_or(DEFAULT_CACHE));
    device.release_unused();
    Ok(Pipeline {
        info,
        device,
        dtype,
        text,
        unet,
        vae,
        adapters,
        scheduler,
        native_only: matches!(files, ModelFiles::Embedded),
        last_latent_shape: None,
    })
}

/// Refuses a UNet that takes more than the VAE's latents.
fn check_channels(unet: &UNetConfig, vae: &VaeConfig) -> Result<(), Error> {
    let (channels, latents) = (unet.in_channels, vae.latent_channels);
    if channels == latents && unet.out_channels == latents {
        return Ok(());
    }
    let message = match recognise::channels(channels) {
        Some(what) if latents == 4 => format!("this is {what}, which is not supported"),
        _ => format!(
            "the UNet takes {channels} channels and gives {}, and the VAE has {latents}: the parts have to belong \
             together",
            unet.out_channels
        ),
    };
    Err(Error::new(ErrorKind::Model, message))
}

/// What the checkpoint's own sampler is called. That it cannot be built is no
/// reason to refuse the model, as long as another one can: a request may name that.
fn own_sampler(scheduler: &Value, steps: usize) -> Result<String, SamplerError> {
    let Err(error) = Sampler::new(None, scheduler, steps) else {
        return Ok(SamplerKind::named_by(scheduler)?.name().to_owned());
    };
    if !SamplerKind::ALL.iter().any(|kind| Sampler::new(Some(*kind), scheduler, steps).is_ok()) {
        return Err(error);
    }
    let class = scheduler.get("_class_name").and_then(Value::as_str).unwrap_or("none");
    let name =
        SamplerKind::named_by(scheduler).map_or_else(|_| class.chars().take(60).collect(), |k| k.to_string());
    Ok(match error {
        SamplerError::Steps(_) => name,
        _ => format!("{name}, which cannot be used: requests have to name another"),
    })
}

/// The scheduler of a family that the user has named, in the place of whatever
/// the files say; only what a single file says of its prediction stays.
fn family_scheduler(files: &ModelFiles, family: &Family) -> Value {
    let scheduler = (family.scheduler)();
    match files {
        ModelFiles::Single(single) => single.marked(scheduler),
        _ => scheduler,
    }
}

/// The scheduler's file. A single file of Stable Diffusion 2.x does not say
/// what its UNet predicts, so the UNet is asked.
fn scheduler(files: &ModelFiles, unet: &UNet, device: &Device, dtype: DType) -> Result<Value, Error> {
    match files {
        ModelFiles::Single(single) if single.prediction_unknown() && predicts_noise(unet, device, dtype) => {
            Ok(families::sd2_base())
        }
        _ => files.json("scheduler/scheduler_config.json"),
    }
}

/// Whether a UNet that was given nothing but noise, at the noisiest timestep,
/// answers with that noise: it then predicts epsilon. v is nearly the
/// negative picture there, which has little in common with the noise.
fn predicts_noise(unet: &UNet, device: &Device, dtype: DType) -> bool {
    const SIDE: usize = 16;
    const TIMESTEP: f32 = 999.0;
    let (channels, context) = (unet.config().in_channels, unet.config().levels[0].context);
    let mut noise = vec![0.0; SIDE * SIDE * channels];
    TorchGenerator::new(0).fill_normal(&mut noise);
    let text = Tensor::from_f32(device, [1, 1, context], dtype, &vec![0.0; context]);
    let conditioning = unet.condition(&text, None, None);
    let latents = Tensor::from_f32(device, [1, SIDE, SIDE, channels], dtype, &noise);
    let answer = unet.forward(&latents, &[(&conditioning, TIMESTEP)]).to_f32();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    dot(&answer, &noise) > 0.5 * (dot(&answer, &answer) * dot(&noise, &noise)).sqrt()
}

/// What the UNet's file says, or else the family.
fn native_size(family: &Family, unet: &UNetConfig, vae: &VaeConfig) -> Result<Size, ParameterError> {
    let [height, width] = match unet.sample_size {
        Some(sides) => sides.map(|side| side.saturating_mul(vae.factor())),
        None => [family.native_side; 2],
    };
    Size::new(width, height)
        .map_err(|e| ParameterError { message: format!("'sample_size': {}", e.message), ..e })
}

/// A model's last path component, which is how people call it.
fn model_name(path: &str) -> String {
    let path = Path::new(path);
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    whole.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// Pipelines of diffusers that draw from text alone with the parts that we have.
const PLAIN: &[&str] = &["StableDiffusionPipeline", "LatentConsistencyModelPipeline"];
/// Those with SDXL's two text encoders.
const XL: &[&str] = &["StableDiffusionXLPipeline"];

/// The checkpoints of a model's parts.
struct Parts {
    xl: bool,
    index: Value,
    text_encoders: Vec<(&'static str, &'static str, Checkpoint)>,
    unet: Checkpoint,
    vae: Vae,
}

impl Parts {
    fn open(files: &ModelFiles, vae: Option<&Path>) -> Result<Self, Error> {
        let index = files.json("model_index.json")?;
        let class = class(files, &index)?;
        let xl = XL.contains(&class);
        let mut text_encoders =
            vec![("tokenizer", "text_encoder", files.checkpoint("text_encoder", "model")?)];
        if xl {
            text_encoders.push((
                "tokenizer_2",
                "text_encoder_2",
                files.checkpoint("text_encoder_2", "model")?,
            ));
        }
        Ok(Self {
            xl,
            text_encoders,
            unet: files.checkpoint("unet", "diffusion_pytorch_model")?,
            vae: match vae {
                None => Vae {
                    checkpoint: files.checkpoint("vae", "diffusion_pytorch_model")?,
                    config: files.json("vae/config.json")?,
                    shown: files.show("vae/config.json"),
                },
                Some(path) => vae::open(path, &|| {
                    let own = files.optional_json("vae/config.json")?;
                    let default = if xl { vae::SCALING_XL } else { vae::SCALING };
                    Ok(own.as_ref().map_or(default, vae::scaling))
                })?,
            },
            index,
        })
    }

    fn all(&self) -> impl Iterator<Item = &Checkpoint> {
        self.text_encoders.iter().map(|(_, _, c)| c).chain([&self.unet, &self.vae.checkpoint])
    }

    fn bytes(&self) -> u64 {
        self.all().map(Checkpoint::bytes).sum()
    }

    fn packed_bytes(&self, dtype: DType) -> usize {
        self.all().map(|c| c.elements() as usize * dtype.size()).sum()
    }
}

/// The pipeline's class, if it is one that we have.
fn class<'a>(files: &ModelFiles, index: &'a Value) -> Result<&'a str, Error> {
    let known = [PLAIN, XL].concat().join(", ");
    let shown = files.show("model_index.json");
    let message = match index.get("_class_name") {
        Some(Value::String(class)) if PLAIN.contains(&class.as_str()) || XL.contains(&class.as_str()) => {
            return Ok(class);
        }
        Some(Value::String(class)) => {
            let what = recognise::class(class).map_or(String::new(), |what| format!(", {what}"));
            let class: String = class.chars().take(80).collect();
            format!(
                "{shown} says that this is a {class}{what}, which is not supported; what can be loaded is {known}"
            )
        }
        other => format!(
            "{shown} does not say which pipeline this is ('_class_name' is {}); what can be loaded is {known}",
            other.map_or("absent", |value| if value.is_null() { "null" } else { "no text" })
        ),
    };
    Err(Error::new(ErrorKind::Model, message))
}

/// What every part is loaded with.
struct Loading<'a> {
    files: &'a ModelFiles,
    device: &'a Device,
    dtype: DType,
    report: &'a dyn Fn(u64),
    /// What LoRAs can change, by the part that it belongs to.
    changeable: RefCell<Vec<lora::Part>>,
}

impl Loading<'_> {
    /// The family, as it is named or else recognised, and the scheduler's file.
    fn family(
        &self,
        named: Option<FamilyName>,
        xl: bool,
        unet: &UNet,
    ) -> Result<(&'static Family, Value), Error> {
        let traits = |scheduler| Traits {
            embedded: matches!(self.files, ModelFiles::Embedded),
            xl,
            context: unet.config().levels[0].context,
            guidance_embedding: unet.config().time_cond_proj_dim.is_some(),
            scheduler,
        };
        if let Some(name) = named {
            let family = Family::named(name, &traits(&Value::Null))?;
            return Ok((family, family_scheduler(self.files, family)));
        }
        let scheduler = scheduler(self.files, unet, self.device, self.dtype)?;
        Ok((Family::of(&traits(&scheduler)), scheduler))
    }

    /// Reads a part's configuration; errors name the file.
    fn config<T>(&self, part: &str, read: impl FnOnce(&Value) -> Result<T, Error>) -> Result<T, Error> {
        let file = format!("{part}/config.json");
        let json = self.files.json(&file)?;
        read(&json).map_err(|e| Error { message: format!("{}: {}", self.files.show(&file), e.message), ..e })
    }

    /// Remembers what LoRAs can change of a part that was loaded.
    fn changeable(&self, component: Component, loader: &Loader<'_>) {
        let part = lora::Part { component, modules: loader.modules(), vectors: loader.vectors() };
        self.changeable.borrow_mut().push(part);
    }

    fn unet(&self, checkpoint: &Checkpoint) -> Result<UNet, Error> {
        let config = self.config("unet", UNetConfig::from_json)?;
        let loader = Loader::new(checkpoint, self.device, self.dtype, self.report);
        let unet = UNet::load(&loader.root(), config)?;
        nothing_left(&loader, checkpoint, |_| false)?;
        self.changeable(Component::UNet, &loader);
        Ok(unet)
    }

    fn vae(&self, parts: &Parts) -> Result<Decoder, Error> {
        let vae = &parts.vae;
        let mut json = vae.config.clone();
        if let Some(fields) = json.as_object_mut().filter(|_| !parts.xl) {
            // Only SDXL's pipeline of diffusers looks at these.
            fields.retain(|field, _| field != "latents_mean" && field != "latents_std");
        }
        let config = VaeConfig::from_json(&json)
            .map_err(|e| Error { message: format!("{}: {}", vae.shown, e.message), ..e })?;
        let checkpoint = &vae.checkpoint;
        let loader = Loader::new(checkpoint, self.device, self.dtype, self.report);
        let vae = Decoder::load(&loader.root(), config)?;
        // Text to picture only decodes.
        nothing_left(&loader, checkpoint, |t| t.starts_with("encoder.") || t.starts_with("quant_conv."))?;
        Ok(vae)
    }

    fn text(&self, parts: &Parts, unet: &UNet) -> Result<TextConditioner, Error> {
        let mut loaded = vec![];
        for (tokenizer, encoder, checkpoint) in &parts.text_encoders {
            let config = self.config(encoder, TextEncoderConfig::from_json)?;
            // SDXL takes the pooled text of its second encoder, and no other is asked for one.
            let config = config.projecting(*encoder == "text_encoder_2");
            let (positions, vocab) = (config.max_position_embeddings, config.vocab_size);
            let tokenizer = Tokenizer::load(self.files, tokenizer, positions, vocab)?;
            let loader = Loader::new(checkpoint, self.device, self.dtype, self.report);
            let encoder = TextEncoder::load(&loader.root(), config)?;
            nothing_left(&loader, checkpoint, beside_text_encoder)?;
            let component = if loaded.is_empty() { Component::Text } else { Component::Text2 };
            self.changeable(component, &loader);
            loaded.push(TextPart { tokenizer, encoder });
        }
        // SDXL takes the penultimate layer of both encoders as it is.
        let state = HiddenState { skip: usize::from(parts.xl), normed: !parts.xl };
        let zeros = parts.index.get("force_zeros_for_empty_prompt").and_then(Value::as_bool).unwrap_or(true);
        let text = TextConditioner::new(loaded, state, parts.xl && zeros);
        text.check_against(unet.config())?;
        Ok(text)
    }
}

/// Tensors that lie beside a text encoder in files of whole CLIP models, or
/// that older versions stored though they are constant.
fn beside_text_encoder(tensor: &str) -> bool {
    tensor.ends_with("position_ids")
        || tensor == "logit_scale"
        || ["vision_model.", "visual_projection.", "text_projection."].iter().any(|p| tensor.starts_with(p))
}

/// A tensor that nothing has asked for shows that configuration and weights
/// do not belong together, which would draw nonsense.
fn nothing_left(
    loader: &Loader<'_>,
    checkpoint: &Checkpoint,
    known: impl Fn(&str) -> bool,
) -> Result<(), Error> {
    let unused: Vec<String> = loader.unused().into_iter().filter(|t| !known(t)).collect();
    let Some(first) = unused.first() else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Model,
        format!(
            "{} holds {} tensors for which the config.json beside it has no place, '{first}' the first of them; \
             do the two files belong together?",
            checkpoint.label(),
            unused.len()
        ),
    ))
}
