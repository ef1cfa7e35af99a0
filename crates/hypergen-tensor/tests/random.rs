//! The torch generator against goldens of torch itself
//! (`goldens/torch_random.py`), several draws in a row.

use hypergen_tensor::TorchGenerator;
use serde_json::Value;

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Large draws equal torch's to the bit. Small ones go through the float64
/// functions of the platform, of which only float32's precision is asked.
fn close(n: usize, ours: f32, theirs: f64) -> bool {
    if n < 16 {
        (f64::from(ours) - theirs).abs() <= 1e-6 * theirs.abs().max(0.05)
    } else {
        ours == theirs as f32
    }
}

#[test]
fn equals_torch() {
    let goldens: Value = serde_json::from_str(include_str!("fixtures/random.json")).unwrap();
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() >= 20);
    for case in cases {
        let seed = case["seed"].as_u64().unwrap();
        let mut generator = TorchGenerator::new(seed);
        for (index, draw) in case["draws"].as_array().unwrap().iter().enumerate() {
            let n = draw["n"].as_u64().unwrap() as usize;
            let mut x = vec![f32::NAN; n];
            generator.fill_normal(&mut x);
            let context = format!("seed {seed}, draw {index} of {n}");

            let head = floats(&draw["head"]);
            for (i, (&ours, &theirs)) in x.iter().zip(&head).enumerate() {
                assert!(close(n, ours, theirs), "{context}, number {i}: {ours} for {theirs}");
            }
            let tail = floats(&draw["tail"]);
            for (i, (&ours, &theirs)) in x.iter().rev().zip(tail.iter().rev()).enumerate() {
                assert!(close(n, ours, theirs), "{context}, number {i} from the end: {ours} for {theirs}");
            }

            // The sums catch any number between head and tail that is off.
            let sum: f64 = x.iter().map(|&v| f64::from(v)).sum();
            let square_sum: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
            let slack = 1e-9 * n as f64 + 1e-6;
            assert!((sum - draw["sum"].as_f64().unwrap()).abs() < slack, "{context}: sum {sum}");
            assert!(
                (square_sum - draw["square_sum"].as_f64().unwrap()).abs() < slack,
                "{context}: sum of squares {square_sum}"
            );
        }
    }
}
