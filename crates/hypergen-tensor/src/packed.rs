//! Weights in the form in which operations read them, made once at load. They
//! may be exchanged for changed ones (`changes.rs`) and back: the first form
//! is kept, so that going back costs nothing and restores every bit.

use std::sync::{Arc, PoisonError, RwLock};

use half::bf16;
use hypergen_cpu::PackedMatrix;

/// A packed matrix of either type.
pub(crate) enum Matrix {
    F32(PackedMatrix<f32>),
    Bf16(PackedMatrix<bf16>),
}

/// The side of [`Matrix`] that fits an element type.
pub(crate) trait MatrixOf: Sized + hypergen_cpu::Element {
    /// The matrix, if it is of this type.
    fn of(matrix: &Matrix) -> Option<&PackedMatrix<Self>>;

    /// A matrix of this type.
    fn wrap(matrix: PackedMatrix<Self>) -> Matrix;

    /// The matrix, for activations of this type.
    fn matrix(matrix: &Matrix) -> &PackedMatrix<Self> {
        Self::of(matrix).expect("activations met weights of another type")
    }
}

impl MatrixOf for f32 {
    fn of(matrix: &Matrix) -> Option<&PackedMatrix<f32>> {
        match matrix {
            Matrix::F32(m) => Some(m),
            Matrix::Bf16(_) => None,
        }
    }

    fn wrap(matrix: PackedMatrix<f32>) -> Matrix {
        Matrix::F32(matrix)
    }
}

impl MatrixOf for bf16 {
    fn of(matrix: &Matrix) -> Option<&PackedMatrix<bf16>> {
        match matrix {
            Matrix::Bf16(m) => Some(m),
            Matrix::F32(_) => None,
        }
    }

    fn wrap(matrix: PackedMatrix<bf16>) -> Matrix {
        Matrix::Bf16(matrix)
    }
}

impl Matrix {
    /// Outputs.
    pub(crate) fn n(&self) -> usize {
        match self {
            Self::F32(m) => m.n(),
            Self::Bf16(m) => m.n(),
        }
    }

    /// Inputs.
    pub(crate) fn k(&self) -> usize {
        match self {
            Self::F32(m) => m.k(),
            Self::Bf16(m) => m.k(),
        }
    }

    /// Memory that it takes.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(m) => m.bytes(),
            Self::Bf16(m) => m.bytes(),
        }
    }

    /// Memory of what operations have derived from it so far.
    pub(crate) fn derived_bytes(&self) -> usize {
        match self {
            Self::F32(m) => m.derived_bytes(),
            Self::Bf16(m) => m.derived_bytes(),
        }
    }
}

/// A packed matrix or a vector, and what stands in for it at the moment. Clones
/// are the same slot.
pub(crate) struct Slot<T = Matrix>(Arc<Places<T>>);

struct Places<T> {
    base: Arc<T>,
    current: RwLock<Arc<T>>,
}

/// A bias, or the scale of a normalisation.
pub(crate) type VectorSlot = Slot<Vec<f32>>;

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Slot<T> {
    pub(crate) fn new(weights: T) -> Self {
        let base = Arc::new(weights);
        let current = RwLock::new(Arc::clone(&base));
        Self(Arc::new(Places { base, current }))
    }

    /// What operations compute with.
    pub(crate) fn get(&self) -> Arc<T> {
        // A lock is held only to exchange a pointer: nothing can be half done.
        Arc::clone(&self.0.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What was loaded.
    pub(crate) fn base(&self) -> &Arc<T> {
        &self.0.base
    }

    /// Lets operations compute with `weights` from now on, which have the shape
    /// of the loaded ones.
    pub(crate) fn set(&self, weights: Arc<T>) {
        *self.0.current.write().unwrap_or_else(PoisonError::into_inner) = weights;
    }

    /// A number that only clones of this slot have.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

impl Slot {
    /// Outputs.
    pub(crate) fn n(&self) -> usize {
        self.0.base.n()
    }

    /// Inputs.
    pub(crate) fn k(&self) -> usize {
        self.0.base.k()
    }
}

/// A linear layer, `[n, k]` and an optional bias. A 1x1 convolution of a
/// picture in NHWC is one, too.
pub struct Linear {
    pub(crate) matrix: Slot,
    pub(crate) bias: Option<VectorSlot>,
}

/// The present values of a bias.
pub(crate) fn present(bias: Option<&VectorSlot>) -> Option<Arc<Vec<f32>>> {
    bias.map(Slot::get)
}

impl Linear {
    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.matrix.n()
    }
}

/// The projection of a gated feed-forward layer; its halves are interleaved.
pub struct GegluProjection {
    pub(crate) matrix: Slot,
    pub(crate) bias: Option<VectorSlot>,
}

/// A convolution; kernels are square.
pub struct Conv {
    pub(crate) matrix: Slot,
    pub(crate) bias: Option<VectorSlot>,
    pub(crate) kernel: usize,
}

/// Scale and shift of a normalisation, with its epsilon.
pub struct Norm {
    pub(crate) gamma: VectorSlot,
    pub(crate) beta: VectorSlot,
    pub(crate) eps: f32,
}
