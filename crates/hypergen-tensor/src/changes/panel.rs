//! One packed panel with its changes: the mathematics of each kind of change,
//! `[rows][PANEL]` values at a time. Which panels there are, and where the
//! results go, is for `changes.rs` to know.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use hypergen_cpu::{AlignedVec, Cpu, Element, PANEL_OUTPUTS as PANEL, PackedMatrix, add_product};

use super::{Change, Delta, Lengths, Magnitude, Module, Product};

/// Adds all changes to rows of a panel, to all of them where one takes the loaded weights.
pub(super) fn change(cpu: &Cpu, parts: &[InPanel<'_>], rows: &Range<usize>, panel: &mut [f32]) {
    // Each change is of the loaded weights, whatever others have made of them.
    let loaded = if parts.iter().any(|p| p.part.takes_loaded()) { panel.to_vec() } else { vec![] };
    for part in parts {
        let Some(magnitude) = &part.part.change.magnitude else {
            part.add(cpu, rows, &loaded, panel);
            continue;
        };
        let mut alone = loaded.clone();
        part.add(cpu, rows, &loaded, &mut alone);
        let factor = part.factors(&magnitude.lengths, &alone);
        for (row, to) in panel.chunks_exact_mut(PANEL).enumerate() {
            for column in part.columns.clone() {
                let at = row * PANEL + column;
                let decomposed = (factor(row, column) * f64::from(alone[at])) as f32;
                to[column] += magnitude.strength * (decomposed - loaded[at]);
            }
        }
    }
}

/// No weight changes by more than about this; with [`Delta::Glora`], none of
/// the size that loaded weights have.
pub(super) fn bound(change: &Change) -> f64 {
    let max = |values: &[f32]| f64::from(values.iter().fold(0.0_f32, |max, v| max.max(v.abs())));
    let product = |p: &Product| max(&p.up) * max(&p.down) * p.rank as f64;
    let delta = match &change.delta {
        Delta::Product(p) => product(p),
        Delta::Hadamard(p, q) => {
            let (p, q) = (product(p), product(q));
            (p * q).max(p).max(q)
        }
        Delta::Kronecker { left, right, .. } => max(left) * max(right),
        Delta::Full(values) => max(values),
        Delta::Glora { through, plus } => {
            let inputs = (through.up.len() / through.rank.max(1)) as f64;
            product(plus) + product(through).max(max(&through.up)) * inputs
        }
    };
    let scaled = delta.max(delta * f64::from(change.scale).abs());
    match &change.magnitude {
        None => scaled,
        Some(Magnitude { lengths: Lengths::Outputs(values) | Lengths::Inputs(values), strength }) => {
            let strength = f64::from(*strength).abs();
            scaled.max(scaled * strength).max(max(values) * strength.max(1.0))
        }
    }
}

/// A change with its place in a packed matrix.
pub(super) struct Part<'a> {
    first: usize,
    outputs: usize,
    inputs: usize,
    taps: usize,
    change: &'a Change,
    /// The right factors of products as a panel's left ones, `[k][rank]`; of
    /// [`Delta::Glora`] also the left factor of what goes through, `[rank][inputs]`.
    left: Vec<Vec<f32>>,
}

impl<'a> Part<'a> {
    pub(super) fn new(module: &Module, change: &'a Change) -> Self {
        let (inputs, taps) = (module.inputs(), module.kernel * module.kernel);
        let outputs = module.outputs;
        let turned = |p: &Product, outputs: usize, taps: usize| {
            let fits = p.up.len() == outputs * p.rank && p.down.len() == p.rank * inputs * taps;
            assert!(fits, "{}: the factors of a product do not fit", module.name);
            let mut left = vec![0.0; p.down.len()];
            // A few channels at a time, so that what is written by lines and
            // what is read by columns both stay in the first cache.
            for start in (0..inputs).step_by(16) {
                for (r, row) in p.down.chunks_exact((inputs * taps).max(1)).enumerate() {
                    for channel in start..inputs.min(start + 16) {
                        for (tap, &value) in row[channel * taps..][..taps].iter().enumerate() {
                            left[(tap * inputs + channel) * p.rank + r] = value;
                        }
                    }
                }
            }
            left
        };
        let left = match &change.delta {
            Delta::Product(p) => vec![turned(p, outputs, taps)],
            Delta::Hadamard(p, q) => vec![turned(p, outputs, taps), turned(q, outputs, taps)],
            Delta::Kronecker { left, shape: [o, i], right } => {
                let size = outputs * inputs * taps;
                assert!(left.len() == o * i && left.len() * right.len() == size, "{}", module.name);
                assert!(outputs.is_multiple_of(*o) && inputs.is_multiple_of(*i), "{}", module.name);
                vec![]
            }
            Delta::Full(values) => {
                assert_eq!(values.len(), outputs * inputs * taps, "{}", module.name);
                vec![]
            }
            Delta::Glora { through, plus } => {
                let mut first = Vec::with_capacity(through.up.len());
                for r in 0..through.rank {
                    first.extend(through.up.iter().skip(r).step_by(through.rank));
                }
                vec![turned(plus, outputs, taps), turned(through, inputs, 1), first]
            }
        };
        Self { first: module.first, outputs, inputs, taps, change, left }
    }

    /// Whether the change depends on the loaded weights, and so on whole panels.
    pub(super) fn takes_loaded(&self) -> bool {
        self.change.magnitude.is_some() || matches!(self.change.delta, Delta::Glora { .. })
    }

    /// The change within a panel, unless the panel has none of the module's outputs.
    pub(super) fn in_panel<'p>(
        &'p self,
        outputs: &Range<usize>,
        lengths: Option<&'p [f64]>,
    ) -> Option<InPanel<'p>> {
        let start = outputs.start.max(self.first);
        let end = outputs.end.min(self.first + self.outputs);
        if start >= end {
            return None;
        }
        let columns = start - outputs.start..end - outputs.start;
        let first = start - self.first;
        let right = |p: &Product, scale: f32| {
            let mut aligned = AlignedVec::zeroed(p.rank * PANEL);
            let right = aligned.as_mut_slice();
            for (column, row) in columns.clone().zip(p.up[first * p.rank..].chunks_exact(p.rank.max(1))) {
                for (r, &value) in row.iter().enumerate() {
                    right[r * PANEL + column] = scale * value;
                }
            }
            aligned
        };
        let right = match &self.change.delta {
            Delta::Product(p) => vec![right(p, self.change.scale)],
            Delta::Hadamard(p, q) => vec![right(p, self.change.scale), right(q, 1.0)],
            Delta::Glora { plus, .. } => vec![right(plus, self.change.scale)],
            Delta::Kronecker { .. } | Delta::Full(_) => vec![],
        };
        Some(InPanel { part: self, columns, first, right, lengths })
    }

    /// Lengths over outputs and taps of the changed weights, where they count.
    pub(super) fn input_lengths<T: Element>(&self, cpu: &Cpu, base: &PackedMatrix<T>) -> Option<Vec<f64>> {
        let lengths = self.change.magnitude.as_ref().map(|m| &m.lengths);
        if !matches!(lengths, Some(Lengths::Inputs(_))) {
            return None;
        }
        let panels = Mutex::new(vec![]);
        base.visit(cpu, |outputs, panel| {
            let Some(part) = self.in_panel(&outputs, None) else { return };
            let loaded = panel.to_vec();
            part.add(cpu, &(0..panel.len() / PANEL), &loaded, panel);
            let mut squares = vec![0.0; self.inputs];
            for (k, row) in panel.chunks_exact(PANEL).enumerate() {
                squares[k % self.inputs] +=
                    row[part.columns.clone()].iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
            }
            panels.lock().unwrap_or_else(PoisonError::into_inner).push((outputs.start, squares));
        });
        // Threads come in any order; the sum must not.
        let mut panels = panels.into_inner().unwrap_or_else(PoisonError::into_inner);
        panels.sort_by_key(|(start, _)| *start);
        let mut sums = vec![0.0; self.inputs];
        for (_, squares) in panels {
            sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
        }
        Some(sums.into_iter().map(f64::sqrt).collect())
    }
}

/// A change within one panel.
pub(super) struct InPanel<'a> {
    part: &'a Part<'a>,
    /// The panel's columns that belong to the module.
    columns: Range<usize>,
    /// The module's output in the first of them.
    first: usize,
    /// The left factors of products as a panel's right ones, `[rank][PANEL]`; the first is scaled.
    right: Vec<AlignedVec<f32>>,
    /// See [`Part::input_lengths`].
    lengths: Option<&'a [f64]>,
}

impl InPanel<'_> {
    /// The module's output in a column that belongs to it.
    fn output(&self, column: usize) -> usize {
        self.first + column - self.columns.start
    }

    /// Adds the scaled change to rows of the panel, `[rows][PANEL]`; `loaded` is
    /// what was loaded there, if the change takes it.
    fn add(&self, cpu: &Cpu, rows: &Range<usize>, loaded: &[f32], panel: &mut [f32]) {
        let part = self.part;
        let add = |panel: &mut [f32], p: &Product, side: usize| {
            let left = &part.left[side][rows.start * p.rank..rows.end * p.rank];
            add_product(cpu.isa(), panel, left, self.right[side].as_slice());
        };
        match &part.change.delta {
            Delta::Product(p) => add(panel, p, 0),
            Delta::Hadamard(p, q) => {
                let (mut a, mut b) = (vec![0.0; panel.len()], vec![0.0; panel.len()]);
                add(&mut a, p, 0);
                add(&mut b, q, 1);
                for ((to, a), b) in panel.iter_mut().zip(&a).zip(&b) {
                    *to += a * b;
                }
            }
            Delta::Full(values) => {
                for (k, to) in rows.clone().zip(panel.chunks_exact_mut(PANEL)) {
                    let (tap, channel) = (k / part.inputs, k % part.inputs);
                    for column in self.columns.clone() {
                        let at = (self.output(column) * part.inputs + channel) * part.taps + tap;
                        to[column] += part.change.scale * values[at];
                    }
                }
            }
            Delta::Glora { through, plus } => {
                add(panel, plus, 0);
                let height = part.inputs * PANEL;
                for (from, to) in loaded.chunks_exact(height).zip(panel.chunks_exact_mut(height)) {
                    let mut inner = vec![0.0; through.rank * PANEL];
                    add_product(cpu.isa(), &mut inner, &part.left[2], from);
                    for row in inner.chunks_exact_mut(PANEL) {
                        // The other columns are another module's.
                        for (column, value) in row.iter_mut().enumerate() {
                            *value *= if self.columns.contains(&column) { part.change.scale } else { 0.0 };
                        }
                    }
                    add_product(cpu.isa(), to, &part.left[1], &inner);
                }
            }
            Delta::Kronecker { left, shape: [o, i], right } => {
                let (height, width) = (part.outputs / o, part.inputs / i);
                for (k, to) in rows.clone().zip(panel.chunks_exact_mut(PANEL)) {
                    let (tap, channel) = (k / part.inputs, k % part.inputs);
                    for column in self.columns.clone() {
                        let output = self.output(column);
                        let a = left[output / height * i + channel / width];
                        let b = right[(output % height * width + channel % width) * part.taps + tap];
                        to[column] += part.change.scale * a * b;
                    }
                }
            }
        }
    }

    /// What each weight of a whole panel is multiplied by to get the lengths
    /// asked for: a function of its row and column. In double precision, as a
    /// tiny length makes a factor beyond single precision of an ordinary weight.
    fn factors(&self, lengths: &Lengths, changed: &[f32]) -> Box<dyn Fn(usize, usize) -> f64> {
        // What is zero has no direction to be lengthened in.
        let factor = |wanted: f32, length: f64| if length > 0.0 { f64::from(wanted) / length } else { 0.0 };
        match lengths {
            Lengths::Inputs(values) => {
                let lengths = self.lengths.unwrap_or_default();
                let factors: Vec<f64> = values.iter().zip(lengths).map(|(m, l)| factor(*m, *l)).collect();
                let inputs = self.part.inputs;
                Box::new(move |row, _| factors[row % inputs])
            }
            Lengths::Outputs(values) => {
                let mut squares = [0.0_f64; PANEL];
                for row in changed.chunks_exact(PANEL) {
                    for column in self.columns.clone() {
                        squares[column] += f64::from(row[column]).powi(2);
                    }
                }
                let mut factors = [0.0_f64; PANEL];
                for column in self.columns.clone() {
                    factors[column] = factor(values[self.output(column)], squares[column].sqrt());
                }
                Box::new(move |_, column| factors[column])
            }
        }
    }
}
