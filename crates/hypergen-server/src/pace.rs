//! How fast the engine is, from what it has measured: the honest part of
//! `Retry-After` and of `/health`. It is an estimate, not a promise: a step costs
//! the same for each pixel, whatever the size.

use std::time::Duration;

use hypergen_diffusion::Request;

/// How much of the past is kept at each step; about the last hundred count.
const DECAY: f64 = 0.99;

/// Work in network evaluations of a million pixels: the unit that takes about the
/// same time each, whatever the request's steps, size and guidance.
pub(crate) fn work(request: &Request) -> f64 {
    let passes = if request.guidance_scale > 1.0 { 2.0 } else { 1.0 };
    let pixels = (request.size.width * request.size.height) as f64;
    request.steps as f64 * passes * pixels / 1e6
}

/// Time and work so far, the old ones fading.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Pace {
    seconds: f64,
    work: f64,
}

impl Pace {
    /// Adds time that was spent on `work` (0 for text and decoding, which
    /// are shared out over the steps).
    pub(crate) fn record(&mut self, work: f64, elapsed: Duration) {
        if work > 0.0 {
            self.seconds *= DECAY;
            self.work *= DECAY;
        }
        self.seconds += elapsed.as_secs_f64();
        self.work += work;
    }

    /// Time that `work` will take, once anything has been measured.
    pub(crate) fn estimate(&self, work: f64) -> Option<Duration> {
        (self.work > 0.0).then(|| Duration::from_secs_f64(self.seconds / self.work * work))
    }
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_time_per_work_with_everything_shared_out() {
        let mut pace = Pace::default();
        assert_eq!(pace.estimate(1.0), None);
        pace.record(2.0, Duration::from_secs(4));
        pace.record(0.0, Duration::from_secs(2));
        assert_eq!(pace.estimate(10.0), Some(Duration::from_secs(30)));
    }

    #[test]
    fn the_past_fades() {
        let mut pace = Pace::default();
        for _ in 0..1000 {
            pace.record(1.0, Duration::from_secs(10));
        }
        for _ in 0..1000 {
            pace.record(1.0, Duration::from_secs(1));
        }
        let seconds = pace.estimate(1.0).expect("measured").as_secs_f64();
        assert!((0.99..1.01).contains(&seconds), "{seconds}");
    }
}
