//! UniPC (Zhao et al. 2023, arXiv 2302.04867), a multistep predictor with a
//! corrector that costs no call of the network, as `UniPCMultistepScheduler`.
//!
//! Its flow-matching fields and a foreign predictor (`solver_p`) are refused.

use super::prediction::{Level, Predicted, Prediction, SampleClamp, zip};
use super::schedule::{BetaDefaults, Rescale, Schedule};
use super::spacing::{FinalSigma, Plan, Ramp, Rounding, Spacing, multistep_levels};
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "UniPCMultistepScheduler";

/// Highest order that is offered.
const ORDER: usize = 3;

struct UniPc {
    /// Levels of all steps and of the end.
    levels: Vec<Level>,
    /// Noise over signal at each of them.
    ratios: Vec<f64>,
    /// Order of each step.
    orders: Vec<usize>,
    /// Whether the sample at the start of a step is corrected.
    corrected: Vec<bool>,
    /// Solves for the denoised sample, or for the noise.
    denoised: bool,
    /// The first of the paper's two choices of B(h).
    first_kind: bool,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON.with_rescale(Rescale::ToTiny))?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::any(fields)?;
    for field in ["use_flow_sigmas", "use_dynamic_shifting", "shift_terminal", "solver_p"] {
        fields.must_be_off(field)?;
    }
    let denoised = fields.flag("predict_x0", true)?;
    let clamp = if denoised { SampleClamp::new(fields, None)? } else { SampleClamp::None };
    let order = fields.integer("solver_order", 2, 1..=ORDER as i64)? as usize;
    // Other solvers' types are taken for the second kind.
    let choices = [("bh1", true), ("bh2", false), ("midpoint", false), ("heun", false), ("logrho", false)];
    let first_kind = fields.choice("solver_type", false, &choices)?;
    let lower_final = fields.flag("lower_order_final", true)?;
    let end = FinalSigma::new(fields)?;
    if end == FinalSigma::Zero && !denoised {
        let problem = "needs \"final_sigmas_type\": \"sigma_min\", as it divides by the final sigma";
        return Err(fields.error("predict_x0", problem));
    }
    if end == FinalSigma::Zero && !lower_final && order > 1 {
        let problem = "needs \"final_sigmas_type\": \"sigma_min\": zero is reached in first order only";
        return Err(fields.error("lower_order_final", problem));
    }
    let end = if end == FinalSigma::Least { FinalSigma::Last } else { end };
    let ramp = (Ramp::new(fields)?, Rounding::Karras);
    let levels = multistep_levels(fields, &schedule, &plan, ramp, schedule.len(), end)?;
    let count = levels.timesteps.len();
    let left = |step: usize| if lower_final { count - step } else { order };
    let disabled = fields.integers("disable_corrector")?;
    let solver = UniPc {
        orders: (0..count).map(|step| order.min(left(step)).min(step + 1)).collect(),
        corrected: (0..count).map(|step| step > 0 && !disabled.contains(&(step as i64 - 1))).collect(),
        levels: levels.variance_preserving(),
        ratios: levels.sigmas.iter().copied().map(f64::from).collect(),
        denoised,
        first_kind,
    };
    Ok(Built { solver: Box::new(solver), prediction, clamp })
}

impl Solver for UniPc {
    fn evaluations(&self) -> usize {
        self.orders.len()
    }

    fn level(&self, index: usize) -> &Level {
        &self.levels[index]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, _: Noise<'_>) {
        let output = if self.denoised { predicted.denoised() } else { predicted.noise() };
        if self.corrected[index] && !state.outputs.is_empty() {
            let order = self.orders[index - 1].min(state.outputs.len());
            state.x = self.step(index - 1, order, &state.start, &state.outputs, Some(&output));
        }
        state.remember(output, ORDER);
        let order = self.orders[index].min(state.outputs.len());
        let next = self.step(index, order, &state.x, &state.outputs, None);
        state.start = std::mem::replace(&mut state.x, next);
    }
}

impl UniPc {
    /// Takes one step from `x`: a prediction, or with the output found
    /// at its end a correction.
    fn step(
        &self,
        step: usize,
        order: usize,
        x: &[f32],
        outputs: &[Vec<f32>],
        found: Option<&[f32]>,
    ) -> Vec<f32> {
        let lambda = |i: usize| -self.ratios[i].ln();
        let h = lambda(step + 1) - lambda(step);
        let Some(newest) = outputs.first().filter(|_| h != 0.0) else { return x.to_vec() };
        let (from, to) = (&self.levels[step], &self.levels[step + 1]);
        let (ratio, unit, signed) = if self.denoised {
            (to.sigma / from.sigma, to.alpha, -h)
        } else {
            (to.alpha / from.alpha, to.sigma, h)
        };
        // Where the older outputs lie, in units of this step and from its start.
        let past: Vec<f64> = (1..order).map(|back| (lambda(step - back) - lambda(step)) / h).collect();
        let scale = if self.first_kind { signed } else { signed.exp_m1() };
        let rhos = rhos(&past, signed, scale, found.is_some());
        let own = f64::from(unit) * signed.exp_m1();
        let unit = f64::from(unit) * scale;
        let mut next = zip(x, newest, |x, m| ratio * x - own as f32 * m);
        let older = outputs.iter().skip(1).zip(&past).map(|(output, at)| (output.as_slice(), *at));
        for ((output, at), rho) in older.chain(found.map(|output| (output, 1.0))).zip(rhos) {
            let factor = (unit * rho / at) as f32;
            let difference = zip(output, newest, |a, b| a - b);
            next = zip(&next, &difference, |next, d| next - factor * d);
        }
        next
    }
}

/// Factors of the differences to older outputs at `past`, and to the one at
/// the step's end for a correction: equation 9 of the paper.
fn rhos(past: &[f64], signed: f64, scale: f64, correction: bool) -> Vec<f64> {
    let mut nodes = past.to_vec();
    if correction {
        nodes.push(1.0);
    }
    // The lowest orders have their factor given, not solved for.
    if nodes.len() == 1 {
        return vec![0.5];
    }
    let mut rows = Vec::with_capacity(nodes.len());
    let (mut phi, mut factorial) = (signed.exp_m1() / signed - 1.0, 1.0);
    for power in 0..nodes.len() {
        let mut row: Vec<f64> = nodes.iter().map(|node| node.powi(power as i32)).collect();
        row.push(phi * factorial / scale);
        rows.push(row);
        factorial *= (power + 2) as f64;
        phi = phi / signed - 1.0 / factorial;
    }
    solve(rows)
}

/// Solves a small linear system, the right-hand side last in each row, by elimination
/// with the largest pivot.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for column in 0..n {
        let largest = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, largest.unwrap_or(column));
        let pivot = rows[column].clone();
        for (index, row) in rows.iter_mut().enumerate() {
            if index != column {
                let factor = row[column] / pivot[column];
                row.iter_mut().zip(&pivot).for_each(|(v, p)| *v -= factor * p);
            }
        }
    }
    rows.iter().enumerate().map(|(i, row)| row[n] / row[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_a_system() {
        let found =
            solve(vec![vec![0.0, 2.0, 1.0, 7.0], vec![1.0, 1.0, 1.0, 6.0], vec![2.0, 0.0, 3.0, 11.0]]);
        for (found, expected) in found.iter().zip([1.0, 2.0, 3.0]) {
            assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
        }
    }
}
