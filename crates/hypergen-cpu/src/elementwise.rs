//! Operations on one element at a time, for the few places where no
//! neighbouring kernel can take them in.

use crate::{Activation, Cpu, Element, gemm::apply};

/// `out = a + b`.
///
/// # Panics
/// When the lengths differ.
pub fn add<T: Element>(cpu: &Cpu, a: &[T], b: &[T], out: &mut [T]) {
    let _ = cpu;
    assert!(a.len() == b.len() && a.len() == out.len());
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = T::from_f32(a.to_f32() + b.to_f32());
    }
}

/// `out = activation(x)`.
///
/// # Panics
/// When the lengths differ.
pub fn activate<T: Element>(cpu: &Cpu, x: &[T], activation: Activation, out: &mut [T]) {
    let _ = cpu;
    assert_eq!(x.len(), out.len());
    for (out, x) in out.iter_mut().zip(x) {
        *out = T::from_f32(apply(activation, x.to_f32()));
    }
}

/// Joins `a[rows, a_cols]` and `b[rows, b_cols]` to `out[rows, a_cols + b_cols]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn concat_columns<T: Element>(cpu: &Cpu, a: &[T], a_cols: usize, b: &[T], b_cols: usize, out: &mut [T]) {
    let _ = cpu;
    for ((out, a), b) in
        out.chunks_exact_mut(a_cols + b_cols).zip(a.chunks_exact(a_cols)).zip(b.chunks_exact(b_cols))
    {
        out[..a_cols].copy_from_slice(a);
        out[a_cols..].copy_from_slice(b);
    }
}

/// Converts from one element type to the other (or the same).
///
/// # Panics
/// When the lengths differ.
pub fn convert<S: Element, T: Element>(cpu: &Cpu, x: &[S], out: &mut [T]) {
    let _ = cpu;
    assert_eq!(x.len(), out.len());
    for (out, x) in out.iter_mut().zip(x) {
        *out = T::from_f32(x.to_f32());
    }
}
