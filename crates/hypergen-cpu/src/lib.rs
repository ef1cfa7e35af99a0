//! CPU kernels: slices in, slices out.
//!
//! This crate knows matrices, pictures in NHWC order and attention heads; it
//! deliberately does not know what a model is, what a tensor is, or where
//! weights come from. Every kernel takes a [`Cpu`], which carries the thread
//! pool and the instruction set that was chosen at run time.
//!
//! Two rules hold for every kernel:
//!
//! * the bytes of the result never depend on the number of threads, nor on
//!   the rows that happen to share the call (a batch of `n` equals `n` singles);
//! * accumulation is in float32 whatever the [`Element`] is, and a value is
//!   rounded to the element type once, when it is stored.

mod aligned;
mod attention;
#[cfg(target_arch = "x86_64")]
mod cache;
mod conv;
mod cpu;
mod element;
mod elementwise;
mod gemm;
mod isa;
mod norm;
mod peak;
mod pool;
#[cfg(test)]
#[path = "pool/tests.rs"]
mod pool_tests;
pub mod reference;
mod scratch;
#[allow(dead_code, reason = "kernels move onto it one by one")]
mod simd;
mod split;
mod sync;
#[cfg(test)]
mod testing;

pub use aligned::{AlignedVec, Arena};
pub use attention::{AttentionShape, Heads, attention};
pub use conv::{ConvShape, conv2d};
pub use cpu::{Cpu, CpuConfig, CpuError};
pub use element::{Element, ElementKind};
pub use elementwise::{activate, add, concat_columns, convert};
pub use gemm::{
    Activation, Epilogue, GroupBias, PANEL_OUTPUTS, PackedMatrix, Portion, add_product, geglu, linear,
    rewrite,
};
pub use isa::Isa;
pub use norm::{GroupNormShape, group_norm, group_norm_scale_shift, layer_norm};
