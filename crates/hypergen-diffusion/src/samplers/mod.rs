//! Samplers: from noise to latents, one file per family, over one wrapper of
//! the network.
//!
//! A sampler never sees a UNet, a guidance scale or a prediction type: it
//! sees a `Denoiser`, which turns whatever the network predicts into a clean
//! sample and a noise at a noise level. Latents are flat float32 slices, so
//! that every step is a weighted sum of slices and several pictures can share
//! one loop.
//!
//! Each sampler follows the diffusers class that its line in the table
//! names, field by field; factors are computed in float64 from the
//! schedule as torch rounds it to float32. What a scheduler's file says and
//! no sampler honours is an error, never a silently different picture.

mod beta;
mod config;
mod consistency;
mod ddim;
mod ddpm;
mod deis;
mod denoiser;
mod dpm2;
mod dpm_multistep;
mod dpm_sde;
mod dpm_singlestep;
mod euler;
mod heun;
mod lms;
mod pndm;
mod schedule;
mod spacing;
mod table;
mod unipc;

use thiserror::Error;

use config::Fields;
use denoiser::{Bound, Denoiser, Prediction};

pub use config::read_config;
pub use table::SamplerKind;

/// Why a sampler cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// No sampler of that name.
    #[error("unknown sampler '{0}'")]
    Unknown(String),
    /// The scheduler's file is no JSON.
    #[error("the scheduler's configuration is not JSON: {0}")]
    NotJson(String),
    /// The scheduler's file holds something else than fields.
    #[error("the scheduler's configuration is not a JSON object")]
    NotAnObject,
    /// The file does not say which sampler it is for, and the user named none.
    #[error("the scheduler's configuration has no \"_class_name\"")]
    NoClass,
    /// The file names a class that has no counterpart here.
    #[error("the checkpoint's scheduler {0} is not supported")]
    Class(String),
    /// A field has a value that cannot be honoured.
    #[error("scheduler field \"{field}\" of {class} {problem}, but is {value}")]
    Field {
        /// The diffusers class whose field it is.
        class: &'static str,
        /// Its name.
        field: &'static str,
        /// Its value as JSON, or `absent`.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The number of steps does not suit the model's schedule.
    #[error("{0}")]
    Steps(String),
}

/// A loop that was stopped, or a model that failed: whatever the model's
/// side returns is passed through.
pub type Stop = crate::Error;

/// Fills a slice with unit normal draws.
type Noise<'a> = &'a mut dyn FnMut(&mut [f32]);

/// The network as a sampler's wrapper sees it.
pub trait Model {
    /// The raw output (epsilon, v or sample) for latents `x`, already scaled
    /// to unit variance, at a possibly fractional `timestep`. Guidance is
    /// applied inside.
    ///
    /// # Errors
    /// When the generation is to stop.
    fn predict(&mut self, x: &[f32], timestep: f32) -> Result<Vec<f32>, Stop>;

    /// How many pictures of equal size `x` holds, one after the other: what
    /// looks at a whole picture, as dynamic thresholding does, must not see its
    /// neighbours.
    fn pictures(&self) -> usize;
}

/// What a family's file makes of a scheduler's fields.
struct Built {
    solver: Box<dyn Solver>,
    prediction: Prediction,
    bound: Bound,
}

/// A family's way from noise to clean latents.
trait Solver: Send + Sync {
    /// Times that the network is called.
    fn evaluations(&self) -> usize;

    /// Factor on unit normal noise to make the first latents.
    fn initial_scale(&self) -> f32 {
        1.0
    }

    /// The whole loop.
    fn run(&self, x: &mut Vec<f32>, model: &mut Denoiser<'_>, noise: Noise<'_>) -> Result<(), Stop>;
}

/// A sampler, built for one checkpoint's schedule and a number of steps.
pub struct Sampler {
    kind: SamplerKind,
    built: Built,
}

impl Sampler {
    /// Builds the sampler that `config` (a `scheduler_config.json` as it was
    /// read, see [`read_config`]) names, or `kind` from that file's fields.
    ///
    /// A named sampler keeps every field that the file holds, but for those that
    /// its very name sets (`dpmpp_2m_karras` has Karras sigmas), and takes its own
    /// class's defaults for the rest.
    ///
    /// # Errors
    /// When a field has a value that is not honoured, by its name; when the
    /// file names a class that has no counterpart; when the steps do not fit.
    pub fn new(
        kind: Option<SamplerKind>,
        config: &serde_json::Value,
        steps: usize,
    ) -> Result<Self, SamplerError> {
        let (kind, from_name) = match kind {
            Some(kind) => (kind, true),
            None => (SamplerKind::named_by(config)?, false),
        };
        Ok(Self { kind, built: kind.build(config, steps, from_name)? })
    }

    /// Which sampler it is.
    pub fn kind(&self) -> SamplerKind {
        self.kind
    }

    /// Factor on unit normal noise to make the first latents.
    pub fn initial_scale(&self) -> f32 {
        self.built.solver.initial_scale()
    }

    /// Times that the model is called.
    pub fn evaluations(&self) -> usize {
        self.built.solver.evaluations()
    }

    /// Takes `x` from noise to clean latents. `noise` fills a slice of `x`'s
    /// length with unit normal draws, wherever the sampler needs fresh ones.
    ///
    /// # Errors
    /// When the model stops.
    pub fn run(
        &self,
        x: &mut Vec<f32>,
        model: &mut dyn Model,
        noise: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), Stop> {
        let mut denoiser = Denoiser::new(model, self.built.prediction, self.built.bound);
        self.built.solver.run(x, &mut denoiser, noise)
    }
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("kind", &self.kind).field("evaluations", &self.evaluations()).finish()
    }
}
