//! DEIS (Zhang and Chen 2022, arXiv 2204.13902) over past steps, with its
//! polynomials in the logarithm of noise over signal, as `DEISMultistepScheduler`.
//!
//! The reference never goes to zero noise: it ends at the least sigma of training.

use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine, zip};
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{FinalSigma, Plan, Ramp, Rounding, Spacing, multistep_levels};
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "DEISMultistepScheduler";

struct Deis {
    /// Levels of all steps and of the end.
    levels: Vec<Level>,
    order: usize,
    lower_order_final: bool,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON)?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::any(fields)?;
    let clamp = SampleClamp::new(fields, None)?;
    for field in ["use_flow_sigmas", "use_dynamic_shifting"] {
        fields.must_be_off(field)?;
    }
    // Other solvers' words, which a file may hold, are taken for this one's.
    fields.choice("algorithm_type", (), &[("deis", ()), ("dpmsolver", ()), ("dpmsolver++", ())])?;
    let types = [("logrho", ()), ("midpoint", ()), ("heun", ()), ("bh1", ()), ("bh2", ())];
    fields.choice("solver_type", (), &types)?;
    let ramp = (Ramp::new(fields)?, Rounding::Karras);
    let levels = multistep_levels(fields, &schedule, &plan, ramp, schedule.len(), FinalSigma::Last)?;
    let solver = Deis {
        levels: levels.variance_preserving(),
        order: fields.integer("solver_order", 2, 1..=3)? as usize,
        lower_order_final: fields.flag("lower_order_final", true)?,
    };
    Ok(Built { solver: Box::new(solver), prediction, clamp })
}

impl Deis {
    fn order_at(&self, step: usize) -> usize {
        let left = self.evaluations() - step;
        let order = self.order.min(step + 1);
        if self.lower_order_final && self.evaluations() < 15 { order.min(left) } else { order }
    }
}

impl Solver for Deis {
    fn evaluations(&self) -> usize {
        self.levels.len() - 1
    }

    fn level(&self, index: usize) -> &Level {
        &self.levels[index]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, _: Noise<'_>) {
        let (from, to) = (&self.levels[index], &self.levels[index + 1]);
        // By way of the denoised sample, as the reference goes: with the steepest
        // schedules the rounding on that way is magnified by thousands.
        let denoised = predicted.denoised();
        state.remember(zip(&state.x, &denoised, |x, denoised| (x - from.alpha * denoised) / from.sigma), 3);
        // Noise over signal, back from this step.
        let rho = |level: &Level| level.sigma / level.alpha;
        let past = |back: usize| rho(&self.levels[index - back]);
        let end = rho(to);
        if end == past(0) {
            return;
        }
        let factor = |value: f32| f64::from(to.alpha * value);
        let scale = f64::from(to.alpha / from.alpha);
        let x = &state.x;
        state.x = match (self.order_at(index).min(state.outputs.len()), state.outputs.as_slice()) {
            (3, [m0, m1, m2]) => {
                let [c0, c1, c2] = third_order(end, [past(0), past(1), past(2)]).map(factor);
                combine([(scale, x), (c0, m0), (c1, m1), (c2, m2)])
            }
            (2, [m0, m1, ..]) => {
                let [c0, c1] = second_order(end, [past(0), past(1)]).map(factor);
                combine([(scale, x), (c0, m0), (c1, m1)])
            }
            (_, outputs) => {
                let lambda = |level: &Level| level.alpha.ln() - level.sigma.ln();
                let way = to.sigma * ((lambda(to) - lambda(from)).exp() - 1.0);
                combine([(scale, x), (f64::from(-way), &outputs[0])])
            }
        };
    }
}

/// Integrals of Lagrange's polynomials in ln(rho) over rho, from the first node to
/// `end`. In float32, as in the reference: these are differences of nearly equal
/// numbers, and how they are rounded is most of what they are.
fn second_order(end: f32, [b, c]: [f32; 2]) -> [f32; 2] {
    let integral = |own: f32, other: f32| {
        let upto = |t: f32| t * (-other.ln() + t.ln() - 1.0) / (own.ln() - other.ln());
        upto(end) - upto(b)
    };
    [integral(b, c), integral(c, b)]
}

/// The same through three nodes.
fn third_order(end: f32, [b, c, d]: [f32; 3]) -> [f32; 3] {
    let integral = |own: f32, first: f32, second: f32| {
        let (own, f, s) = (own.ln(), first.ln(), second.ln());
        // The antiderivative of (ln t - f)(ln t - s).
        let upto = |t: f32| {
            let l = t.ln();
            t * (f * (s - l + 1.0) - s * l + s + l * l - 2.0 * l + 2.0) / ((own - f) * (own - s))
        };
        upto(end) - upto(b)
    };
    [integral(b, c, d), integral(c, d, b), integral(d, b, c)]
}
