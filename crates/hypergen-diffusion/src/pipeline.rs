//! A loaded model that draws: text, denoising steps, decoding.

use std::sync::Arc;
use std::time::Instant;

use hypergen_tensor::{DType, Device, Tensor};

use crate::conditioning::{Encoded, PromptReader, TextConditioner};
use crate::denoising::{self, Drawing, Guidance, Noise};
use crate::enlarge::enlarge;
use crate::finite::finite;
use crate::lora::{Adapters, Lora};
use crate::memory;
use crate::models::unet::{Added, Conditioning, UNet};
use crate::models::vae::{Decoder, VaeConfig};
use crate::prompt::LoraTag;
use crate::prompt::PromptSyntax;
use crate::samplers::{Sampler, SamplerError, Trajectory};
use crate::session::Fixed;
use crate::{
    Check, Error, ErrorKind, GUIDANCE_RESCALE, GUIDANCE_SCALE, Generator, ModelInfo, Observer, Picture,
    Progress, Request, RequestId, STEPS, Session, Size, SizeConditioning, Stage,
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
    /// Latents of the pass that memory was last laid out for, `[rows, h, w, channels]`.
    pub(crate) last_latent_shape: Option<[usize; 4]>,
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
        let mut session = Fixed::new(requests, observer)?;
        let mut all = vec![None; requests.len()];
        self.denoise(&mut session, &mut |_, _, done| {
            let index = done.id as usize;
            all[index] = Some(done.into_latents());
        });
        session.end()?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Denoises what a session asks for, and hands over each request that reached its
    /// end. Each turn of the loop is one forward pass over all that are being drawn.
    fn denoise(
        &mut self,
        session: &mut dyn Session,
        finish: &mut dyn FnMut(&Self, &mut dyn Session, Active),
    ) {
        let rules = self.rules();
        let mut active: Vec<Active> = vec![];
        loop {
            self.join(session, &rules, &mut active);
            active.retain(|one| !session.cancelled(one.id));
            if active.is_empty() {
                return;
            }
            self.pass(session, &mut active);
            for done in active.extract_if(.., |one| one.drawing.finished()) {
                finish(self, session, done);
            }
        }
    }

    /// Begins what the session has and may be drawn beside the others.
    fn join(&mut self, session: &mut dyn Session, rules: &Rules, active: &mut Vec<Active>) {
        let started = Instant::now();
        let mut joined = vec![];
        while let Some((id, request)) = session.next() {
            if session.cancelled(id) {
                continue;
            }
            match self.begin(&request, rules, active.first()) {
                Ok((shape, drawing)) => {
                    joined.push(Progress { id, done: 1, count: 1 });
                    active.push(Active { id, request, shape, drawing });
                }
                Err(error) => session.finish(id, Err(error)),
            }
        }
        if !joined.is_empty() {
            session.stage(Stage::Text, &joined, started.elapsed());
        }
    }

    /// One forward pass; whoever fails in it is told and dropped.
    fn pass(&mut self, session: &mut dyn Session, active: &mut Vec<Active>) {
        let shape = active[0].shape;
        let rows = active.iter().map(|one| one.drawing.rows()).sum();
        let laid_out = Some([rows, shape[0], shape[1], shape[2]]);
        if std::mem::replace(&mut self.last_latent_shape, laid_out) != laid_out {
            // Buffers of other shapes are of no use to this pass.
            self.device.release_unused();
        }
        let started = Instant::now();
        let mut drawings: Vec<_> = active.iter_mut().map(|one| &mut one.drawing).collect();
        let outcomes = denoising::pass(&self.unet, &self.device, self.dtype, shape, &mut drawings);
        let progress: Vec<_> = active.iter().map(Active::progress).collect();
        session.stage(Stage::Step, &progress, started.elapsed());
        let mut outcomes = outcomes.into_iter();
        active.retain(|one| match outcomes.next() {
            Some(Err(error)) => {
                session.finish(one.id, Err(with_loras(error, &one.request)));
                false
            }
            _ => true,
        });
    }

    /// Encodes what a request says, and draws its first noise. `beside` is one of those
    /// that are being drawn.
    fn begin(
        &mut self,
        request: &Request,
        rules: &Rules,
        beside: Option<&Active>,
    ) -> Result<([usize; 3], Drawing), Error> {
        rules.check(request)?;
        let size = rules.drawn(request.size);
        memory::check(size, self.vae.config(), self.dtype)?;
        match beside {
            Some(beside) if !request.can_batch_with(&beside.request) => {
                let message = format!("{request:?} and {:?} cannot share a batch", beside.request);
                return Err(Error::new(ErrorKind::Internal, message));
            }
            Some(_) => {}
            None => {
                self.adapters.activate(&request.loras, &self.device)?;
                self.text.set_weights(self.adapters.text(), self.adapters.embeddings());
            }
        }
        let shape = self.latent_shape(size);
        let drawing = self.drawing(request, rules, shape).map_err(|e| with_loras(e, request))?;
        Ok((shape, drawing))
    }

    /// Latents of a size: `[height, width, channels]`.
    fn latent_shape(&self, size: Size) -> [usize; 3] {
        let config = self.vae.config();
        [size.height / config.factor(), size.width / config.factor(), config.latent_channels]
    }

    fn drawing(&mut self, request: &Request, rules: &Rules, shape: [usize; 3]) -> Result<Drawing, Error> {
        let sampler = Arc::new(rules.sampler(request)?);
        let guided = request.guidance_scale > 1.0 && self.unet.config().time_cond_proj_dim.is_none();
        let conditioning = self.condition(request, guided, rules.drawn(request.size))?;
        let guidance = guided.then_some(Guidance {
            scale: request.guidance_scale as f32,
            rescale: request.guidance_rescale as f32,
        });
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
    /// When the decoder produces values that are not finite.
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

    fn picture(&self, done: Active) -> Result<Picture, Error> {
        let request = done.request.clone();
        let latents = done.into_latents();
        let factor = self.vae.config().factor();
        let drawn = Size { width: latents.width * factor, height: latents.height * factor };
        let rgb = enlarge(self.decode(&latents)?, drawn, request.size)?;
        Ok(Picture { size: request.size, rgb, warnings: self.warnings(&request)? })
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

    fn draw(&mut self, session: &mut dyn Session) {
        self.denoise(session, &mut |model, session, done| {
            if session.cancelled(done.id) {
                return;
            }
            let started = Instant::now();
            let id = done.id;
            let outcome = model.picture(done);
            session.stage(Stage::Decode, &[Progress { id, done: 1, count: 1 }], started.elapsed());
            session.finish(id, outcome);
        });
    }
}

/// A request that is being drawn.
struct Active {
    id: RequestId,
    request: Request,
    /// Of its latents: `[height, width, channels]`.
    shape: [usize; 3],
    drawing: Drawing,
}

impl Active {
    fn progress(&self) -> Progress {
        Progress { id: self.id, done: self.drawing.done(), count: self.drawing.evaluations() }
    }

    fn into_latents(self) -> Latents {
        let [height, width, _] = self.shape;
        Latents { height, width, values: self.drawing.into_latents() }
    }
}

/// Says of values that are not finite which LoRAs were in use: they are the first to
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
