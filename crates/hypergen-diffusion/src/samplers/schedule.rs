//! The noise that a model was trained with: betas and their running product.
//!
//! Everything is rounded where torch rounds it (float32 betas, a running
//! product that is carried in float64 and stored in float32), because the
//! small differences at the clean end are divided by small numbers later. There
//! are no inference steps here; those are [`super::spacing`].

use super::SamplerError;
use super::config::Fields;

/// Most train timesteps that a file may ask for. Published models have 1000.
const MOST_TIMESTEPS: i64 = 100_000;

/// What `rescale_betas_zero_snr` does to the last entry, which differs by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rescale {
    /// The class has no such field.
    Unknown,
    /// The last alpha is exactly zero.
    ToZero,
    /// The last alpha is 2^-24, so that the first sigma is 4096 and not infinite.
    ToTiny,
}

/// How betas are spread over the train timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BetaSchedule {
    Linear,
    ScaledLinear,
    /// Cosine (Nichol and Dhariwal 2021, arXiv 2102.09672).
    SquaredCosine,
    Exponential,
    Laplace,
    Sigmoid,
}

/// What a class assumes where the file is silent.
pub(super) struct BetaDefaults {
    pub(super) start: f64,
    pub(super) end: f64,
    pub(super) schedule: BetaSchedule,
    pub(super) rescale: Rescale,
    /// Schedules that this class knows beyond the common three.
    pub(super) extra: &'static [(&'static str, BetaSchedule)],
}

impl BetaDefaults {
    /// Of most classes.
    pub(super) const COMMON: Self = Self {
        start: 0.0001,
        end: 0.02,
        schedule: BetaSchedule::Linear,
        rescale: Rescale::Unknown,
        extra: &[],
    };
    /// Of the classes that were ported from k-diffusion with a second evaluation per step.
    pub(super) const SECOND_ORDER: Self = Self { start: 0.00085, end: 0.012, ..Self::COMMON };

    pub(super) const fn with_rescale(self, rescale: Rescale) -> Self {
        Self { rescale, ..self }
    }
}

/// Cumulative products of alpha, by train timestep.
#[derive(Debug, Clone)]
pub(super) struct Schedule {
    pub(super) alphas_cumprod: Vec<f32>,
    pub(super) kind: BetaSchedule,
}

impl Schedule {
    pub(super) fn new(fields: &Fields, defaults: &BetaDefaults) -> Result<Self, SamplerError> {
        let count = fields.integer("num_train_timesteps", 1000, 1..=MOST_TIMESTEPS)? as usize;
        let start = fields.number("beta_start", defaults.start, 0.0..=1.0)?;
        let end = fields.number("beta_end", defaults.end, 0.0..=1.0)?;
        let mut choices = vec![
            ("linear", BetaSchedule::Linear),
            ("scaled_linear", BetaSchedule::ScaledLinear),
            ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
        ];
        choices.extend_from_slice(defaults.extra);
        let kind = fields.choice("beta_schedule", defaults.schedule, &choices)?;
        let rescale = match defaults.rescale {
            Rescale::Unknown => Rescale::Unknown,
            kind if fields.flag("rescale_betas_zero_snr", false)? => kind,
            _ => Rescale::Unknown,
        };

        let mut betas = match fields.numbers("trained_betas", 0.0..=1.0, MOST_TIMESTEPS as usize)? {
            Some(trained) if trained.len() != count => {
                let problem = format!("holds {} numbers for {count} train timesteps", trained.len());
                return Err(fields.error("trained_betas", problem));
            }
            Some(trained) => trained.into_iter().map(|b| b as f32).collect(),
            None => betas(kind, start, end, count),
        };
        if rescale != Rescale::Unknown {
            rescale_to_zero_terminal_snr(&mut betas);
        }
        let mut alphas_cumprod = cumulative_alphas(&betas);
        if rescale == Rescale::ToTiny
            && let Some(last) = alphas_cumprod.last_mut()
        {
            *last = 1.0 / 16_777_216.0;
        }
        if alphas_cumprod.iter().any(|a| !a.is_finite()) {
            return Err(fields.error("rescale_betas_zero_snr", "cannot be applied to these betas"));
        }
        Ok(Self { alphas_cumprod, kind })
    }

    /// Number of train timesteps.
    pub(super) fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Noise over signal at each train timestep, ascending.
    pub(super) fn sigmas(&self) -> Vec<f32> {
        self.alphas_cumprod.iter().map(|&a| ((1.0 - a) / a).sqrt()).collect()
    }
}

fn betas(kind: BetaSchedule, start: f64, end: f64, count: usize) -> Vec<f32> {
    match kind {
        BetaSchedule::Linear => torch_linspace(start as f32, end as f32, count),
        BetaSchedule::ScaledLinear => torch_linspace(start.sqrt() as f32, end.sqrt() as f32, count)
            .into_iter()
            .map(|root| root * root)
            .collect(),
        BetaSchedule::SquaredCosine => {
            betas_of_alpha_bar(count, |t| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2))
        }
        BetaSchedule::Exponential => betas_of_alpha_bar(count, |t| (-12.0 * t).exp()),
        BetaSchedule::Laplace => betas_of_alpha_bar(count, |t| {
            let half: f64 = 0.5 - t;
            let log_snr = -0.5 * 1f64.copysign(half) * (1.0 - 2.0 * half.abs() + 1e-6).ln();
            let snr = log_snr.exp();
            (snr / (1.0 + snr)).sqrt()
        }),
        BetaSchedule::Sigmoid => {
            let (start, end) = (start as f32, end as f32);
            torch_linspace(-6.0, 6.0, count)
                .into_iter()
                .map(|x| (1.0 / (1.0 + f64::from(-x).exp())) as f32 * (end - start) + start)
                .collect()
        }
    }
}

/// `torch.linspace` in float32: from both ends towards the middle, with one
/// rounding per number.
pub(super) fn torch_linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    if count == 1 {
        return vec![start];
    }
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| {
            if i < count / 2 {
                step.mul_add(i as f32, start)
            } else {
                (-step).mul_add((count - 1 - i) as f32, end)
            }
        })
        .collect()
}

/// Betas that make alpha's product follow a function of time in [0, 1].
fn betas_of_alpha_bar(count: usize, alpha_bar: impl Fn(f64) -> f64) -> Vec<f32> {
    let time = |i: usize| i as f64 / count as f64;
    (0..count).map(|i| (1.0 - alpha_bar(time(i + 1)) / alpha_bar(time(i))).min(0.999) as f32).collect()
}

fn cumulative_alphas(betas: &[f32]) -> Vec<f32> {
    let product = |state: &mut f64, beta: &f32| {
        *state *= f64::from(1.0 - beta);
        Some(*state as f32)
    };
    betas.iter().scan(1.0, product).collect()
}

/// Shifts and scales the square roots of alpha's product so that the last is zero
/// and the first is kept (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
fn rescale_to_zero_terminal_snr(betas: &mut [f32]) {
    let mut roots: Vec<f32> = cumulative_alphas(betas).into_iter().map(f32::sqrt).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return };
    let scale = first / (first - last);
    for root in &mut roots {
        *root = (*root - last) * scale;
    }
    let mut previous = 1.0;
    for (beta, root) in betas.iter_mut().zip(&roots) {
        let product = root * root;
        *beta = 1.0 - product / previous;
        previous = product;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn schedule(config: &Value) -> Result<Schedule, SamplerError> {
        let defaults = BetaDefaults::COMMON.with_rescale(Rescale::ToZero);
        Schedule::new(&Fields::new("DDIMScheduler", config, &[])?, &defaults)
    }

    #[test]
    fn products_equal_those_of_torch() {
        // alphas_cumprod of DDIMScheduler, as bits.
        let config = json!({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012});
        let products = schedule(&config).unwrap().alphas_cumprod;
        let bits = [0, 333, 666, 999].map(|i| products[i].to_bits());
        assert_eq!(bits, [1_065_338_955, 1_057_551_171, 1_037_513_827, 999_863_222]);
    }

    #[test]
    fn zero_terminal_snr_is_zero() {
        let products = schedule(&json!({"rescale_betas_zero_snr": true})).unwrap().alphas_cumprod;
        assert_eq!(products.last(), Some(&0.0));
        assert!((products[0] - 0.9999).abs() < 1e-7);
        // One train timestep has no first that could be kept.
        assert!(schedule(&json!({"rescale_betas_zero_snr": true, "num_train_timesteps": 1})).is_err());
    }
}
