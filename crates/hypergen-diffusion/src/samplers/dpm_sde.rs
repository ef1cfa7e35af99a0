//! DPM-Solver++ as a stochastic differential equation in single steps, as
//! k-diffusion's `sample_dpmpp_sde` and `DPMSolverSDEScheduler` have it.
//!
//! The reference draws its noise from a Brownian tree of the torchsde library, from
//! a seed of its own: no two of its runs are equal, and there is nothing that could
//! be equalled. Here the same process is drawn from the picture's own
//! generator. A step needs the path's increments from its start to its middle
//! and from its start to its end; both are made of two independent draws, which is
//! the tree's distribution exactly. Everything else equals the reference.

use super::euler::ancestral;
use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine, zip};
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{LogSigmas, Plan, Ramp, Spacing, k_diffusion_levels};
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "DPMSolverSDEScheduler";

#[derive(Clone, Copy)]
struct Step {
    from: Level,
    /// The middle and the sigma of the end; none for the last step, to zero.
    rest: Option<(Level, f32)>,
}

struct DpmSde {
    /// A step for each call of the network, and whether the call is in its middle.
    calls: Vec<(Step, bool)>,
    initial_scale: f32,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::SECOND_ORDER)?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::epsilon_or_v(fields)?;
    fields.must_be_off("noise_sampler_seed")?;
    let ramp = Ramp::new(fields)?;
    let levels = k_diffusion_levels(&limits(fields, ramp), &schedule, &plan, ramp)?;
    let logs = LogSigmas::new(&schedule.sigmas());
    let step = |(pair, &t): (&[f32], &f64)| {
        let (sigma, next) = (pair[0], pair[1]);
        let rest = (next > 0.0).then(|| {
            let (near, far) = (-sigma.ln(), -next.ln());
            let middle = (-(near + (far - near) * 0.5)).exp();
            (Level::variance_exploding(middle, logs.timestep(middle.into())), next)
        });
        Step { from: Level::variance_exploding(sigma, t), rest }
    };
    let steps = levels.sigmas.windows(2).zip(&levels.timesteps).map(step);
    let calls = steps.flat_map(|s| std::iter::once((s, false)).chain(s.rest.map(|_| (s, true)))).collect();
    let initial_scale = plan.spacing.initial_scale(&levels.sigmas);
    Ok(Built { solver: Box::new(DpmSde { calls, initial_scale }), prediction, clamp: SampleClamp::None })
}

/// The fields as this class and LMS read them: their Karras ramp, unlike the
/// others, does not look for limits of sigma.
pub(super) fn limits(fields: &Fields, ramp: Option<Ramp>) -> Fields {
    if ramp == Some(Ramp::Karras) { fields.without(&["sigma_min", "sigma_max"]) } else { fields.clone() }
}

impl Solver for DpmSde {
    fn evaluations(&self) -> usize {
        self.calls.len()
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn level(&self, index: usize) -> &Level {
        match &self.calls[index] {
            (Step { rest: Some((middle, _)), .. }, true) => middle,
            (step, _) => &step.from,
        }
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        let (Step { from, rest }, in_middle) = self.calls[index];
        let denoised = predicted.denoised();
        let Some((middle, next)) = rest else {
            // Straight to the denoised sample, as a step of Euler's.
            let slope = zip(&state.x, &denoised, |x, denoised| (x - denoised) / from.sigma);
            state.x = combine([(1.0, &state.x), ((-from.sigma).into(), &slope)]);
            return;
        };
        let fresh = draw(state.x.len(), noise);
        if !in_middle {
            state.probe = Some(ancestral_step(&state.x, &denoised, from.sigma, middle.sigma, &fresh));
            state.kept = fresh;
            return;
        }
        // The path's increment over the whole step, in unit variance.
        let whole = f64::from(from.sigma - next);
        let (half, rest) = (f64::from(from.sigma - middle.sigma), f64::from(middle.sigma - next));
        let noise = combine([((half / whole).sqrt(), &state.kept), ((rest / whole).sqrt(), &fresh)]);
        state.x = ancestral_step(&state.x, &denoised, from.sigma, next, &noise);
    }
}

/// Goes towards a denoised sample as far as the ancestral split says, and adds noise.
fn ancestral_step(x: &[f32], denoised: &[f32], from: f32, to: f32, noise: &[f32]) -> Vec<f32> {
    let (down, up) = ancestral(from, to);
    let kept = f64::from(down / from);
    combine([(kept, x), (1.0 - kept, denoised), (up.min(to).into(), noise)])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Sampler, Trajectory};
    use super::*;

    /// A Brownian path's increment over a whole step has unit variance in its own
    /// measure, and shares with the one over the first half what the half has of the whole.
    #[test]
    fn increments_are_those_of_a_brownian_path() {
        let config = serde_json::json!({"beta_schedule": "scaled_linear"});
        let kind = "dpmpp_sde".parse().ok();
        let sampler = Arc::new(Sampler::new(kind, &config, 4).unwrap());
        // With the denoised sample equal to the latents, the final latents are linear in
        // the draws. The response to each draw alone gives their whole law.
        let response = |which: usize| {
            let mut drawn = 0;
            let mut draw = |noise: &mut [f32]| {
                noise.fill(if drawn == which { 1.0 } else { 0.0 });
                drawn += 1;
            };
            // The network predicts no noise, so that latents move by what is drawn alone.
            let mut way = Trajectory::new(Arc::clone(&sampler), vec![0.0]);
            while way.query().is_some() {
                way.advance(vec![0.0], &mut draw);
            }
            (f64::from(way.latents()[0]), drawn)
        };
        let (_, draws) = response(usize::MAX);
        assert_eq!(draws, 6, "two for each step but the last");
        // What a step leaves of noise in latents that it keeps is `up` of the whole step.
        let variance: f64 = (0..draws).map(|i| response(i).0.powi(2)).sum();
        let fields = Fields::new(CLASS, &config, &[]).unwrap();
        let schedule = Schedule::new(&fields, &BetaDefaults::SECOND_ORDER).unwrap();
        let plan = Plan::new(&fields, &schedule, Spacing::Linspace, 4).unwrap();
        let sigmas = k_diffusion_levels(&fields, &schedule, &plan, None).unwrap().sigmas;
        let ups = sigmas.windows(2).map(|p| f64::from(ancestral(p[0], p[1]).1));
        // The denoised sample of the second evaluation carries the middle's noise too.
        let mut expected = 0.0;
        for (pair, up) in sigmas.windows(2).zip(ups).filter(|(p, _)| p[1] > 0.0) {
            let (from, to) = (f64::from(pair[0]), f64::from(pair[1]));
            let middle = (from * to).sqrt();
            let kept = f64::from(ancestral(pair[0], pair[1]).0) / from;
            let way = f64::from(ancestral(pair[0], middle as f32).1) * (1.0 - kept);
            let shared = ((from - middle) / (from - to)).sqrt();
            expected += up * up + way * way + 2.0 * up * way * shared;
        }
        assert!((variance / expected - 1.0).abs() < 1e-4, "{variance} for {expected}");
    }
}
