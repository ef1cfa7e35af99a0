//! Changes of loaded weights: low-rank products and their kin, added to packed
//! matrices without touching what was loaded. [`apply`] makes changed matrices,
//! [`Changed::install`] lets operations compute with them, and
//! [`Changed::restore`] goes back to the loaded bits. A matrix is read once and
//! written once, panel by panel, and all matrices together are one job for the
//! threads, into one piece of memory.
//!
//! It deliberately reads no file and knows no name of a format: that is for
//! whoever has adapters to apply. Everything is computed in float32 from the
//! weights as they are packed, and rounded once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use hypergen_cpu::{
    AlignedVec, Arena, Cpu, Element, PANEL_OUTPUTS as PANEL, PackedMatrix, Portion, add_product, rewrite,
};

use crate::Device;
use crate::packed::{Matrix, MatrixOf, Slot};

/// A matrix or convolution of a checkpoint, wherever it was packed.
#[derive(Clone)]
pub struct Module {
    name: String,
    slot: Slot,
    first: usize,
    outputs: usize,
    kernel: usize,
}

impl Module {
    pub(crate) fn new(name: String, slot: Slot, first: usize, outputs: usize, kernel: usize) -> Self {
        Self { name, slot, first, outputs, kernel }
    }

    /// Its name in the checkpoint, without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Input channels.
    pub fn inputs(&self) -> usize {
        self.slot.k() / (self.kernel * self.kernel)
    }

    /// Side of its square kernel: 1 for a matrix.
    pub fn kernel(&self) -> usize {
        self.kernel
    }
}

/// `up[outputs, rank] * down[rank, inputs * kernel * kernel]`, in PyTorch's order.
#[derive(Debug, Clone, PartialEq)]
pub struct Product {
    /// `[outputs, rank]`.
    pub up: Vec<f32>,
    /// `[rank, inputs, kernel, kernel]`.
    pub down: Vec<f32>,
    /// Columns of `up`.
    pub rank: usize,
}

/// What is added to a module's weights, before it is scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum Delta {
    /// LoRA (Hu et al. 2021, arXiv 2106.09685).
    Product(Product),
    /// LoHa: two products, multiplied element by element (Hyeon-Woo et al.
    /// 2021, arXiv 2108.06098).
    Hadamard(Product, Product),
    /// LoKr: `left[o, i] (x) right[p, j, kernel, kernel]`, Kronecker's product
    /// over outputs and inputs (Yeh et al. 2023, arXiv 2309.14859).
    Kronecker {
        /// `[o, i]`.
        left: Vec<f32>,
        /// `o` and `i`.
        shape: [usize; 2],
        /// `[outputs / o, inputs / i, kernel, kernel]`.
        right: Vec<f32>,
    },
}

/// Lengths that a changed weight is brought to: DoRA (Liu et al. 2024, arXiv
/// 2402.09353).
#[derive(Debug, Clone, PartialEq)]
pub enum Magnitude {
    /// One for each output, over its inputs and taps.
    Outputs(Vec<f32>),
    /// One for each input, over its outputs and taps.
    Inputs(Vec<f32>),
}

/// A change of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// What is added.
    pub delta: Delta,
    /// Multiplies it.
    pub scale: f32,
    /// With it, the changed weight is brought to these lengths.
    pub magnitude: Option<Magnitude>,
}

/// Changed matrices.
pub struct Changed {
    matrices: Vec<(Slot, Arc<Matrix>)>,
    memory: Memory,
}

/// What changed matrices lay in, for others to be written there: that spares
/// the system clearing fresh pages.
pub struct Memory(Arena);

impl Changed {
    /// Operations compute with the changed weights from now on.
    pub fn install(&self) {
        self.matrices.iter().for_each(|(slot, matrix)| slot.set(Arc::clone(matrix)));
    }

    /// Operations compute with the loaded weights again.
    pub fn restore(&self) {
        self.matrices.iter().for_each(|(slot, _)| slot.set(Arc::clone(slot.base())));
    }

    /// Memory that the changed weights take, with what operations have derived
    /// from them so far.
    pub fn bytes(&self) -> usize {
        let derived: usize = self.matrices.iter().map(|(_, matrix)| matrix.derived_bytes()).sum();
        self.memory.0.bytes() + derived
    }

    /// Forgets the changed weights, and keeps their memory.
    pub fn into_memory(self) -> Memory {
        self.memory
    }
}

impl Memory {
    /// Whether changes of this size would be written into it.
    pub fn fits(&self, bytes: usize) -> bool {
        self.0.bytes() == bytes
    }
}

/// Memory that [`apply`] would take for changes of these modules; what
/// operations derive from them comes on top.
pub fn bytes_to_change<'a>(modules: impl IntoIterator<Item = &'a Module>) -> usize {
    let mut slots: Vec<&Slot> = modules.into_iter().map(|m| &m.slot).collect();
    slots.sort_by_key(|slot| slot.address());
    slots.dedup_by_key(|slot| slot.address());
    slots.into_iter().map(|slot| slot.base().bytes()).sum()
}

/// Makes changed weights, in `memory` if that fits. Changes of one module add
/// up, each computed from the loaded weights.
///
/// # Panics
/// When a change's shape is not its module's.
pub fn apply(device: &Device, changes: &[(Module, Change)], memory: Option<Memory>) -> Changed {
    let cpu = device.cpu_kernels();
    let parts = device.map(changes.len(), |i| Part::new(&changes[i].0, &changes[i].1));
    let mut groups: Vec<Group<'_>> = vec![];
    let mut places: HashMap<usize, usize> = HashMap::new();
    for ((module, _), part) in changes.iter().zip(parts) {
        let place = *places.entry(module.slot.address()).or_insert_with(|| {
            groups.push(Group { slot: module.slot.clone(), parts: vec![] });
            groups.len() - 1
        });
        groups[place].parts.push(part);
    }
    let bytes = groups.iter().map(|group| group.slot.base().bytes()).sum();
    let reused = memory.filter(|m| m.fits(bytes)).and_then(|mut m| m.0.reuse().then_some(m.0));
    let mut arena = reused.unwrap_or_else(|| Arena::new(bytes));
    let mut matrices = rewritten::<f32>(cpu, &groups, &mut arena);
    matrices.extend(rewritten::<bf16>(cpu, &groups, &mut arena));
    Changed { matrices, memory: Memory(arena) }
}

/// The changes of one packed matrix.
struct Group<'a> {
    slot: Slot,
    parts: Vec<Part<'a>>,
}

/// Changes all matrices of one type.
fn rewritten<T: MatrixOf>(cpu: &Cpu, groups: &[Group<'_>], arena: &mut Arena) -> Vec<(Slot, Arc<Matrix>)> {
    let (groups, bases): (Vec<&Group<'_>>, Vec<&PackedMatrix<T>>) =
        groups.iter().filter_map(|group| Some((group, T::of(group.slot.base())?))).unzip();
    let lengths: Vec<Vec<Option<Vec<f64>>>> = groups
        .iter()
        .zip(&bases)
        .map(|(group, base)| group.parts.iter().map(|part| part.input_lengths(cpu, base)).collect())
        .collect();
    let whole = groups.iter().flat_map(|group| &group.parts).any(|part| part.change.magnitude.is_some());
    let portion = if whole { Portion::Panel } else { Portion::Strip };
    let matrices = rewrite(cpu, &bases, arena, portion, |i, outputs| {
        let parts: Vec<InPanel<'_>> = (groups[i].parts.iter().zip(&lengths[i]))
            .filter_map(|(part, lengths)| part.in_panel(&outputs, lengths.as_deref()))
            .collect();
        move |rows, panel: &mut [f32]| change(cpu, &parts, &rows, panel)
    });
    let slots = groups.iter().map(|group| group.slot.clone());
    slots.zip(matrices.into_iter().map(|matrix| Arc::new(T::wrap(matrix)))).collect()
}

/// Adds all changes to rows of a panel, to all of them where there are lengths.
fn change(cpu: &Cpu, parts: &[InPanel<'_>], rows: &Range<usize>, panel: &mut [f32]) {
    // Lengths are those of the loaded weights with one change alone.
    let loaded = parts.iter().any(|p| p.part.change.magnitude.is_some()).then(|| panel.to_vec());
    for part in parts {
        match (&loaded, &part.part.change.magnitude) {
            (Some(loaded), Some(magnitude)) => {
                let mut alone = loaded.clone();
                part.add(cpu, rows, &mut alone);
                let factor = part.factors(magnitude, &alone);
                for (row, to) in panel.chunks_exact_mut(PANEL).enumerate() {
                    for column in part.columns.clone() {
                        let at = row * PANEL + column;
                        to[column] += factor(row, column) * alone[at] - loaded[at];
                    }
                }
            }
            _ => part.add(cpu, rows, panel),
        }
    }
}

/// A change with its place in a packed matrix.
struct Part<'a> {
    first: usize,
    outputs: usize,
    inputs: usize,
    taps: usize,
    change: &'a Change,
    /// The right factors of products as a panel's left ones, `[k][rank]`.
    left: Vec<Vec<f32>>,
}

impl<'a> Part<'a> {
    fn new(module: &Module, change: &'a Change) -> Self {
        let (inputs, taps) = (module.inputs(), module.kernel * module.kernel);
        let outputs = module.outputs;
        let turned = |p: &Product| {
            assert_eq!(p.up.len(), outputs * p.rank, "{}: the left factor does not fit", module.name);
            assert_eq!(
                p.down.len(),
                p.rank * inputs * taps,
                "{}: the right factor does not fit",
                module.name
            );
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
            Delta::Product(p) => vec![turned(p)],
            Delta::Hadamard(p, q) => vec![turned(p), turned(q)],
            Delta::Kronecker { left, shape: [o, i], right } => {
                let size = outputs * inputs * taps;
                assert!(left.len() == o * i && left.len() * right.len() == size, "{}", module.name);
                assert!(outputs.is_multiple_of(*o) && inputs.is_multiple_of(*i), "{}", module.name);
                vec![]
            }
        };
        Self { first: module.first, outputs, inputs, taps, change, left }
    }

    /// The change within a panel, unless the panel has none of the module's outputs.
    fn in_panel<'p>(&'p self, outputs: &Range<usize>, lengths: Option<&'p [f64]>) -> Option<InPanel<'p>> {
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
            Delta::Kronecker { .. } => vec![],
        };
        Some(InPanel { part: self, columns, first, right, lengths })
    }

    /// Lengths over outputs and taps of the changed weights, where they count.
    fn input_lengths<T: Element>(&self, cpu: &Cpu, base: &PackedMatrix<T>) -> Option<Vec<f64>> {
        if !matches!(self.change.magnitude, Some(Magnitude::Inputs(_))) {
            return None;
        }
        let panels = Mutex::new(vec![]);
        base.visit(cpu, |outputs, panel| {
            let Some(part) = self.in_panel(&outputs, None) else { return };
            part.add(cpu, &(0..panel.len() / PANEL), panel);
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
struct InPanel<'a> {
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

    /// Adds the scaled change to rows of the panel, `[rows][PANEL]`.
    fn add(&self, cpu: &Cpu, rows: &Range<usize>, panel: &mut [f32]) {
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
    /// asked for: a function of its row and column.
    fn factors(&self, magnitude: &Magnitude, changed: &[f32]) -> Box<dyn Fn(usize, usize) -> f32> {
        match magnitude {
            Magnitude::Inputs(values) => {
                let lengths = self.lengths.unwrap_or_default();
                let factors: Vec<f32> =
                    values.iter().zip(lengths).map(|(m, l)| (f64::from(*m) / l) as f32).collect();
                let inputs = self.part.inputs;
                Box::new(move |row, _| factors[row % inputs])
            }
            Magnitude::Outputs(values) => {
                let mut squares = [0.0_f64; PANEL];
                for row in changed.chunks_exact(PANEL) {
                    for column in self.columns.clone() {
                        squares[column] += f64::from(row[column]).powi(2);
                    }
                }
                let mut factors = [0.0_f32; PANEL];
                for column in self.columns.clone() {
                    let wanted = f64::from(values[self.output(column)]);
                    factors[column] = (wanted / squares[column].sqrt()) as f32;
                }
                Box::new(move |_, column| factors[column])
            }
        }
    }
}

#[cfg(test)]
mod tests;
