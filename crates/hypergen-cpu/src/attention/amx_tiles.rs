//! The tile instructions of attention, in pieces that [`super::amx`] puts
//! between its vector work. Stable Rust has no intrinsics for AMX, hence
//! `asm!`; the compiler itself never uses tile registers, so they keep their
//! contents from one piece to the next.

use std::arch::asm;

/// 32-bit words of a tile: 16 rows of 64 bytes, packed one after another on
/// cache lines, because rows that straddle lines load three times slower.
pub(super) const TILE: usize = 256;

#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Makes all eight tiles 16 rows of 64 bytes.
///
/// # Safety
/// The machine has AMX, and the process may use it.
#[inline(always)]
pub(crate) unsafe fn configure() {
    static ALL: Configuration = {
        let mut c =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut i = 0;
        while i < 8 {
            (c.row_bytes[i], c.rows[i]) = (64, 16);
            i += 1;
        }
        c
    };
    // SAFETY: by the contract; reads 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const ALL, options(nostack, readonly)) }
}

/// Gives the tiles back, so that the system need not save them any more.
///
/// # Safety
/// The machine has AMX.
#[inline(always)]
pub(crate) unsafe fn release() {
    // SAFETY: by the contract.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// `S = K Q^T` of an item, 32 keys a piece.
pub(super) struct Scores {
    keys: *const f32,
    q: *const f32,
    scores: *mut f32,
    /// Tiles over the width of the head.
    steps: usize,
    pieces: usize,
}

impl Scores {
    /// `keys` and `q` are `[16 rows each][steps]` tiles, `scores` becomes
    /// `[pieces * 2][2]` tiles.
    #[inline(always)]
    pub(super) fn new(keys: &[f32], q: &[f32], scores: &mut [f32], steps: usize, pieces: usize) -> Self {
        assert!(keys.len() >= pieces * 2 * steps * TILE && q.len() >= 2 * steps * TILE);
        assert!(scores.len() >= pieces * 4 * TILE);
        Self { keys: keys.as_ptr(), q: q.as_ptr(), scores: scores.as_mut_ptr(), steps, pieces }
    }

    /// Tile products that are left.
    #[inline(always)]
    pub(super) fn products_left(&self) -> usize {
        self.pieces * self.steps * 4
    }

    /// Starts the next 32 keys.
    ///
    /// # Safety
    /// AMX is there and configured, the slices that this was made of are still
    /// alive, and some pieces are left.
    #[inline(always)]
    pub(super) unsafe fn advance(&mut self) {
        let row = self.steps * TILE * 4;
        // SAFETY: by the contract; `new` saw that the slices are long enough.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{k} + {s}]",
                "tileloadd tmm6, [{q} + {s}]",
                "tileloadd tmm7, [{q2} + {s}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{k2} + {s}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {k}, 1024",
                "add {k2}, 1024",
                "add {q}, 1024",
                "add {q2}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {s}], tmm0",
                "tilestored [{c} + {s} + 1024], tmm1",
                "tilestored [{c} + {s} + 2048], tmm2",
                "tilestored [{c} + {s} + 3072], tmm3",
                k = inout(reg) self.keys => _,
                k2 = inout(reg) self.keys.byte_add(row) => _,
                q = inout(reg) self.q => _,
                q2 = inout(reg) self.q.byte_add(row) => _,
                c = in(reg) self.scores,
                n = inout(reg) self.steps => _,
                s = in(reg) 64_usize,
                options(nostack),
            );
            self.keys = self.keys.byte_add(2 * row);
            self.scores = self.scores.add(4 * TILE);
        }
        self.pieces -= 1;
    }
}

/// `O += V^T P` of an item: for up to three tiles of columns at a time, whose
/// sums then stay in the tiles, 32 keys a piece.
pub(super) struct Output {
    values: *const f32,
    weights: *const f32,
    o: *mut f32,
    /// Tiles of columns that are left, the present ones included.
    columns: usize,
    /// Bytes of values of 32 keys.
    row: usize,
    /// Pieces of 32 keys altogether, and those done of the present columns.
    steps: usize,
    done: usize,
    /// Whether there is nothing yet in `o`.
    fresh: bool,
}

impl Output {
    /// `values` is `[steps][columns]` tiles, `weights` `[steps][2]`, `o`
    /// `[columns][2]`.
    #[inline(always)]
    pub(super) fn new(
        values: &[f32],
        weights: &[f32],
        o: &mut [f32],
        columns: usize,
        steps: usize,
        fresh: bool,
    ) -> Self {
        assert!(values.len() >= steps * columns * TILE && weights.len() >= steps * 2 * TILE);
        assert!(o.len() >= 2 * columns * TILE);
        let (values, weights, o) = (values.as_ptr(), weights.as_ptr(), o.as_mut_ptr());
        Self { values, weights, o, columns, row: columns * TILE * 4, steps, done: 0, fresh }
    }

    /// Tile products that are left.
    #[inline(always)]
    pub(super) fn products_left(&self) -> usize {
        let now = self.columns.min(3);
        2 * (self.columns * self.steps - now * self.done)
    }

    /// Starts the next 32 keys.
    ///
    /// # Safety
    /// AMX is there and configured, the slices that this was made of are still
    /// alive, some pieces are left, and no other tile work came between the
    /// pieces of the same columns.
    #[inline(always)]
    pub(super) unsafe fn advance(&mut self) {
        // SAFETY: by the contract; `new` saw that the slices are long enough.
        unsafe {
            let columns = self.columns.min(3);
            if self.done == 0 {
                self.begin(columns);
            }
            let v = self.values.byte_add(self.done * self.row);
            let p = self.weights.add(self.done * 2 * TILE);
            // One tile for values, one for weights: six hold the sums.
            match columns {
                3 => asm!(
                    "tileloadd tmm6, [{p} + {s}]",
                    "tileloadd tmm7, [{v} + {s}]",
                    "tdpbf16ps tmm0, tmm7, tmm6",
                    "tileloadd tmm7, [{v} + {s} + 1024]",
                    "tdpbf16ps tmm2, tmm7, tmm6",
                    "tileloadd tmm7, [{v} + {s} + 2048]",
                    "tdpbf16ps tmm4, tmm7, tmm6",
                    "tileloadd tmm6, [{p} + {s} + 1024]",
                    "tdpbf16ps tmm5, tmm7, tmm6",
                    "tileloadd tmm7, [{v} + {s} + 1024]",
                    "tdpbf16ps tmm3, tmm7, tmm6",
                    "tileloadd tmm7, [{v} + {s}]",
                    "tdpbf16ps tmm1, tmm7, tmm6",
                    v = in(reg) v, p = in(reg) p, s = in(reg) 64_usize, options(nostack, readonly),
                ),
                2 => asm!(
                    "tileloadd tmm6, [{p} + {s}]",
                    "tileloadd tmm4, [{v} + {s}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{v} + {s} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm7, [{p} + {s} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    v = in(reg) v, p = in(reg) p, s = in(reg) 64_usize, options(nostack, readonly),
                ),
                _ => asm!(
                    "tileloadd tmm4, [{v} + {s}]",
                    "tileloadd tmm6, [{p} + {s}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{p} + {s} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    v = in(reg) v, p = in(reg) p, s = in(reg) 64_usize, options(nostack, readonly),
                ),
            }
            self.done += 1;
            if self.done == self.steps {
                self.end(columns);
                self.done = 0;
                self.columns -= columns;
                self.values = self.values.add(columns * TILE);
                self.o = self.o.add(2 * columns * TILE);
            }
        }
    }

    /// Loads the sums of these columns, or zeroes them.
    #[inline(always)]
    unsafe fn begin(&self, columns: usize) {
        macro_rules! tiles {
            ($($zero:literal, $load:literal;)*) => {
                if self.fresh {
                    asm!($($zero),*, options(nostack, nomem))
                } else {
                    asm!($($load),*, o = in(reg) self.o, s = in(reg) 64_usize, options(nostack, readonly))
                }
            };
        }
        // SAFETY: by the contract of `advance`.
        unsafe {
            match columns {
                3 => tiles! {
                    "tilezero tmm0", "tileloadd tmm0, [{o} + {s}]";
                    "tilezero tmm1", "tileloadd tmm1, [{o} + {s} + 1024]";
                    "tilezero tmm2", "tileloadd tmm2, [{o} + {s} + 2048]";
                    "tilezero tmm3", "tileloadd tmm3, [{o} + {s} + 3072]";
                    "tilezero tmm4", "tileloadd tmm4, [{o} + {s} + 4096]";
                    "tilezero tmm5", "tileloadd tmm5, [{o} + {s} + 5120]";
                },
                2 => tiles! {
                    "tilezero tmm0", "tileloadd tmm0, [{o} + {s}]";
                    "tilezero tmm1", "tileloadd tmm1, [{o} + {s} + 1024]";
                    "tilezero tmm2", "tileloadd tmm2, [{o} + {s} + 2048]";
                    "tilezero tmm3", "tileloadd tmm3, [{o} + {s} + 3072]";
                },
                _ => tiles! {
                    "tilezero tmm0", "tileloadd tmm0, [{o} + {s}]";
                    "tilezero tmm1", "tileloadd tmm1, [{o} + {s} + 1024]";
                },
            }
        }
    }

    /// Stores the sums of these columns.
    #[inline(always)]
    unsafe fn end(&self, columns: usize) {
        macro_rules! tiles {
            ($($store:literal),*) => {
                asm!($($store),*, o = in(reg) self.o, s = in(reg) 64_usize, options(nostack))
            };
        }
        // SAFETY: by the contract of `advance`.
        unsafe {
            tiles!("tilestored [{o} + {s}], tmm0", "tilestored [{o} + {s} + 1024], tmm1");
            if columns > 1 {
                tiles!("tilestored [{o} + {s} + 2048], tmm2", "tilestored [{o} + {s} + 3072], tmm3");
            }
            if columns > 2 {
                tiles!("tilestored [{o} + {s} + 4096], tmm4", "tilestored [{o} + {s} + 5120], tmm5");
            }
        }
    }
}
