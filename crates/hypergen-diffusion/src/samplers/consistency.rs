//! Samplers of distilled models, which go to the denoised sample at each step and back to
//! less noise: latent consistency models (Luo et al. 2023, arXiv 2310.04378) as
//! `LCMScheduler`, and trajectory consistency distillation (Zheng et al. 2024, arXiv
//! 2402.19159) as `TCDScheduler`.
//!
//! The latter has a share of randomness (eta, gamma in the paper). Pipelines pass zero
//! unless they are told otherwise, and zero it is here: no fresh noise.

use super::ddim::{Ddim, Table, check_signal};
use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, BetaSchedule, Rescale, Schedule};
use super::spacing::check_steps;
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const LCM_CLASS: &str = "LCMScheduler";
pub(super) const TCD_CLASS: &str = "TCDScheduler";

const DEFAULTS: BetaDefaults = BetaDefaults {
    schedule: BetaSchedule::ScaledLinear,
    rescale: Rescale::ToZero,
    ..BetaDefaults::SECOND_ORDER
};

/// Standard deviation of the data in the boundary condition.
const SIGMA_DATA: f64 = 0.5;

struct Lcm {
    /// A level and its factors of the denoised sample and the sample.
    steps: Vec<(Level, f64, f64)>,
}

pub(super) fn build_lcm(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &DEFAULTS)?;
    let prediction = Prediction::any(fields)?;
    let clamp = SampleClamp::new(fields, Some(false))?;
    let scaling = fields.number("timestep_scaling", 10.0, 0.0..=1e6)?;
    let table = Table::new(&schedule, true);
    let mut levels = Vec::with_capacity(steps);
    for t in timesteps(fields, &schedule, steps)? {
        let level = table.level(t);
        check_signal(fields, prediction, &level)?;
        let scaled = t as f64 * scaling;
        let norm = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        levels.push((level, scaled / norm.sqrt(), SIGMA_DATA * SIGMA_DATA / norm));
    }
    Ok(Built { solver: Box::new(Lcm { steps: levels }), prediction, clamp })
}

pub(super) fn build_tcd(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &DEFAULTS)?;
    let prediction = Prediction::any(fields)?;
    let table = Table::new(&schedule, true);
    let timesteps = timesteps(fields, &schedule, steps)?;
    let mut levels = Vec::with_capacity(steps);
    for (index, &t) in timesteps.iter().enumerate() {
        let from = table.level(t);
        check_signal(fields, prediction, &from)?;
        let to = timesteps.get(index + 1).copied().unwrap_or(0);
        levels.push((from, table.level(to)));
    }
    // This class has fields for bounds, but its step does not look at them.
    // Without noise of its own a step is DDIM's.
    Ok(Built { solver: Box::new(Ddim { steps: levels }), prediction, clamp: SampleClamp::None })
}

/// Picks from the timesteps of the distillation, evenly and from the noisy end. The
/// fields of spacing have no say in it.
fn timesteps(fields: &Fields, schedule: &Schedule, steps: usize) -> Result<Vec<usize>, SamplerError> {
    check_steps(steps, schedule.len())?;
    let original = fields.integer("original_inference_steps", 50, 1..=schedule.len() as i64)? as usize;
    // The default may be too many, too, for a model of few train timesteps.
    if original > schedule.len() {
        let problem =
            format!("is {original} by default, but the model was trained on {} timesteps", schedule.len());
        return Err(fields.error("original_inference_steps", problem));
    }
    if steps > original {
        let problem = format!("allows {original} steps at most, not {steps}");
        return Err(fields.error("original_inference_steps", problem));
    }
    let stride = schedule.len() / original;
    let pick = |i: usize| (i as f64 * (original as f64 / steps as f64)).floor() as usize;
    Ok((0..steps).map(|i| (original - pick(i)) * stride - 1).collect())
}

impl Solver for Lcm {
    fn evaluations(&self) -> usize {
        self.steps.len()
    }

    fn level(&self, index: usize) -> &Level {
        &self.steps[index].0
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        let (_, out, skip) = self.steps[index];
        state.x = combine([(out, &predicted.denoised()), (skip, &state.x)]);
        if let Some((next, ..)) = self.steps.get(index + 1) {
            let fresh = draw(state.x.len(), noise);
            state.x = combine([(next.alpha.into(), &state.x), (next.sigma.into(), &fresh)]);
        }
    }
}
