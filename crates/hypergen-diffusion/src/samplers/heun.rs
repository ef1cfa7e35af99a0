//! Heun's method over sigmas (Karras et al. 2022, arXiv 2206.00364, algorithm 2
//! without churn), as `HeunDiscreteScheduler`: every step but the last asks the
//! network twice.

use super::denoiser::{Bound, Denoiser, Level, Prediction, combine, zip};
use super::schedule::{BetaDefaults, BetaSchedule, Schedule};
use super::spacing::{Plan, Ramp, Spacing, k_diffusion_levels};
use super::{Built, Fields, Noise, SamplerError, Solver, Stop};

pub(super) const CLASS: &str = "HeunDiscreteScheduler";

struct Heun {
    levels: Vec<Level>,
    initial_scale: f32,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let extra = &[("exp", BetaSchedule::Exponential)];
    let schedule = Schedule::new(fields, &BetaDefaults { extra, ..BetaDefaults::SECOND_ORDER })?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::any(fields)?;
    let bound = Bound::clip(fields, Some(false))?;
    let levels = k_diffusion_levels(fields, &schedule, &plan, Ramp::new(fields)?)?;
    let initial_scale = plan.spacing.initial_scale(&levels.sigmas);
    let solver = Box::new(Heun { levels: levels.growing(), initial_scale });
    Ok(Built { solver, prediction, bound })
}

impl Solver for Heun {
    fn evaluations(&self) -> usize {
        2 * self.levels.len() - 1
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn run(&self, x: &mut Vec<f32>, model: &mut Denoiser<'_>, _: Noise<'_>) -> Result<(), Stop> {
        for (step, level) in self.levels.iter().enumerate() {
            let slope = model.noise(x, level)?;
            let Some(next) = self.levels.get(step + 1) else {
                *x = combine([(1.0, x), ((-level.sigma).into(), &slope)]);
                break;
            };
            let way = next.sigma - level.sigma;
            let there = combine([(1.0, x), (way.into(), &slope)]);
            let slope_there = model.noise(&there, next)?;
            let mean = zip(&slope, &slope_there, |a, b| (a + b) / 2.0);
            *x = combine([(1.0, x), (way.into(), &mean)]);
        }
        Ok(())
    }
}
