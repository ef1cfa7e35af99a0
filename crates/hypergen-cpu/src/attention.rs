//! Multi-head attention with a running softmax.

use crate::{Cpu, Element};

/// Where queries, keys or values of all heads lie: element `d` of head `h` of
/// token `t` of picture `b` is `data[(b * len + t) * row_stride + offset + h * head_dim + d]`.
/// So the three may be column ranges of one fused projection.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a, T> {
    /// The tensor that holds them.
    pub data: &'a [T],
    /// Elements from one token to the next.
    pub row_stride: usize,
    /// Column at which head 0 begins.
    pub offset: usize,
}

/// Sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Pictures or texts.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head; any number.
    pub head_dim: usize,
    /// Query tokens.
    pub q_len: usize,
    /// Key and value tokens.
    pub kv_len: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Whether token `i` sees only tokens `0..=i`.
    pub causal: bool,
}

/// `out[batch, q_len, heads * head_dim] = softmax(scale * q k^T) v`.
///
/// # Panics
/// When a slice's length does not fit the shape.
pub fn attention<T: Element>(
    cpu: &Cpu,
    shape: &AttentionShape,
    q: Heads<'_, T>,
    k: Heads<'_, T>,
    v: Heads<'_, T>,
    out: &mut [T],
) {
    let _ = cpu;
    let s = shape;
    let at = |x: &Heads<'_, T>, len: usize, b: usize, t: usize, h: usize, d: usize| {
        x.data[(b * len + t) * x.row_stride + x.offset + h * s.head_dim + d].to_f32()
    };
    for b in 0..s.batch {
        for h in 0..s.heads {
            for i in 0..s.q_len {
                let visible = if s.causal { i + 1 } else { s.kv_len };
                let mut p: Vec<f32> = (0..visible)
                    .map(|j| {
                        s.scale
                            * (0..s.head_dim)
                                .map(|d| at(&q, s.q_len, b, i, h, d) * at(&k, s.kv_len, b, j, h, d))
                                .sum::<f32>()
                    })
                    .collect();
                let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                p.iter_mut().for_each(|p| *p = (*p - max).exp());
                let sum: f32 = p.iter().sum();
                for d in 0..s.head_dim {
                    let value =
                        p.iter().enumerate().map(|(j, p)| p * at(&v, s.kv_len, b, j, h, d)).sum::<f32>()
                            / sum;
                    out[((b * s.q_len + i) * s.heads + h) * s.head_dim + d] = T::from_f32(value);
                }
            }
        }
    }
}
