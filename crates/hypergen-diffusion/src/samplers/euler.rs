//! Euler's method and its ancestral form (Karras et al. 2022, arXiv 2206.00364,
//! as k-diffusion has them), as `EulerDiscreteScheduler` and
//! `EulerAncestralDiscreteScheduler`. The churn of the former is not offered:
//! pipelines never turn it on.

use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, Rescale, Schedule, torch_linspace};
use super::spacing::{FinalSigma, Levels, LogSigmas, Plan, Ramp, Spacing, interpolate, k_diffusion_levels};
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "EulerDiscreteScheduler";
pub(super) const ANCESTRAL_CLASS: &str = "EulerAncestralDiscreteScheduler";

struct Euler {
    /// Where the network is asked.
    levels: Vec<Level>,
    /// Sigmas of the levels and of the end.
    sigmas: Vec<f32>,
    initial_scale: f32,
    ancestral: bool,
}

impl Euler {
    fn new(levels: Levels, spacing: Spacing, ancestral: bool) -> Self {
        let initial_scale = spacing.initial_scale(&levels.sigmas);
        Self { levels: levels.variance_exploding(), sigmas: levels.sigmas, initial_scale, ancestral }
    }
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON.with_rescale(Rescale::ToTiny))?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let choices = [
        ("epsilon", Prediction::Epsilon),
        ("v_prediction", Prediction::V),
        ("sample", Prediction::Sample),
        ("original_sample", Prediction::Sample),
    ];
    let prediction = fields.choice("prediction_type", Prediction::Epsilon, &choices)?;
    let levels = euler_levels(fields, &schedule, &plan, prediction)?;
    let solver = Box::new(Euler::new(levels, plan.spacing, false));
    Ok(Built { solver, prediction, clamp: SampleClamp::None })
}

pub(super) fn build_ancestral(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON.with_rescale(Rescale::ToTiny))?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::epsilon_or_v(fields)?;
    let levels = k_diffusion_levels(fields, &schedule, &plan, None)?;
    let solver = Box::new(Euler::new(levels, plan.spacing, true));
    Ok(Built { solver, prediction, clamp: SampleClamp::None })
}

/// The levels of the class with the most fields of all.
fn euler_levels(
    fields: &Fields,
    schedule: &Schedule,
    plan: &Plan,
    prediction: Prediction,
) -> Result<Levels, SamplerError> {
    let table = schedule.sigmas();
    let log_linear =
        fields.choice("interpolation_type", false, &[("linear", false), ("log_linear", true)])?;
    let types = [("discrete", false), ("continuous", true)];
    let continuous = fields.without_null("timestep_type").choice("timestep_type", false, &types)?;
    let mut timesteps = plan.timesteps();
    let mut sigmas: Vec<f64> = match table.as_slice() {
        [least, .., most] if log_linear => {
            // diffusers spreads one sigma more than there are steps, and
            // appends the final one after it, so that the run ends at the least.
            let logs = torch_linspace(most.ln(), least.ln(), plan.steps + 1);
            logs.into_iter().map(|l| f64::from(l.exp())).collect()
        }
        _ => timesteps.iter().map(|&t| interpolate(&table, f64::from(t as f32))).collect(),
    };
    if let Some(ramp) = Ramp::new(fields)?
        && let [most, .., least] | [most @ least] = sigmas.as_slice()
    {
        sigmas = ramp.sigmas(fields, *most, *least, plan.steps)?;
        timesteps = LogSigmas::new(&table).timesteps(&sigmas);
    }
    if continuous && prediction == Prediction::V {
        timesteps = sigmas.iter().map(|s| 0.25 * s.ln()).collect();
    }
    let last = match FinalSigma::new(fields)? {
        FinalSigma::Zero => 0.0,
        FinalSigma::Least | FinalSigma::Last => table.first().copied().map_or(f64::NAN, f64::from),
    };
    sigmas.push(last);
    Levels::new(timesteps, sigmas)
}

impl Solver for Euler {
    fn evaluations(&self) -> usize {
        self.levels.len()
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn level(&self, index: usize) -> &Level {
        &self.levels[index]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        let slope = predicted.noise();
        let (sigma, next) = (predicted.level.sigma, self.sigmas[index + 1]);
        state.x = if self.ancestral {
            let (down, up) = ancestral(sigma, next);
            let fresh = draw(state.x.len(), noise);
            combine([(1.0, &state.x), ((down - sigma).into(), &slope), (up.into(), &fresh)])
        } else {
            combine([(1.0, &state.x), ((next - sigma).into(), &slope)])
        };
    }
}

/// Splits the way to the next sigma: how far to go down, and how much fresh
/// noise to add after, so that the variances sum to the next sigma's.
pub(super) fn ancestral(sigma: f32, next: f32) -> (f32, f32) {
    let (variance, next_variance) = (sigma * sigma, next * next);
    let up = (next_variance * (variance - next_variance) / variance).sqrt();
    // From a huge sigma rounding can take more than there is; the reference
    // ends in NaN there.
    ((next_variance - up * up).max(0.0).sqrt(), up)
}
