//! From accumulators to stored outputs: bias, time embedding, activation,
//! residual, scale, rounding. The accumulators come as tiles of
//! [`PANEL`] float32 columns in scratch memory that is hot in the cache.

use super::packed::PANEL;
use super::{Activation, Epilogue};
use crate::Element;
use crate::simd::{Simd, math};

/// What becomes of the accumulators.
#[derive(Clone, Copy)]
pub(crate) enum Finish<'a, T> {
    /// The epilogue, on every column.
    Plain(&'a Epilogue<'a, T>),
    /// Values and gates come in alternating panels and leave as one; the bias
    /// is `[2 h]`.
    Geglu(Option<&'a [f32]>),
}

/// One place of all squares of two by two pixels in pictures of twice the
/// width and height: a product's row, a pixel of the small pictures, belongs
/// there in its square.
#[derive(Clone, Copy)]
pub(crate) struct Square {
    /// Width of the small pictures.
    pub(crate) width: usize,
    /// The pixel's line in its square: 0 or 1.
    pub(crate) line: usize,
    /// The pixel's column in its square: 0 or 1.
    pub(crate) column: usize,
}

/// Where outputs go and how they are finished.
pub(crate) struct Output<'a, T> {
    /// `[m, n]`, or `[4 m, n]` where rows go into squares.
    pub(super) start: *mut T,
    /// Rows that lie there.
    rows: usize,
    square: Option<Square>,
    /// Columns of the output: of a GEGLU, half of the weight's.
    pub(super) n: usize,
    pub(super) finish: Finish<'a, T>,
}

// SAFETY: tasks write disjoint tiles, as the drivers cut them.
unsafe impl<T: Element> Sync for Output<'_, T> {}

impl<'a, T: Element> Output<'a, T> {
    /// Checks that `out` and all that the epilogue reads have the right length for `m` rows of `n`.
    pub(crate) fn new(out: &mut [T], m: usize, n: usize, finish: Finish<'a, T>) -> Self {
        assert_eq!(Some(out.len()), m.checked_mul(n), "the output is not [{m}, {n}]");
        match finish {
            Finish::Plain(e) => {
                if let Some(bias) = e.bias {
                    assert_eq!(bias.len(), n, "the bias has not one value for each output");
                }
                if let Some(g) = e.group_bias {
                    assert!(g.rows_per_group > 0, "a group has rows");
                    let groups = m.div_ceil(g.rows_per_group);
                    assert!(g.values.len() >= groups * n, "the group bias is shorter than [{groups}, {n}]");
                }
                if let Some(residual) = e.residual {
                    assert_eq!(residual.len(), out.len(), "the residual is not of the output's size");
                }
            }
            Finish::Geglu(bias) => {
                if let Some(bias) = bias {
                    assert_eq!(bias.len(), 2 * n, "the bias has not one value for each row of the weight");
                }
            }
        }
        Self { start: out.as_mut_ptr(), rows: m, square: None, n, finish }
    }

    /// As [`Output::new`] for `m` rows, each of which goes to one place of its
    /// square in `out`, `[4 m, n]`. The epilogue may not read anything that
    /// differs from row to row.
    pub(crate) fn in_squares(
        out: &mut [T],
        m: usize,
        n: usize,
        finish: Finish<'a, T>,
        square: Square,
    ) -> Self {
        let all = Self::new(out, 4 * m, n, finish);
        let Finish::Plain(e) = finish else { panic!("a GEGLU has no squares") };
        assert!(e.group_bias.is_none() && e.residual.is_none(), "an epilogue that reads rows");
        assert!(m == 0 || m.is_multiple_of(square.width), "pictures have whole lines");
        assert!(square.line < 2 && square.column < 2, "a square has four places");
        Self { square: Some(square), ..all }
    }

    /// The output's row at which a row of the product is stored.
    #[inline(always)]
    pub(super) fn stored_row(&self, row: usize) -> usize {
        match self.square {
            None => row,
            Some(s) => {
                let (line, column) = (row / s.width, row % s.width);
                (2 * line + s.line) * 2 * s.width + 2 * column + s.column
            }
        }
    }

    /// How far apart these rows are stored, in rows, if always equally far.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn row_step(&self, row: usize, rows: usize) -> Option<usize> {
        match self.square {
            None => Some(1),
            Some(s) => (row % s.width + rows <= s.width).then_some(2),
        }
    }

    /// Panels that become one of the output: two, values and gates, of a GEGLU.
    pub(crate) fn unit(&self) -> usize {
        if matches!(self.finish, Finish::Geglu(_)) { 2 } else { 1 }
    }

    /// Whether every panel of a row is one whole line of memory.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_whole_lines(&self) -> bool {
        let panel = PANEL * size_of::<T>();
        self.start.addr().is_multiple_of(panel) && self.n.is_multiple_of(PANEL) && panel == 64
    }

    /// Bytes of the output.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.n * size_of::<T>()
    }

    /// Columns that a panel of the weight has in the output; of a GEGLU `panel`
    /// is the values'.
    pub(crate) fn columns(&self, panel: usize) -> usize {
        PANEL.min(self.n - panel / self.unit() * PANEL)
    }

    /// Finishes a tile: rows `row..row + rows` of panel `panel` from `tile`
    /// (`[rows][32]`); of a GEGLU `panel` is the values' and `gates` the tile
    /// of the panel after it.
    ///
    /// # Safety
    /// The machine has the set of `S`, the tiles are readable, the rows exist,
    /// and nobody else writes these outputs.
    #[inline(always)]
    pub(crate) unsafe fn tile<S: Simd>(
        &self,
        tile: *const f32,
        gates: *const f32,
        row: usize,
        rows: usize,
        panel: usize,
    ) {
        // SAFETY: the caller's contract; lengths were checked in `new`.
        unsafe {
            match self.finish {
                Finish::Plain(e) => {
                    let col = panel * PANEL;
                    let cols = PANEL.min(self.n - col);
                    if cols == PANEL {
                        self.plain::<S, true>(e, tile, row, rows, col, cols);
                    } else {
                        self.plain::<S, false>(e, tile, row, rows, col, cols);
                    }
                }
                Finish::Geglu(bias) => {
                    let col = panel / 2 * PANEL;
                    let cols = PANEL.min(self.n - col);
                    if cols == PANEL {
                        self.geglu::<S, true>(bias, tile, gates, row, rows, col, cols);
                    } else {
                        self.geglu::<S, false>(bias, tile, gates, row, rows, col, cols);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    unsafe fn plain<S: Simd, const FULL: bool>(
        &self,
        e: &Epilogue<'_, T>,
        tile: *const f32,
        row: usize,
        rows: usize,
        col: usize,
        cols: usize,
    ) {
        // SAFETY: rows and columns exist, and the lengths were checked in `new`.
        unsafe {
            let scale = S::splat(e.scale);
            for v in (0..cols).step_by(S::LANES) {
                let lanes = if FULL { S::LANES } else { S::LANES.min(cols - v) };
                let zero = S::splat(0.0);
                let bias = e.bias.map_or(zero, |b| read::<S, f32, FULL>(b.as_ptr().add(col + v), lanes));
                // The group of the row at hand, and the row at which the next begins.
                let (mut group, mut next) = (zero, row);
                for r in 0..rows {
                    if let Some(g) = e.group_bias
                        && row + r >= next
                    {
                        let index = (row + r) / g.rows_per_group;
                        next = (index + 1) * g.rows_per_group;
                        group = read::<S, T, FULL>(g.values.as_ptr().add(index * self.n + col + v), lanes);
                    }
                    let at = self.stored_row(row + r) * self.n + col + v;
                    let mut x = S::load_f32(tile.add(r * PANEL + v));
                    x = S::add(S::add(x, bias), group);
                    if e.activation != Activation::None {
                        x = math::activate::<S, T>(e.activation, x);
                    }
                    if let Some(residual) = e.residual {
                        x = S::add(x, read::<S, T, FULL>(residual.as_ptr().add(at), lanes));
                    }
                    write::<S, T, FULL>(self.start.add(at), S::mul(x, scale), lanes);
                }
            }
        }
    }

    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "a tile's place is that many numbers")]
    unsafe fn geglu<S: Simd, const FULL: bool>(
        &self,
        bias: Option<&[f32]>,
        values: *const f32,
        gates: *const f32,
        row: usize,
        rows: usize,
        col: usize,
        cols: usize,
    ) {
        // SAFETY: rows and columns exist, and the lengths were checked in `new`.
        unsafe {
            for v in (0..cols).step_by(S::LANES) {
                let lanes = if FULL { S::LANES } else { S::LANES.min(cols - v) };
                let read_bias = |at: usize| {
                    bias.map_or(S::splat(0.0), |b| read::<S, f32, FULL>(b.as_ptr().add(at + v), lanes))
                };
                let (value_bias, gate_bias) = (read_bias(col), read_bias(self.n + col));
                for r in 0..rows {
                    let value = S::add(S::load_f32(values.add(r * PANEL + v)), value_bias);
                    let gate = S::add(S::load_f32(gates.add(r * PANEL + v)), gate_bias);
                    let x = S::mul(value, math::activate::<S, T>(Activation::Gelu, gate));
                    write::<S, T, FULL>(self.start.add((row + r) * self.n + col + v), x, lanes);
                }
            }
        }
    }
}

/// # Safety
/// `lanes` elements are readable, all of a vector if `FULL`.
#[inline(always)]
unsafe fn read<S: Simd, T: Element, const FULL: bool>(from: *const T, lanes: usize) -> S::V {
    // SAFETY: the caller's contract.
    unsafe { if FULL { S::load(from) } else { S::load_part(from, lanes) } }
}

/// # Safety
/// `lanes` elements are writable, all of a vector if `FULL`.
#[inline(always)]
unsafe fn write<S: Simd, T: Element, const FULL: bool>(to: *mut T, v: S::V, lanes: usize) {
    // SAFETY: the caller's contract.
    unsafe { if FULL { S::store(to, v) } else { S::store_part(to, v, lanes) } }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The four products that make a doubled picture write each of its pixels once.
        #[test]
        fn squares_cover_a_doubled_picture_once(batch in 1..=3_usize, h in 1..=70_usize, w in 1..=300_usize) {
            let m = batch * h * w;
            let mut out = vec![0.0_f32; 4 * m];
            let mut times = vec![0_u8; 4 * m];
            let epilogue = Epilogue::default();
            for (line, column) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let square = Square { width: w, line, column };
                let output = Output::in_squares(&mut out, m, 1, Finish::Plain(&epilogue), square);
                for row in 0..m {
                    times[output.stored_row(row)] += 1;
                    #[cfg(target_arch = "x86_64")]
                    if let Some(step) = output.row_step(row, 16.min(m - row)) {
                        let last = 16.min(m - row) - 1;
                        prop_assert_eq!(output.stored_row(row + last), output.stored_row(row) + last * step);
                    }
                }
            }
            prop_assert!(times.iter().all(|&times| times == 1));
        }
    }
}
