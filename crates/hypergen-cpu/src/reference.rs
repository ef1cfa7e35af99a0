//! Every kernel once more in plain scalar code, accumulated in float64: what
//! the fast kernels are tested against. It deliberately knows nothing of
//! threads, instruction sets, packing or blocking, and is as slow as it is
//! plain; nothing on a hot path may call it.
//!
//! The functions take the same shapes as the kernels and return float32
//! values that have been rounded once; a test rounds them on to its element
//! type, or compares with that type's precision in mind. Inputs are widened
//! exactly, so a bfloat16 kernel and its oracle see the same numbers.

use crate::{Activation, AttentionShape, ConvShape, Element, Epilogue, GroupNormShape, Heads};

fn wide<T: Element>(x: T) -> f64 {
    f64::from(x.to_f32())
}

/// The activation at one point, in float64.
pub fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        // erfc keeps its relative accuracy where 1 + erf cancels.
        Activation::Gelu => 0.5 * x * libm::erfc(-x / std::f64::consts::SQRT_2),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
    }
}

/// The epilogue of one output: `row` and `col` of a result that is `n` wide.
fn finish<T: Element>(acc: f64, row: usize, col: usize, n: usize, e: &Epilogue<'_, T>) -> f32 {
    let bias = e.bias.map_or(0.0, |b| f64::from(b[col]));
    let group = e.group_bias.map_or(0.0, |g| wide(g.values[row / g.rows_per_group * n + col]));
    let residual = e.residual.map_or(0.0, |r| wide(r[row * n + col]));
    ((activation(e.activation, acc + bias + group) + residual) * f64::from(e.scale)) as f32
}

/// `epilogue(a[m, k] * w^T)` with `w[n, k]` as a checkpoint stores it:
/// `[m, n]`.
pub fn linear<T: Element>(a: &[T], w: &[T], n: usize, k: usize, epilogue: &Epilogue<'_, T>) -> Vec<f32> {
    assert_eq!(w.len(), n * k, "reference linear: the weight is not [n, k]");
    let m = a.len().checked_div(k).unwrap_or(0);
    assert_eq!(a.len(), m * k, "reference linear: the input is not [m, k]");
    let mut out = Vec::with_capacity(m * n);
    for row in 0..m {
        for col in 0..n {
            let acc = (0..k).map(|i| wide(a[row * k + i]) * wide(w[col * k + i])).sum();
            out.push(finish(acc, row, col, n, epilogue));
        }
    }
    out
}

/// `value * gelu(gate)` with `[value, gate] = a[m, k] * w^T + bias`, where
/// `w` is `[2 h, k]`: `[m, h]`.
pub fn geglu<T: Element>(a: &[T], w: &[T], h: usize, k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    assert_eq!(w.len(), 2 * h * k, "reference geglu: the weight is not [2 h, k]");
    let m = a.len().checked_div(k).unwrap_or(0);
    let dot = |row: usize, col: usize| -> f64 {
        let acc: f64 = (0..k).map(|i| wide(a[row * k + i]) * wide(w[col * k + i])).sum();
        acc + bias.map_or(0.0, |b| f64::from(b[col]))
    };
    (0..m)
        .flat_map(|row| (0..h).map(move |col| (row, col)))
        .map(|(row, col)| (dot(row, col) * activation(Activation::Gelu, dot(row, h + col))) as f32)
        .collect()
}

/// Source row or column of nearest-neighbour upsampling, which PyTorch
/// computes in float32 and rounds down.
fn nearest(dst: usize, input: usize, output: usize) -> usize {
    if input == output {
        return dst;
    }
    ((dst as f32 * (input as f32 / output as f32)) as usize).min(input - 1)
}

/// `epilogue(conv(x[b, in_h, in_w, in_c], w))` with `w` in the order
/// `[n, kernel_h, kernel_w, in_c]`: `[b, out_h, out_w, n]`.
pub fn conv2d<T: Element>(
    x: &[T],
    shape: &ConvShape,
    w: &[T],
    n: usize,
    epilogue: &Epilogue<'_, T>,
) -> Vec<f32> {
    let s = shape;
    assert_eq!(x.len(), s.batch * s.in_h * s.in_w * s.in_c, "reference conv2d: the input's length");
    assert_eq!(w.len(), n * s.kernel_h * s.kernel_w * s.in_c, "reference conv2d: the weight's length");
    // The input's row or column for an output position and a kernel offset, if it is inside.
    let source = |o: usize, k: usize, pad: usize, input: usize, up: usize| {
        (o * s.stride + k).checked_sub(pad).filter(|&i| i < up).map(|i| nearest(i, input, up))
    };
    let mut out = Vec::with_capacity(s.batch * s.out_h * s.out_w * n);
    for pixel in 0..s.batch * s.out_h * s.out_w {
        let (b, oy, ox) = (pixel / (s.out_h * s.out_w), pixel / s.out_w % s.out_h, pixel % s.out_w);
        for o in 0..n {
            let mut acc = 0.0;
            for kh in 0..s.kernel_h {
                for kw in 0..s.kernel_w {
                    let iy = source(oy, kh, s.pad_top, s.in_h, s.up_h);
                    let ix = source(ox, kw, s.pad_left, s.in_w, s.up_w);
                    if let (Some(iy), Some(ix)) = (iy, ix) {
                        let x = &x[((b * s.in_h + iy) * s.in_w + ix) * s.in_c..][..s.in_c];
                        let w = &w[((o * s.kernel_h + kh) * s.kernel_w + kw) * s.in_c..][..s.in_c];
                        acc += x.iter().zip(w).map(|(&x, &w)| wide(x) * wide(w)).sum::<f64>();
                    }
                }
            }
            out.push(finish(acc, pixel, o, n, epilogue));
        }
    }
    out
}

/// `softmax(scale * q k^T) v`: `[batch, q_len, heads * head_dim]`. A query
/// that sees no key at all gets zeros.
pub fn attention<T: Element>(
    shape: &AttentionShape,
    q: Heads<'_, T>,
    k: Heads<'_, T>,
    v: Heads<'_, T>,
) -> Vec<f32> {
    let s = shape;
    let row = |x: &Heads<'_, T>, len: usize, b: usize, t: usize, h: usize| -> Vec<f64> {
        let start = (b * len + t) * x.row_stride + x.offset + h * s.head_dim;
        x.data[start..][..s.head_dim].iter().map(|&x| wide(x)).collect()
    };
    let mut out = vec![0.0; s.batch * s.q_len * s.heads * s.head_dim];
    for b in 0..s.batch {
        for h in 0..s.heads {
            let keys: Vec<_> = (0..s.kv_len).map(|j| row(&k, s.kv_len, b, j, h)).collect();
            let values: Vec<_> = (0..s.kv_len).map(|j| row(&v, s.kv_len, b, j, h)).collect();
            for i in 0..s.q_len {
                let query = row(&q, s.q_len, b, i, h);
                let visible = if s.causal { s.kv_len.min(i + 1) } else { s.kv_len };
                let score = |key: &Vec<f64>| {
                    f64::from(s.scale) * query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>()
                };
                let scores: Vec<f64> = keys[..visible].iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
                let sum: f64 = p.iter().sum();
                let out = &mut out[((b * s.q_len + i) * s.heads + h) * s.head_dim..][..s.head_dim];
                for (d, out) in out.iter_mut().enumerate() {
                    let weighted: f64 = p.iter().zip(&values).map(|(p, v)| p * v[d]).sum();
                    *out = if visible == 0 { 0.0 } else { (weighted / sum) as f32 };
                }
            }
        }
    }
    out
}

/// Mean and reciprocal standard deviation of some values.
fn moments(values: impl Iterator<Item = f64> + Clone, eps: f32) -> (f64, f64) {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let var = values.map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    (mean, 1.0 / (var + f64::from(eps)).sqrt())
}

/// Group normalisation as a factor and a summand for each picture and
/// channel, both `[batch, channels]`: `gamma / std` and `beta - mean * gamma / std`.
pub fn group_norm_scale_shift<T: Element>(
    x: &[T],
    shape: &GroupNormShape,
    gamma: &[f32],
    beta: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let s = shape;
    assert_eq!(x.len(), s.batch * s.pixels * s.channels, "reference group_norm: the input's length");
    let width = s.channels / s.groups;
    let (mut scale, mut shift) = (Vec::new(), Vec::new());
    for b in 0..s.batch {
        for g in 0..s.groups {
            let at = |i: usize| (b * s.pixels + i / width) * s.channels + g * width + i % width;
            let (mean, inv) = moments((0..s.pixels * width).map(|i| wide(x[at(i)])), s.eps);
            for c in g * width..(g + 1) * width {
                scale.push((f64::from(gamma[c]) * inv) as f32);
                shift.push((f64::from(beta[c]) - mean * f64::from(gamma[c]) * inv) as f32);
            }
        }
    }
    (scale, shift)
}

/// Group normalisation followed by an activation, over
/// `[batch, pixels, channels]`.
pub fn group_norm<T: Element>(
    x: &[T],
    shape: &GroupNormShape,
    gamma: &[f32],
    beta: &[f32],
    act: Activation,
) -> Vec<f32> {
    let s = shape;
    let width = s.channels / s.groups;
    let mut out = vec![0.0; x.len()];
    for b in 0..s.batch {
        for g in 0..s.groups {
            let at = |i: usize| (b * s.pixels + i / width) * s.channels + g * width + i % width;
            let (mean, inv) = moments((0..s.pixels * width).map(|i| wide(x[at(i)])), s.eps);
            for i in 0..s.pixels * width {
                let c = g * width + i % width;
                let y = (wide(x[at(i)]) - mean) * inv * f64::from(gamma[c]) + f64::from(beta[c]);
                out[at(i)] = activation(act, y) as f32;
            }
        }
    }
    out
}

/// Layer normalisation of each row of `[rows, channels]`.
pub fn layer_norm<T: Element>(x: &[T], channels: usize, eps: f32, gamma: &[f32], beta: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(channels) {
        let (mean, inv) = moments(row.iter().map(|&x| wide(x)), eps);
        let normalised = row.iter().zip(gamma.iter().zip(beta));
        out.extend(
            normalised.map(|(&x, (&g, &b))| ((wide(x) - mean) * inv * f64::from(g) + f64::from(b)) as f32),
        );
    }
    out
}

/// `activation(x)`.
pub fn activate<T: Element>(x: &[T], act: Activation) -> Vec<f32> {
    x.iter().map(|&x| activation(act, wide(x)) as f32).collect()
}

/// `a + b`.
pub fn add<T: Element>(a: &[T], b: &[T]) -> Vec<f32> {
    a.iter().zip(b).map(|(&a, &b)| (wide(a) + wide(b)) as f32).collect()
}

/// `a[rows, a_cols]` and `b[rows, b_cols]` side by side.
pub fn concat_columns<T: Element>(rows: usize, a: &[T], a_cols: usize, b: &[T], b_cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(a.len() + b.len());
    for r in 0..rows {
        out.extend_from_slice(&a[r * a_cols..][..a_cols]);
        out.extend_from_slice(&b[r * b_cols..][..b_cols]);
    }
    out
}

/// `x` in the other element type (or the same).
pub fn convert<S: Element, T: Element>(x: &[S]) -> Vec<T> {
    x.iter().map(|x| T::from_f32(x.to_f32())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values from the C library's erf, erfc and exp.
    #[test]
    fn activations_match_known_values() {
        let known = [
            (Activation::Gelu, 1.0, 0.841_344_746_068_542_9),
            (Activation::Gelu, -3.0, -0.004_049_694_094_890_287),
            (Activation::Silu, 1.0, 0.731_058_578_630_004_9),
            (Activation::QuickGelu, -1.0, -0.154_204_234_067_178_7),
        ];
        for (act, x, want) in known {
            let got = activation(act, x);
            assert!((got - want).abs() < 1e-14, "{act:?}({x}) = {got}, not {want}");
        }
    }

    /// One query, two keys, by hand: the weights are the logistic of the difference of the scores.
    #[test]
    fn attention_of_two_keys_is_a_logistic() {
        let shape = AttentionShape {
            batch: 1,
            heads: 1,
            head_dim: 1,
            q_len: 1,
            kv_len: 2,
            scale: 0.5,
            causal: false,
        };
        let heads = |data| Heads { data, row_stride: 1, offset: 0 };
        let out = attention(&shape, heads(&[2.0_f32]), heads(&[1.0, 3.0]), heads(&[0.0, 1.0]));
        assert!((out[0] - 1.0 / (1.0 + (-2.0_f32).exp())).abs() < 1e-7);
    }

    #[test]
    fn factor_and_summand_give_the_group_norm() {
        let shape = GroupNormShape { batch: 2, pixels: 5, channels: 6, groups: 3, eps: 1e-5 };
        let x: Vec<f32> = (0..60).map(|i| ((i * 37 % 23) as f32).sin()).collect();
        let gamma = [1.0, 0.5, -2.0, 3.0, 0.0, 1.5];
        let beta = [0.0, 1.0, -1.0, 0.5, 2.0, 0.25];
        let whole = group_norm(&x, &shape, &gamma, &beta, Activation::None);
        let (scale, shift) = group_norm_scale_shift(&x, &shape, &gamma, &beta);
        for (i, y) in whole.iter().enumerate() {
            let at = i / 30 * 6 + i % 6;
            assert!((x[i] * scale[at] + shift[at] - y).abs() < 1e-5);
        }
    }
}
