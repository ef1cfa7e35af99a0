//! Attention on emulated tiles: the control flow of the tile kernel, run on any
//! machine against the reference. The vectors around the tiles are replaced by
//! loops that say what each of them means.

use std::ops::Range;

use half::bf16;

use super::amx::{Job, attention_by, queries_with};
use super::amx_plan::{Layout, TILE};
use super::amx_weights::{Block, Vectors};
use super::pack512::key_of_word;
use super::tests::{Inputs, SHAPES, shape};
use super::*;
use crate::gemm::amx::Tiles;
use crate::testing::{assert_close, cpu};
use crate::{Isa, reference};

/// Vectors as arrays.
struct Plain;

/// Writes a tile of 16 rows of 16 pairs.
fn fill(tile: &mut [f32], value: impl Fn(usize, usize) -> bf16) {
    for (row, words) in tile.chunks_exact_mut(16).enumerate() {
        for (column, word) in words.iter_mut().enumerate() {
            let half = |i: usize| u32::from(value(row, 2 * column + i).to_bits());
            *word = f32::from_bits(half(0) | half(1) << 16);
        }
    }
}

impl Vectors for Plain {
    type W = [u16; 32];
    type Table = f32;

    unsafe fn pack_keys(s: &AttentionShape, k: &Heads<'_, bf16>, [b, h, first]: [usize; 3], to: &mut [f32]) {
        for (i, tile) in to.chunks_exact_mut(TILE).enumerate() {
            fill(tile, |pair, column| {
                let key = (first + i % 2 * 16 + column / 2).min(s.kv_len - 1);
                let d = i / 2 * 32 + 2 * pair + column % 2;
                k.token(s, b * s.kv_len + key, h).get(d).copied().unwrap_or_default()
            });
        }
    }

    unsafe fn pack_values(
        s: &AttentionShape,
        v: &Heads<'_, bf16>,
        [b, h, first]: [usize; 3],
        to: &mut [f32],
    ) {
        for (i, tile) in to.chunks_exact_mut(TILE).enumerate() {
            fill(tile, |pair, column| {
                let key = first + key_of_word(2 * pair + column % 2);
                let d = i * 16 + column / 2;
                match () {
                    () if key >= s.kv_len => bf16::ZERO,
                    () if d == s.head_dim => bf16::ONE,
                    () => v.token(s, b * s.kv_len + key, h).get(d).copied().unwrap_or_default(),
                }
            });
        }
    }

    unsafe fn pack_queries(
        s: &AttentionShape,
        layout: &Layout,
        q: &Heads<'_, bf16>,
        [b, h, first]: [usize; 3],
        sign: f32,
        to: &mut [f32],
    ) {
        for (i, tile) in to.chunks_exact_mut(TILE).enumerate() {
            fill(tile, |row, column| {
                let query = first + i / layout.steps * 16 + row;
                if query >= s.q_len {
                    return bf16::ZERO;
                }
                let d = i % layout.steps * 32 + column;
                let value = q.token(s, b * s.q_len + query, h).get(d).copied().unwrap_or_default();
                bf16::from_f32(value.to_f32() * sign)
            });
        }
    }

    unsafe fn queries(job: &Job<'_>, head: usize, queries: Range<usize>) {
        // SAFETY: by the contract; every machine has these vectors, and tiles are emulated.
        unsafe { queries_with::<Self>(job, head, queries, Tiles::emulated) }
    }

    unsafe fn finish(job: &Job<'_>, [b, h, first]: [usize; 3], o: &[f32]) {
        let s = job.shape;
        for row in 0..32.min(s.q_len.saturating_sub(first)) {
            let at = |d: usize| o[(d / 16 * 2 + row / 16) * TILE + row % 16 * 16 + d % 16];
            // SAFETY: by the contract.
            let out = unsafe { output(job.out, s, b, first + row, h) };
            for (d, out) in out.iter_mut().enumerate() {
                *out = bf16::from_f32(at(d) / at(s.head_dim));
            }
        }
    }

    unsafe fn raise(block: &Block<Self>, shift: &mut [f32], o: Option<&mut [f32]>) {
        // SAFETY: by the contract.
        unsafe { block.raise(shift, o) }
    }

    unsafe fn zero() -> [u16; 32] {
        [0; 32]
    }
    unsafe fn load(from: *const u16) -> [u16; 32] {
        // SAFETY: by the contract.
        unsafe { from.cast::<[u16; 32]>().read_unaligned() }
    }
    unsafe fn store(to: *mut u16, w: [u16; 32]) {
        // SAFETY: by the contract.
        unsafe { to.cast::<[u16; 32]>().write_unaligned(w) }
    }
    unsafe fn max(a: [u16; 32], b: [u16; 32]) -> [u16; 32] {
        std::array::from_fn(|i| a[i].max(b[i]))
    }
    unsafe fn keep(places: u32, w: [u16; 32]) -> [u16; 32] {
        std::array::from_fn(|i| if places >> i & 1 == 1 { w[i] } else { 0 })
    }
    unsafe fn any_above(w: [u16; 32], limit: u16) -> bool {
        w.iter().any(|&w| w > limit)
    }
    unsafe fn largest(scores: *const f32, seen: usize) -> f32 {
        // SAFETY: by the contract; sixteen scores of a query lie two tiles apart from the next.
        (0..seen.min(64))
            .map(|i| unsafe { *scores.add(i / 16 * 2 * TILE + i % 16) })
            .fold(f32::NEG_INFINITY, f32::max)
    }
    unsafe fn table(scale: f32) -> f32 {
        scale
    }
    unsafe fn weights(scale: &f32, scores: *const f32, shift: f32) -> ([u16; 32], [u16; 32]) {
        let steps: [u16; 32] = std::array::from_fn(|word| {
            let key = key_of_word(word);
            // SAFETY: by the contract.
            let score = unsafe { *scores.add(key / 16 * 2 * TILE + key % 16) };
            (score * scale + shift).round_ties_even().clamp(0.0, 65535.0) as u16
        });
        // 127 steps of 256 are the exponent of 1.
        let weight = |steps: u16| bf16::from_f32(((f32::from(steps) / 256.0) - 127.0).exp2()).to_bits();
        (steps, steps.map(weight))
    }
}

/// The result on emulated tiles.
fn run(s: &AttentionShape, inputs: &Inputs<bf16>, threads: usize) -> Vec<bf16> {
    let [q, k, v] = inputs.heads();
    let mut out = vec![bf16::NAN; s.batch * s.q_len * s.heads * s.head_dim];
    // SAFETY: every machine has plain vectors and emulated tiles.
    unsafe { attention_by::<Plain>(&cpu(Isa::Portable, threads), s, q, k, v, &mut out) };
    out
}

fn check(s: &AttentionShape, inputs: &Inputs<bf16>, tolerance: f32) {
    let [q, k, v] = inputs.heads();
    let want = reference::attention(s, q, k, v);
    let what = format!("{s:?}");
    let got = run(s, inputs, 2);
    assert_close(&what, &cpu(Isa::Portable, 1), &got, &want, tolerance);
    assert!(run(s, inputs, 1) == got && run(s, inputs, 5) == got, "threads change {what}");
}

#[test]
fn tiles_match_the_reference() {
    for sizes in SHAPES {
        if sizes.contains(&0) {
            continue;
        }
        for causal in [false, true] {
            let s = AttentionShape { causal, ..shape(sizes) };
            check(&s, &Inputs::new(&s, 1.0), 6e-3);
        }
    }
}

/// Later keys weigh more than the first 64 by more than the exponent has room
/// for, so shifts are raised, among them those of items with few keys left.
#[test]
fn shifts_are_raised() {
    for kv_len in [65, 96, 128, 200, 300] {
        for causal in [false, true] {
            for scale in [20.0, -20.0] {
                let s = AttentionShape { scale, causal, ..shape([1, 2, 40, 70, kv_len]) };
                let mut inputs = Inputs::<bf16>::new(&s, 1.0);
                let stride = inputs.stride;
                for (i, k) in inputs.k.iter_mut().enumerate() {
                    *k = bf16::from_f32(k.to_f32() * (i / stride) as f32 / 50.0);
                }
                check(&s, &inputs, 1e-2);
            }
        }
    }
}
