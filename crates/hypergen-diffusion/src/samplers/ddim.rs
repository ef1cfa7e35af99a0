//! DDIM (Song et al. 2021, arXiv 2010.02502), without added noise, as
//! `DDIMScheduler`. Its stochastic form (eta above zero) is not offered.

use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, Rescale, Schedule};
use super::spacing::{Plan, Spacing};
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "DDIMScheduler";

pub(super) struct Ddim {
    /// From where to where each step goes.
    pub(super) steps: Vec<(Level, Level)>,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON.with_rescale(Rescale::ToZero))?;
    let plan = Plan::new(fields, &schedule, Spacing::Leading, steps)?;
    let prediction = Prediction::any(fields)?;
    let clamp = SampleClamp::new(fields, Some(true))?;
    let table = Table::new(&schedule, fields.flag("set_alpha_to_one", true)?);
    let stride = plan.train_steps / steps;
    let steps: Vec<_> = plan
        .table_timesteps()?
        .into_iter()
        .map(|t| (table.level(t), table.level_before(t, stride)))
        .collect();
    for (from, _) in &steps {
        check_signal(fields, prediction, from)?;
    }
    Ok(Built { solver: Box::new(Ddim { steps }), prediction, clamp })
}

/// Refuses to look for a denoised sample where a predicted noise says nothing about it.
pub(super) fn check_signal(
    fields: &Fields,
    prediction: Prediction,
    level: &Level,
) -> Result<(), SamplerError> {
    if prediction == Prediction::Epsilon && level.alpha == 0.0 {
        let problem = "cannot start from pure noise (zero terminal SNR); a model of this kind predicts v";
        return Err(fields.error("prediction_type", problem));
    }
    Ok(())
}

/// Levels by whole train timestep.
pub(super) struct Table<'a> {
    schedule: &'a Schedule,
    /// Product of alpha behind the first train timestep.
    end: f32,
}

impl<'a> Table<'a> {
    pub(super) fn new(schedule: &'a Schedule, set_alpha_to_one: bool) -> Self {
        let first = schedule.alphas_cumprod.first().copied().unwrap_or(1.0);
        Self { schedule, end: if set_alpha_to_one { 1.0 } else { first } }
    }

    /// The level of a timestep; of the last where the table ends before it.
    pub(super) fn level(&self, timestep: usize) -> Level {
        let at = timestep.min(self.schedule.len() - 1);
        Level::of_product(self.schedule.alphas_cumprod[at], timestep as f64)
    }

    /// The level `stride` timesteps nearer to the clean sample, or the end.
    pub(super) fn level_before(&self, timestep: usize, stride: usize) -> Level {
        timestep.checked_sub(stride).map_or_else(|| Level::of_product(self.end, 0.0), |t| self.level(t))
    }
}

impl Solver for Ddim {
    fn evaluations(&self) -> usize {
        self.steps.len()
    }

    fn level(&self, index: usize) -> &Level {
        &self.steps[index].0
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, _: Noise<'_>) {
        let to = &self.steps[index].1;
        let (denoised, noise) = (predicted.denoised(), predicted.noise_as_predicted());
        state.x = combine([(to.alpha.into(), &denoised), (to.sigma.into(), &noise)]);
    }
}
