//! A loaded model that draws: text, denoising steps, decoding.

use std::sync::Arc;
use std::time::Instant;

use hypergen_tensor::{DType, Device, Tensor, TorchGenerator};

use crate::conditioning::{Encoded, PromptReader, TextConditioner};
use crate::enlarge::enlarge;
use crate::finite::finite;
use crate::lora::{Adapters, Lora};
use crate::memory;
use crate::models::unet::{Added, Conditioning, UNet};
use crate::models::vae::{Decoder, VaeConfig};
use crate::prompt::LoraTag;
use crate::prompt::PromptSyntax;
use crate::samplers::{self, Sampler, SamplerError};
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
        let sampler = rules.sampler(first)?;
        let size = rules.drawn(first.size);
        memory::check(size, self.vae.config(), self.dtype)?;
        let factor = self.vae.config().factor();
        let shape =
            [requests.len(), size.height / factor, size.width / factor, self.vae.config().latent_channels];

        if self.warm.replace(shape) != Some(shape) {
            // Buffers of other shapes are of no use to this request.
            self.device.release_unused();
        }
        stop_if_unwanted(observer, requests.len())?;
        self.adapters.activate(&first.loras, &self.device)?;
        self.text.set_weights(self.adapters.text(), self.adapters.embeddings());
        let started = Instant::now();
        let guided = first.guidance_scale > 1.0 && self.unet.config().time_cond_proj_dim.is_none();
        let conditioning = self.condition(requests, guided, size).map_err(|e| with_loras(e, first))?;
        observer.stage(Stage::Text, 1, 1, started.elapsed());

        let mut generators: Vec<_> = requests.iter().map(|r| TorchGenerator::new(r.seed)).collect();
        let mut noise = |out: &mut [f32]| fill_noise(&mut generators, shape, out);
        let mut x = vec![0.0; shape.iter().product()];
        noise(&mut x);
        let scale = sampler.initial_scale();
        x.iter_mut().for_each(|x| *x *= scale);
        let mut network = Network {
            unet: &self.unet,
            device: &self.device,
            dtype: self.dtype,
            conditioning,
            guidance: guided.then_some((first.guidance_scale as f32, first.guidance_rescale as f32)),
            shape,
            observer,
            done: 0,
            evaluations: sampler.evaluations(),
        };
        sampler
            .run(&mut x, &mut network, &mut noise)
            .and_then(|()| finite(&x, "sampler after its last step"))
            .map_err(|e| with_loras(e, first))?;
        let [_, height, width, _] = shape;
        let len = x.len() / requests.len();
        Ok(x.chunks_exact(len).map(|values| Latents { height, width, values: values.to_vec() }).collect())
    }

    /// What the UNet is told: all negative sides first, then all positive.
    fn condition(&mut self, requests: &[Request], guided: bool, size: Size) -> Result<Conditioning, Error> {
        let (mut rows, mut positive, mut time_ids) = (vec![], vec![], vec![]);
        for r in requests {
            let sides = self.text.encode(r, guided)?;
            positive.push(sides.positive);
            if let Some(negative) = sides.negative {
                rows.push(negative);
                time_ids.push(r.negative_sizes.unwrap_or(r.sizes).time_ids(size));
            }
        }
        rows.extend(positive);
        time_ids.extend(requests.iter().map(|r| r.sizes.time_ids(size)));
        let join = |part: fn(&Encoded) -> &Vec<f32>| {
            rows.iter().flat_map(|e| part(e)).copied().collect::<Vec<f32>>()
        };
        let (hidden, pooled) = (join(|e| &e.hidden), join(|e| &e.pooled));
        let width = self.text.width();
        let shape = [rows.len(), rows[0].hidden.len() / width, width];
        let text = Tensor::from_f32(&self.device, shape, self.dtype, &hidden);
        let added = self.unet.config().text_time.map(|_| Added { pooled: &pooled, time_ids: &time_ids });
        let guidance = self.unet.config().time_cond_proj_dim.map(|_| requests[0].guidance_scale);
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

/// The UNet with guidance, as a sampler sees it.
struct Network<'a> {
    unet: &'a UNet,
    device: &'a Device,
    dtype: DType,
    conditioning: Conditioning,
    /// Guidance scale and guidance rescale.
    guidance: Option<(f32, f32)>,
    shape: [usize; 4],
    observer: &'a mut dyn Observer,
    done: usize,
    evaluations: usize,
}

impl samplers::Model for Network<'_> {
    fn predict(&mut self, x: &[f32], timestep: f32) -> Result<Vec<f32>, Error> {
        stop_if_unwanted(self.observer, self.shape[0])?;
        if self.done > 0 {
            finite(x, &format!("sampler after step {}", self.done))?;
        }
        let started = Instant::now();
        let mut shape = self.shape;
        let mut out = match self.guidance {
            None => self.forward(x, shape, timestep),
            Some((scale, rescale)) => {
                shape[0] *= 2;
                let mut both = self.forward(&[x, x].concat(), shape, timestep);
                let (guided, positive) = both.split_at_mut(x.len());
                for (n, p) in guided.iter_mut().zip(&*positive) {
                    *n += scale * (*p - *n);
                }
                if rescale > 0.0 {
                    let picture = x.len() / self.shape[0];
                    for (g, p) in guided.chunks_exact_mut(picture).zip(positive.chunks_exact(picture)) {
                        rescale_guidance(g, p, rescale);
                    }
                }
                both.truncate(x.len());
                both
            }
        };
        out.truncate(x.len());
        self.done += 1;
        finite(&out, &format!("unet at step {}", self.done))?;
        self.observer.stage(Stage::Step, self.done, self.evaluations, started.elapsed());
        Ok(out)
    }

    fn pictures(&self) -> usize {
        self.shape[0]
    }
}

impl Network<'_> {
    fn forward(&self, x: &[f32], shape: [usize; 4], timestep: f32) -> Vec<f32> {
        let latents = Tensor::from_f32(self.device, shape, self.dtype, x);
        self.unet.forward(&latents, timestep, &self.conditioning).to_f32()
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

/// Mixes a guided prediction with itself at the spread of the positive one:
/// what guidance adds in contrast, this takes back (Lin et al. 2023,
/// <https://arxiv.org/abs/2305.08891>, section 3.4).
fn rescale_guidance(guided: &mut [f32], positive: &[f32], rescale: f32) {
    let factor = (deviation(positive) / deviation(guided)) as f32;
    for g in guided {
        *g = rescale * (*g * factor) + (1.0 - rescale) * *g;
    }
}

/// Standard deviation of a sample.
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    (square / (n - 1.0)).sqrt()
}

/// Unit normals for a batch: each request draws from its own generator, in
/// PyTorch's order of dimensions (channels first).
fn fill_noise(generators: &mut [TorchGenerator], [_, h, w, c]: [usize; 4], out: &mut [f32]) {
    let mut planes = vec![0.0; h * w * c];
    for (generator, out) in generators.iter_mut().zip(out.chunks_exact_mut(h * w * c)) {
        generator.fill_normal(&mut planes);
        for (channel, plane) in planes.chunks_exact(h * w).enumerate() {
            for (pixel, &value) in plane.iter().enumerate() {
                out[pixel * c + channel] = value;
            }
        }
    }
}
