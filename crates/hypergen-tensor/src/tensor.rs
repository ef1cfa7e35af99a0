//! A dense tensor: a shape, a type, and memory on a device. No strides.

use std::fmt;

use half::bf16;

use crate::device::{Buffer, Device, Pooled};

/// Number types that tensors are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// The name that users know: `float32` or `bfloat16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Up to four dimensions, outermost first; pictures are `[n, h, w, c]`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }

    /// The innermost dimension: channels.
    pub fn last(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// The same shape with another innermost dimension.
    pub fn with_last(mut self, last: usize) -> Self {
        self.dims[self.rank - 1] = last;
        self
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(from: [usize; N]) -> Self {
        const { assert!(N >= 1 && N <= 4, "a tensor has one to four dimensions") };
        let mut dims = [1; 4];
        dims[..N].copy_from_slice(&from);
        Self { dims, rank: N }
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dims().fmt(f)
    }
}

/// A tensor. Operations on it are in [`crate::ops`].
pub struct Tensor {
    shape: Shape,
    storage: Storage,
    device: Device,
}

pub(crate) enum Storage {
    F32(Buffer<f32>),
    Bf16(Buffer<bf16>),
}

/// An element type, with its side of the enums that hold either.
pub(crate) trait Stored: Pooled {
    fn wrap(buffer: Buffer<Self>) -> Storage;
    fn slice(storage: &Storage) -> &[Self];
}

/// Models keep one type throughout; a mixture is a defect in the model's code.
fn mixed() -> ! {
    panic!("tensors of different types met in one operation")
}

impl Stored for f32 {
    fn wrap(buffer: Buffer<f32>) -> Storage {
        Storage::F32(buffer)
    }

    fn slice(storage: &Storage) -> &[f32] {
        match storage {
            Storage::F32(b) => b,
            Storage::Bf16(_) => mixed(),
        }
    }
}

impl Stored for bf16 {
    fn wrap(buffer: Buffer<bf16>) -> Storage {
        Storage::Bf16(buffer)
    }

    fn slice(storage: &Storage) -> &[bf16] {
        match storage {
            Storage::Bf16(b) => b,
            Storage::F32(_) => mixed(),
        }
    }
}

impl Tensor {
    /// A tensor of float32 values converted to `dtype`.
    ///
    /// # Panics
    /// When the number of values does not fit the shape.
    pub fn from_f32(device: &Device, shape: impl Into<Shape>, dtype: DType, values: &[f32]) -> Self {
        fn fill<T: Stored>(device: &Device, shape: Shape, values: &[f32]) -> Tensor {
            Tensor::build::<T>(device, shape, |out| hypergen_cpu::convert(device.cpu_kernels(), values, out))
        }
        let shape = shape.into();
        assert_eq!(shape.elements(), values.len(), "{shape:?} does not hold {} values", values.len());
        match dtype {
            DType::F32 => fill::<f32>(device, shape, values),
            DType::Bf16 => fill::<bf16>(device, shape, values),
        }
    }

    /// The values as float32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.elements()];
        let cpu = self.device.cpu_kernels();
        match &self.storage {
            Storage::F32(data) => out.copy_from_slice(data),
            Storage::Bf16(data) => hypergen_cpu::convert(cpu, data, &mut out),
        }
        out
    }

    /// Makes a tensor and has `fill` write all of it.
    pub(crate) fn build<T: Stored>(device: &Device, shape: Shape, fill: impl FnOnce(&mut [T])) -> Self {
        let mut buffer = Buffer::new(device, shape.elements());
        fill(&mut buffer);
        Self { shape, storage: T::wrap(buffer), device: device.clone() }
    }

    pub(crate) fn slice<T: Stored>(&self) -> &[T] {
        T::slice(&self.storage)
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The dimensions of a picture, `[n, h, w, c]`.
    ///
    /// # Panics
    /// When the tensor has not four dimensions.
    pub fn nhwc(&self) -> [usize; 4] {
        assert_eq!(self.shape.rank, 4, "a picture has four dimensions, not {:?}", self.shape);
        self.shape.dims
    }

    /// The number type.
    pub fn dtype(&self) -> DType {
        match self.storage {
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The same elements in another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    pub fn reshape(mut self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.elements(), self.shape.elements(), "{:?} cannot become {shape:?}", self.shape);
        self.shape = shape;
        self
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor {:?} {}", self.shape, self.dtype().name())
    }
}
