//! The epilogue of the tile products, a few rows at a time: while the tiles
//! multiply, this finishes the sums that they left before. Epilogues that are
//! common (bias, one vector for each picture, residual, GEGLU; whole panels) go
//! row by row here; the others fall back on [`Output::tile`].

use std::arch::x86_64::*;

use half::bf16;

use super::Activation;
use super::amx::{Between, TILE_ROWS};
use super::epilogue::{Finish, Output};
use super::packed::PANEL;
use super::tiles::{Spot, Vectors};
use crate::cache::second_level_bytes;
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

/// What is done to a row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
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
pub(super) struct Finisher<'a> {
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
}

impl<'a> Finisher<'a> {
    /// A finisher that has nothing to do.
    pub(super) fn new(output: &'a Output<'a, bf16>) -> Self {
        let nowhere = Spot { a: std::ptr::null(), row: 0, rows: 0 };
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
            sums: Sums { c: [std::ptr::null(); 2], spots: [nowhere; 2], panel: 0 },
            half: 0,
        }
    }

    /// Takes sums over, to be finished over some `pieces`. There may not be any
    /// others left.
    ///
    /// # Safety
    /// Before the first piece the sums are written and then left alone, the rows
    /// exist, nobody else writes these outputs, and the machine has AVX-512 with
    /// bfloat16.
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

    /// Finishes everything at once, by the general function.
    ///
    /// # Safety
    /// As for [`Finisher::begin`].
    #[cold]
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn at_once(&mut self) {
        let sums = &self.sums;
        for (i, spot) in sums.spots.iter().enumerate() {
            let offset = i * TILE_ROWS * PANEL;
            // SAFETY: by the contract.
            unsafe {
                let [values, gates] = [sums.c[0].add(offset), sums.c[1].add(offset)];
                self.output.tile::<Vectors>(values, gates, spot.row, spot.rows, sums.panel);
            }
        }
        (self.left, self.half) = (0, 1);
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
                    let (mut a, mut b) = (_mm512_setzero_ps(), _mm512_setzero_ps());
                    if let Some(bias) = e.bias {
                        a = _mm512_loadu_ps(bias.as_ptr().add(col));
                        b = _mm512_loadu_ps(bias.as_ptr().add(col + 16));
                    }
                    if let Some(g) = e.group_bias
                        && spot.rows > 0
                    {
                        let group = spot.row / g.rows_per_group * self.output.n + col;
                        let from = g.values[group..][..PANEL].as_ptr();
                        a = _mm512_add_ps(a, Vectors::load_bf16(from));
                        b = _mm512_add_ps(b, Vectors::load_bf16(from.add(16)));
                    }
                    _mm512_storeu_ps(self.bias.as_mut_ptr(), a);
                    _mm512_storeu_ps(self.bias.as_mut_ptr().add(16), b);
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
        let (bias, n) = (self.bias.as_ptr(), self.pitch);
        // SAFETY: by the contract; rows of sums have 32 values, and the panel is whole.
        unsafe {
            for _ in 0..count {
                let mut low = _mm512_add_ps(_mm512_loadu_ps(values), _mm512_loadu_ps(bias));
                let mut high = _mm512_add_ps(_mm512_loadu_ps(values.add(16)), _mm512_loadu_ps(bias.add(16)));
                if KIND == Kind::Residual as usize {
                    low = _mm512_add_ps(low, Vectors::load_bf16(residual));
                    high = _mm512_add_ps(high, Vectors::load_bf16(residual.add(16)));
                    residual = residual.wrapping_add(n);
                }
                if KIND == Kind::Geglu as usize {
                    let a = _mm512_add_ps(_mm512_loadu_ps(gates), _mm512_loadu_ps(bias.add(32)));
                    let b = _mm512_add_ps(_mm512_loadu_ps(gates.add(16)), _mm512_loadu_ps(bias.add(48)));
                    low = _mm512_mul_ps(low, math::activate::<Vectors, bf16>(Activation::Gelu, a));
                    high = _mm512_mul_ps(high, math::activate::<Vectors, bf16>(Activation::Gelu, b));
                    gates = gates.wrapping_add(PANEL);
                }
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                if STREAM {
                    _mm512_stream_si512(to.cast(), both);
                } else {
                    _mm512_storeu_si512(to.cast(), both);
                }
                values = values.wrapping_add(PANEL);
                to = to.wrapping_add(n);
            }
        }
        (self.values, self.gates, self.to, self.residual) = (values, gates, to, residual);
        self.left -= count;
    }
}

impl Drop for Finisher<'_> {
    fn drop(&mut self) {
        if self.stream {
            // SAFETY: every processor with AVX-512 has it. Stores that pass the
            // caches become visible to other threads in order only behind a fence.
            unsafe { _mm_sfence() };
        }
    }
}

impl Between for Finisher<'_> {
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
                (Kind::Other, _) => self.at_once(),
            }
            if self.left == 0 && self.half == 0 {
                self.tile_of_rows(1);
            }
        }
    }
}
