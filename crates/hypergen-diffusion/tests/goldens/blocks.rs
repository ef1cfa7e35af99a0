//! Reads the goldens of single networks and blocks, and compares outputs with
//! them: every so-manieth number and the statistics of all.

use serde::Deserialize;
use serde_json::Value;

use super::fixture::{self, Numbers, worst};
use super::formula::signal;

/// Largest difference of an output, as a fraction of its scale. The reference
/// itself is within 1e-5 of float64 in norm.
const TOLERANCE: f64 = 1e-4;

/// The part of every row that says what the output was.
#[derive(Debug, Deserialize)]
struct Golden {
    shape: Vec<usize>,
    stride: usize,
    mean: f64,
    std: f64,
    max: f64,
}

/// `blocks.json` and its numbers.
pub(crate) struct Blocks {
    pub(crate) json: Value,
    numbers: Numbers,
}

impl Blocks {
    pub(crate) fn read() -> Self {
        Self { json: fixture::json("blocks.json"), numbers: Numbers::open("blocks.safetensors") }
    }

    /// The rows whose names start so.
    pub(crate) fn rows(&self, prefix: &str) -> Vec<(String, Value)> {
        let all = self.json["blocks"].as_object().expect("rows").iter();
        let rows: Vec<_> =
            all.filter(|(n, _)| n.starts_with(prefix)).map(|(n, r)| (n.clone(), r.clone())).collect();
        assert!(!rows.is_empty(), "no golden starts with {prefix}");
        rows
    }

    /// Demands that an output, in the reference's order, is the golden one.
    pub(crate) fn check(&self, name: &str, ours: &[f32]) {
        let golden: Golden = serde_json::from_value(self.json["blocks"][name].clone()).expect("a row");
        assert_eq!(ours.len(), golden.shape.iter().product::<usize>(), "{name}: {:?}", golden.shape);
        let sampled: Vec<f32> = ours.iter().copied().step_by(golden.stride).collect();
        let difference = worst(&sampled, &self.numbers.f32(name));
        let wide = || ours.iter().map(|&v| f64::from(v));
        let n = ours.len() as f64;
        let mean = wide().sum::<f64>() / n;
        let std = (wide().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
        let max = wide().map(f64::abs).fold(0.0, f64::max);
        println!("{name}: {difference:.1e} of the scale");
        assert!(difference <= TOLERANCE, "{name}: differs by {difference:.1e} of its scale");
        for (what, ours, golden_value) in
            [("mean", mean, golden.mean), ("deviation", std, golden.std), ("maximum", max, golden.max)]
        {
            let difference = (ours - golden_value).abs() / golden.std;
            assert!(difference <= TOLERANCE, "{name}: its {what} is {ours} and not {golden_value}");
        }
    }
}

/// Formula inputs of a row, named after it and themselves.
pub(crate) fn input(row: &str, name: &str, shape: &[usize]) -> Vec<f32> {
    signal(&format!("blocks/{row}/{name}"), shape)
}
