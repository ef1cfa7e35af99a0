//! Attention against the reference, on every instruction set.

use half::bf16;

use super::*;
use crate::testing::{Values, assert_close, cpu, every_cpu, sets};
use crate::{Isa, reference};

/// Queries, keys and values as columns of one tensor or of three, with room
/// before and behind that must not matter.
pub(super) struct Inputs<T> {
    pub(super) q: Vec<T>,
    pub(super) k: Vec<T>,
    pub(super) v: Vec<T>,
    pub(super) stride: usize,
}

const OFFSET: usize = 3;

impl<T: Element> Inputs<T> {
    pub(super) fn new(s: &AttentionShape, spread: f32) -> Self {
        let stride = OFFSET + s.heads * s.head_dim + 2;
        let values = |seed, len: usize, spread: f32| -> Vec<T> {
            let x = Values::new(seed).normal::<f32>(s.batch * len * stride);
            x.into_iter().map(|x| T::from_f32(x * spread)).collect()
        };
        Self {
            q: values(1, s.q_len, spread),
            k: values(2, s.kv_len, 1.0),
            v: values(3, s.kv_len, 1.0),
            stride,
        }
    }

    pub(super) fn heads(&self) -> [Heads<'_, T>; 3] {
        [&self.q, &self.k, &self.v].map(|data| Heads { data, row_stride: self.stride, offset: OFFSET })
    }

    fn run(&self, cpu: &Cpu, s: &AttentionShape) -> Vec<T> {
        let [q, k, v] = self.heads();
        let mut out = vec![T::from_f32(f32::NAN); s.batch * s.q_len * s.heads * s.head_dim];
        attention(cpu, s, q, k, v, &mut out);
        out
    }

    fn reference(&self, s: &AttentionShape) -> Vec<f32> {
        let [q, k, v] = self.heads();
        reference::attention(s, q, k, v)
    }
}

/// Batch, heads, head_dim, q_len, kv_len.
pub(super) fn shape([batch, heads, head_dim, q_len, kv_len]: [usize; 5]) -> AttentionShape {
    let scale = 1.0 / (head_dim.max(1) as f32).sqrt();
    AttentionShape { batch, heads, head_dim, q_len, kv_len, scale, causal: false }
}

pub(super) const SHAPES: [[usize; 5]; 16] = [
    [1, 1, 1, 1, 1],
    [1, 2, 8, 3, 15],
    [2, 3, 40, 17, 77],
    [1, 1, 7, 63, 31],
    [1, 2, 64, 47, 33],
    [1, 1, 80, 49, 129],
    [1, 1, 160, 16, 64],
    [1, 1, 33, 97, 257],
    [1, 1, 32, 33, 1031],
    [1, 1, 512, 5, 131],
    [2, 1, 16, 2, 300],
    [3, 2, 40, 64, 256],
    [0, 2, 8, 4, 4],
    [1, 2, 8, 0, 4],
    [1, 2, 8, 4, 0],
    [1, 2, 0, 4, 4],
];

/// In bfloat16 the weights are rounded too: three significant digits, of
/// values that partly cancel.
fn check<T: Element>(tolerance: f32) {
    for cpu in every_cpu() {
        for sizes in SHAPES {
            for causal in [false, true] {
                let s = AttentionShape { causal, ..shape(sizes) };
                let inputs = Inputs::<T>::new(&s, 1.0);
                let what = format!("attention {s:?}");
                assert_close(&what, &cpu, &inputs.run(&cpu, &s), &inputs.reference(&s), tolerance);
            }
        }
    }
}

#[test]
fn float32_matches_the_reference() {
    check::<f32>(2e-6);
}

#[test]
fn bfloat16_matches_the_reference() {
    check::<bf16>(6e-3);
}

/// Scores in the hundreds: exponentials under- and overflow unless the maximum
/// is taken off, wherever among the keys it lies.
#[test]
fn large_scores_are_harmless() {
    for cpu in every_cpu() {
        for scale in [20.0, -20.0, 0.0] {
            for growing in [false, true] {
                let s = AttentionShape { scale, ..shape([1, 2, 40, 35, 300]) };
                let mut inputs = Inputs::<f32>::new(&s, 1.0);
                if growing {
                    // Later keys weigh more, so that the maximum rises all the way.
                    let stride = inputs.stride;
                    for (i, k) in inputs.k.iter_mut().enumerate() {
                        *k *= (i / stride) as f32 / 100.0;
                    }
                }
                let narrow = Inputs::<bf16> {
                    q: reference::convert(&inputs.q),
                    k: reference::convert(&inputs.k),
                    v: reference::convert(&inputs.v),
                    stride: inputs.stride,
                };
                let what = format!("scale {scale}, growing {growing}");
                assert_close(&what, &cpu, &inputs.run(&cpu, &s), &inputs.reference(&s), 1e-3);
                assert_close(&what, &cpu, &narrow.run(&cpu, &s), &narrow.reference(&s), 1e-2);
            }
        }
    }
}

/// A query's result has the same bytes alone and among any others, in any
/// picture of a batch, on any number of threads.
fn check_invariance<T: Element>() {
    for sizes in [[2, 2, 40, 131, 77], [2, 1, 64, 70, 300]] {
        for causal in [false, true] {
            let s = AttentionShape { causal, ..shape(sizes) };
            let inputs = Inputs::<T>::new(&s, 4.0);
            let columns = s.heads * s.head_dim;
            for &isa in sets() {
                let whole = inputs.run(&cpu(isa, 1), &s);
                for threads in [2, 5] {
                    assert!(inputs.run(&cpu(isa, threads), &s) == whole, "{isa}, {threads} threads, {s:?}");
                }
                // The last picture alone, and of it only the first queries (or,
                // where no mask counts them, only some in the middle).
                let [q, k, v] = inputs.heads();
                let from = if causal { 0 } else { 37 };
                let one = AttentionShape { batch: 1, q_len: 20, ..s };
                let q = Heads { data: &q.data[(s.q_len + from) * q.row_stride..], ..q };
                let k = Heads { data: &k.data[s.kv_len * k.row_stride..], ..k };
                let v = Heads { data: &v.data[s.kv_len * v.row_stride..], ..v };
                let mut out = vec![T::default(); one.q_len * columns];
                attention(&cpu(isa, 1), &one, q, k, v, &mut out);
                let start = (s.q_len + from) * columns;
                assert!(out == whole[start..start + out.len()], "{isa}, some queries alone, {s:?}");
            }
        }
    }
}

#[test]
fn float32_depends_on_nothing_else() {
    check_invariance::<f32>();
}

#[test]
fn bfloat16_depends_on_nothing_else() {
    check_invariance::<bf16>();
}

#[test]
#[should_panic(expected = "keys of 79 elements")]
fn short_keys_are_refused() {
    let s = shape([1, 2, 8, 5, 5]);
    let heads = |data| Heads { data, row_stride: 16, offset: 0 };
    let (q, k) = (vec![0.0_f32; 80], vec![0.0; 79]);
    attention(&cpu(Isa::Portable, 1), &s, heads(&q), heads(&k), heads(&q), &mut [0.0; 80]);
}

#[test]
#[should_panic(expected = "columns 9..25")]
fn columns_beyond_the_row_are_refused() {
    let s = shape([1, 2, 8, 5, 5]);
    let x = vec![0.0_f32; 200];
    let heads = |offset| Heads { data: &x[..], row_stride: 24, offset };
    attention(&cpu(Isa::Portable, 1), &s, heads(0), heads(9), heads(0), &mut [0.0; 80]);
}
