//! DPM-Solver and DPM-Solver++ in single steps (Lu et al. 2022, arXiv 2206.00927
//! and 2211.01095), as `DPMSolverSinglestepScheduler`.
//!
//! Every group of steps starts afresh from its own first sample with rising
//! order: what the group's earlier steps found serves as intermediate points only.
//! This class spaces its timesteps evenly whatever the file says.

use super::dpm_multistep::{Algorithm, Weights, clipped_len, heun_type, refuse_flow};
use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{FinalSigma, Plan, Ramp, Rounding, multistep_levels};
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "DPMSolverSinglestepScheduler";

struct DpmSinglestep {
    /// Levels of all steps and of the end.
    levels: Vec<Level>,
    /// Noise over signal at each of them.
    ratios: Vec<f64>,
    /// Order of each step.
    orders: Vec<usize>,
    algorithm: Algorithm,
    heun: bool,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON)?;
    let plan = Plan::evenly(&schedule, steps)?;
    let prediction = Prediction::any(fields)?;
    let clamp = SampleClamp::new(fields, None)?;
    refuse_flow(fields)?;
    let end = FinalSigma::new(fields)?;
    let algorithm = Algorithm::new(fields, end)?;
    if algorithm.stochastic && !algorithm.denoised {
        return Err(fields.error("algorithm_type", "has no single-step form; use sde-dpmsolver++"));
    }
    let order = fields.integer("solver_order", 2, 1..=3)? as usize;
    let ramp = (Ramp::new(fields)?, Rounding::Karras);
    let last_timestep = clipped_len(fields, &schedule)?;
    let levels = multistep_levels(fields, &schedule, &plan, ramp, last_timestep, end)?;
    let lower_final = fields.flag("lower_order_final", false)?;
    let solver = DpmSinglestep {
        levels: levels.variance_preserving(),
        ratios: levels.sigmas.iter().copied().map(f64::from).collect(),
        orders: orders(order, steps, lower_final, end),
        algorithm,
        heun: heun_type(fields)?,
    };
    Ok(Built { solver: Box::new(solver), prediction, clamp })
}

/// Orders of the steps, in groups that rise from first order.
fn orders(order: usize, steps: usize, lower_final: bool, end: FinalSigma) -> Vec<usize> {
    let mut orders: Vec<usize> = (0..steps).map(|i| i % order + 1).collect();
    // Steps that fill no group, and a final sigma of zero, ask for a lower order
    // at the end whether the file does or not.
    let lower_final = lower_final || !steps.is_multiple_of(order) || end == FinalSigma::Zero;
    if lower_final && order > 1 && steps.is_multiple_of(order) {
        // The last group comes to its end early, and one first-order step follows.
        orders[steps - 1] = 1;
    }
    if end == FinalSigma::Zero {
        orders[steps - 1] = 1;
    }
    orders
}

impl Solver for DpmSinglestep {
    fn evaluations(&self) -> usize {
        self.orders.len()
    }

    fn level(&self, index: usize) -> &Level {
        &self.levels[index]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        state.remember(self.algorithm.output(predicted), 3);
        let len = state.x.len();
        let fresh = if self.algorithm.stochastic { draw(len, noise) } else { vec![0.0; len] };
        let order = self.orders[index];
        if order == 1 {
            state.start.clone_from(&state.x);
        }
        // From the group's start to the end of this step.
        let first = index + 1 - order;
        let distance = |i: usize| self.ratios[first].ln() - self.ratios[i].ln();
        let h = distance(index + 1);
        let weights = Weights::new(self.algorithm, &self.levels[first], &self.levels[index + 1], h);
        let sample = (weights.sample, state.start.as_slice());
        let fresh = (weights.noise, fresh.as_slice());
        state.x = match (order, state.outputs.as_slice()) {
            (3, [m0, m1, m2]) => {
                let (r0, r1) = (distance(index) / h, distance(index - 1) / h);
                let [c0, c1] = self.third_order(&weights, r0, r1);
                combine([sample, (weights.output - c0 - c1, m2), (c1, m1), (c0, m0), fresh])
            }
            (2, [m0, m1, ..]) => {
                let slope = if self.heun { weights.slope } else { 0.5 * weights.output };
                let c0 = slope * h / distance(index);
                combine([sample, (weights.output - c0, m1), (c0, m0), fresh])
            }
            (_, outputs) => combine([sample, (weights.output, &outputs[0]), fresh]),
        };
    }
}

impl DpmSinglestep {
    /// Factors of the newest and the second output less the group's first,
    /// which were taken `r0` and `r1` of the way.
    fn third_order(&self, weights: &Weights, r0: f64, r1: f64) -> [f64; 2] {
        if !self.heun {
            return [weights.slope / r0, 0.0];
        }
        let (slope, curve) = (weights.slope / (r0 - r1), 2.0 * weights.curve / (r0 - r1));
        [(curve - slope * r1) / r0, (slope * r0 - curve) / r1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_those_of_the_reference() {
        // DPMSolverSinglestepScheduler.order_list after set_timesteps.
        let zero = |order, steps| orders(order, steps, false, FinalSigma::Zero);
        assert_eq!(zero(2, 6), [1, 2, 1, 2, 1, 1]);
        assert_eq!(zero(2, 5), [1, 2, 1, 2, 1]);
        assert_eq!(zero(3, 6), [1, 2, 3, 1, 2, 1]);
        assert_eq!(zero(3, 7), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(zero(3, 5), [1, 2, 3, 1, 1]);
        assert_eq!(zero(1, 2), [1, 1]);
        assert_eq!(orders(2, 4, false, FinalSigma::Least), [1, 2, 1, 2]);
        assert_eq!(orders(2, 4, true, FinalSigma::Least), [1, 2, 1, 1]);
        assert_eq!(orders(3, 5, false, FinalSigma::Least), [1, 2, 3, 1, 2]);
    }
}
