//! Linear multistep method over sigmas (as k-diffusion's `sample_lms`): the
//! slope is the polynomial through the last four, integrated over the step.
//! `LMSDiscreteScheduler`.

use super::dpm_sde::limits;
use super::prediction::{Level, Predicted, Prediction, SampleClamp, zip};
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{Plan, Ramp, Spacing, k_diffusion_levels};
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "LMSDiscreteScheduler";

/// Slopes that are looked back to.
const ORDER: usize = 4;

struct Lms {
    levels: Vec<Level>,
    /// Factors of the slopes at each step, newest first.
    weights: Vec<Vec<f32>>,
    initial_scale: f32,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON)?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::any(fields)?;
    let ramp = Ramp::new(fields)?;
    let levels = k_diffusion_levels(&limits(fields, ramp), &schedule, &plan, ramp)?;
    let sigmas: Vec<f64> = levels.sigmas.iter().copied().map(f64::from).collect();
    let solver = Lms {
        levels: levels.variance_exploding(),
        weights: (1..sigmas.len()).map(|end| weights(&sigmas[end.saturating_sub(ORDER)..=end])).collect(),
        initial_scale: plan.spacing.initial_scale(&levels.sigmas),
    };
    Ok(Built { solver: Box::new(solver), prediction, clamp: SampleClamp::None })
}

/// Integrals of Lagrange's polynomials on all nodes but the last, from the last
/// but one to the last. For the newest node first.
fn weights(nodes: &[f64]) -> Vec<f32> {
    let [past @ .., end] = nodes else { return Vec::new() };
    let Some(start) = past.last() else { return Vec::new() };
    let (middle, half) = (0.5 * (start + end), 0.5 * (end - start));
    // Gauss's two points integrate third degrees exactly.
    let points = [middle - half / 3f64.sqrt(), middle + half / 3f64.sqrt()];
    let basis = |own: usize, at: f64| -> f64 {
        let others = past.iter().enumerate().filter(|(i, _)| *i != own);
        others.map(|(_, other)| (at - other) / (past[own] - other)).product()
    };
    (0..past.len()).rev().map(|i| (points.map(|p| basis(i, p)).iter().sum::<f64>() * half) as f32).collect()
}

impl Solver for Lms {
    fn evaluations(&self) -> usize {
        self.levels.len()
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn level(&self, index: usize) -> &Level {
        &self.levels[index]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, _: Noise<'_>) {
        state.remember(predicted.noise(), ORDER);
        let mut sum = vec![0.0; state.x.len()];
        for (weight, slope) in self.weights[index].iter().zip(&state.outputs) {
            sum = zip(&sum, slope, |sum, slope| sum + weight * slope);
        }
        state.x = zip(&state.x, &sum, |x, sum| x + sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_order_is_the_way_itself() {
        assert_eq!(weights(&[3.0, 2.0]), [-1.0]);
        assert!(weights(&[1.0]).is_empty() && weights(&[]).is_empty());
    }

    #[test]
    fn integrates_cubics_exactly() {
        // Slopes t^3 at 4, 3, 2.5, 1 integrate to t^4 / 4 from 1 to 0.
        let nodes = [4.0, 3.0, 2.5, 1.0, 0.0];
        let sum: f32 = weights(&nodes).iter().zip([1f32, 2.5, 3.0, 4.0]).map(|(w, t)| w * t.powi(3)).sum();
        assert!((sum + 0.25).abs() < 1e-5, "{sum}");
    }
}
