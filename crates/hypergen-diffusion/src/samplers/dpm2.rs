//! DPM-Solver-2 as k-diffusion has it (after Karras et al. 2022, arXiv 2206.00364,
//! algorithm 2, with the second evaluation in the logarithmic middle), and its
//! ancestral form: `KDPM2DiscreteScheduler` and `KDPM2AncestralDiscreteScheduler`.

use super::euler::ancestral;
use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{LogSigmas, Plan, Ramp, Spacing, k_diffusion_levels};
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "KDPM2DiscreteScheduler";
pub(super) const ANCESTRAL_CLASS: &str = "KDPM2AncestralDiscreteScheduler";

#[derive(Clone, Copy)]
struct Step {
    from: Level,
    /// Where the network is asked again, if it is.
    middle: Option<Level>,
    /// Sigma to which the slope leads.
    down: f32,
    /// Factor of fresh noise after that.
    up: f32,
}

struct Dpm2 {
    /// A step for each call of the network, and whether the call is in its middle.
    calls: Vec<(Step, bool)>,
    initial_scale: f32,
    ancestral: bool,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    build_either(fields, steps, false)
}

pub(super) fn build_ancestral(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    build_either(fields, steps, true)
}

fn build_either(fields: &Fields, steps: usize, with_noise: bool) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::SECOND_ORDER)?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::epsilon_or_v(fields)?;
    let ramp = Ramp::new(fields)?;
    let levels = k_diffusion_levels(fields, &schedule, &plan, ramp)?;
    let logs = LogSigmas::new(&schedule.sigmas());
    let step = |(pair, &t): (&[f32], &f64)| {
        let (sigma, next) = (pair[0], pair[1]);
        let (down, up) = if with_noise { ancestral(sigma, next) } else { (next, 0.0) };
        // This class rounds the Karras timesteps, but not those in the middle.
        let t = if ramp == Some(Ramp::Karras) { t.round_ties_even() } else { t };
        let middle = (next > 0.0 && down > 0.0).then(|| {
            let (far, near) = (sigma.ln(), down.ln());
            let sigma = (far - (far - near) * 0.5).exp();
            Level::variance_exploding(sigma, logs.timestep(sigma.into()))
        });
        Step { from: Level::variance_exploding(sigma, t), middle, down, up }
    };
    let steps = levels.sigmas.windows(2).zip(&levels.timesteps).map(step);
    let calls = steps.flat_map(|s| std::iter::once((s, false)).chain(s.middle.map(|_| (s, true)))).collect();
    let initial_scale = plan.spacing.initial_scale(&levels.sigmas);
    let solver = Box::new(Dpm2 { calls, initial_scale, ancestral: with_noise });
    Ok(Built { solver, prediction, clamp: SampleClamp::None })
}

impl Solver for Dpm2 {
    fn evaluations(&self) -> usize {
        self.calls.len()
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn level(&self, index: usize) -> &Level {
        let (step, in_middle) = &self.calls[index];
        step.middle.as_ref().filter(|_| *in_middle).unwrap_or(&step.from)
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        let (Step { from, middle, down, up }, in_middle) = self.calls[index];
        let slope = predicted.noise();
        if let Some(middle) = middle.filter(|_| !in_middle) {
            let way = middle.sigma - from.sigma;
            state.probe = Some(combine([(1.0, &state.x), (way.into(), &slope)]));
            return;
        }
        state.x = combine([(1.0, &state.x), ((down - from.sigma).into(), &slope)]);
        if self.ancestral && up > 0.0 {
            let fresh = draw(state.x.len(), noise);
            state.x = combine([(1.0, &state.x), (up.into(), &fresh)]);
        }
    }
}
