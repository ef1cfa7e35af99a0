//! DPM-Solver++ as a stochastic differential equation in single steps, as
//! k-diffusion's `sample_dpmpp_sde` and `DPMSolverSDEScheduler` have it.
//!
//! The reference draws its noise from a Brownian tree of the torchsde library, from
//! a seed of its own: no two of its runs are equal, and there is nothing that could
//! be equalled. Here the same process is drawn from the picture's own
//! generator. A step needs the path's increments from its start to its middle
//! and from its start to its end; both are made of two independent draws, which is
//! the tree's distribution exactly. Everything else equals the reference.

use super::denoiser::{Bound, Denoiser, Level, Prediction, combine, zip};
use super::euler::ancestral;
use super::schedule::{BetaDefaults, Schedule};
use super::spacing::{LogSigmas, Plan, Ramp, Spacing, k_diffusion_levels};
use super::{Built, Fields, Noise, SamplerError, Solver, Stop};

pub(super) const CLASS: &str = "DPMSolverSDEScheduler";

struct Step {
    from: Level,
    /// The middle and the sigma of the end; none for the last step, to zero.
    rest: Option<(Level, f32)>,
}

struct DpmSde {
    steps: Vec<Step>,
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
            (Level::growing(middle, logs.timestep(middle.into())), next)
        });
        Step { from: Level::growing(sigma, t), rest }
    };
    let steps = levels.sigmas.windows(2).zip(&levels.timesteps).map(step).collect();
    let initial_scale = plan.spacing.initial_scale(&levels.sigmas);
    Ok(Built { solver: Box::new(DpmSde { steps, initial_scale }), prediction, bound: Bound::None })
}

/// The fields as this class and LMS read them: their Karras ramp, unlike the
/// others, does not look for limits of sigma.
pub(super) fn limits(fields: &Fields, ramp: Option<Ramp>) -> Fields {
    if ramp == Some(Ramp::Karras) { fields.without(&["sigma_min", "sigma_max"]) } else { fields.clone() }
}

impl Solver for DpmSde {
    fn evaluations(&self) -> usize {
        self.steps.iter().map(|s| 1 + usize::from(s.rest.is_some())).sum()
    }

    fn initial_scale(&self) -> f32 {
        self.initial_scale
    }

    fn run(&self, x: &mut Vec<f32>, model: &mut Denoiser<'_>, draw: Noise<'_>) -> Result<(), Stop> {
        let mut first = vec![0.0; x.len()];
        let mut second = vec![0.0; x.len()];
        for Step { from, rest } in &self.steps {
            let clean = model.clean(x, from)?;
            let Some((middle, next)) = rest else {
                // Straight to the clean sample, as a step of Euler's.
                let slope = zip(x, &clean, |x, clean| (x - clean) / from.sigma);
                *x = combine([(1.0, x), ((-from.sigma).into(), &slope)]);
                continue;
            };
            draw(&mut first);
            draw(&mut second);
            let there = advance(x, &clean, from.sigma, middle.sigma, &first);
            let clean = model.clean(&there, middle)?;
            // The path's increment over the whole step, in unit variance.
            let whole = f64::from(from.sigma - next);
            let (half, rest) = (f64::from(from.sigma - middle.sigma), f64::from(middle.sigma - next));
            let noise = combine([((half / whole).sqrt(), &first), ((rest / whole).sqrt(), &second)]);
            *x = advance(x, &clean, from.sigma, *next, &noise);
        }
        Ok(())
    }
}

/// Goes towards a clean sample as far as the ancestral split says, and adds noise.
fn advance(x: &[f32], clean: &[f32], from: f32, to: f32, noise: &[f32]) -> Vec<f32> {
    let (down, up) = ancestral(from, to);
    let kept = f64::from(down / from);
    combine([(kept, x), (1.0 - kept, clean), (up.min(to).into(), noise)])
}

#[cfg(test)]
mod tests {
    use super::super::{Model, Sampler};
    use super::*;

    /// Predicts no noise, so that latents move by what is drawn alone.
    struct Nothing;

    impl Model for Nothing {
        fn predict(&mut self, x: &[f32], _: f32) -> Result<Vec<f32>, Stop> {
            Ok(vec![0.0; x.len()])
        }
        fn pictures(&self) -> usize {
            1
        }
    }

    /// A Brownian path's increment over a whole step has unit variance in its own
    /// measure, and shares with the one over the first half what the half has of the whole.
    #[test]
    fn increments_are_those_of_a_brownian_path() {
        let config = serde_json::json!({"beta_schedule": "scaled_linear"});
        let kind = "dpmpp_sde".parse().ok();
        let sampler = Sampler::new(kind, &config, 4).unwrap();
        // With the clean sample equal to the latents, the final latents are linear in
        // the draws. The response to each draw alone gives their whole law.
        let response = |which: usize| {
            let mut drawn = 0;
            let mut x = vec![0.0];
            let mut draw = |noise: &mut [f32]| {
                noise.fill(if drawn == which { 1.0 } else { 0.0 });
                drawn += 1;
            };
            sampler.run(&mut x, &mut Nothing, &mut draw).unwrap();
            (f64::from(x[0]), drawn)
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
        // The clean sample of the second evaluation carries the middle's noise too.
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
