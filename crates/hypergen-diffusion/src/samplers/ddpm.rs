//! DDPM (Ho et al. 2020, arXiv 2006.11239) over a subset of the train timesteps, as
//! `DDPMScheduler`: the ancestral chain that a model was trained for. Learned
//! variances need a network with twice the outputs and are refused.

use super::ddim::{Table, check_signal};
use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, BetaSchedule, Rescale, Schedule};
use super::spacing::{Plan, Spacing};
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "DDPMScheduler";

/// How much noise a step adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variance {
    Small,
    /// As the former, but through a logarithm that is taken back.
    SmallLog,
    Large,
}

struct Step {
    from: Level,
    /// Factors of the denoised sample, the sample and fresh noise, if any is drawn.
    denoised: f32,
    sample: f32,
    noise: Option<f32>,
}

struct Ddpm {
    steps: Vec<Step>,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let extra = &[("laplace", BetaSchedule::Laplace), ("sigmoid", BetaSchedule::Sigmoid)];
    let defaults = BetaDefaults { extra, ..BetaDefaults::COMMON.with_rescale(Rescale::ToZero) };
    let schedule = Schedule::new(fields, &defaults)?;
    let plan = Plan::new(fields, &schedule, Spacing::Leading, steps)?;
    let prediction = Prediction::any(fields)?;
    let clamp = SampleClamp::new(fields, Some(true))?;
    let choices = [
        ("fixed_small", Variance::Small),
        ("fixed_small_log", Variance::SmallLog),
        ("fixed_large", Variance::Large),
    ];
    // As files for other classes have it; this class then takes the small one.
    let variance = fields.without_null("variance_type").choice("variance_type", Variance::Small, &choices)?;
    let table = Table::new(&schedule, true);
    let timesteps = plan.table_timesteps()?;
    let mut steps = Vec::with_capacity(timesteps.len());
    for (index, &t) in timesteps.iter().enumerate() {
        let from = table.level(t);
        check_signal(fields, prediction, &from)?;
        let to = timesteps.get(index + 1).map_or(1.0, |&t| table.level(t).product);
        steps.push(step(from, to, variance, t > 0));
    }
    Ok(Built { solver: Box::new(Ddpm { steps }), prediction, clamp })
}

/// Equation 7 of the paper, and the variance of its choice.
fn step(from: Level, to: f32, variance: Variance, with_noise: bool) -> Step {
    let alpha = from.product / to;
    let beta = 1.0 - alpha;
    let rest = 1.0 - from.product;
    let small = ((1.0 - to) / rest * beta).max(1e-20);
    let deviation = match variance {
        Variance::Small => small.sqrt(),
        Variance::SmallLog => (0.5 * small.ln()).exp(),
        Variance::Large => beta.sqrt(),
    };
    Step {
        from,
        denoised: to.sqrt() * beta / rest,
        sample: alpha.sqrt() * (1.0 - to) / rest,
        noise: with_noise.then_some(deviation),
    }
}

impl Solver for Ddpm {
    fn evaluations(&self) -> usize {
        self.steps.len()
    }

    fn level(&self, index: usize) -> &Level {
        &self.steps[index].from
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        let step = &self.steps[index];
        state.x = combine([(step.denoised.into(), &predicted.denoised()), (step.sample.into(), &state.x)]);
        if let Some(deviation) = step.noise {
            let fresh = draw(state.x.len(), noise);
            state.x = combine([(1.0, &state.x), (deviation.into(), &fresh)]);
        }
    }
}
