//! DPM-Solver and DPM-Solver++ over past steps (Lu et al. 2022, arXiv
//! 2206.00927 and 2211.01095), of first to third order, plain and as a stochastic
//! differential equation, as `DPMSolverMultistepScheduler`.
//!
//! Its flow-matching fields are refused: models that need them are another family.

use super::prediction::{Level, Predicted, Prediction, SampleClamp, combine};
use super::schedule::{BetaDefaults, Rescale, Schedule};
use super::spacing::{
    FinalSigma, Levels, LogSigmas, Plan, Ramp, Rounding, Spacing, linspace, multistep_levels,
};
use super::trajectory::draw;
use super::{Built, Fields, Noise, SamplerError, Solver, State};

pub(super) const CLASS: &str = "DPMSolverMultistepScheduler";

/// Which equation is solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Algorithm {
    /// In terms of the denoised sample (`++`) or of the noise.
    pub(super) denoised: bool,
    /// With fresh noise at each step.
    pub(super) stochastic: bool,
}

impl Algorithm {
    /// What the equation is about: the denoised sample or the noise.
    pub(super) fn output(self, predicted: &Predicted<'_>) -> Vec<f32> {
        if self.denoised { predicted.denoised() } else { predicted.noise() }
    }

    /// Reads `algorithm_type` and checks it against the final sigma.
    pub(super) fn new(fields: &Fields, end: FinalSigma) -> Result<Self, SamplerError> {
        let of = |denoised, stochastic| Self { denoised, stochastic };
        let choices = [
            ("dpmsolver++", of(true, false)),
            ("sde-dpmsolver++", of(true, true)),
            ("dpmsolver", of(false, false)),
            ("sde-dpmsolver", of(false, true)),
            // What a file for the DEIS sampler says, taken as diffusers takes it.
            ("deis", of(true, false)),
        ];
        let algorithm = fields.choice("algorithm_type", of(true, false), &choices)?;
        if !algorithm.denoised && end == FinalSigma::Zero {
            let problem = "needs \"final_sigmas_type\": \"sigma_min\", as it divides by the final sigma";
            return Err(fields.error("algorithm_type", problem));
        }
        Ok(algorithm)
    }
}

/// Reads `solver_type`: whether the second-order term is that of Heun.
pub(super) fn heun_type(fields: &Fields) -> Result<bool, SamplerError> {
    let choices = [
        ("midpoint", false),
        ("heun", true),
        // Other solvers' types, which diffusers takes for midpoint.
        ("logrho", false),
        ("bh1", false),
        ("bh2", false),
    ];
    fields.choice("solver_type", false, &choices)
}

/// Refuses what only flow matching and models with learned variance need.
pub(super) fn refuse_flow(fields: &Fields) -> Result<(), SamplerError> {
    for field in ["use_flow_sigmas", "use_dynamic_shifting"] {
        fields.must_be_off(field)?;
    }
    // These classes look only for a network that predicts variances too; the
    // other values, which files for DDPM hold, mean nothing to them.
    match fields.text("variance_type") {
        Some("learned" | "learned_range") => Err(fields.error("variance_type", "is not supported")),
        _ => Ok(()),
    }
}

/// How many of the first train timesteps `lambda_min_clipped` leaves.
pub(super) fn clipped_len(fields: &Fields, schedule: &Schedule) -> Result<usize, SamplerError> {
    let least = fields.lower_limit("lambda_min_clipped")?;
    let lambda = |product: f32| f64::from(product.sqrt().ln() - (1.0 - product).sqrt().ln());
    let left = schedule.alphas_cumprod.partition_point(|&a| lambda(a) >= least);
    if left == 0 {
        return Err(fields.error("lambda_min_clipped", "leaves no timestep"));
    }
    Ok(left)
}

struct DpmMultistep {
    /// Levels of all steps and of the end.
    levels: Vec<Level>,
    /// Noise over signal at each of them.
    ratios: Vec<f64>,
    order: usize,
    algorithm: Algorithm,
    heun: bool,
    lower_order_final: bool,
    euler_at_final: bool,
    zero_at_final: bool,
}

pub(super) fn build(fields: &Fields, steps: usize) -> Result<Built, SamplerError> {
    let schedule = Schedule::new(fields, &BetaDefaults::COMMON.with_rescale(Rescale::ToTiny))?;
    let plan = Plan::new(fields, &schedule, Spacing::Linspace, steps)?;
    let prediction = Prediction::any(fields)?;
    let clamp = SampleClamp::new(fields, None)?;
    refuse_flow(fields)?;
    let end = FinalSigma::new(fields)?;
    let algorithm = Algorithm::new(fields, end)?;
    let order = fields.integer("solver_order", 2, 1..=3)? as usize;
    let last_timestep = clipped_len(fields, &schedule)?;
    let ramp = Ramp::new(fields)?;
    let levels = if ramp.is_none() && fields.flag("use_lu_lambdas", false)? {
        lu_levels(&schedule, &plan, end)?
    } else {
        let ramp = (ramp, Rounding::KarrasUnlessCosine);
        multistep_levels(fields, &schedule, &plan, ramp, last_timestep, end)?
    };
    let solver = DpmMultistep {
        levels: levels.variance_preserving(),
        ratios: levels.sigmas.into_iter().map(f64::from).collect(),
        order,
        algorithm,
        heun: heun_type(fields)?,
        lower_order_final: fields.flag("lower_order_final", true)?,
        euler_at_final: fields.flag("euler_at_final", false)?,
        zero_at_final: end == FinalSigma::Zero,
    };
    if algorithm.stochastic
        && !algorithm.denoised
        && (0..solver.evaluations()).any(|step| solver.order_at(step) == 3)
    {
        return Err(fields.error("algorithm_type", "has no third order; it needs a \"solver_order\" of 2"));
    }
    Ok(Built { solver: Box::new(solver), prediction, clamp })
}

/// Steps of equal logarithm of signal over noise, as the solver's authors first had them.
fn lu_levels(schedule: &Schedule, plan: &Plan, end: FinalSigma) -> Result<Levels, SamplerError> {
    let table = schedule.sigmas();
    let [least, .., most] = table.as_slice() else {
        return Err(SamplerError::Steps("use_lu_lambdas needs more than one train timestep".to_owned()));
    };
    let logs = linspace(0.0, 1.0, plan.steps);
    let (high, low) = (f64::from(most.ln()), f64::from(least.ln()));
    let mut sigmas: Vec<f64> = logs.into_iter().map(|r| (high + r * (low - high)).exp()).collect();
    let mut timesteps = LogSigmas::new(&table).timesteps(&sigmas);
    Rounding::KarrasUnlessCosine.apply(Ramp::Karras, schedule, &mut timesteps);
    sigmas.push(if end == FinalSigma::Zero { 0.0 } else { f64::from(*least) });
    Levels::new(timesteps, sigmas)
}

impl DpmMultistep {
    /// The order of a step, given the steps before it.
    fn order_at(&self, step: usize) -> usize {
        let steps = self.evaluations();
        let few = self.lower_order_final && steps < 15;
        let order = self.order.min(step + 1);
        match steps - step {
            1 if self.euler_at_final || few || self.zero_at_final => 1,
            2 if few => order.min(2),
            _ => order,
        }
    }
}

impl Solver for DpmMultistep {
    fn evaluations(&self) -> usize {
        self.levels.len() - 1
    }

    fn level(&self, index: usize) -> &Level {
        &self.levels[index]
    }

    fn advance(&self, index: usize, predicted: &Predicted<'_>, state: &mut State, noise: Noise<'_>) {
        state.remember(self.algorithm.output(predicted), 3);
        let len = state.x.len();
        let fresh = if self.algorithm.stochastic { draw(len, noise) } else { vec![0.0; len] };
        // Logarithm of signal over noise, and how far it went in each step.
        let lambda = |i: usize| -self.ratios[i].ln();
        let [h, past @ ..] = [0, 1, 2].map(|back| match index.checked_sub(back) {
            Some(i) => lambda(i + 1) - lambda(i),
            None => f64::NAN,
        });
        if h == 0.0 {
            return;
        }
        let weights = Weights::new(self.algorithm, &self.levels[index], &self.levels[index + 1], h);
        let (x, fresh) = ((weights.sample, state.x.as_slice()), (weights.noise, fresh.as_slice()));
        state.x = match (self.order_at(index).min(state.outputs.len()), state.outputs.as_slice()) {
            (3, [m0, m1, m2]) => {
                let [c0, c1, c2] = weights.third_order(past.map(|p| p / h));
                combine([x, (c0, m0), (c1, m1), (c2, m2), fresh])
            }
            (2, [m0, m1, ..]) => {
                let slope = if self.heun { weights.slope } else { 0.5 * weights.output };
                let c1 = -slope * h / past[0];
                combine([x, (weights.output - c1, m0), (c1, m1), fresh])
            }
            (_, outputs) => combine([x, (weights.output, &outputs[0]), fresh]),
        };
    }
}

/// Factors of one step of an exponential integrator.
pub(super) struct Weights {
    /// Of the sample at the start.
    pub(super) sample: f64,
    /// Of the network's output.
    pub(super) output: f64,
    /// Of the output's first derivative over the step.
    pub(super) slope: f64,
    /// Of its second derivative.
    pub(super) curve: f64,
    /// Of fresh noise.
    pub(super) noise: f64,
}

/// A level in float64.
struct Wide {
    alpha: f64,
    sigma: f64,
}

impl Wide {
    fn new(level: &Level) -> Self {
        Self { alpha: level.alpha.into(), sigma: level.sigma.into() }
    }
}

impl Weights {
    /// For a step between two levels whose logarithms of signal over noise
    /// are `h` apart, which may be infinite.
    pub(super) fn new(algorithm: Algorithm, from: &Level, to: &Level, h: f64) -> Self {
        let (from, to) = (Wide::new(from), Wide::new(to));
        // What integrals of the exponential against 1 and t are made of.
        let phi1 = |e: f64| e.exp_m1() / e;
        let phi2 = |e: f64| (e.exp_m1() - e) / (e * e);
        match (algorithm.denoised, algorithm.stochastic) {
            (true, false) => Self {
                sample: to.sigma / from.sigma,
                output: -to.alpha * (-h).exp_m1(),
                slope: to.alpha * (1.0 - phi1(-h)),
                curve: to.alpha * (0.5 - phi2(-h)),
                noise: 0.0,
            },
            (true, true) => {
                let e = -2.0 * h;
                Self {
                    sample: to.sigma / from.sigma * (-h).exp(),
                    output: -to.alpha * e.exp_m1(),
                    slope: to.alpha * (1.0 - phi1(e)),
                    // By analogy the half would be added; this is what the
                    // reference computes.
                    curve: to.alpha * (-0.5 - phi2(e)),
                    noise: to.sigma * (-e.exp_m1()).sqrt(),
                }
            }
            (false, stochastic) => {
                let unit = if stochastic { 2.0 * to.sigma } else { to.sigma };
                Self {
                    sample: to.alpha / from.alpha,
                    output: -unit * h.exp_m1(),
                    slope: -unit * (phi1(h) - 1.0),
                    curve: -unit * (phi2(h) - 0.5),
                    noise: if stochastic { to.sigma * (2.0 * h).exp_m1().sqrt() } else { 0.0 },
                }
            }
        }
    }

    /// Factors of the last three outputs, newest first, where the two steps
    /// before this one went `r0` and `r1` times as far.
    fn third_order(&self, [r0, r1]: [f64; 2]) -> [f64; 3] {
        let (mix, curve) = (r0 / (r0 + r1), self.curve / (r0 + r1));
        // Of the divided differences over the last step and the one before.
        let newer = (self.slope * (1.0 + mix) + curve) / r0;
        let older = -(self.slope * mix + curve) / r1;
        [self.output + newer, older - newer, -older]
    }
}
