//! Changes of loaded weights: low-rank products and their kin, added to packed
//! matrices without touching what was loaded; biases and normalisations change
//! by addition. [`apply`] makes changed weights, [`Changed::install`] lets
//! operations compute with them, and [`Changed::restore`] goes back to the
//! loaded bits. A matrix is read once and written once, panel by panel, and all
//! matrices together are one job for the threads, into one piece of memory.
//!
//! It deliberately reads no file and knows no name of a format: that is for
//! whoever has adapters to apply. Everything is computed in float32 from the
//! weights as they are packed, and rounded once.

mod panel;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;
use hypergen_cpu::{Arena, Cpu, PANEL_OUTPUTS as PANEL, PackedMatrix, Portion, rewrite};

use self::panel::{InPanel, Part, change};
use crate::Device;
use crate::packed::{Matrix, MatrixOf, Slot, VectorSlot};

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

/// A bias or the scale of a normalisation, wherever it was put.
#[derive(Clone)]
pub struct Vector {
    name: String,
    slot: VectorSlot,
    first: usize,
    len: usize,
}

impl Vector {
    pub(crate) fn new(name: String, slot: VectorSlot, first: usize, len: usize) -> Self {
        Self { name, slot, first, len }
    }

    /// Its full name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds to its part of a slot's values.
    fn add(&self, all: &mut [f32], values: &[f32]) {
        assert_eq!(values.len(), self.len, "{}: another number of values", self.name);
        all[self.first..][..self.len].iter_mut().zip(values).for_each(|(to, v)| *to += v);
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
    /// The difference itself, `[outputs, inputs, kernel, kernel]`.
    Full(Vec<f32>),
    /// GLoRA: the loaded weights times a product over their inputs, tap by tap,
    /// and a product beside them (Chavan et al. 2023, arXiv 2306.07967).
    Glora {
        /// `up[inputs, rank] * down[rank, inputs]`.
        through: Product,
        /// As in LoRA.
        plus: Product,
    },
}

/// Lengths that a changed weight is brought to: DoRA (Liu et al. 2024, arXiv
/// 2402.09353). A weight of length zero stays zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Magnitude {
    /// What the lengths are.
    pub lengths: Lengths,
    /// Multiplies the difference between the weight with these lengths and the loaded one.
    pub strength: f32,
}

/// The lengths of a [`Magnitude`].
#[derive(Debug, Clone, PartialEq)]
pub enum Lengths {
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

/// Changed matrices and vectors.
pub struct Changed {
    matrices: Vec<(Slot, Arc<Matrix>)>,
    vectors: Vec<(VectorSlot, Arc<Vec<f32>>)>,
    memory: Memory,
}

/// What changed matrices lay in, for others to be written there: that spares
/// the system clearing fresh pages.
pub struct Memory(Arena);

impl Changed {
    /// Operations compute with the changed weights from now on.
    pub fn install(&self) {
        self.matrices.iter().for_each(|(slot, matrix)| slot.set(Arc::clone(matrix)));
        self.vectors.iter().for_each(|(slot, values)| slot.set(Arc::clone(values)));
    }

    /// Operations compute with the loaded weights again.
    pub fn restore(&self) {
        self.matrices.iter().for_each(|(slot, _)| slot.set(Arc::clone(slot.base())));
        self.vectors.iter().for_each(|(slot, _)| slot.set(Arc::clone(slot.base())));
    }

    /// Memory that the changed weights take, with what operations have derived
    /// from them so far.
    pub fn bytes(&self) -> usize {
        let derived: usize = self.matrices.iter().map(|(_, matrix)| matrix.derived_bytes()).sum();
        let vectors: usize = self.vectors.iter().map(|(_, values)| size_of_val(values.as_slice())).sum();
        self.memory.0.bytes() + derived + vectors
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
/// up, each computed from the loaded weights; `vectors` are added as they are.
///
/// # Panics
/// When a change's shape is not its module's.
pub fn apply(
    device: &Device,
    changes: &[(Module, Change)],
    vectors: &[(Vector, Vec<f32>)],
    memory: Option<Memory>,
) -> Changed {
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
    Changed { matrices, vectors: summed(vectors), memory: Memory(arena) }
}

/// Loaded vectors with all that is added to them.
fn summed(changes: &[(Vector, Vec<f32>)]) -> Vec<(VectorSlot, Arc<Vec<f32>>)> {
    let mut sums: Vec<(VectorSlot, Vec<f32>)> = vec![];
    let mut places: HashMap<usize, usize> = HashMap::new();
    for (vector, values) in changes {
        let place = *places.entry(vector.slot.address()).or_insert_with(|| {
            sums.push((vector.slot.clone(), vector.slot.base().to_vec()));
            sums.len() - 1
        });
        vector.add(&mut sums[place].1, values);
    }
    sums.into_iter().map(|(slot, values)| (slot, Arc::new(values))).collect()
}

/// The name of a matrix that a change, alone, makes infinite or no number; of a
/// vector its own. Weights of ordinary size are not computed for that.
pub fn overflowing<'a>(
    device: &Device,
    changes: &'a [(Module, Change)],
    vectors: &'a [(Vector, Vec<f32>)],
) -> Option<&'a str> {
    let bounds = device.map(changes.len(), |i| panel::bound(&changes[i].1));
    let suspects = changes.iter().zip(bounds).filter(|(_, bound)| *bound > SAFE).map(|(change, _)| change);
    let matrix = suspects.map(|(module, change)| (module, change)).find(|(module, change)| {
        let (cpu, part) = (device.cpu_kernels(), Part::new(module, change));
        match &**module.slot.base() {
            Matrix::F32(base) => overflows(cpu, base, &part, f32::MAX),
            Matrix::Bf16(base) => overflows(cpu, base, &part, bf16::MAX.to_f32()),
        }
    });
    let infinite = |(vector, values): &&(Vector, Vec<f32>)| {
        let mut sum = vector.slot.base().to_vec();
        vector.add(&mut sum, values);
        !sum.iter().all(|v| v.is_finite())
    };
    let vector = || vectors.iter().find(infinite).map(|(vector, _)| vector.name());
    matrix.map(|(module, _)| module.name()).or_else(vector)
}

/// Changes within this keep any loaded weight, and all that is computed on the
/// way, far from the largest number, 3.4e38.
const SAFE: f64 = 1e30;

/// Whether a change makes weights that are larger than `max`.
fn overflows<T: MatrixOf>(cpu: &Cpu, base: &PackedMatrix<T>, part: &Part<'_>, max: f32) -> bool {
    let lengths = part.input_lengths(cpu, base);
    let found = AtomicBool::new(false);
    base.visit(cpu, |outputs, values| {
        let Some(part) = part.in_panel(&outputs, lengths.as_deref()) else { return };
        change(cpu, &[part], &(0..values.len() / PANEL), values);
        if !values.iter().all(|v| v.abs() <= max) {
            found.store(true, Ordering::Relaxed);
        }
    });
    found.into_inner()
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
    let whole = groups.iter().flat_map(|group| &group.parts).any(|part| part.takes_loaded());
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

#[cfg(test)]
mod tests;
