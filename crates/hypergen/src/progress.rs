//! What a person at a terminal sees while weights load and pictures are drawn.
//!
//! The bars go to standard error, and indicatif hides them when that is no
//! terminal. Lines that stay are the console's business.

use std::time::{Duration, Instant};

use hypergen_diffusion::hub::PullProgress;
use hypergen_diffusion::{LoadProgress, Observer, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::interrupt::Interrupt;

/// Bytes in a megabyte, as file managers count.
const MEGABYTE: u64 = 1_000_000;

/// The bar of weights that load.
pub(crate) struct Loading {
    bar: ProgressBar,
}

impl Loading {
    /// Shows an empty bar.
    pub(crate) fn start() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("loading weights [{bar:30}] {pos}/{len} MB"));
        Self { bar }
    }

    /// Shows how far it is.
    pub(crate) fn update(&self, progress: LoadProgress) {
        self.bar.set_length(progress.total.div_ceil(MEGABYTE));
        self.bar.set_position(progress.done.min(progress.total).div_ceil(MEGABYTE));
    }
}

impl Loading {
    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The bar of a model that is downloaded.
pub(crate) struct Download {
    bar: ProgressBar,
}

impl Download {
    /// Shows an empty bar.
    pub(crate) fn start() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style(
            "{msg} [{bar:30}] {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} to go",
        ));
        Self { bar }
    }

    /// Shows how far it is.
    pub(crate) fn update(&self, progress: PullProgress<'_>) {
        self.bar.set_length(progress.total);
        self.bar.set_position(progress.done);
        if self.bar.message() != progress.file {
            self.bar.set_message(progress.file.to_owned());
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The bar of a measurement's rounds.
pub(crate) struct Rounds {
    bar: ProgressBar,
}

impl Rounds {
    /// Shows nothing until there is something to show.
    pub(crate) fn start() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("measuring [{bar:30}] round {pos} of {len}"));
        Self { bar }
    }

    /// Shows that a round begins; the first does not count.
    pub(crate) fn update(&self, round: usize, count: usize) {
        self.bar.set_length(count as u64);
        self.bar.set_position(round as u64);
    }
}

impl Drop for Rounds {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The bar of one picture's steps, which also carries the wish to stop.
pub(crate) struct Drawing<'a> {
    bar: ProgressBar,
    interrupt: &'a Interrupt,
    in_steps: Duration,
    steps: u32,
    started: Instant,
}

impl<'a> Drawing<'a> {
    /// Shows an empty bar for picture `index` of `count`.
    pub(crate) fn start(index: usize, count: usize, steps: usize, interrupt: &'a Interrupt) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
        let which = if count == 1 { String::new() } else { format!(" {} of {count}", index + 1) };
        bar.set_style(style("{prefix} [{bar:30}] {pos}/{len} steps {msg}"));
        bar.set_prefix(format!("drawing{which}"));
        Self { bar, interrupt, in_steps: Duration::ZERO, steps: 0, started: Instant::now() }
    }

    /// How it went, in words: `20 steps in 0.81 s, 39 ms a step`.
    pub(crate) fn summary(&self) -> String {
        let total = self.started.elapsed().as_secs_f64();
        let steps = if self.steps == 1 { "step" } else { "steps" };
        format!(
            "{} {steps} in {total:.2} s{}",
            self.steps,
            self.step_time().map_or(String::new(), |t| format!(", {t}"))
        )
    }

    fn step_time(&self) -> Option<String> {
        let mean = self.in_steps.checked_div(self.steps)?;
        Some(match mean.as_secs_f64() {
            s if s >= 1.0 => format!("{s:.2} s a step"),
            s if s >= 0.01 => format!("{:.0} ms a step", s * 1e3),
            s => format!("{:.1} ms a step", s * 1e3),
        })
    }
}

impl Observer for Drawing<'_> {
    fn stage(&mut self, stage: Stage, index: usize, count: usize, elapsed: Duration) {
        if stage != Stage::Step {
            return;
        }
        self.in_steps += elapsed;
        self.steps += 1;
        // Some samplers call the model more often than the steps they are given.
        self.bar.set_length(count as u64);
        self.bar.set_position(index as u64);
        self.bar.set_message(self.step_time().unwrap_or_default());
    }

    fn cancelled(&mut self, _index: usize) -> bool {
        self.interrupt.exit_code().is_some()
    }
}

impl Drop for Drawing<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are this file's own constants; should one be wrong, a
    // plain bar is better than a panic.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}
