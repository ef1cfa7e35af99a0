//! Reads fixtures, and measures how far our numbers are from them.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A JSON fixture.
pub(crate) fn json(name: &str) -> Value {
    let path = path(name);
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A safetensors fixture.
pub(crate) struct Numbers(Vec<u8>);

impl Numbers {
    /// Reads the file.
    pub(crate) fn open(name: &str) -> Self {
        Self(fs::read(path(name)).expect("a fixture of numbers"))
    }

    /// A tensor's bytes.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let all = SafeTensors::deserialize(&self.0).expect("a safetensors fixture");
        all.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec()
    }

    /// A float32 tensor's values.
    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

/// `[n, c, h, w]` as the reference has it to `[n, h, w, c]` as we have it.
pub(crate) fn to_nhwc(values: &[f32], [n, c, h, w]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for i in 0..n {
        for pixel in 0..h * w {
            out.extend((0..c).map(|channel| values[(i * c + channel) * h * w + pixel]));
        }
    }
    out
}

/// `[n, h, w, c]` to `[n, c, h, w]`.
pub(crate) fn to_nchw(values: &[f32], [n, h, w, c]: [usize; 4]) -> Vec<f32> {
    // The same permutation, with pixels and channels in each other's place.
    to_nhwc(values, [n, h * w, c, 1])
}

/// Norm of the difference over the norm of the reference.
pub(crate) fn distance(ours: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(ours.len(), reference.len(), "numbers of another count");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(reference).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut reference.iter().map(|&b| f64::from(b)))
}

/// Largest difference, as a fraction of the reference's root mean square.
pub(crate) fn worst(ours: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(ours.len(), reference.len(), "numbers of another count");
    let square: f64 = reference.iter().map(|&b| f64::from(b).powi(2)).sum();
    let scale = (square / reference.len() as f64).sqrt();
    // A NaN must not vanish in a maximum.
    let differences = ours.iter().zip(reference).map(|(a, b)| f64::from((a - b).abs()));
    differences.fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m }) / scale
}

/// Peak signal-to-noise ratio of 8-bit pictures, in dB; infinite when equal.
pub(crate) fn psnr(ours: &[u8], reference: &[u8]) -> f64 {
    assert_eq!(ours.len(), reference.len(), "a picture of another size");
    let square: f64 = ours.iter().zip(reference).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    10.0 * (255f64.powi(2) * reference.len() as f64 / square).log10()
}
