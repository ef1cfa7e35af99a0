//! The tile instructions of attention, in pieces that [`super::amx`] puts
//! between its vector work. Stable Rust has no intrinsics for AMX, hence
//! `asm!`; the compiler itself never uses tile registers, so they keep their
//! contents from one piece to the next.

use super::amx_plan::TILE;
use crate::gemm::amx::{Between, tile_code};

/// Bytes of a tile.
const BYTES: usize = TILE * 4;

/// No work for the vectors.
pub(super) struct Nothing;

impl Between for Nothing {
    #[inline(always)]
    fn is_done(&self) -> bool {
        true
    }
    #[inline(always)]
    unsafe fn advance(&mut self) {}
}

/// `S = Q K^T` of an item, for 32 keys after 32 keys (a group). A piece is half
/// of a step of 32 columns: 16 keys for all 32 queries. The sums of a group are
/// stored when the next one begins, because a store waits for the products
/// before it, and everything behind the store with it.
pub(super) struct Scores {
    keys: *const f32,
    q: *const f32,
    scores: *mut f32,
    steps: usize,
    groups: usize,
}

impl Scores {
    /// `keys` is `[groups][steps][2]` tiles, `q` `[2][steps]`, `scores` becomes
    /// `[groups][2 halves of the keys][2 halves of the queries]` tiles.
    #[inline(always)]
    pub(super) fn new(keys: &[f32], q: &[f32], scores: *mut f32, steps: usize, groups: usize) -> Self {
        assert!(keys.len() >= groups * 2 * steps * TILE && q.len() >= 2 * steps * TILE);
        Self { keys: keys.as_ptr(), q: q.as_ptr(), scores, steps, groups }
    }

    /// Pieces that there are.
    #[inline(always)]
    pub(super) fn pieces(&self) -> usize {
        2 * self.groups * self.steps + 2
    }

    /// Computes all, and something else between any two pieces.
    ///
    /// # Safety
    /// AMX is there and configured, what this was made of is still alive and as
    /// large as said, and `between` may advance.
    #[inline(always)]
    pub(super) unsafe fn run(&self, between: &mut impl Between) {
        let (mut keys, mut scores) = (self.keys, self.scores);
        let q_row = self.steps * BYTES;
        // SAFETY: by the contract; `new` saw that the slices are long enough.
        unsafe {
            for group in 0..self.groups {
                if group > 0 {
                    store_first(scores);
                }
                tile_code!(["tilezero tmm0", "tilezero tmm1"]; nostack, nomem);
                for step in 0..self.steps {
                    let q = self.q.byte_add(step * BYTES);
                    tile_code!([
                        "tileloadd tmm4, [{q} + {s}]",
                        "tileloaddt1 tmm6, [{k} + {s}]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{q2} + {s}]",
                        "tdpbf16ps tmm1, tmm5, tmm6",
                    ], k = keys, q = q, q2 = q.byte_add(q_row), s = 64_usize; nostack, readonly);
                    between.advance();
                    if step == 0 {
                        if group > 0 {
                            store_second(scores);
                            scores = scores.byte_add(4 * BYTES);
                        }
                        tile_code!(["tilezero tmm2", "tilezero tmm3"]; nostack, nomem);
                    }
                    tile_code!([
                        "tileloaddt1 tmm7, [{k} + {s} + 1024]",
                        "tdpbf16ps tmm2, tmm4, tmm7",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                    ], k = keys, s = 64_usize; nostack, readonly);
                    keys = keys.byte_add(2 * BYTES);
                    between.advance();
                }
            }
            store_first(scores);
            between.advance();
            store_second(scores);
            between.advance();
        }
    }
}

/// # Safety
/// As for [`Scores::run`].
#[inline(always)]
unsafe fn store_first(scores: *mut f32) {
    // SAFETY: by the contract.
    unsafe {
        tile_code!([
            "tilestored [{c} + {s}], tmm0",
            "tilestored [{c} + {s} + 1024], tmm1",
        ], c = scores, s = 64_usize; nostack);
    }
}

/// # Safety
/// As for [`Scores::run`].
#[inline(always)]
unsafe fn store_second(scores: *mut f32) {
    // SAFETY: by the contract.
    unsafe {
        tile_code!([
            "tilestored [{c} + {s} + 2048], tmm2",
            "tilestored [{c} + {s} + 3072], tmm3",
        ], c = scores, s = 64_usize; nostack);
    }
}

/// `O += P V` of an item: for up to three tiles of columns at a time, whose
/// sums then stay in the tiles. A piece is 32 keys for 16 of the queries, or
/// the storing of some sums.
pub(super) struct Output {
    values: *const f32,
    weights: *const f32,
    o: *mut f32,
    columns: usize,
    groups: usize,
    /// Whether there is nothing yet in `o`.
    fresh: bool,
}

impl Output {
    /// `values` is `[groups][columns]` tiles, `weights` `[groups][2]`, `o`
    /// `[columns][2]`.
    #[inline(always)]
    pub(super) fn new(
        values: &[f32],
        weights: *const f32,
        o: &mut [f32],
        columns: usize,
        groups: usize,
        fresh: bool,
    ) -> Self {
        assert!(values.len() >= groups * columns * TILE && o.len() >= 2 * columns * TILE);
        let (values, o) = (values.as_ptr(), o.as_mut_ptr());
        Self { values, weights, o, columns, groups, fresh }
    }

    /// Pieces that there are.
    #[inline(always)]
    pub(super) fn pieces(&self) -> usize {
        self.columns.div_ceil(3) * (2 * self.groups + 2)
    }

    /// Computes all, and something else between any two pieces.
    ///
    /// # Safety
    /// As for [`Scores::run`].
    #[inline(always)]
    pub(super) unsafe fn run(&self, between: &mut impl Between) {
        for first in (0..self.columns).step_by(3) {
            // SAFETY: by the contract; `new` saw that the slices are long enough.
            unsafe {
                let o = self.o.add(first * 2 * TILE);
                let v = self.values.add(first * TILE);
                match self.columns - first {
                    1 => self.run_columns::<1>(v, o, between),
                    2 => self.run_columns::<2>(v, o, between),
                    _ => self.run_columns::<3>(v, o, between),
                }
            }
        }
    }

    /// # Safety
    /// As for [`Scores::run`].
    #[inline(always)]
    unsafe fn run_columns<const COLUMNS: usize>(
        &self,
        mut v: *const f32,
        o: *mut f32,
        between: &mut impl Between,
    ) {
        let mut p = self.weights;
        // SAFETY: by the contract.
        unsafe {
            self.begin::<COLUMNS>(o);
            for _ in 0..self.groups {
                product::<COLUMNS>(v, p, false);
                between.advance();
                product::<COLUMNS>(v, p.add(TILE), true);
                between.advance();
                v = v.add(self.columns * TILE);
                p = p.add(2 * TILE);
            }
            end::<COLUMNS>(o, false);
            between.advance();
            end::<COLUMNS>(o, true);
            between.advance();
        }
    }

    /// Loads the sums of these columns, or zeroes them.
    #[inline(always)]
    unsafe fn begin<const COLUMNS: usize>(&self, o: *mut f32) {
        macro_rules! tiles {
            ($($zero:literal, $load:literal;)*) => {
                if self.fresh {
                    tile_code!([$($zero), *]; nostack, nomem)
                } else {
                    tile_code!([$($load), *], o = o, s = 64_usize; nostack, readonly)
                }
            };
        }
        // SAFETY: by the contract.
        unsafe {
            tiles! {
                "tilezero tmm0", "tileloadd tmm0, [{o} + {s}]";
                "tilezero tmm1", "tileloadd tmm1, [{o} + {s} + 1024]";
            }
            if COLUMNS > 1 {
                tiles! {
                    "tilezero tmm2", "tileloadd tmm2, [{o} + {s} + 2048]";
                    "tilezero tmm3", "tileloadd tmm3, [{o} + {s} + 3072]";
                }
            }
            if COLUMNS > 2 {
                tiles! {
                    "tilezero tmm4", "tileloadd tmm4, [{o} + {s} + 4096]";
                    "tilezero tmm5", "tileloadd tmm5, [{o} + {s} + 5120]";
                }
            }
        }
    }
}

/// Stores the sums of the first 16 queries, or of the others.
///
/// # Safety
/// As for [`Scores::run`].
#[inline(always)]
unsafe fn end<const COLUMNS: usize>(o: *mut f32, second: bool) {
    macro_rules! tiles {
        ($($store:literal),*) => {
            tile_code!([$($store), *], o = o, s = 64_usize; nostack)
        };
    }
    // SAFETY: by the contract.
    unsafe {
        match (second, COLUMNS) {
            (false, 3) => tiles!(
                "tilestored [{o} + {s}], tmm0",
                "tilestored [{o} + {s} + 2048], tmm2",
                "tilestored [{o} + {s} + 4096], tmm4"
            ),
            (false, 2) => {
                tiles!("tilestored [{o} + {s}], tmm0", "tilestored [{o} + {s} + 2048], tmm2");
            }
            (false, _) => tiles!("tilestored [{o} + {s}], tmm0"),
            (true, 3) => tiles!(
                "tilestored [{o} + {s} + 5120], tmm5",
                "tilestored [{o} + {s} + 3072], tmm3",
                "tilestored [{o} + {s} + 1024], tmm1"
            ),
            (true, 2) => {
                tiles!("tilestored [{o} + {s} + 3072], tmm3", "tilestored [{o} + {s} + 1024], tmm1");
            }
            (true, _) => tiles!("tilestored [{o} + {s} + 1024], tmm1"),
        }
    }
}

/// 16 queries' weights of 32 keys times up to three tiles of columns. The
/// second 16 take the columns backwards: the last one is still there.
///
/// # Safety
/// As for [`Scores::run`].
#[inline(always)]
unsafe fn product<const COLUMNS: usize>(v: *const f32, p: *const f32, second: bool) {
    macro_rules! tiles {
        ($($line:literal),*) => {
            tile_code!([$($line), *], v = v, p = p, s = 64_usize; nostack, readonly)
        };
    }
    // SAFETY: by the contract.
    unsafe {
        match (second, COLUMNS) {
            (false, 3) => tiles!(
                "tileloadd tmm6, [{p} + {s}]",
                "tileloaddt1 tmm7, [{v} + {s}]",
                "tdpbf16ps tmm0, tmm6, tmm7",
                "tileloaddt1 tmm7, [{v} + {s} + 1024]",
                "tdpbf16ps tmm2, tmm6, tmm7",
                "tileloaddt1 tmm7, [{v} + {s} + 2048]",
                "tdpbf16ps tmm4, tmm6, tmm7"
            ),
            (true, 3) => tiles!(
                "tileloadd tmm6, [{p} + {s}]",
                "tdpbf16ps tmm5, tmm6, tmm7",
                "tileloaddt1 tmm7, [{v} + {s} + 1024]",
                "tdpbf16ps tmm3, tmm6, tmm7",
                "tileloaddt1 tmm7, [{v} + {s}]",
                "tdpbf16ps tmm1, tmm6, tmm7"
            ),
            (false, 2) => tiles!(
                "tileloadd tmm6, [{p} + {s}]",
                "tileloaddt1 tmm4, [{v} + {s}]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tileloaddt1 tmm5, [{v} + {s} + 1024]",
                "tdpbf16ps tmm2, tmm6, tmm5"
            ),
            (true, 2) => tile_code!([
                "tileloadd tmm7, [{p} + {s}]",
                "tdpbf16ps tmm1, tmm7, tmm4",
                "tdpbf16ps tmm3, tmm7, tmm5",
            ], p = p, s = 64_usize; nostack, readonly),
            (false, _) => tiles!(
                "tileloadd tmm6, [{p} + {s}]",
                "tileloaddt1 tmm4, [{v} + {s}]",
                "tdpbf16ps tmm0, tmm6, tmm4"
            ),
            (true, _) => tile_code!([
                "tileloadd tmm7, [{p} + {s}]",
                "tdpbf16ps tmm1, tmm7, tmm4",
            ], p = p, s = 64_usize; nostack, readonly),
        }
    }
}
