//! The epilogue of the tile products, a few rows at a time: while the tiles
//! multiply, this finishes the sums that they left before. Epilogues that are
//! common (bias, one vector for each picture, residual, GEGLU; whole panels) go
//! row by row here; the others fall back on [`Output::tile`].

use std::arch::x86_64::*;
use std::marker::PhantomData;

use half::bf16;

use super::Activation;
use super::amx::{Between, TILE_ROWS};
use super::epilogue::{Finish, Output};
use super::packed::PANEL;
use super::plan::Spot;
use crate::cache::second_level_bytes;
use crate::simd::avx512::Avx512;
use crate::simd::{Simd, math};

/// Finished sums of two tiles of rows and a panel.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// `[32][32]`; of a GEGLU, values and gates, else the same twice.
    pub(super) c: [*const f32; 2],
    /// Where the two tiles' rows go; the second may have none.
    pub(super) spots: [Spot; 2],
    /// The panel; of a GEGLU, the values'.
    pub(super) panel: usize,
}

/// The vectors that work around the tiles.
///
/// # Safety
/// Every method may only be called where the machine has the set.
#[allow(clippy::missing_safety_doc, reason = "one contract for all methods, stated above")]
pub(super) trait Around: Simd {
    /// Finishes one row of a whole panel, of a [`Kind`] but [`Kind::Other`],
    /// all of whose pointers are as [`Finisher`] has them.
    unsafe fn row<const KIND: usize, const STREAM: bool>(
        values: *const f32,
        gates: *const f32,
        bias: &[f32; 2 * PANEL],
        residual: *const bf16,
        to: *mut bf16,
    );

    /// Finishes all rows by the general function; see [`Output::tile`].
    unsafe fn all_rows(output: &Output<'_, bf16>, sums: &Sums);
}

impl Around for Avx512<true> {
    #[inline(always)]
    unsafe fn row<const KIND: usize, const STREAM: bool>(
        values: *const f32,
        gates: *const f32,
        bias: &[f32; 2 * PANEL],
        residual: *const bf16,
        to: *mut bf16,
    ) {
        let bias = bias.as_ptr();
        // SAFETY: by the contract; rows of sums have 32 values, and the panel is whole.
        unsafe {
            let mut low = _mm512_add_ps(_mm512_loadu_ps(values), _mm512_loadu_ps(bias));
            let mut high = _mm512_add_ps(_mm512_loadu_ps(values.add(16)), _mm512_loadu_ps(bias.add(16)));
            if KIND == Kind::Residual as usize {
                low = _mm512_add_ps(low, Self::load_bf16(residual));
                high = _mm512_add_ps(high, Self::load_bf16(residual.add(16)));
            }
            if KIND == Kind::Geglu as usize {
                let a = _mm512_add_ps(_mm512_loadu_ps(gates), _mm512_loadu_ps(bias.add(32)));
                let b = _mm512_add_ps(_mm512_loadu_ps(gates.add(16)), _mm512_loadu_ps(bias.add(48)));
                low = _mm512_mul_ps(low, math::activate::<Self, bf16>(Activation::Gelu, a));
                high = _mm512_mul_ps(high, math::activate::<Self, bf16>(Activation::Gelu, b));
            }
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            if STREAM {
                _mm512_stream_si512(to.cast(), both);
            } else {
                _mm512_storeu_si512(to.cast(), both);
            }
        }
    }

    #[cold]
    #[inline(never)]
    unsafe fn all_rows(output: &Output<'_, bf16>, sums: &Sums) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
        unsafe fn compiled(output: &Output<'_, bf16>, sums: &Sums) {
            // SAFETY: by the contract.
            unsafe { sums.finish::<Avx512<true>>(output) }
        }
        // SAFETY: by the contract.
        unsafe { compiled(output, sums) }
    }
}

impl Sums {
    /// Finishes all rows by the general function.
    ///
    /// # Safety
    /// As for [`Output::tile`].
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self, output: &Output<'_, bf16>) {
        for (i, spot) in self.spots.iter().enumerate() {
            let offset = i * TILE_ROWS * PANEL;
            // SAFETY: by the contract.
            unsafe {
                let [values, gates] = self.c.map(|c| c.add(offset));
                output.tile::<S>(values, gates, spot.row, spot.rows, self.panel);
            }
        }
    }
}

/// What is done to a row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bias only.
    Plain,
    /// Bias, then the residual is added.
    Residual,
    /// Value times GELU of the gate, after the biases.
    Geglu,
    /// Anything else, all at once.
    Other,
}

/// Finishes sums row by row.
pub(super) struct Finisher<'a, V> {
    output: &'a Output<'a, bf16>,
    kind: Kind,
    /// Whether outputs pass the caches by: they are whole lines, and too many
    /// to be there still when they are read. A line that is not in a cache
    /// would have to be read before it is written.
    stream: bool,
    /// Rows for each piece.
    each: usize,
    /// Rows left of the present tile of rows; 0 when all is done.
    left: usize,
    /// The next row's sums (of a GEGLU, values and gates), output and residual.
    values: *const f32,
    gates: *const f32,
    to: *mut bf16,
    residual: *const bf16,
    /// Values from one row's output to the next one's.
    pitch: usize,
    /// Bias of the present rows: two vectors, of a GEGLU four.
    bias: [f32; 2 * PANEL],
    /// The sums, and which of their tiles of rows is at hand.
    sums: Sums,
    half: usize,
    vectors: PhantomData<V>,
}

impl<'a, V: Around> Finisher<'a, V> {
    /// A finisher that has nothing to do.
    pub(super) fn new(output: &'a Output<'a, bf16>) -> Self {
        Self {
            output,
            kind: Kind::Plain,
            stream: output.has_whole_lines() && output.bytes() >= second_level_bytes(),
            each: 1,
            left: 0,
            values: std::ptr::null(),
            gates: std::ptr::null(),
            to: std::ptr::null_mut(),
            residual: std::ptr::null(),
            pitch: output.n,
            bias: [0.0; 2 * PANEL],
            sums: Sums { c: [std::ptr::null(); 2], spots: [Spot::NOTHING; 2], panel: 0 },
            half: 0,
            vectors: PhantomData,
        }
    }

    /// Takes sums over, to be finished over some `pieces`. There may not be any
    /// others left.
    ///
    /// # Safety
    /// Before the first piece the sums are written and then left alone, the rows
    /// exist, nobody else writes these outputs, and the machine has the set of `V`.
    #[inline(always)]
    pub(super) unsafe fn begin(&mut self, sums: Sums, pieces: usize) {
        debug_assert_eq!(self.left, 0, "the last sums are finished");
        self.kind = self.kind_of(&sums);
        self.each = (2 * TILE_ROWS).div_ceil(pieces.max(1));
        self.sums = sums;
        // SAFETY: by the contract.
        unsafe { self.tile_of_rows(0) };
    }

    /// Finishes what is left.
    ///
    /// # Safety
    /// As for [`Finisher::begin`].
    #[inline(always)]
    pub(super) unsafe fn finish(&mut self) {
        self.each = TILE_ROWS;
        while !self.is_done() {
            // SAFETY: by the contract.
            unsafe { self.advance() };
        }
    }

    fn kind_of(&self, sums: &Sums) -> Kind {
        let even = |spot: &Spot| self.output.row_step(spot.row, spot.rows).is_some();
        if self.output.columns(sums.panel) < PANEL || !sums.spots.iter().all(even) {
            return Kind::Other;
        }
        match self.output.finish {
            Finish::Geglu(_) => Kind::Geglu,
            Finish::Plain(e) => {
                let one_group = |spot: &Spot| {
                    e.group_bias.is_none_or(|g| {
                        spot.row / g.rows_per_group == (spot.row + spot.rows.max(1) - 1) / g.rows_per_group
                    })
                };
                let common = e.activation == Activation::None && e.scale == 1.0;
                match e.residual {
                    _ if !common || !sums.spots.iter().all(one_group) => Kind::Other,
                    Some(_) => Kind::Residual,
                    None => Kind::Plain,
                }
            }
        }
    }

    /// Goes to the first row of one of the two tiles of rows.
    ///
    /// # Safety
    /// As for [`Finisher::begin`].
    #[inline(always)]
    unsafe fn tile_of_rows(&mut self, half: usize) {
        let spot = self.sums.spots[half];
        (self.half, self.left) = (half, spot.rows);
        if self.kind == Kind::Other {
            return;
        }
        let offset = half * TILE_ROWS * PANEL;
        self.values = self.sums.c[0].wrapping_add(offset);
        self.gates = self.sums.c[1].wrapping_add(offset);
        let col = self.sums.panel / self.output.unit() * PANEL;
        let at = self.output.stored_row(spot.row) * self.output.n + col;
        self.pitch = self.output.row_step(spot.row, spot.rows).unwrap_or(1) * self.output.n;
        self.to = self.output.start.wrapping_add(at);
        // SAFETY: the panel is whole, and the lengths were checked in `Output::new`.
        unsafe {
            match self.output.finish {
                Finish::Plain(e) => {
                    let group = e.group_bias.filter(|_| spot.rows > 0).map(|g| {
                        let start = spot.row / g.rows_per_group * self.output.n + col;
                        g.values[start..][..PANEL].as_ptr()
                    });
                    for i in (0..PANEL).step_by(V::LANES) {
                        let mut sum = V::splat(0.0);
                        if let Some(bias) = e.bias {
                            sum = V::load_f32(bias.as_ptr().add(col + i));
                        }
                        if let Some(group) = group {
                            sum = V::add(sum, V::load_bf16(group.add(i)));
                        }
                        V::store_f32(self.bias.as_mut_ptr().add(i), sum);
                    }
                    if let Some(residual) = e.residual {
                        self.residual = residual.as_ptr().wrapping_add(at);
                    }
                }
                Finish::Geglu(bias) => {
                    for (i, start) in [col, self.output.n + col].into_iter().enumerate() {
                        let to = &mut self.bias[i * PANEL..][..PANEL];
                        match bias {
                            Some(bias) => to.copy_from_slice(&bias[start..][..PANEL]),
                            None => to.fill(0.0),
                        }
                    }
                }
            }
        }
    }

    /// Finishes some rows.
    ///
    /// # Safety
    /// As for [`Finisher::begin`].
    #[inline(always)]
    unsafe fn some<const KIND: usize, const STREAM: bool>(&mut self) {
        let count = self.each.min(self.left);
        let (mut values, mut gates, mut to) = (self.values, self.gates, self.to);
        let mut residual = self.residual;
        for _ in 0..count {
            // SAFETY: by the contract; the panel is whole.
            unsafe { V::row::<KIND, STREAM>(values, gates, &self.bias, residual, to) };
            values = values.wrapping_add(PANEL);
            to = to.wrapping_add(self.pitch);
            if KIND == Kind::Residual as usize {
                residual = residual.wrapping_add(self.pitch);
            }
            if KIND == Kind::Geglu as usize {
                gates = gates.wrapping_add(PANEL);
            }
        }
        (self.values, self.gates, self.to, self.residual) = (values, gates, to, residual);
        self.left -= count;
    }
}

impl<V> Drop for Finisher<'_, V> {
    fn drop(&mut self) {
        if self.stream {
            // SAFETY: every processor with AVX-512 has it. Stores that pass the
            // caches become visible to other threads in order only behind a fence.
            unsafe { _mm_sfence() };
        }
    }
}

impl<V: Around> Between for Finisher<'_, V> {
    #[inline(always)]
    fn is_done(&self) -> bool {
        self.left == 0
    }

    #[inline(always)]
    unsafe fn advance(&mut self) {
        // SAFETY: by the contract of `begin`.
        unsafe {
            match (self.kind, self.stream) {
                (Kind::Plain, false) => self.some::<{ Kind::Plain as usize }, false>(),
                (Kind::Plain, true) => self.some::<{ Kind::Plain as usize }, true>(),
                (Kind::Residual, false) => self.some::<{ Kind::Residual as usize }, false>(),
                (Kind::Residual, true) => self.some::<{ Kind::Residual as usize }, true>(),
                (Kind::Geglu, false) => self.some::<{ Kind::Geglu as usize }, false>(),
                (Kind::Geglu, true) => self.some::<{ Kind::Geglu as usize }, true>(),
                (Kind::Other, _) => {
                    V::all_rows(self.output, &self.sums);
                    (self.left, self.half) = (0, 1);
                }
            }
            if self.left == 0 && self.half == 0 {
                self.tile_of_rows(1);
            }
        }
    }
}
