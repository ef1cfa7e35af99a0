//! The microkernel on AMX tiles: 32 rows times 32 columns of float32
//! accumulators from tiles of bfloat16, four tiles wide because the eight
//! registers then balance: four loads feed four products. It knows operands
//! in memory only; cutting, packing and epilogues are in `tiles`.

use std::arch::asm;
use std::marker::PhantomData;

use half::bf16;

use super::packed::PANEL;

/// Instructions of the tiles: lines of assembly, named inputs, inputs that are
/// counted up or down (`mut`), and `asm!`'s options. Tests may have the
/// emulator interpret the same lines, on any machine.
macro_rules! tile_code {
    ([$($line:expr),+ $(,)?] $(, $name:ident = $value:expr)*; $($option:ident),+) => {
        tile_code!([$($line),+] $(, $name = $value)*;; $($option),+)
    };
    (
        [$($line:expr),+ $(,)?] $(, $name:ident = $value:expr)*;
        $(mut $counter:ident = $start:expr),*;
        $($option:ident),+
    ) => {{
        #[cfg(test)]
        let emulated = $crate::gemm::emulator::run(
            &[$($line),+],
            &mut [
                $((stringify!($name), $crate::gemm::emulator::Word::word($value)),)*
                $((stringify!($counter), $crate::gemm::emulator::Word::word($start)),)*
            ],
        );
        #[cfg(not(test))]
        let emulated = false;
        if !emulated {
            std::arch::asm!(
                $($line),+,
                $($name = in(reg) $value,)*
                $($counter = inout(reg) $start => _,)*
                options($($option),+)
            );
        }
    }};
}
pub(crate) use tile_code;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;

/// Holds this thread's tile configuration; when dropped, the tiles go back to
/// their initial state, so that the system need not save them.
pub(crate) struct Tiles {
    /// The configuration is the thread's.
    not_send: PhantomData<*const ()>,
}

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// Configures all eight tiles as 16 rows of 64 bytes.
    ///
    /// # Safety
    /// The machine has AMX and the process may use it ([`crate::Isa::AmxBf16`]
    /// is supported), and this thread holds no other [`Tiles`].
    pub(crate) unsafe fn configure() -> Self {
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
        config.bytes_per_row[..8].fill(64);
        config.rows[..8].fill(TILE_ROWS as u8);
        // SAFETY: the caller's contract; the configuration is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self { not_send: PhantomData }
    }

    /// Tiles that this thread emulates, on a machine that need not have any.
    #[cfg(test)]
    pub(crate) fn emulated() -> Self {
        super::emulator::start();
        Self { not_send: PhantomData }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` exists only where AMX does.
        unsafe { tile_code!(["tilerelease"]; nostack, nomem) };
    }
}

/// A stretch of consecutive `k` in both operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Bytes from a tile's base to this stretch's first value in its first row.
    pub(crate) a: usize,
    /// Bytes from a panel's start to this stretch.
    pub(crate) b: usize,
    /// Length in steps of 32 values; not zero.
    pub(crate) steps: usize,
}

/// Operands of one call.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// The first row of each of the two tiles of rows; where there is only
    /// one, the second is not read.
    pub(super) a: [*const bf16; 2],
    /// Bytes from a row to the next.
    pub(super) stride: usize,
    /// The panel.
    pub(super) b: *const bf16,
    /// What is multiplied, in order; not empty.
    pub(super) runs: &'a [Run],
    /// Accumulators, `[32][32]`.
    pub(super) c: *mut f32,
    /// Whether the accumulators start from zero.
    pub(super) first: bool,
}

/// Work for the vectors that comes in small pieces, to be put between the
/// steps of a product: tiles and vectors are different parts of the processor,
/// and both are busy only while they alternate every few instructions.
pub(crate) trait Between {
    /// Whether nothing is left.
    fn is_done(&self) -> bool;
    /// Does the next piece, if there is one.
    ///
    /// # Safety
    /// As said where the work was made.
    unsafe fn advance(&mut self);
}

/// Lines of memory to be brought into the second-level cache.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The first.
    pub(super) from: *const u8,
    /// How many.
    pub(super) lines: usize,
}

impl Ahead {
    /// Nothing to bring.
    pub(super) const NOTHING: Self = Self { from: std::ptr::null(), lines: 0 };

    /// Asks for some of the lines.
    #[inline(always)]
    fn bring(&mut self, lines: usize) {
        let lines = lines.min(self.lines);
        for _ in 0..lines {
            // SAFETY: a prefetch touches nothing, wherever it points.
            unsafe { asm!("prefetcht1 [{}]", in(reg) self.from, options(nostack, readonly)) };
            self.from = self.from.wrapping_add(64);
        }
        self.lines -= lines;
    }
}

/// Bytes from one row of accumulators to the next.
const C_STRIDE: usize = PANEL * 4;

/// Steps of a long sum whose rows of A are loaded into the first-level cache;
/// the others pass it by, as the weights do. All of a long row would not fit,
/// and then nothing of it would still be there for the next panel.
const KEPT_STEPS: usize = 16;
/// Steps up to which all rows fit.
const FITTING_STEPS: usize = 20;

/// Multiplies two tiles of rows and a panel. The products stay in the tile
/// registers: the next call, or [`store`], writes them to this call's `c`. So
/// the multiplier need not drain: this call loads its first operands, writes
/// what the call before it left (to `previous`, unless null), and goes on.
/// `between` is what the vectors do meanwhile; it may read what is written to `previous`.
///
/// # Safety
/// This thread holds [`Tiles`]; all that the runs name is readable, and the
/// accumulators are writable.
#[inline(always)]
pub(super) unsafe fn multiply_pair(
    o: &Operands<'_>,
    previous: *mut f32,
    ahead: &[Ahead],
    between: &mut impl Between,
) {
    let keep = if o.runs.len() == 1 && o.runs[0].steps > FITTING_STEPS { KEPT_STEPS } else { usize::MAX };
    // SAFETY: the caller's contract. Tile registers keep their contents from
    // one `asm!` to the next because compiled code never uses them.
    unsafe {
        let run = o.runs[0];
        tile_code!([
            "tileloadd tmm4, [{a0} + {stride}]",
            "tileloaddt1 tmm6, [{b} + {line}]",
            "tileloaddt1 tmm7, [{b} + {line} + 1024]",
            "tileloadd tmm5, [{a1} + {stride}]",
        ],
            a0 = o.a[0].byte_add(run.a), a1 = o.a[1].byte_add(run.a), b = o.b.byte_add(run.b),
            stride = o.stride, line = 64_usize;
            nostack, readonly
        );
        if o.first && !previous.is_null() {
            tile_code!([
                "tilestored [{c} + {s}], tmm0",
                "tilezero tmm0",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tilestored [{c} + {s} + 64], tmm1",
                "tilezero tmm1",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tilestored [{low} + {s}], tmm2",
                "tilezero tmm2",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tilestored [{low} + {s} + 64], tmm3",
                "tilezero tmm3",
                "tdpbf16ps tmm3, tmm5, tmm7",
            ], c = previous, low = previous.add(TILE_ROWS * PANEL), s = C_STRIDE; nostack);
        } else {
            if !previous.is_null() {
                store(previous);
            }
            load(o.c, o.first);
            tile_code!([
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
            ]; nostack, nomem);
        }
        for (i, run) in o.runs.iter().enumerate() {
            let mut ahead = ahead.get(i).copied().unwrap_or(Ahead::NOTHING);
            // The first step is done.
            let done = usize::from(i == 0);
            let kept = run.steps.min(keep);
            let each = ahead.lines.div_ceil((run.steps - done).max(1));
            steps::<true>(o, run, done..kept, (&mut ahead, each), between);
            steps::<false>(o, run, kept.max(done)..run.steps, (&mut ahead, each), between);
        }
    }
}

/// Multiplies some steps of a run; `KEEP` says whether the rows of A are to
/// stay in the first-level cache. `each` lines are asked for behind each step:
/// more at once would hold up the loads of the tiles.
///
/// # Safety
/// As for [`multiply_pair`].
#[inline(always)]
unsafe fn steps<const KEEP: bool>(
    o: &Operands<'_>,
    run: &Run,
    mut range: std::ops::Range<usize>,
    (ahead, each): (&mut Ahead, usize),
    between: &mut impl Between,
) {
    macro_rules! multiply {
        ($load:literal, $count:expr) => {
            tile_code!([
                "2:",
                concat!($load, " tmm4, [{a0} + {stride}]"),
                "tileloaddt1 tmm6, [{b} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloaddt1 tmm7, [{b} + {line} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                concat!($load, " tmm5, [{a1} + {stride}]"),
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b}, 2048",
                "dec {n}",
                "jnz 2b",
            ],
                stride = o.stride, line = 64_usize;
                mut a0 = o.a[0].byte_add(run.a + range.start * 64),
                mut a1 = o.a[1].byte_add(run.a + range.start * 64),
                mut b = o.b.byte_add(run.b + range.start * 2048),
                mut n = $count;
                nostack, readonly
            )
        };
    }
    // SAFETY: the caller's contract. Weights are always loaded past the
    // first-level cache, which then keeps the rows of A for the next panel.
    unsafe {
        while !range.is_empty() && (ahead.lines > 0 || !between.is_done()) {
            if KEEP {
                multiply!("tileloadd", 1_usize);
            } else {
                multiply!("tileloaddt1", 1_usize);
            }
            range.start += 1;
            ahead.bring(each);
            if !between.is_done() {
                between.advance();
            }
        }
        if range.is_empty() {
            return;
        }
        if KEEP {
            multiply!("tileloadd", range.len());
        } else {
            multiply!("tileloaddt1", range.len());
        }
    }
}

/// Sets the accumulators of a pair to zero or to what waits in memory.
///
/// # Safety
/// As for [`multiply_pair`].
#[inline(always)]
unsafe fn load(c: *mut f32, zero: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        if zero {
            tile_code!(["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"]; nostack, nomem);
        } else {
            tile_code!([
                "tileloadd tmm0, [{c} + {s}]",
                "tileloadd tmm1, [{c} + {s} + 64]",
                "tileloadd tmm2, [{low} + {s}]",
                "tileloadd tmm3, [{low} + {s} + 64]",
            ], c = c, low = c.add(TILE_ROWS * PANEL), s = C_STRIDE; nostack, readonly);
        }
    }
}

/// Writes the accumulators that the last [`multiply_pair`] left in registers.
///
/// # Safety
/// This thread holds [`Tiles`]; `c` is writable.
#[inline(always)]
pub(super) unsafe fn store(c: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        tile_code!([
            "tilestored [{c} + {s}], tmm0",
            "tilestored [{c} + {s} + 64], tmm1",
            "tilestored [{low} + {s}], tmm2",
            "tilestored [{low} + {s} + 64], tmm3",
        ], c = c, low = c.add(TILE_ROWS * PANEL), s = C_STRIDE; nostack);
    }
}

/// Multiplies one tile of rows and a panel, and writes the result.
///
/// # Safety
/// As for [`multiply_pair`].
#[inline(always)]
pub(super) unsafe fn multiply_single(o: &Operands<'_>) {
    // SAFETY: as in `multiply_pair`.
    unsafe {
        if o.first {
            tile_code!(["tilezero tmm0", "tilezero tmm1"]; nostack, nomem);
        } else {
            tile_code!([
                "tileloadd tmm0, [{c} + {s}]",
                "tileloadd tmm1, [{c} + {s} + 64]",
            ], c = o.c, s = C_STRIDE; nostack, readonly);
        }
        for run in o.runs {
            tile_code!([
                "2:",
                "tileloadd tmm4, [{a} + {stride}]",
                "tileloaddt1 tmm6, [{b} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloaddt1 tmm7, [{b} + {line} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64",
                "add {b}, 2048",
                "dec {n}",
                "jnz 2b",
            ],
                stride = o.stride, line = 64_usize;
                mut a = o.a[0].byte_add(run.a), mut b = o.b.byte_add(run.b), mut n = run.steps;
                nostack, readonly
            );
        }
        tile_code!([
            "tilestored [{c} + {s}], tmm0",
            "tilestored [{c} + {s} + 64], tmm1",
        ], c = o.c, s = C_STRIDE; nostack);
    }
}
