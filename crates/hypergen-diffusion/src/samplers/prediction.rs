//! What stands between samplers and the network: it turns whatever the network
//! predicts (epsilon, v or the sample) into a denoised sample and a noise.
//!
//! A noise level is a pair (alpha, sigma): latents are `alpha * denoised + sigma *
//! noise`. Samplers that preserve the variance have alpha^2 + sigma^2 = 1; those that
//! let it grow have alpha = 1. No sampler's formula is here.

use super::SamplerError;
use super::config::Fields;

/// How much of the latents is picture and how much is noise, and what the
/// network calls it. In float32, as torch has its scalars.
#[derive(Debug, Clone, Copy)]
pub(super) struct Level {
    /// Alpha squared, from which torch's expressions start.
    pub(super) product: f32,
    pub(super) alpha: f32,
    pub(super) sigma: f32,
    /// Standard deviation of the latents, by which the network's input is divided.
    pub(super) norm: f32,
    pub(super) timestep: f32,
}

impl Level {
    /// A level of a sampler that preserves the variance, from the schedule's product.
    pub(super) fn of_product(alpha_cumprod: f32, timestep: f64) -> Self {
        Self {
            product: alpha_cumprod,
            alpha: alpha_cumprod.sqrt(),
            sigma: (1.0 - alpha_cumprod).sqrt(),
            norm: 1.0,
            timestep: timestep as f32,
        }
    }

    /// A level of a sampler that preserves the variance, from noise over signal.
    pub(super) fn of_ratio(ratio: f32, timestep: f64) -> Self {
        let alpha = 1.0 / (ratio * ratio + 1.0).sqrt();
        let sigma = ratio * alpha;
        Self { product: alpha * alpha, alpha, sigma, norm: 1.0, timestep: timestep as f32 }
    }

    /// A level of a sampler whose latents grow with sigma.
    pub(super) fn variance_exploding(sigma: f32, timestep: f64) -> Self {
        let norm = (sigma * sigma + 1.0).sqrt();
        Self { product: 1.0, alpha: 1.0, sigma, norm, timestep: timestep as f32 }
    }
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity (Salimans and Ho 2022, arXiv 2202.00512).
    V,
    /// The denoised sample.
    Sample,
}

impl Prediction {
    /// For the classes that know all three.
    pub(super) fn any(fields: &Fields) -> Result<Self, SamplerError> {
        let choices = [("epsilon", Self::Epsilon), ("v_prediction", Self::V), ("sample", Self::Sample)];
        fields.choice("prediction_type", Self::Epsilon, &choices)
    }

    /// For the classes that do not take a predicted sample.
    pub(super) fn epsilon_or_v(fields: &Fields) -> Result<Self, SamplerError> {
        let choices = [("epsilon", Self::Epsilon), ("v_prediction", Self::V)];
        fields.choice("prediction_type", Self::Epsilon, &choices)
    }
}

/// What is done to a predicted clean sample. Meant for models of pixels; latents
/// should be left alone, but files exist that say otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum SampleClamp {
    None,
    /// Clamped to a range around zero.
    Clip(f32),
    /// Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487): clamped to
    /// a quantile of the picture's own magnitudes and divided by it.
    Threshold {
        ratio: f64,
        most: f32,
    },
}

impl SampleClamp {
    /// Reads the thresholding fields, and the clipping ones for a class that
    /// has them, with its default.
    pub(super) fn new(fields: &Fields, clip_default: Option<bool>) -> Result<Self, SamplerError> {
        if fields.flag("thresholding", false)? {
            let ratio = fields.number("dynamic_thresholding_ratio", 0.995, 0.0..=1.0)?;
            let most = fields.number("sample_max_value", 1.0, 0.0..=1e6)? as f32;
            return Ok(Self::Threshold { ratio, most });
        }
        Self::clip(fields, clip_default)
    }

    /// Reads the clipping fields alone.
    pub(super) fn clip(fields: &Fields, default: Option<bool>) -> Result<Self, SamplerError> {
        match default {
            Some(default) if fields.flag("clip_sample", default)? => {
                Ok(Self::Clip(fields.number("clip_sample_range", 1.0, 0.0..=1e6)? as f32))
            }
            _ => Ok(Self::None),
        }
    }

    fn apply(self, denoised: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Clip(range) => denoised.iter_mut().for_each(|v| *v = v.clamp(-range, range)),
            Self::Threshold { ratio, most } => {
                let limit = quantile_of_magnitudes(denoised, ratio).max(1.0).min(most);
                denoised.iter_mut().for_each(|v| *v = v.clamp(-limit, limit) / limit);
            }
        }
    }
}

/// `torch.quantile` of the absolute values, with linear interpolation. NaN
/// where there are none or one of them is.
fn quantile_of_magnitudes(values: &[f32], ratio: f64) -> f32 {
    let mut sorted: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let rank = ratio * sorted.len().saturating_sub(1) as f64;
    let low = rank.floor() as usize;
    let (Some(&below), Some(&above)) = (sorted.get(low), sorted.get(rank.ceil() as usize)) else {
        return f32::NAN;
    };
    (f64::from(below) + (f64::from(above) - f64::from(below)) * (rank - low as f64)) as f32
}

/// What the network predicted for latents at a level, ready to be read as
/// whichever quantity a solver's formula is about.
pub(super) struct Predicted<'a> {
    /// The latents that the network was asked about, before scaling.
    pub(super) x: &'a [f32],
    /// What it answered: epsilon, v or the sample.
    pub(super) raw: &'a [f32],
    pub(super) level: Level,
    pub(super) prediction: Prediction,
    pub(super) clamp: SampleClamp,
}

impl Predicted<'_> {
    /// The denoised sample, within bounds.
    pub(super) fn denoised(&self) -> Vec<f32> {
        let Level { alpha, sigma, norm, .. } = self.level;
        let mut denoised = match self.prediction {
            Prediction::Epsilon => zip(self.x, self.raw, |x, noise| (x - sigma * noise) / alpha),
            Prediction::V if norm == 1.0 => zip(self.x, self.raw, |x, v| alpha * x - sigma * v),
            Prediction::V => {
                let (own, other) = (sigma * sigma + 1.0, -sigma / norm);
                zip(self.x, self.raw, |x, v| v * other + x / own)
            }
            Prediction::Sample => self.raw.to_vec(),
        };
        self.clamp.apply(&mut denoised);
        denoised
    }

    /// The noise: what remains when the denoised sample, within bounds, is taken away.
    pub(super) fn noise(&self) -> Vec<f32> {
        let Level { alpha, sigma, norm, .. } = self.level;
        if self.clamp == SampleClamp::None && norm == 1.0 {
            return self.noise_as_predicted();
        }
        // Variance-exploding latents take this way always, because the reference does: from a
        // huge first sigma the rounding of the difference shows in the picture.
        zip(self.x, &self.denoised(), |x, denoised| (x - alpha * denoised) / sigma)
    }

    /// The noise without bounds, at a level that preserves the variance.
    pub(super) fn noise_as_predicted(&self) -> Vec<f32> {
        self.noise_of(self.raw, self.x, &self.level)
    }

    /// The noise that a prediction stands for, at a level that preserves the variance.
    pub(super) fn noise_of(&self, raw: &[f32], x: &[f32], level: &Level) -> Vec<f32> {
        let &Level { alpha, sigma, .. } = level;
        match self.prediction {
            Prediction::Epsilon => raw.to_vec(),
            Prediction::V => zip(x, raw, |x, v| alpha * v + sigma * x),
            Prediction::Sample => zip(x, raw, |x, denoised| (x - alpha * denoised) / sigma),
        }
    }
}

/// Two slices, number by number.
pub(super) fn zip(a: &[f32], b: &[f32], of: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    a.iter().zip(b).map(|(&a, &b)| of(a, b)).collect()
}

/// A sum of slices with factors, term by term in float32 as torch would
/// compute the expression. Nearly every step of every sampler is one of these.
pub(super) fn combine<const N: usize>(terms: [(f64, &[f32]); N]) -> Vec<f32> {
    let Some(&(_, first)) = terms.first() else { return Vec::new() };
    let mut sum = vec![0.0; first.len()];
    for (factor, values) in terms {
        let factor = factor as f32;
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += factor * v);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_at_a_quantile() {
        let mut x = vec![0.5, -4.0, 2.0, 1.0];
        SampleClamp::Threshold { ratio: 1.0, most: 3.0 }.apply(&mut x);
        assert_eq!(x, [0.5 / 3.0, -1.0, 2.0 / 3.0, 1.0 / 3.0]);
    }

    #[test]
    fn quantile_is_interpolated() {
        assert_eq!(quantile_of_magnitudes(&[-3.0, 1.0, 2.0], 0.75), 2.5);
        assert!(quantile_of_magnitudes(&[], 0.5).is_nan());
    }
}
