//! Heun's method over sigmas (Karras et al. 2022, arXiv 2206.00364, algorithm 2
//! without churn), as `HeunDiscreteScheduler`: every step but the last asks the
//! network twice.

use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine, zip};
use super::schedule::{BetaDefaults, BetaSchedule, Schedule};
use super::spacing::{Plan, Ramp, Spacing, k_diffusion_levels};
use super::{Built, Fields, Noise, SamplerError, Solver, State};

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
    let clamp = SampleClamp::clip(fields, Some(false))?;
    let levels = k_diffusion_levels(fields, &schedule, &plan, Ramp::new(fields)?)?;
    let initial_scale = plan.spacing.initial_scale(&levels.sigmas);
    let solver = Box::new(Heun { levels: levels.variance_exploding(), initial_scale });
    Ok(Built { solver, prediction, clamp })
}

impl Solver for Heun {
    fn evaluations(&self) -> usize {
        2 * self.levels.len() - 1
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn level(&self, index: usize) -> &Level {
        // Every step but the last asks at its start and at its end.
        &self.levels[index.div_ceil(2)]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, _: Noise<'_>) {
        let slope = predicted.noise();
        let level = &self.levels[index / 2];
        let Some(next) = self.levels.get(index / 2 + 1) else {
            state.x = combine([(1.0, &state.x), ((-level.sigma).into(), &slope)]);
            return;
        };
        let way = f64::from(next.sigma - level.sigma);
        match state.outputs.pop() {
            None => {
                state.probe = Some(combine([(1.0, &state.x), (way, &slope)]));
                state.outputs.push(slope);
            }
            Some(first) => {
                let mean = zip(&first, &slope, |a, b| (a + b) / 2.0);
                state.x = combine([(1.0, &state.x), (way, &mean)]);
            }
        }
    }
}
