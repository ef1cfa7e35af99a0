//! Operations on one element at a time, for the few places where no
//! neighbouring kernel can take them in. They are bound by memory; fusing
//! them into a product's epilogue is always better.

use crate::simd::constant::{ConstActivation, Identity, with_activation};
use crate::simd::slices::{load, store};
use crate::simd::{Kernel, Simd, math, run};
use crate::split::{elements_per_task, parallel_chunks};
use crate::{Activation, Cpu, Element};

/// `out = a + b`.
///
/// # Panics
/// When the lengths differ.
pub fn add<T: Element>(cpu: &Cpu, a: &[T], b: &[T], out: &mut [T]) {
    assert!(a.len() == b.len() && a.len() == out.len(), "add: the lengths differ");
    let chunk = elements_per_task(cpu, out.len());
    parallel_chunks(cpu, out, chunk, |i, out| {
        let (a, b) = (&a[i * chunk..][..out.len()], &b[i * chunk..][..out.len()]);
        run(cpu.isa(), Add { a, b, out });
    });
}

struct Add<'a, T> {
    a: &'a [T],
    b: &'a [T],
    out: &'a mut [T],
}

impl<T: Element> Kernel for Add<'_, T> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the machine has the set, by the contract.
        unsafe {
            let mut out = self.out.chunks_exact_mut(S::LANES);
            let (mut a, mut b) = (self.a.chunks_exact(S::LANES), self.b.chunks_exact(S::LANES));
            for ((out, a), b) in (&mut out).zip(&mut a).zip(&mut b) {
                store::<S, _>(out, S::add(load::<S, _>(a), load::<S, _>(b)));
            }
            store::<S, _>(
                out.into_remainder(),
                S::add(load::<S, _>(a.remainder()), load::<S, _>(b.remainder())),
            );
        }
    }
}

/// `out = activation(x)`.
///
/// # Panics
/// When the lengths differ.
pub fn activate<T: Element>(cpu: &Cpu, x: &[T], activation: Activation, out: &mut [T]) {
    with_activation!(activation, A => map::<T, T, A>(cpu, x, out));
}

/// Converts from one element type to the other (or the same).
///
/// # Panics
/// When the lengths differ.
pub fn convert<S: Element, T: Element>(cpu: &Cpu, x: &[S], out: &mut [T]) {
    map::<S, T, Identity>(cpu, x, out);
}

fn map<X: Element, Y: Element, A: ConstActivation>(cpu: &Cpu, x: &[X], out: &mut [Y]) {
    assert_eq!(x.len(), out.len(), "activate, convert: the lengths differ");
    let chunk = elements_per_task(cpu, out.len());
    parallel_chunks(cpu, out, chunk, |i, out| {
        let x = &x[i * chunk..][..out.len()];
        run(cpu.isa(), Map { x, out, function: std::marker::PhantomData::<A> });
    });
}

struct Map<'a, X, Y, A> {
    x: &'a [X],
    out: &'a mut [Y],
    function: std::marker::PhantomData<A>,
}

impl<X: Element, Y: Element, A: ConstActivation> Kernel for Map<'_, X, Y, A> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the machine has the set, by the contract.
        unsafe {
            let mut out = self.out.chunks_exact_mut(S::LANES);
            let mut x = self.x.chunks_exact(S::LANES);
            for (out, x) in (&mut out).zip(&mut x) {
                store::<S, _>(out, math::activate::<S, Y>(A::ACTIVATION, load::<S, _>(x)));
            }
            store::<S, _>(
                out.into_remainder(),
                math::activate::<S, Y>(A::ACTIVATION, load::<S, _>(x.remainder())),
            );
        }
    }
}

/// Joins `a[rows, a_cols]` and `b[rows, b_cols]` to `out[rows, a_cols + b_cols]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn concat_columns<T: Element>(cpu: &Cpu, a: &[T], a_cols: usize, b: &[T], b_cols: usize, out: &mut [T]) {
    let cols = a_cols + b_cols;
    let rows = out.len().checked_div(cols).unwrap_or(0);
    assert!(
        out.len() == rows * cols && a.len() == rows * a_cols && b.len() == rows * b_cols,
        "concat_columns: {} + {} elements are not the {rows} rows of {a_cols} + {b_cols} columns",
        a.len(),
        b.len(),
    );
    if out.is_empty() {
        return;
    }
    let rows_per_task = (elements_per_task(cpu, out.len()) / cols).max(1);
    parallel_chunks(cpu, out, rows_per_task * cols, |i, out| {
        for (r, out) in out.chunks_exact_mut(cols).enumerate() {
            let r = i * rows_per_task + r;
            let (left, right) = out.split_at_mut(a_cols);
            left.copy_from_slice(&a[r * a_cols..][..a_cols]);
            right.copy_from_slice(&b[r * b_cols..][..b_cols]);
        }
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::reference;
    use crate::testing::{Values, assert_close, every_cpu};

    const LENGTHS: [usize; 8] = [0, 1, 3, 15, 17, 63, 1031, 40_009];

    /// Activations in bfloat16 are as precise as that type, not more.
    fn check<T: Element>(tolerance: f32) {
        for cpu in every_cpu() {
            for len in LENGTHS {
                let (a, b): (Vec<T>, Vec<T>) = (Values::new(1).normal(len), Values::new(2).normal(len));
                let mut out = vec![T::default(); len];
                add(&cpu, &a, &b, &mut out);
                assert_close("add", &cpu, &out, &reference::add(&a, &b), 1e-7);
                for act in [Activation::None, Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
                    activate(&cpu, &a, act, &mut out);
                    assert_close("activate", &cpu, &out, &reference::activate(&a, act), tolerance);
                }
            }
        }
    }

    #[test]
    fn add_and_activate_match_the_reference() {
        check::<f32>(1e-6);
        check::<bf16>(6e-5);
    }

    #[test]
    fn convert_is_exact() {
        for cpu in every_cpu() {
            for len in LENGTHS {
                let x: Vec<f32> = Values::new(3).normal(len);
                let mut narrow = vec![bf16::ZERO; len];
                convert(&cpu, &x, &mut narrow);
                assert_eq!(narrow, reference::convert::<f32, bf16>(&x));
                let mut wide = vec![0.0_f32; len];
                convert(&cpu, &narrow, &mut wide);
                assert_eq!(wide, reference::convert::<bf16, f32>(&narrow));
            }
        }
    }

    #[test]
    fn concat_columns_is_exact() {
        for cpu in every_cpu() {
            for (rows, a_cols, b_cols) in [(0, 3, 4), (1, 1, 1), (5, 3, 0), (5, 0, 3), (211, 320, 17)] {
                let a: Vec<bf16> = Values::new(4).normal(rows * a_cols);
                let b: Vec<bf16> = Values::new(5).normal(rows * b_cols);
                let mut out = vec![bf16::ZERO; a.len() + b.len()];
                concat_columns(&cpu, &a, a_cols, &b, b_cols, &mut out);
                assert_eq!(out, reference::concat_columns(rows, &a, a_cols, &b, b_cols));
            }
        }
    }
}
