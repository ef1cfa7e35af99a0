//! Microkernels over vectors, written once for all sets without tiles, and
//! what differs between the sets: how many rows of accumulators fit into the
//! registers, and whether there is a dot product of bfloat16 pairs.
//!
//! A microkernel adds `a[rows, k] * b[k, 32]` to a tile of accumulators. The
//! sum over `k` runs in order for every element, whatever the number of rows,
//! so results do not depend on how the work was cut.

use half::bf16;

use super::packed::{PANEL, STEP, TILE, TILE_K};
use crate::simd::Simd;

/// A set of vectors with what a matrix product needs beyond arithmetic.
pub(crate) trait Registers: Simd {
    /// Rows of a full tile: with two vectors a row, as many as the registers
    /// hold beside two vectors of `b` and a broadcast of `a`.
    const ROWS: usize;
    /// Whether [`Registers::dot`] exists.
    const HAS_DOT: bool = false;

    /// `acc + a.0 * b.0 + a.1 * b.1` over pairs of bfloat16, the pair at `a`
    /// for all lanes and one pair of `b` for each.
    ///
    /// # Safety
    /// [`Registers::HAS_DOT`]; the pointers are readable.
    unsafe fn dot(acc: Self::V, a: *const bf16, b: *const bf16) -> Self::V {
        let _ = (a, b);
        acc
    }
}

/// Bytes from one row of a packed block of A to the next: constant, so that
/// all rows are reached from one register, and short enough that a tile of
/// rows stays in the first-level cache.
pub(crate) const ROW_BYTES: usize = 1024;

/// One call's operands.
#[derive(Clone, Copy)]
pub(crate) struct Operands<A, B> {
    /// `[rows]`, [`ROW_BYTES`] apart.
    pub(crate) a: *const A,
    /// The panel, from the first `k` of this block on.
    pub(crate) b: *const B,
    /// Values of `k` in this block.
    pub(crate) k: usize,
    /// `[rows][32]` accumulators.
    pub(crate) c: *mut f32,
    /// Whether the accumulators start from zero.
    pub(crate) first: bool,
}

/// A microkernel for up to [`Registers::ROWS`] rows.
pub(crate) trait Microkernel<S: Registers> {
    /// The element type of packed A.
    type A: crate::Element;
    /// The element type of the weights.
    type B: crate::Element;

    /// Adds `R` rows of the product for the vectors at columns `col` and
    /// `col + LANES`.
    ///
    /// # Safety
    /// The operands are as described in [`Operands`] and the machine has the set.
    unsafe fn multiply<const R: usize>(
        acc: &mut [[S::V; 2]; R],
        operands: &Operands<Self::A, Self::B>,
        col: usize,
    );
}

/// Runs a microkernel on `rows` rows, at most [`Registers::ROWS`].
///
/// # Safety
/// As for [`Microkernel::multiply`].
#[inline(always)]
pub(crate) unsafe fn tile<S: Registers, M: Microkernel<S>>(rows: usize, operands: &Operands<M::A, M::B>) {
    // Fewer sizes than rows: a row too many costs less than the code for each
    // number. What it computes is never looked at.
    // SAFETY: the caller's contract.
    unsafe {
        match rows {
            0 => {}
            1 => tile_of::<S, M, 1>(operands),
            2 => tile_of::<S, M, 2>(operands),
            3..=4 if S::ROWS >= 4 => tile_of::<S, M, 4>(operands),
            5..=8 if S::ROWS >= 8 => tile_of::<S, M, 8>(operands),
            _ if S::ROWS == 14 => tile_of::<S, M, 14>(operands),
            _ if S::ROWS == 6 => tile_of::<S, M, 6>(operands),
            _ => tile_of::<S, M, 3>(operands),
        }
    }
}

/// The rows that [`tile`] computes, where a set has at most `most`.
#[cfg(test)]
pub(crate) fn computed_rows(rows: usize, most: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 if most >= 4 => 4,
        5..=8 if most >= 8 => 8,
        _ => most,
    }
}

#[inline(always)]
unsafe fn tile_of<S: Registers, M: Microkernel<S>, const R: usize>(operands: &Operands<M::A, M::B>) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut col = 0;
        while col < PANEL {
            let at = |r: usize, v: usize| operands.c.add(r * PANEL + col + v * S::LANES);
            let mut acc = [[S::splat(0.0); 2]; R];
            if !operands.first {
                for (r, row) in acc.iter_mut().enumerate() {
                    *row = [S::load_f32(at(r, 0)), S::load_f32(at(r, 1))];
                }
            }
            M::multiply::<R>(&mut acc, operands, col);
            for (r, row) in acc.iter().enumerate() {
                S::store_f32(at(r, 0), row[0]);
                S::store_f32(at(r, 1), row[1]);
            }
            col += 2 * S::LANES;
        }
    }
}

/// Float32 throughout.
pub(crate) struct Float;

impl<S: Registers> Microkernel<S> for Float {
    type A = f32;
    type B = f32;

    #[inline(always)]
    unsafe fn multiply<const R: usize>(acc: &mut [[S::V; 2]; R], o: &Operands<f32, f32>, col: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            let (mut a, mut b) = (o.a, o.b.add(col));
            for _ in 0..o.k {
                let (b0, b1) = (S::load_f32(b), S::load_f32(b.add(S::LANES)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = S::splat(*a.add(r * (ROW_BYTES / 4)));
                    acc[0] = S::mul_add(x, b0, acc[0]);
                    acc[1] = S::mul_add(x, b1, acc[1]);
                }
                a = a.add(1);
                b = b.add(PANEL);
            }
        }
    }
}

/// Bfloat16 weights that are widened on the way; A was widened when packed.
pub(super) struct Widening;

impl<S: Registers> Microkernel<S> for Widening {
    type A = f32;
    type B = bf16;

    #[inline(always)]
    unsafe fn multiply<const R: usize>(acc: &mut [[S::V; 2]; R], o: &Operands<f32, bf16>, col: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            let columns = pair_columns::<S>(o.b, col);
            for pair in 0..o.k.div_ceil(2) {
                let a = o.a.add(pair * 2);
                let (b0, b0_next) = S::load_bf16_pairs(columns[0].add(pair_offset(pair)));
                let (b1, b1_next) = S::load_bf16_pairs(columns[1].add(pair_offset(pair)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = S::splat(*a.add(r * (ROW_BYTES / 4)));
                    let x_next = S::splat(*a.add(r * (ROW_BYTES / 4) + 1));
                    acc[0] = S::mul_add(x_next, b0_next, S::mul_add(x, b0, acc[0]));
                    acc[1] = S::mul_add(x_next, b1_next, S::mul_add(x, b1, acc[1]));
                }
            }
        }
    }
}

/// Dot products of bfloat16 pairs.
pub(super) struct Dot;

impl<S: Registers> Microkernel<S> for Dot {
    type A = bf16;
    type B = bf16;

    #[inline(always)]
    unsafe fn multiply<const R: usize>(acc: &mut [[S::V; 2]; R], o: &Operands<bf16, bf16>, col: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            let columns = pair_columns::<S>(o.b, col);
            for pair in 0..o.k.div_ceil(2) {
                let a = o.a.add(pair * 2);
                let (b0, b1) = (columns[0].add(pair_offset(pair)), columns[1].add(pair_offset(pair)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let a = a.add(r * (ROW_BYTES / 2));
                    acc[0] = S::dot(acc[0], a, b0);
                    acc[1] = S::dot(acc[1], a, b1);
                }
            }
        }
    }
}

/// Where the two vectors of columns from `col` on begin in a bfloat16 panel.
#[inline(always)]
unsafe fn pair_columns<S: Simd>(b: *const bf16, col: usize) -> [*const bf16; 2] {
    // SAFETY: both columns lie in the panel.
    [col, col + S::LANES].map(|c| unsafe { b.add(c / 16 * TILE + c % 16 * 2) })
}

/// Elements from a bfloat16 panel's start to a pair of `k`.
#[inline(always)]
fn pair_offset(pair: usize) -> usize {
    const PAIRS: usize = TILE_K / 2;
    pair / PAIRS * STEP + pair % PAIRS * 32
}
