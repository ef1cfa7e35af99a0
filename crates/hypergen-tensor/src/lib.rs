//! Tensors on a device, the fused operations that models are made of,
//! checkpoint reading and PyTorch's random numbers.
//!
//! Operations are *meanings* over packed weights (`linear`, `conv2d`,
//! `group_norm`, `attention`), not primitives: there is no autograd, no graph
//! and no strided view, and there will be none. This crate knows no model.

mod changes;
mod checkpoint;
mod device;
pub mod ops;
mod packed;
mod profile;
pub mod random;
mod tensor;
mod weights;

pub use changes::{
    Change, Changed, Delta, Lengths, Magnitude, Memory, Module, Product, Vector, apply, bytes_to_change,
    overflowing,
};
pub use checkpoint::{Checkpoint, CheckpointError, FileDType, Part, Renamed, TensorInfo};
pub use device::{Device, DeviceConfig};
pub use hypergen_cpu::{Activation, CpuError};
pub use packed::{Conv, GegluProjection, Linear, Norm};
pub use profile::ProfileEntry;
pub use random::TorchGenerator;
pub use tensor::{DType, Shape, Tensor};
pub use weights::{Loader, Weights};
