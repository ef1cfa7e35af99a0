//! Tensors and checkpoints.

pub mod random;

pub use random::TorchGenerator;
