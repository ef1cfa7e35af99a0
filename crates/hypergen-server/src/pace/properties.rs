//! What holds for an estimate whatever was measured: it lies between the best
//! and the worst of it, and grows with the work.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_estimate_lies_between_the_fastest_and_the_slowest(
        measured in prop::collection::vec((1..=3000_u32, 0..=86_400_000_u64), 1..400),
        asked in 0..=10_000_000_u32,
    ) {
        let mut pace = Pace::default();
        for &(work, millis) in &measured {
            pace.record(f64::from(work), Duration::from_millis(millis));
        }
        let rates = || measured.iter().map(|&(work, millis)| millis as f64 / 1000.0 / f64::from(work));
        let (fastest, slowest) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
        let estimate = pace.estimate(f64::from(asked)).expect("something was measured").as_secs_f64();
        let asked = f64::from(asked);
        prop_assert!(estimate >= fastest * asked * 0.999 - 0.001 && estimate <= slowest * asked * 1.001 + 0.001);
    }

    #[test]
    fn more_work_takes_longer_and_work_that_takes_no_steps_counts(
        measured in prop::collection::vec((0..=10_u32, 0..=1000_u64), 0..50),
        less in 0..=1000_u32,
        more in 0..=1000_u32,
    ) {
        let mut pace = Pace::default();
        for &(work, millis) in &measured {
            pace.record(f64::from(work), Duration::from_millis(millis));
        }
        let any = measured.iter().any(|&(work, _)| work > 0);
        prop_assert_eq!(pace.estimate(1.0).is_some(), any);
        let (least, most) = (pace.estimate(f64::from(less)), pace.estimate(f64::from(less) + f64::from(more)));
        prop_assert!(least <= most);
        pace.record(0.0, Duration::from_secs(1));
        prop_assert!(pace.estimate(f64::from(less)) >= least);
    }
}
