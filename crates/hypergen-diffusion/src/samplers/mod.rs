//! Samplers: from noise to latents, one file per family, over one reading of
//! what the network predicts.
//!
//! A sampler never sees a UNet, a guidance scale or a prediction type: it says
//! at which noise level it wants a prediction, and is handed `Predicted`, which
//! turns whatever the network said into a denoised sample and a noise. A
//! [`Trajectory`] is one picture's way through a sampler; the pipeline owns the
//! loop over the trajectories that share a forward pass. Latents are flat
//! float32 slices, so that every step is a weighted sum of slices.
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
mod dpm2;
mod dpm_multistep;
mod dpm_sde;
mod dpm_singlestep;
mod euler;
mod heun;
mod lms;
mod pndm;
mod prediction;
mod schedule;
mod spacing;
mod table;
mod trajectory;
mod unipc;

use thiserror::Error;

use config::Fields;
use prediction::{Level, Predicted, Prediction, SampleClamp};
use trajectory::State;

pub use config::read_config;
pub use table::SamplerKind;
pub use trajectory::{NoiseLevel, Query, StepView, Trajectory};

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

/// Fills a slice with unit normal draws.
type Noise<'a> = &'a mut dyn FnMut(&mut [f32]);

/// What a family's file makes of a scheduler's fields.
struct Built {
    solver: Box<dyn Solver>,
    prediction: Prediction,
    clamp: SampleClamp,
}

/// A family's way from noise to the clean sample latents: which levels it asks the network at,
/// and what it does with each answer. It holds nothing of a picture; that is [`State`].
trait Solver: Send + Sync {
    /// Times that the network is called.
    fn evaluations(&self) -> usize;

    /// The level that the network is asked at in the call `index`.
    fn level(&self, index: usize) -> &Level;

    /// Factor on unit normal noise to make the first latents.
    fn initial_scale(&self) -> f32 {
        1.0
    }

    /// Takes the answer to the call `index` into `state`: moves the latents, or
    /// sets the probe at which the network is asked next.
    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>);
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
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("kind", &self.kind).field("evaluations", &self.evaluations()).finish()
    }
}
