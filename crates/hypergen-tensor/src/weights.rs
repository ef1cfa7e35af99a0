//! Walks a checkpoint by its own names and packs what a model asks for:
//! `weights.pp("down_blocks").pp(0)` reads like the checkpoint's keys, so
//! there is no table of names to keep.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::Display;

use hypergen_cpu::PackedMatrix;

use crate::Device;
use crate::changes::{Module, Vector};
use crate::checkpoint::{Checkpoint, CheckpointError, Values};
use crate::packed::{Conv, GegluProjection, Linear, Matrix, Norm, Slot, VectorSlot};
use crate::tensor::{DType, Tensor};

/// Loads the parts of one checkpoint onto a device, and keeps account of what
/// has been used.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    dtype: DType,
    used: RefCell<HashSet<String>>,
    modules: RefCell<Vec<Module>>,
    vectors: RefCell<Vec<Vector>>,
    progress: &'a dyn Fn(u64),
}

impl<'a> Loader<'a> {
    /// A loader; `progress` is told the stored size of each tensor as it is packed.
    pub fn new(
        checkpoint: &'a Checkpoint,
        device: &'a Device,
        dtype: DType,
        progress: &'a dyn Fn(u64),
    ) -> Self {
        Self {
            checkpoint,
            device,
            dtype,
            used: RefCell::default(),
            modules: RefCell::default(),
            vectors: RefCell::default(),
            progress,
        }
    }

    /// The root of the names.
    pub fn root(&self) -> Weights<'_> {
        Weights { loader: self, prefix: String::new() }
    }

    /// Tensors that no part of the model has asked for, sorted.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        let mut unused: Vec<String> =
            self.checkpoint.names().filter(|n| !used.contains(*n)).map(str::to_owned).collect();
        unused.sort_unstable();
        unused
    }

    /// The matrices and convolutions loaded so far, each by the name that it
    /// has in the checkpoint, wherever it was packed: what can be changed later.
    pub fn modules(&self) -> Vec<Module> {
        self.modules.borrow().clone()
    }

    /// The biases and the scales of normalisations loaded so far, in the same way.
    pub fn vectors(&self) -> Vec<Vector> {
        self.vectors.borrow().clone()
    }

    fn note(&self, name: &str) {
        if self.used.borrow_mut().insert(name.to_owned())
            && let Some(info) = self.checkpoint.get(name)
        {
            (self.progress)(info.bytes());
        }
        self.checkpoint.release(name);
    }
}

/// A place in a checkpoint's tree of names.
#[derive(Clone)]
pub struct Weights<'a> {
    loader: &'a Loader<'a>,
    prefix: String,
}

impl<'a> Weights<'a> {
    /// One step down.
    pub fn pp(&self, part: impl Display) -> Weights<'a> {
        Weights { loader: self.loader, prefix: self.name(part) }
    }

    /// The full name of a tensor here.
    pub fn name(&self, part: impl Display) -> String {
        if self.prefix.is_empty() { part.to_string() } else { format!("{}.{part}", self.prefix) }
    }

    /// Whether there is such a tensor here.
    pub fn contains(&self, tensor: &str) -> bool {
        self.loader.checkpoint.get(&self.name(tensor)).is_some()
    }

    /// The device that is loaded onto.
    pub fn device(&self) -> &Device {
        self.loader.device
    }

    /// The type that is loaded into.
    pub fn dtype(&self) -> DType {
        self.loader.dtype
    }

    /// A linear layer of `inputs` to `outputs`; `weight` may also be a 1x1 convolution.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear, CheckpointError> {
        Self::linear_stacked(std::slice::from_ref(self), inputs, outputs, bias)
    }

    /// Several linear layers over the same inputs as one, their outputs side
    /// by side.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn linear_stacked(
        parts: &[Weights<'_>],
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Linear, CheckpointError> {
        let all =
            parts.iter().map(|p| p.values("weight", &[outputs, inputs])).collect::<Result<Vec<_>, _>>()?;
        let loader = parts[0].loader;
        let matrix = pack(loader, parts.len() * outputs, inputs, |row, out| {
            all[row / outputs].read(row % outputs * inputs, out);
        });
        let matrix = Slot::new(matrix);
        for (i, part) in parts.iter().enumerate() {
            part.done("weight");
            part.module(&matrix, i * outputs, outputs, 1);
        }
        let bias = match bias {
            false => None,
            true => {
                let values: Result<Vec<_>, _> = parts.iter().map(|p| p.vector("bias", outputs)).collect();
                let slot = Slot::new(values?.concat());
                for (i, part) in parts.iter().enumerate() {
                    part.changeable("bias", &slot, i * outputs, outputs);
                }
                Some(slot)
            }
        };
        Ok(Linear { matrix, bias })
    }

    /// The projection of a gated feed-forward layer, to `hidden` values and as many gates.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn geglu(&self, inputs: usize, hidden: usize) -> Result<GegluProjection, CheckpointError> {
        let values = self.values("weight", &[2 * hidden, inputs])?;
        let (l, n) = (self.loader, 2 * hidden);
        let cpu = l.device.cpu_kernels();
        let row = |row: usize, out: &mut [f32]| values.read(row * inputs, out);
        let matrix = match l.dtype {
            DType::F32 => Matrix::F32(PackedMatrix::pack_geglu(cpu, n, inputs, row)),
            DType::Bf16 => Matrix::Bf16(PackedMatrix::pack_geglu(cpu, n, inputs, row)),
        };
        let matrix = Slot::new(matrix);
        self.done("weight");
        self.module(&matrix, 0, n, 1);
        Ok(GegluProjection { matrix, bias: Some(self.slot("bias", n)?) })
    }

    /// A convolution with a square kernel, with bias.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn conv2d(&self, inputs: usize, outputs: usize, kernel: usize) -> Result<Conv, CheckpointError> {
        let values = self.values("weight", &[outputs, inputs, kernel, kernel])?;
        let taps = kernel * kernel;
        // The file has [out, in, kh, kw]; kernels read [out, kh, kw, in].
        let matrix = pack(self.loader, outputs, taps * inputs, |row, out| {
            let mut stored = vec![0.0; taps * inputs];
            values.read(row * stored.len(), &mut stored);
            for (c, stored) in stored.chunks_exact(taps).enumerate() {
                for (tap, &value) in stored.iter().enumerate() {
                    out[tap * inputs + c] = value;
                }
            }
        });
        let matrix = Slot::new(matrix);
        self.done("weight");
        self.module(&matrix, 0, outputs, kernel);
        Ok(Conv { matrix, bias: Some(self.slot("bias", outputs)?), kernel })
    }

    /// Scale and shift of a normalisation.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit.
    pub fn norm(&self, channels: usize, eps: f64) -> Result<Norm, CheckpointError> {
        let (gamma, beta) = (self.slot("weight", channels)?, self.slot("bias", channels)?);
        Ok(Norm { gamma, beta, eps: eps as f32 })
    }

    /// A table `[rows, columns]` of embeddings, as a tensor.
    ///
    /// # Errors
    /// When it is missing or does not fit.
    pub fn table(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor, CheckpointError> {
        let values = self.values(name, &[rows, columns])?.to_vec();
        self.done(name);
        Ok(Tensor::from_f32(self.loader.device, [rows, columns], self.loader.dtype, &values))
    }

    /// A vector in float32.
    ///
    /// # Errors
    /// When it is missing or does not fit.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let values = self.values(name, &[len])?.to_vec();
        self.done(name);
        Ok(values)
    }

    /// A vector that can be changed later.
    fn slot(&self, tensor: &str, len: usize) -> Result<VectorSlot, CheckpointError> {
        let slot = Slot::new(self.vector(tensor, len)?);
        self.changeable(tensor, &slot, 0, len);
        Ok(slot)
    }

    /// Remembers where a vector here was put: `len` values of `slot` from `first` on.
    fn changeable(&self, tensor: &str, slot: &VectorSlot, first: usize, len: usize) {
        let vector = Vector::new(self.name(tensor), slot.clone(), first, len);
        self.loader.vectors.borrow_mut().push(vector);
    }

    fn values(&self, tensor: &str, shape: &[usize]) -> Result<Values<'a>, CheckpointError> {
        self.loader.checkpoint.tensor(&self.name(tensor), shape)
    }

    /// Remembers where the module here was packed: `outputs` of `slot` from `first` on.
    fn module(&self, slot: &Slot, first: usize, outputs: usize, kernel: usize) {
        let module = Module::new(self.prefix.clone(), slot.clone(), first, outputs, kernel);
        self.loader.modules.borrow_mut().push(module);
    }

    fn done(&self, tensor: &str) {
        self.loader.note(&self.name(tensor));
    }
}

fn pack(loader: &Loader<'_>, n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Matrix {
    let cpu = loader.device.cpu_kernels();
    match loader.dtype {
        DType::F32 => Matrix::F32(PackedMatrix::pack(cpu, n, k, row)),
        DType::Bf16 => Matrix::Bf16(PackedMatrix::pack(cpu, n, k, row)),
    }
}
