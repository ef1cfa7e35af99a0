//! PNDM (Liu et al. 2022, arXiv 2202.09778) as `PNDMScheduler`: a linear
//! multistep method over the network's raw predictions.
//!
//! With `skip_prk_steps`, as published checkpoints have it, the second timestep is
//! visited twice, so that the network is called once more than there are steps;
//! without it, three Runge-Kutta steps of four calls each come first.
//!
//! The multistep weights act on what the network predicts, be it epsilon or v,
//! and the sum is turned into a noise afterwards. So this solver does not
//! see denoised samples, and has no bounds to honour.

use super::ddim::{Table, check_signal};
use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine, zip};
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{Plan, Spacing};
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "PNDMScheduler";

/// What one call of the network is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// One of the four slopes of a Runge-Kutta step.
    RungeKutta(usize),
    /// The first multistep call, whose sample is kept.
    First,
    /// The second, which does the first step again with both slopes.
    Again,
    /// Any other.
    Multistep,
}

struct Call {
    role: Role,
    /// What the network is told.
    seen: Level,
    from: Level,
    to: Level,
}

struct Pndm {
    calls: Vec<Call>,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON)?;
    let plan = Plan::new(fields, &schedule, Spacing::Leading, steps)?;
    let prediction = Prediction::epsilon_or_v(fields)?;
    let table = Table::new(&schedule, fields.flag("set_alpha_to_one", false)?);
    let timesteps = plan.table_timesteps()?;
    let stride = plan.train_steps / steps;
    let calls = if fields.flag("skip_prk_steps", false)? {
        multistep_calls(&table, &timesteps, stride)
    } else if steps < 4 {
        return Err(SamplerError::Steps(format!(
            "pndm with \"skip_prk_steps\": false needs at least 4 steps, not {steps}"
        )));
    } else {
        let mut calls = runge_kutta_calls(&table, &timesteps, stride / 2);
        calls.extend(timesteps.iter().skip(3).map(|&t| Call {
            role: Role::Multistep,
            seen: table.level(t),
            from: table.level(t),
            to: table.level_before(t, stride),
        }));
        calls
    };
    let most = plan.train_steps as f32;
    if calls.iter().any(|c| c.seen.timestep.max(c.from.timestep) >= most) {
        return Err(SamplerError::Steps(format!(
            "{steps} steps of pndm reach beyond the {most} timesteps that the model was trained on; ask for \
             another number of steps"
        )));
    }
    for call in &calls {
        check_signal(fields, prediction, &call.from)?;
    }
    Ok(Built { solver: Box::new(Pndm { calls }), prediction, clamp: SampleClamp::None })
}

fn multistep_calls(table: &Table<'_>, timesteps: &[usize], stride: usize) -> Vec<Call> {
    let mut calls = Vec::with_capacity(timesteps.len() + 1);
    for (index, &t) in timesteps.iter().enumerate() {
        let level = table.level(t);
        if index == 1 {
            let from = table.level(t + stride);
            calls.push(Call { role: Role::Again, seen: level, from, to: level });
        }
        let role = if index == 0 { Role::First } else { Role::Multistep };
        calls.push(Call { role, seen: level, from: level, to: table.level_before(t, stride) });
    }
    calls
}

fn runge_kutta_calls(table: &Table<'_>, timesteps: &[usize], half: usize) -> Vec<Call> {
    // Three steps between the four noisiest timesteps; slopes at the start,
    // twice at the middle and at the end.
    let mut calls = Vec::with_capacity(12);
    for pair in timesteps.windows(2).take(3) {
        let (start, middle, end) = (pair[0], pair[1] + half, pair[1]);
        for (stage, t) in [start, middle, middle, end].into_iter().enumerate() {
            // The first and third slopes carry half a stride on, counted from
            // where they were taken, the others arrive where they are.
            let to = if stage % 2 == 0 { table.level_before(t, half) } else { table.level(t) };
            let seen = table.level(t);
            calls.push(Call { role: Role::RungeKutta(stage), seen, from: table.level(start), to });
        }
    }
    calls
}

impl Solver for Pndm {
    fn evaluations(&self) -> usize {
        self.calls.len()
    }

    fn level(&self, index: usize) -> &Level {
        &self.calls[index].seen
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, _: Noise<'_>) {
        let call = &self.calls[index];
        let raw = predicted.raw;
        if matches!(call.role, Role::RungeKutta(0) | Role::First) {
            state.start.clone_from(&state.x);
        }
        let combined = match call.role {
            Role::RungeKutta(0) => {
                state.kept = combine([(1.0 / 6.0, raw)]);
                state.remember(raw.to_vec(), ORDER);
                raw.to_vec()
            }
            Role::RungeKutta(3) => combine([(1.0, &state.kept), (1.0 / 6.0, raw)]),
            Role::RungeKutta(_) => {
                state.kept = combine([(1.0, &state.kept), (1.0 / 3.0, raw)]);
                raw.to_vec()
            }
            Role::First => {
                state.remember(raw.to_vec(), ORDER);
                raw.to_vec()
            }
            Role::Again => match state.outputs.first() {
                Some(slope) => combine([(0.5, raw), (0.5, slope)]),
                None => raw.to_vec(),
            },
            Role::Multistep => {
                state.remember(raw.to_vec(), ORDER);
                adams_bashforth(&state.outputs)
            }
        };
        let base = if call.role == Role::Multistep { &state.x } else { &state.start };
        state.x = transfer(predicted, base, &combined, call);
    }
}

/// Slopes that the multistep method looks back to.
const ORDER: usize = 4;

/// The Adams-Bashforth sum of as many slopes as there are, newest first.
fn adams_bashforth(slopes: &[Vec<f32>]) -> Vec<f32> {
    match slopes {
        [a, b, c, d] => combine([(55.0 / 24.0, a), (-59.0 / 24.0, b), (37.0 / 24.0, c), (-9.0 / 24.0, d)]),
        [a, b, c] => combine([(23.0 / 12.0, a), (-16.0 / 12.0, b), (5.0 / 12.0, c)]),
        [a, b] => combine([(1.5, a), (-0.5, b)]),
        [a, ..] => a.clone(),
        [] => Vec::new(),
    }
}

/// Moves latents from one level to another along one noise: equation 11 of the paper.
///
/// In the reference's order of operations: with the steepest schedules a single
/// step magnifies by thousands, rounding included.
fn transfer(predicted: &Predicted<'_>, x: &[f32], combined: &[f32], call: &Call) -> Vec<f32> {
    let noise = predicted.noise_of(combined, x, &call.from);
    let (from, to) = (call.from.product, call.to.product);
    let own = (to / from).sqrt();
    let divisor = from * (1.0 - to).sqrt() + (from * (1.0 - from) * to).sqrt();
    zip(x, &noise, |x, noise| own * x - (to - from) * noise / divisor)
}
