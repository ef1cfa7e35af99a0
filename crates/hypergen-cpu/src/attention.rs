//! Multi-head attention with a running softmax: scores live in blocks that
//! stay in the cache and are never written out whole (Dao et al. 2022; the
//! running softmax is Milakov and Gimelshein's, 2018). This file holds the
//! contract and the choice of kernel; the kernels are beside it:
//!
//! * [`vector`]: float32 products, any instruction set;
//! * [`pairs`]: bfloat16 dot products of AVX-512;
//! * [`amx`]: bfloat16 tiles, whose instructions are in [`amx_tiles`], whose
//!   operands [`pack512`] lays out and whose softmax is [`amx_weights`];
//!   [`amx_plan`] says who computes what.
//!
//! On vectors the problem is transposed, keys by queries: a lane is a query, so
//! maxima, sums and factors of the softmax need no work across lanes. On tiles
//! it is queries by keys. Either way no query can see what its neighbours are.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_plan;
#[cfg(target_arch = "x86_64")]
mod amx_tiles;
#[cfg(target_arch = "x86_64")]
mod amx_weights;
#[cfg(target_arch = "x86_64")]
mod pack512;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod vector;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use crate::Isa;
use crate::split::Shared;
use crate::{Cpu, Element, ElementKind};

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

impl<'a, T: Element> Heads<'a, T> {
    /// One token of one head.
    #[inline(always)]
    fn token(&self, s: &AttentionShape, token: usize, head: usize) -> &'a [T] {
        &self.data[token * self.row_stride + self.offset + head * s.head_dim..][..s.head_dim]
    }

    fn check(&self, s: &AttentionShape, what: &str, len: usize) {
        let tokens = s.batch * len;
        if tokens * s.heads * s.head_dim == 0 {
            return;
        }
        let columns = self.offset + s.heads * s.head_dim;
        let needed = (tokens - 1) * self.row_stride + columns;
        assert!(
            columns <= self.row_stride && needed <= self.data.len(),
            "attention: {what} of {} elements with rows of {} do not hold columns {}..{columns} of {tokens} tokens",
            self.data.len(),
            self.row_stride,
            self.offset,
        );
    }

    /// The same, if the elements are bfloat16.
    #[cfg(target_arch = "x86_64")]
    fn as_bf16(&self) -> Option<Heads<'a, bf16>> {
        if T::KIND != ElementKind::Bf16 {
            return None;
        }
        // SAFETY: the kind says that `T` is bf16.
        let data = unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.data.len()) };
        Some(Heads { data, row_stride: self.row_stride, offset: self.offset })
    }
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

impl AttentionShape {
    /// Keys that any of the queries up to `last` sees.
    fn visible(&self, last: usize) -> usize {
        if self.causal { self.kv_len.min(last + 1) } else { self.kv_len }
    }
}

/// `out[batch, q_len, heads * head_dim] = softmax(scale * q k^T) v`. Without
/// any keys the result is zeros.
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
    let s = shape;
    q.check(s, "queries", s.q_len);
    k.check(s, "keys", s.kv_len);
    v.check(s, "values", s.kv_len);
    assert_eq!(out.len(), s.batch * s.q_len * s.heads * s.head_dim, "attention: the output is not {s:?}");
    if out.is_empty() {
        return;
    }
    if s.kv_len == 0 {
        out.fill(T::default());
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let (Some(q), Some(k), Some(v)) = (q.as_bf16(), k.as_bf16(), v.as_bf16()) {
        // SAFETY: all element types are the same, and that one is bf16.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<bf16>(), out.len()) };
        match cpu.isa() {
            Isa::AmxBf16 => return amx::attention(cpu, s, q, k, v, out),
            Isa::Avx512Bf16 => return pairs::attention(cpu, s, q, k, v, out),
            _ => {}
        }
    }
    vector::attention(cpu, s, q, k, v, out);
}

#[allow(clippy::mut_from_ref, reason = "the contract is what the lint asks about")]
/// The part of the output that belongs to one query of one head.
///
/// # Safety
/// No two parts that are alive at the same time may be the same.
unsafe fn output<'a, T>(
    out: &'a Shared<'_, T>,
    s: &AttentionShape,
    b: usize,
    i: usize,
    h: usize,
) -> &'a mut [T] {
    let start = ((b * s.q_len + i) * s.heads + h) * s.head_dim;
    // SAFETY: parts of different queries or heads do not overlap.
    unsafe { out.part(start, s.head_dim) }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod emulated;
#[cfg(test)]
mod tests;
