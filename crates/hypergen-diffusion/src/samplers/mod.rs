//! Samplers: from noise to latents, one file each, over `denoise(x, level)`.
//!
//! A sampler never sees a UNet, a guidance scale or a prediction type: it
//! sees a [`Denoiser`], which turns whatever the network predicts into a clean
//! sample and a noise. Latents are flat float32 slices, so that a sampler is
//! plain arithmetic and several pictures can share one loop.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The table of samplers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// DDIM (Song et al. 2021, arXiv 2010.02502).
    Ddim,
}

impl SamplerKind {
    /// All samplers, in the order in which they are listed to users.
    pub const ALL: &[SamplerKind] = &[SamplerKind::Ddim];

    /// The name that users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
        }
    }

    /// What it is good for, in one line for people who choose.
    pub fn about(self) -> &'static str {
        match self {
            Self::Ddim => "Denoising diffusion implicit models: deterministic, good from 20 steps",
        }
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SamplerKind {
    type Err = SamplerError;

    fn from_str(text: &str) -> Result<Self, SamplerError> {
        Self::ALL
            .iter()
            .copied()
            .find(|s| s.name() == text)
            .ok_or_else(|| SamplerError::Unknown(text.to_owned()))
    }
}

/// Why a sampler cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// No sampler of that name.
    #[error("unknown sampler '{0}'")]
    Unknown(String),
}

/// A loop that was stopped, or a model that failed: whatever the model's
/// side returns is passed through.
pub type Stop = crate::Error;

/// The network as a sampler's wrapper sees it.
pub trait Model {
    /// The raw output (epsilon, v or sample) for latents `x`, already scaled
    /// to unit variance, at a possibly fractional `timestep`. Guidance is
    /// applied inside.
    ///
    /// # Errors
    /// When the generation is to stop.
    fn predict(&mut self, x: &[f32], timestep: f32) -> Result<Vec<f32>, Stop>;
}

/// A sampler, built for one checkpoint's schedule and a number of steps.
pub struct Sampler {}

impl Sampler {
    /// Builds the sampler that `config` (a `scheduler_config.json` as it was
    /// read) names, or `kind` from that file's fields.
    ///
    /// # Errors
    /// When a field has a value that is not honoured, by its name.
    pub fn new(
        kind: Option<SamplerKind>,
        config: &serde_json::Value,
        steps: usize,
    ) -> Result<Self, SamplerError> {
        let _ = (kind, config, steps);
        Ok(Self {})
    }

    /// Factor on unit normal noise to make the first latents.
    pub fn initial_scale(&self) -> f32 {
        1.0
    }

    /// Times that the model is called.
    pub fn evaluations(&self) -> usize {
        0
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
        let _ = (x, model, noise);
        Ok(())
    }
}
