//! Tensors and checkpoints.
