//! Which noise levels a run visits: timesteps by spacing, sigmas by
//! interpolation or by one of the published ramps.
//!
//! Timesteps are computed as numpy computes them in float64 (its `linspace`,
//! `arange`, `interp` and rounding of halves to even), since a timestep that is
//! off by one is another picture.

use super::config::Fields;
use super::prediction::Level;
use super::schedule::{BetaSchedule, Schedule};
use super::{SamplerError, beta};

/// Where timesteps lie (Lin et al. 2023, arXiv 2305.08891, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spacing {
    Linspace,
    Leading,
    Trailing,
}

impl Spacing {
    pub(super) fn new(fields: &Fields, default: Self) -> Result<Self, SamplerError> {
        let choices =
            [("linspace", Self::Linspace), ("leading", Self::Leading), ("trailing", Self::Trailing)];
        fields.choice("timestep_spacing", default, &choices)
    }

    /// Factor on unit noise of the samplers whose latents grow with sigma.
    /// Leading spacing starts below the last train timestep, where some of
    /// the picture should already be there.
    pub(super) fn initial_scale(self, sigmas: &[f32]) -> f32 {
        let most = sigmas.iter().copied().fold(0.0, f32::max);
        match self {
            Self::Linspace | Self::Trailing => most,
            Self::Leading => (most * most + 1.0).sqrt(),
        }
    }
}

/// Timesteps asked for by a file: how many of how many, and where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) spacing: Spacing,
    pub(super) steps: usize,
    pub(super) train_steps: usize,
    pub(super) offset: i64,
}

impl Plan {
    pub(super) fn new(
        fields: &Fields,
        schedule: &Schedule,
        default: Spacing,
        steps: usize,
    ) -> Result<Self, SamplerError> {
        let train_steps = schedule.len();
        check_steps(steps, train_steps)?;
        let spacing = Spacing::new(fields, default)?;
        let offset =
            fields.without_null("steps_offset").integer("steps_offset", 0, 0..=train_steps as i64)?;
        Ok(Self { spacing, steps, train_steps, offset })
    }

    /// For a class that knows nothing of spacing.
    pub(super) fn evenly(schedule: &Schedule, steps: usize) -> Result<Self, SamplerError> {
        check_steps(steps, schedule.len())?;
        Ok(Self { spacing: Spacing::Linspace, steps, train_steps: schedule.len(), offset: 0 })
    }

    /// From noise to the clean sample, both ends included where the spacing has them. May be
    /// fractional for linspace, and may hold one timestep of -1 more than
    /// `steps` for trailing: numpy's `arange` has it so for 61, 103, 121 ...
    /// steps of 1000.
    pub(super) fn timesteps(&self) -> Vec<f64> {
        let (steps, train) = (self.steps, self.train_steps as f64);
        match self.spacing {
            Spacing::Linspace => {
                let mut all = linspace(0.0, train - 1.0, steps);
                all.reverse();
                all
            }
            Spacing::Leading => {
                let ratio = self.train_steps / steps;
                (0..steps).rev().map(|i| (i * ratio) as f64 + self.offset as f64).collect()
            }
            Spacing::Trailing => self.trailing(train),
        }
    }

    /// Whole timesteps, as the samplers that look alpha up in a table want them.
    ///
    /// Here the surplus -1 is dropped: diffusers would read the table's other
    /// end for it and spoil the picture.
    pub(super) fn table_timesteps(&self) -> Result<Vec<usize>, SamplerError> {
        let mut all: Vec<f64> = self.timesteps().into_iter().map(f64::round_ties_even).collect();
        all.retain(|&t| t >= 0.0);
        match all.iter().find(|&&t| t >= self.train_steps as f64) {
            Some(&t) => Err(SamplerError::Steps(format!(
                "{} steps with a steps_offset of {} reach timestep {t}, but the model was trained on {}; ask \
                 for fewer steps",
                self.steps, self.offset, self.train_steps
            ))),
            None => Ok(all.into_iter().map(|t| t as usize).collect()),
        }
    }

    /// From noise to the clean sample, without the clean end: spacing of the multistep
    /// solvers, over the first `last` train timesteps.
    pub(super) fn open_timesteps(&self, last: usize) -> Vec<f64> {
        let steps = self.steps;
        match self.spacing {
            Spacing::Linspace => {
                let all = linspace(0.0, last as f64 - 1.0, steps + 1);
                all.into_iter().skip(1).rev().map(f64::round_ties_even).collect()
            }
            Spacing::Leading => {
                let ratio = last / (steps + 1);
                (1..=steps).rev().map(|i| (i * ratio) as f64 + self.offset as f64).collect()
            }
            Spacing::Trailing => self.trailing(last as f64),
        }
    }

    fn trailing(&self, from: f64) -> Vec<f64> {
        let ratio = self.train_steps as f64 / self.steps as f64;
        // numpy takes the difference of the first two values for the step.
        let step = (from - ratio) - from;
        let count = ((0.0 - from) / -ratio).ceil().max(0.0) as usize;
        (0..count).map(|i| (from + i as f64 * step).round_ties_even() - 1.0).collect()
    }
}

/// Refuses numbers of steps that no spacing can place.
pub(super) fn check_steps(steps: usize, train_steps: usize) -> Result<(), SamplerError> {
    if steps == 0 {
        return Err(SamplerError::Steps("at least 1 step is needed".to_owned()));
    }
    if steps > train_steps {
        return Err(SamplerError::Steps(format!(
            "{steps} steps are more than the {train_steps} that the model was trained on"
        )));
    }
    Ok(())
}

/// `numpy.linspace`.
pub(super) fn linspace(start: f64, stop: f64, count: usize) -> Vec<f64> {
    let step = (stop - start) / (count.max(2) - 1) as f64;
    let mut all: Vec<f64> = (0..count).map(|i| i as f64 * step + start).collect();
    if count > 1
        && let Some(last) = all.last_mut()
    {
        *last = stop;
    }
    all
}

/// Value of a table between its entries, clamped at both ends.
pub(super) fn interpolate(table: &[f32], at: f64) -> f64 {
    let Some(last) = table.len().checked_sub(1) else { return f64::NAN };
    let low = at.clamp(0.0, last as f64).floor() as usize;
    let value = f64::from(table[low]);
    if low == last || at <= 0.0 {
        return value;
    }
    (f64::from(table[low + 1]) - value) * (at - low as f64) + value
}

/// A ramp of sigmas that replaces those of the spacing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ramp {
    /// Karras et al. 2022 (arXiv 2206.00364), rho 7.
    Karras,
    /// Uniform in the logarithm.
    Exponential,
    /// Quantiles of a beta distribution (Lee et al. 2024, arXiv 2407.12173).
    Beta,
}

impl Ramp {
    /// The one that a file's flags choose.
    pub(super) fn new(fields: &Fields) -> Result<Option<Self>, SamplerError> {
        let flags = [
            ("use_karras_sigmas", Self::Karras),
            ("use_exponential_sigmas", Self::Exponential),
            ("use_beta_sigmas", Self::Beta),
        ];
        let mut chosen = None;
        for (field, ramp) in flags {
            if fields.flag(field, false)? && chosen.replace(ramp).is_some() {
                return Err(fields.error(field, "excludes the other use_*_sigmas fields"));
            }
        }
        Ok(chosen)
    }

    /// Sigmas from `most` down to `least`. Fields `sigma_max` and
    /// `sigma_min` go before those, in whatever class's file they stand:
    /// diffusers keeps unknown fields of a file and looks these two up.
    pub(super) fn sigmas(
        self,
        fields: &Fields,
        most: f64,
        least: f64,
        steps: usize,
    ) -> Result<Vec<f64>, SamplerError> {
        let range = 0.0..=1e6;
        let most = fields.optional_number("sigma_max", range.clone())?.unwrap_or(most);
        let least = fields.optional_number("sigma_min", range)?.unwrap_or(least);
        Ok(self.between(most, least, steps))
    }

    pub(super) fn between(self, most: f64, least: f64, steps: usize) -> Vec<f64> {
        match self {
            Self::Karras => {
                let rho = 7.0;
                let (high, low) = (most.powf(1.0 / rho), least.powf(1.0 / rho));
                linspace(0.0, 1.0, steps).into_iter().map(|r| (high + r * (low - high)).powf(rho)).collect()
            }
            Self::Exponential => linspace(most.ln(), least.ln(), steps).into_iter().map(f64::exp).collect(),
            Self::Beta => linspace(0.0, 1.0, steps)
                .into_iter()
                .map(|p| least + beta::quantile(1.0 - p) * (most - least))
                .collect(),
        }
    }
}

/// Train timesteps by the logarithm of their sigma, to find the timestep of
/// a sigma.
pub(super) struct LogSigmas(Vec<f32>);

impl LogSigmas {
    pub(super) fn new(sigmas: &[f32]) -> Self {
        Self(sigmas.iter().map(|&s| f64::from(s).ln() as f32).collect())
    }

    /// The fractional train timestep whose sigma this is.
    pub(super) fn timestep(&self, sigma: f64) -> f64 {
        let Some(highest) = self.0.len().checked_sub(2) else { return 0.0 };
        let log_sigma = sigma.max(1e-10).ln();
        let below = self.0.partition_point(|&l| f64::from(l) <= log_sigma);
        let low = below.saturating_sub(1).min(highest);
        let (l, h) = (f64::from(self.0[low]), f64::from(self.0[low + 1]));
        let weight = ((l - log_sigma) / (l - h)).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * (low + 1) as f64
    }

    pub(super) fn timesteps(&self, sigmas: &[f64]) -> Vec<f64> {
        sigmas.iter().map(|&s| self.timestep(s)).collect()
    }
}

/// The noise levels of a run: one sigma more than timesteps, from noise to the clean sample.
pub(super) struct Levels {
    pub(super) timesteps: Vec<f64>,
    pub(super) sigmas: Vec<f32>,
}

impl Levels {
    /// Checks that noise falls from step to step; only the last may stay.
    pub(super) fn new(timesteps: Vec<f64>, sigmas: Vec<f64>) -> Result<Self, SamplerError> {
        let sigmas: Vec<f32> = sigmas.into_iter().map(|s| s as f32).collect();
        if sigmas.iter().any(|s| !s.is_finite()) || timesteps.iter().any(|t| !t.is_finite()) {
            return Err(SamplerError::Steps(
                "the betas leave no signal at the first step: a sampler over sigmas cannot start from \
                 infinite noise"
                    .to_owned(),
            ));
        }
        let falling = |pair: &[f32]| pair[0] > pair[1];
        let body = &sigmas[..sigmas.len().saturating_sub(1)];
        if !body.windows(2).all(falling) || sigmas.windows(2).any(|p| p[0] < p[1]) {
            return Err(SamplerError::Steps(format!(
                "the noise does not fall at each of {} steps; ask for fewer steps, or look at sigma_min and \
                 sigma_max if the scheduler's configuration has them",
                timesteps.len()
            )));
        }
        Ok(Self { timesteps, sigmas })
    }

    /// Levels of latents that grow with sigma, one for each timestep.
    pub(super) fn variance_exploding(&self) -> Vec<Level> {
        self.sigmas.iter().zip(&self.timesteps).map(|(&s, &t)| Level::variance_exploding(s, t)).collect()
    }

    /// Levels of latents that keep their variance, and that of the end.
    pub(super) fn variance_preserving(&self) -> Vec<Level> {
        let timesteps = self.timesteps.iter().copied().chain([0.0]);
        self.sigmas.iter().zip(timesteps).map(|(&s, t)| Level::of_ratio(s, t)).collect()
    }
}

/// Levels of the samplers whose latents grow with sigma (Euler, Heun and
/// their kin): sigmas at the timesteps of the spacing, or a ramp between the
/// first and the last of them, then zero.
pub(super) fn k_diffusion_levels(
    fields: &Fields,
    schedule: &Schedule,
    plan: &Plan,
    ramp: Option<Ramp>,
) -> Result<Levels, SamplerError> {
    let table = schedule.sigmas();
    let mut timesteps = plan.timesteps();
    let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| interpolate(&table, f64::from(t as f32))).collect();
    if let (Some(ramp), [most, .., least] | [most @ least]) = (ramp, sigmas.as_slice()) {
        sigmas = ramp.sigmas(fields, *most, *least, plan.steps)?;
        timesteps = LogSigmas::new(&table).timesteps(&sigmas);
    }
    sigmas.push(0.0);
    Levels::new(timesteps, sigmas)
}

/// What follows the last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FinalSigma {
    Zero,
    /// The least sigma of training.
    Least,
    /// The last sigma again, where a ramp has made it.
    Last,
}

impl FinalSigma {
    pub(super) fn new(fields: &Fields) -> Result<Self, SamplerError> {
        fields.choice("final_sigmas_type", Self::Zero, &[("zero", Self::Zero), ("sigma_min", Self::Least)])
    }
}

/// How the multistep solvers' ramps are turned into whole timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rounding {
    /// To the nearest for Karras, always.
    Karras,
    /// To the nearest for Karras, but not with cosine betas.
    KarrasUnlessCosine,
}

impl Rounding {
    /// What is not rounded is cut off.
    pub(super) fn apply(self, ramp: Ramp, schedule: &Schedule, timesteps: &mut [f64]) {
        let cosine = schedule.kind == BetaSchedule::SquaredCosine;
        let nearest = ramp == Ramp::Karras && !(self == Self::KarrasUnlessCosine && cosine);
        for t in timesteps {
            *t = if nearest { t.round_ties_even() } else { t.trunc() };
        }
    }
}

/// Levels of the multistep solvers: whole timesteps, and a ramp over the whole
/// table of training.
pub(super) fn multistep_levels(
    fields: &Fields,
    schedule: &Schedule,
    plan: &Plan,
    (ramp, rounding): (Option<Ramp>, Rounding),
    last_timestep: usize,
    end: FinalSigma,
) -> Result<Levels, SamplerError> {
    let table = schedule.sigmas();
    let (least, most) = match table.as_slice() {
        [least, .., most] | [least @ most] => (f64::from(*least), f64::from(*most)),
        [] => (f64::NAN, f64::NAN),
    };
    let (timesteps, mut sigmas) = match ramp {
        Some(ramp) => {
            let sigmas = ramp.sigmas(fields, most, least, plan.steps)?;
            let mut timesteps = LogSigmas::new(&table).timesteps(&sigmas);
            rounding.apply(ramp, schedule, &mut timesteps);
            (timesteps, sigmas)
        }
        None => {
            let timesteps = plan.open_timesteps(last_timestep);
            let sigmas = timesteps.iter().map(|&t| interpolate(&table, t)).collect();
            (timesteps, sigmas)
        }
    };
    let last = match end {
        FinalSigma::Zero => 0.0,
        FinalSigma::Last if ramp.is_some() => sigmas.last().copied().unwrap_or(least),
        FinalSigma::Last | FinalSigma::Least => least,
    };
    sigmas.push(last);
    Levels::new(timesteps, sigmas)
}
