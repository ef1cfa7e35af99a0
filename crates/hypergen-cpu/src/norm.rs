//! Group and layer normalisation. Statistics are in float32 or better.

use crate::{Activation, Cpu, Element, gemm::apply};

/// Sizes of a group normalisation over `[batch, pixels, channels]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNormShape {
    /// Pictures.
    pub batch: usize,
    /// Height times width.
    pub pixels: usize,
    /// Channels, a multiple of `groups`.
    pub channels: usize,
    /// Groups of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
}

/// `out = activation((x - mean) / sqrt(var + eps) * gamma + beta)`, with mean
/// and variance over the pixels and channels of each group of each picture.
///
/// # Panics
/// When a slice's length does not fit the shape.
pub fn group_norm<T: Element>(
    cpu: &Cpu,
    x: &[T],
    shape: &GroupNormShape,
    gamma: &[f32],
    beta: &[f32],
    activation: Activation,
    out: &mut [T],
) {
    let _ = cpu;
    let s = shape;
    let width = s.channels / s.groups;
    for b in 0..s.batch {
        for g in 0..s.groups {
            let index = |p: usize, c: usize| (b * s.pixels + p) * s.channels + g * width + c;
            let all = || (0..s.pixels).flat_map(|p| (0..width).map(move |c| (p, c)));
            let count = (s.pixels * width) as f64;
            let mean = all().map(|(p, c)| f64::from(x[index(p, c)].to_f32())).sum::<f64>() / count;
            let var =
                all().map(|(p, c)| (f64::from(x[index(p, c)].to_f32()) - mean).powi(2)).sum::<f64>() / count;
            let inv = 1.0 / (var + f64::from(s.eps)).sqrt();
            for (p, c) in all() {
                let v = ((f64::from(x[index(p, c)].to_f32()) - mean) * inv) as f32;
                out[index(p, c)] =
                    T::from_f32(apply(activation, v * gamma[g * width + c] + beta[g * width + c]));
            }
        }
    }
}

/// Normalises each row of `[rows, channels]` to mean 0 and variance 1, then
/// applies `gamma` and `beta`.
///
/// # Panics
/// When a slice's length does not fit.
pub fn layer_norm<T: Element>(
    cpu: &Cpu,
    x: &[T],
    channels: usize,
    eps: f32,
    gamma: &[f32],
    beta: &[f32],
    out: &mut [T],
) {
    let rows = x.len() / channels;
    let _ = cpu;
    for r in 0..rows {
        let row = &x[r * channels..][..channels];
        let mean = row.iter().map(|v| f64::from(v.to_f32())).sum::<f64>() / channels as f64;
        let var = row.iter().map(|v| (f64::from(v.to_f32()) - mean).powi(2)).sum::<f64>() / channels as f64;
        let inv = 1.0 / (var + f64::from(eps)).sqrt();
        for c in 0..channels {
            let v = ((f64::from(row[c].to_f32()) - mean) * inv) as f32;
            out[r * channels + c] = T::from_f32(v * gamma[c] + beta[c]);
        }
    }
}
