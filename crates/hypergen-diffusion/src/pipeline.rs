//! A loaded model that draws: text, denoising steps, decoding.

use std::sync::Arc;
use std::time::Instant;

use hypergen_tensor::{DType, Device, Tensor};

use crate::conditioning::{Encoded, PromptReader, TextConditioner};
use crate::denoising::{Drawing, Guidance, Noise, pass};
use crate::enlarge::enlarge;
use crate::finite::finite;
use crate::lora::{Adapters, Lora};
use crate::memory;
use crate::models::unet::{Added, Conditioning, UNet};
use crate::models::vae::{Decoder, VaeConfig};
use crate::prompt::LoraTag;
use crate::prompt::PromptSyntax;
use crate::samplers::{Sampler, SamplerError, Trajectory};
use crate::{
    Check, Error, ErrorKind, GUIDANCE_RESCALE, GUIDANCE_SCALE, Generator, ModelInfo, Observer, Picture,
    Request, STEPS, Size, SizeConditioning, Stage,
};

/// A loaded model.
pub struct Pipeline {
    pub(crate) info: ModelInfo,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    pub(crate) text: TextConditioner,
    pub(crate) unet: UNet,
    pub(crate) vae: Decoder,
    pub(crate) adapters: Adapters,
    /// `scheduler_config.json` as it was read.
    pub(crate) scheduler: serde_json::Value,
    /// The model draws only at its native size; others are enlarged from it.
    pub(crate) native_only: bool,
    /// Latents of the request that memory was last laid out for.
    pub(crate) warm: Option<[usize; 4]>,
}

/// What a loaded model can do: all that a request is checked against, and
/// none of the weights.
struct Rules {
    info: ModelInfo,
    dtype: DType,
    text: PromptReader,
    vae: VaeConfig,
    /// Whether the UNet is told of sizes, as SDXL's is.
    takes_sizes: bool,
    scheduler: serde_json::Value,
    native_only: bool,
}

/// Final latents of one request, before decoding.
#[derive(Debug, Clone, PartialEq)]
pub struct Latents {
    /// Height in latents.
    pub height: usize,
    /// Width in latents.
    pub width: usize,
    /// `[height, width, channels]`.
    pub values: Vec<f32>,
}

impl Pipeline {
    fn rules(&self) -> Rules {
        Rules {
            info: self.info.clone(),
            dtype: self.dtype,
            text: self.text.reader().clone(),
            vae: self.vae.config().clone(),
            takes_sizes: self.unet.config().text_time.is_some(),
            scheduler: self.scheduler.clone(),
            native_only: self.native_only,
        }
    }

    /// The latents that [`Generator::generate`] decodes, for tests against
    /// other implementations.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn latents(
        &mut self,
        requests: &[Request],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Latents>, Error> {
        let Some(first) = requests.first() else { return Ok(vec![]) };
        if let Some(other) = requests.iter().find(|r| !r.agrees_with(first)) {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("{first:?} and {other:?} cannot share a batch"),
            ));
        }
        let rules = self.rules();
        requests.iter().try_for_each(|r| rules.check(r))?;
        let size = rules.drawn(first.size);
        memory::check(size, self.vae.config(), self.dtype)?;
        let shape = self.latent_shape(size);
        let [height, width, channels] = shape;
        let warm = [requests.len(), height, width, channels];
        if self.warm.replace(warm) != Some(warm) {
            // Buffers of other shapes are of no use to this request.
            self.device.release_unused();
        }
        stop_if_unwanted(observer, requests.len())?;
        self.adapters.activate(&first.loras, &self.device)?;
        self.text.set_weights(self.adapters.text(), self.adapters.embeddings());
        let started = Instant::now();
        let begun = requests.iter().map(|r| self.begin(r, &rules)).collect::<Result<Vec<_>, _>>();
        let mut drawings = begun.map_err(|e| with_loras(e, first))?;
        observer.stage(Stage::Text, 1, 1, started.elapsed());
        let calls = drawings.iter().map(Drawing::evaluations).max().unwrap_or(0);
        for call in 1..=calls {
            stop_if_unwanted(observer, requests.len())?;
            let started = Instant::now();
            let mut active: Vec<_> = drawings.iter_mut().filter(|d| !d.finished()).collect();
            let outcomes = pass(&self.unet, &self.device, self.dtype, shape, &mut active);
            outcomes.into_iter().collect::<Result<(), _>>().map_err(|e| with_loras(e, first))?;
            observer.stage(Stage::Step, call, calls, started.elapsed());
        }
        let latents = drawings.into_iter().map(Drawing::into_latents);
        Ok(latents.map(|values| Latents { height, width, values }).collect())
    }

    /// Latents of a size: `[height, width, channels]`.
    fn latent_shape(&self, size: Size) -> [usize; 3] {
        let config = self.vae.config();
        [size.height / config.factor(), size.width / config.factor(), config.latent_channels]
    }

    /// Encodes what a request says, and draws its first noise.
    fn begin(&mut self, request: &Request, rules: &Rules) -> Result<Drawing, Error> {
        let sampler = Arc::new(rules.sampler(request)?);
        let size = rules.drawn(request.size);
        let guided = request.guidance_scale > 1.0 && self.unet.config().time_cond_proj_dim.is_none();
        let conditioning = self.condition(request, guided, size)?;
        let guidance = guided.then_some(Guidance {
            scale: request.guidance_scale as f32,
            rescale: request.guidance_rescale as f32,
        });
        let shape = self.latent_shape(size);
        let mut noise = Noise::new(request.seed, shape[2]);
        let mut x = vec![0.0; shape.iter().product()];
        noise.fill(&mut x);
        Ok(Drawing::new(Trajectory::new(sampler, x), conditioning, guidance, noise))
    }

    /// What the UNet is told: the negative side first, then the positive.
    fn condition(&mut self, request: &Request, guided: bool, size: Size) -> Result<Conditioning, Error> {
        let sides = self.text.encode(request, guided)?;
        let negative = sides.negative.map(|side| (side, request.negative_sizes.unwrap_or(request.sizes)));
        let rows: Vec<_> = negative.into_iter().chain([(sides.positive, request.sizes)]).collect();
        let join = |part: fn(&Encoded) -> &Vec<f32>| {
            rows.iter().flat_map(|(side, _)| part(side)).copied().collect::<Vec<f32>>()
        };
        let (hidden, pooled) = (join(|e| &e.hidden), join(|e| &e.pooled));
        let time_ids: Vec<_> = rows.iter().map(|(_, sizes)| sizes.time_ids(size)).collect();
        let width = self.text.width();
        let shape = [rows.len(), rows[0].0.hidden.len() / width, width];
        let text = Tensor::from_f32(&self.device, shape, self.dtype, &hidden);
        let added = self.unet.config().text_time.map(|_| Added { pooled: &pooled, time_ids: &time_ids });
        let guidance = self.unet.config().time_cond_proj_dim.map(|_| request.guidance_scale);
        Ok(self.unet.condition(&text, added.as_ref(), guidance))
    }

    /// Latents to 8-bit RGB, of the size that was drawn.
    ///
    /// # Errors
    /// When the decoder produces what is no number.
    pub fn decode(&self, latents: &Latents) -> Result<Vec<u8>, Error> {
        let config = self.vae.config();
        let mut values = latents.values.clone();
        self.vae.unscale(&mut values);
        let shape = [1, latents.height, latents.width, config.latent_channels];
        let pixels = self.vae.forward(&Tensor::from_f32(&self.device, shape, self.dtype, &values)).to_f32();
        finite(&pixels, "vae")?;
        let byte = |x: f32| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        Ok(pixels.into_iter().map(byte).collect())
    }

    fn warnings(&self, request: &Request) -> Result<Vec<String>, Error> {
        let mut warnings = vec![];
        let negative = request.negative_prompt.as_deref();
        for (name, prompt) in [("prompt", Some(request.prompt.as_str())), ("negative_prompt", negative)] {
            let Some(prompt) = prompt.filter(|_| request.prompt_syntax == PromptSyntax::Plain) else {
                continue;
            };
            if let Some(rest) = self.text.truncated(prompt)? {
                let room = self.text.tokens() - 2;
                warnings.push(format!(
                    "the {name} is longer than the {room} tokens that the model reads; ignored: {rest}"
                ));
            }
        }
        Ok(warnings)
    }
}

impl Rules {
    /// The size that is drawn for a requested one.
    fn drawn(&self, requested: Size) -> Size {
        if self.native_only { self.info.native_size } else { requested }
    }

    fn sampler(&self, request: &Request) -> Result<Sampler, Error> {
        Sampler::new(request.sampler, &self.scheduler, request.steps).map_err(|e| Error {
            kind: ErrorKind::Request,
            param: Some("sampler"),
            message: match request.sampler {
                // The file's own: another may do.
                None if !matches!(e, SamplerError::Steps(_)) => {
                    format!("{e}; name another sampler, such as euler")
                }
                _ => e.to_string(),
            },
        })
    }

    /// Only SDXL is told of sizes.
    fn check_sizes(&self, request: &Request) -> Result<(), Error> {
        let told = request.sizes != SizeConditioning::default() || request.negative_sizes.is_some();
        if !told || self.takes_sizes {
            return Ok(());
        }
        Err(Error {
            kind: ErrorKind::Request,
            param: Some("original_size"),
            message: "original_size, target_size, crop and their negative_ forms are for SDXL: this model takes none"
                .into(),
        })
    }
}

impl Check for Rules {
    fn check(&self, request: &Request) -> Result<(), Error> {
        STEPS.check(request.steps)?;
        self.info.check_guidance(GUIDANCE_SCALE.name, request.guidance_scale)?;
        Size::new(request.size.width, request.size.height)?;
        let factor = self.vae.factor();
        let drawn = self.drawn(request.size);
        if !drawn.width.is_multiple_of(factor) || !drawn.height.is_multiple_of(factor) {
            return Err(Error {
                kind: ErrorKind::Request,
                param: Some("size"),
                message: format!(
                    "Invalid size: {}. This model needs sides divisible by {factor}",
                    request.size
                ),
            });
        }
        GUIDANCE_RESCALE.check(request.guidance_rescale)?;
        self.text.check(request)?;
        self.check_sizes(request)?;
        // Whoever makes a request looks up what its prompt names.
        let found = |tag: &LoraTag| request.loras.iter().any(|lora| lora.name == tag.name);
        if let Some(tag) = request.lora_tags()?.iter().find(|tag| !found(tag)) {
            return Err(Error {
                kind: ErrorKind::Request,
                param: Some("prompt"),
                message: format!(
                    "the LoRA <lora:{}> of the prompt was not looked up: give it as a LoRA",
                    tag.name
                ),
            });
        }
        self.sampler(request)?;
        memory::check_total(drawn, &self.vae, self.dtype)
    }
}

impl Generator for Pipeline {
    fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    fn checker(&self) -> Arc<dyn Check> {
        Arc::new(self.rules())
    }

    fn check_loras(&self, loras: &[Lora]) -> Result<(), Error> {
        self.adapters.check(loras, &self.device)
    }

    fn generate(&mut self, requests: &[Request], observer: &mut dyn Observer) -> Result<Vec<Picture>, Error> {
        let latents = self.latents(requests, observer)?;
        let rules = self.rules();
        let mut pictures = vec![];
        for (i, (request, latents)) in requests.iter().zip(&latents).enumerate() {
            stop_if_unwanted(observer, requests.len())?;
            let started = Instant::now();
            let rgb = enlarge(self.decode(latents)?, rules.drawn(request.size), request.size)?;
            pictures.push(Picture { size: request.size, rgb, warnings: self.warnings(request)? });
            observer.stage(Stage::Decode, i + 1, requests.len(), started.elapsed());
        }
        Ok(pictures)
    }
}

/// Says of numbers that are none which LoRAs were in use: they are the first to
/// be suspected.
fn with_loras(error: Error, request: &Request) -> Error {
    let used = request.loras.iter().filter(|lora| lora.scale != 0.0);
    let used: Vec<String> = used.map(|lora| format!("'{}' at scale {}", lora.name, lora.scale)).collect();
    if error.kind != ErrorKind::Internal || used.is_empty() {
        return error;
    }
    let message = format!(
        "{}; drawn with the LoRA {}, whose weights or scale may be too large: try it without",
        error.message,
        used.join(" and ")
    );
    Error { message, ..error }
}

fn stop_if_unwanted(observer: &mut dyn Observer, requests: usize) -> Result<(), Error> {
    // Asks for every request, so that an observer may count on being asked.
    let unwanted = (0..requests).filter(|&i| observer.cancelled(i)).count();
    if unwanted == requests {
        return Err(Error::new(ErrorKind::Cancelled, "the generation was cancelled"));
    }
    Ok(())
}
