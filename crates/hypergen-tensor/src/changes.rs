//! Changes of loaded weights: low-rank products and their kin, added to packed
//! matrices without touching what was loaded. [`apply`] makes changed matrices,
//! [`Changed::install`] lets operations compute with them, and
//! [`Changed::restore`] goes back to the loaded bits.
//!
//! It deliberately reads no file and knows no name of a format: that is for
//! whoever has adapters to apply. Everything is computed in float32 from the
//! weights as they are packed, and rounded once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use hypergen_cpu::{Cpu, Element, PANEL_OUTPUTS as PANEL, PackedMatrix, add_product};

use crate::Device;
use crate::packed::{Matrix, Slot};

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

/// A packed matrix with its changes.
pub struct Changed {
    slot: Slot,
    matrix: Arc<Matrix>,
}

impl Changed {
    /// Operations compute with the changed weights from now on.
    pub fn install(&self) {
        self.slot.set(Arc::clone(&self.matrix));
    }

    /// Operations compute with the loaded weights again.
    pub fn restore(&self) {
        self.slot.set(Arc::clone(self.slot.base()));
    }

    /// Memory that the changed weights take.
    pub fn bytes(&self) -> usize {
        self.matrix.bytes()
    }
}

/// Memory that [`apply`] would take for changes of these modules.
pub fn bytes_to_change<'a>(modules: impl IntoIterator<Item = &'a Module>) -> usize {
    let mut slots: Vec<&Slot> = modules.into_iter().map(|m| &m.slot).collect();
    slots.sort_by_key(|slot| slot.address());
    slots.dedup_by_key(|slot| slot.address());
    slots.into_iter().map(|slot| slot.base().bytes()).sum()
}

/// Makes changed weights. Changes of one module add up, each computed from the
/// loaded weights.
///
/// # Panics
/// When a change's shape is not its module's.
pub fn apply(device: &Device, changes: &[(Module, Change)]) -> Vec<Changed> {
    let mut order: Vec<Slot> = vec![];
    let mut by_slot: HashMap<usize, Vec<&(Module, Change)>> = HashMap::new();
    for change in changes {
        let slot = &change.0.slot;
        by_slot.entry(slot.address()).or_insert_with(|| {
            order.push(slot.clone());
            vec![]
        });
        by_slot.entry(slot.address()).or_default().push(change);
    }
    let cpu = device.cpu_kernels();
    let changed = |slot: Slot| {
        let parts: Vec<Part<'_>> =
            by_slot[&slot.address()].iter().map(|(module, change)| Part::new(module, change)).collect();
        let matrix = match &**slot.base() {
            Matrix::F32(base) => Matrix::F32(rewrite(cpu, base, &parts)),
            Matrix::Bf16(base) => Matrix::Bf16(rewrite(cpu, base, &parts)),
        };
        Changed { slot, matrix: Arc::new(matrix) }
    };
    order.into_iter().map(changed).collect()
}

fn rewrite<T: Element>(cpu: &Cpu, base: &PackedMatrix<T>, parts: &[Part<'_>]) -> PackedMatrix<T> {
    let lengths: Vec<Option<Vec<f64>>> = parts.iter().map(|part| part.input_lengths(cpu, base)).collect();
    base.rewritten(cpu, |outputs, panel| {
        // Lengths are those of the loaded weights with one change alone.
        let loaded = parts.iter().any(|p| p.change.magnitude.is_some()).then(|| panel.to_vec());
        for (part, lengths) in parts.iter().zip(&lengths) {
            let Some(columns) = part.columns(&outputs) else { continue };
            match (&loaded, &part.change.magnitude) {
                (Some(loaded), Some(magnitude)) => {
                    let mut alone = loaded.clone();
                    part.add(cpu, &outputs, &mut alone);
                    let factor = part.factors(magnitude, lengths.as_deref(), &alone, &outputs, &columns);
                    for (row, to) in panel.chunks_exact_mut(PANEL).enumerate() {
                        for column in columns.clone() {
                            let at = row * PANEL + column;
                            to[column] += factor(row, column) * alone[at] - loaded[at];
                        }
                    }
                }
                _ => part.add(cpu, &outputs, panel),
            }
        }
    })
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
            for (r, row) in p.down.chunks_exact((inputs * taps).max(1)).enumerate() {
                for (channel, stored) in row.chunks_exact(taps).enumerate() {
                    for (tap, &value) in stored.iter().enumerate() {
                        left[(tap * inputs + channel) * p.rank + r] = value;
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

    /// The panel's columns that belong to this module.
    fn columns(&self, panel: &Range<usize>) -> Option<Range<usize>> {
        let start = panel.start.max(self.first);
        let end = panel.end.min(self.first + self.outputs);
        (start < end).then(|| start - panel.start..end - panel.start)
    }

    /// Adds the scaled change to a panel `[k][PANEL]`.
    fn add(&self, cpu: &Cpu, outputs: &Range<usize>, panel: &mut [f32]) {
        let Some(columns) = self.columns(outputs) else { return };
        // The panel's column of this module's first output, which may lie left of it.
        let output = |column: usize| outputs.start + column - self.first;
        let right = |p: &Product, scale: f32| {
            let mut right = vec![0.0; p.rank * PANEL];
            for column in columns.clone() {
                for (r, &value) in p.up[output(column) * p.rank..][..p.rank].iter().enumerate() {
                    right[r * PANEL + column] = scale * value;
                }
            }
            right
        };
        let scale = self.change.scale;
        match &self.change.delta {
            Delta::Product(p) => add_product(cpu.isa(), panel, &self.left[0], &right(p, scale)),
            Delta::Hadamard(p, q) => {
                let (mut a, mut b) = (vec![0.0; panel.len()], vec![0.0; panel.len()]);
                add_product(cpu.isa(), &mut a, &self.left[0], &right(p, scale));
                add_product(cpu.isa(), &mut b, &self.left[1], &right(q, 1.0));
                for ((to, a), b) in panel.iter_mut().zip(&a).zip(&b) {
                    *to += a * b;
                }
            }
            Delta::Kronecker { left, shape: [o, i], right } => {
                let (rows, width) = (self.outputs / o, self.inputs / i);
                for (k, to) in panel.chunks_exact_mut(PANEL).enumerate() {
                    let (tap, channel) = (k / self.inputs, k % self.inputs);
                    for column in columns.clone() {
                        let output = output(column);
                        let a = left[output / rows * i + channel / width];
                        let b = right[(output % rows * width + channel % width) * self.taps + tap];
                        to[column] += scale * a * b;
                    }
                }
            }
        }
    }

    /// What each weight of a panel is multiplied by to get the lengths asked
    /// for: a function of its row and column.
    fn factors<'f>(
        &'f self,
        magnitude: &'f Magnitude,
        lengths: Option<&[f64]>,
        changed: &[f32],
        outputs: &'f Range<usize>,
        columns: &Range<usize>,
    ) -> Box<dyn Fn(usize, usize) -> f32 + 'f> {
        match magnitude {
            Magnitude::Inputs(values) => {
                let lengths = lengths.unwrap_or_default();
                let factors: Vec<f32> =
                    values.iter().zip(lengths).map(|(m, l)| (f64::from(*m) / l) as f32).collect();
                Box::new(move |row, _| factors[row % self.inputs])
            }
            Magnitude::Outputs(values) => {
                let mut squares = [0.0_f64; PANEL];
                for row in changed.chunks_exact(PANEL) {
                    for column in columns.clone() {
                        squares[column] += f64::from(row[column]).powi(2);
                    }
                }
                Box::new(move |_, column| {
                    let output = outputs.start + column - self.first;
                    (f64::from(values[output]) / squares[column].sqrt()) as f32
                })
            }
        }
    }

    /// Lengths over outputs and taps of the changed weights, where they count.
    fn input_lengths<T: Element>(&self, cpu: &Cpu, base: &PackedMatrix<T>) -> Option<Vec<f64>> {
        if !matches!(self.change.magnitude, Some(Magnitude::Inputs(_))) {
            return None;
        }
        let panels = Mutex::new(vec![]);
        base.rewritten(cpu, |outputs, panel| {
            let Some(columns) = self.columns(&outputs) else { return };
            self.add(cpu, &outputs, panel);
            let mut squares = vec![0.0; self.inputs];
            for (k, row) in panel.chunks_exact(PANEL).enumerate() {
                squares[k % self.inputs] +=
                    row[columns.clone()].iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
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

#[cfg(test)]
mod tests;
