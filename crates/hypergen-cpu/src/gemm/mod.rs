//! Matrix products over packed weights: `linear` and `geglu`, and what they
//! share with convolution. What differs between instruction sets is in the
//! files named after them; nothing here knows how A came to be.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) mod emulator;
mod epilogue;
#[cfg(target_arch = "x86_64")]
mod finish512;
mod packed;
#[cfg(target_arch = "x86_64")]
pub(crate) mod plan;
mod portable;
mod rewrite;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;
pub(crate) mod vector;

pub use packed::PackedMatrix;
pub use rewrite::{PANEL_OUTPUTS, Portion, add_product, rewrite};

pub(crate) use blocks::copy_run;
pub(crate) use epilogue::{Finish, Output, Square};
pub(crate) use packed::{PANEL, TILE_K};

use half::bf16;

#[cfg(target_arch = "x86_64")]
use crate::element::as_bf16;
use crate::simd::Simd;
use crate::{Cpu, Element, ElementKind, Isa};

/// A function applied to each output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// The value itself.
    #[default]
    None,
    /// `x * sigmoid(x)`.
    Silu,
    /// The exact GELU, `x * Phi(x)` by the error function.
    Gelu,
    /// `x * sigmoid(1.702 x)`, CLIP's approximation.
    QuickGelu,
}

/// A vector of `n` values that is added to all rows of one group (one picture
/// of a batch): a time embedding.
#[derive(Debug, Clone, Copy)]
pub struct GroupBias<'a, T> {
    /// `[groups, n]`.
    pub values: &'a [T],
    /// Consecutive rows that share one vector.
    pub rows_per_group: usize,
}

/// What happens to a product before it is stored, in this order:
/// `((acc + bias + group_bias) -> activation, + residual) * scale`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// One vector for each group of rows.
    pub group_bias: Option<GroupBias<'a, T>>,
    /// Applied after the biases.
    pub activation: Activation,
    /// `[m, n]`, added after the activation.
    pub residual: Option<&'a [T]>,
    /// Multiplies the result; 1 in nearly every use.
    pub scale: f32,
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Self { bias: None, group_bias: None, activation: Activation::None, residual: None, scale: 1.0 }
    }
}

/// The left operand of a product: rows of `k` values that need not lie in
/// memory as rows.
pub(crate) trait Rows<T: Element>: Sync {
    /// The number of rows.
    fn count(&self) -> usize;

    /// Copies values `k0..k0 + len` of a row.
    ///
    /// # Safety
    /// The machine has the set of `S`; the row exists and has these values;
    /// `len` elements are writable.
    unsafe fn copy<S: Simd, E: Element>(&self, row: usize, k0: usize, len: usize, to: *mut E);

    /// `output = self * w^T` on AMX tiles, which the machine has; only called
    /// where `T` is bfloat16.
    #[cfg(target_arch = "x86_64")]
    fn multiply_on_tiles(&self, cpu: &Cpu, w: &PackedMatrix<bf16>, output: &Output<'_, bf16>);
}

/// A matrix `[m, k]`.
struct Matrix<'a, T> {
    data: &'a [T],
    m: usize,
    k: usize,
}

impl<T: Element> Rows<T> for Matrix<'_, T> {
    fn count(&self) -> usize {
        self.m
    }

    #[inline(always)]
    unsafe fn copy<S: Simd, E: Element>(&self, row: usize, k0: usize, len: usize, to: *mut E) {
        // SAFETY: the caller's contract; `data` is `[m, k]`.
        unsafe { copy_run::<S, T, E>(self.data.as_ptr().add(row * self.k + k0), len, to) }
    }

    #[cfg(target_arch = "x86_64")]
    fn multiply_on_tiles(&self, cpu: &Cpu, w: &PackedMatrix<bf16>, output: &Output<'_, bf16>) {
        let data = as_bf16(self.data).expect("tiles are for bfloat16");
        match tiles::Direct::new(data, self.m, self.k) {
            Some(direct) => tiles::multiply(cpu, &direct, w, output),
            None => tiles::multiply_rows(cpu, &Matrix { data, m: self.m, k: self.k }, w, output),
        }
    }
}

/// `output = a * w^T`, by whatever the processor has.
pub(crate) fn multiply<T: Element>(cpu: &Cpu, a: &impl Rows<T>, w: &PackedMatrix<T>, output: &Output<'_, T>) {
    #[cfg(target_arch = "x86_64")]
    if T::KIND == ElementKind::Bf16 && cpu.isa() == Isa::AmxBf16 {
        // SAFETY: only bfloat16 is of this kind, so the types are the same.
        let (w, output) = unsafe {
            (
                &*std::ptr::from_ref(w).cast::<PackedMatrix<bf16>>(),
                &*std::ptr::from_ref(output).cast::<Output<'_, bf16>>(),
            )
        };
        return a.multiply_on_tiles(cpu, w, output);
    }
    blocks::multiply(cpu, a, w, output);
}

/// `out[m, n] = epilogue(a[m, k] * w^T)`; `m` follows from `out`.
///
/// # Panics
/// When a slice's length does not fit the shapes.
pub fn linear<T: Element>(
    cpu: &Cpu,
    a: &[T],
    w: &PackedMatrix<T>,
    epilogue: &Epilogue<'_, T>,
    out: &mut [T],
) {
    assert!(!w.is_geglu(), "linear: the weight is packed for geglu");
    let m = out.len().checked_div(w.n()).unwrap_or(0);
    product(cpu, a, m, w, Finish::Plain(epilogue), w.n(), out);
}

/// The gated feed-forward projection: `out[m, h] = value * gelu(gate)`, where
/// `[value, gate] = a[m, k] * w^T + bias` and `bias` is `[2 h]` in the
/// checkpoint's order (values, then gates).
///
/// # Panics
/// When a slice's length does not fit the shapes.
pub fn geglu<T: Element>(cpu: &Cpu, a: &[T], w: &PackedMatrix<T>, bias: Option<&[f32]>, out: &mut [T]) {
    assert!(w.is_geglu(), "geglu: the weight is not packed for it");
    let h = w.n() / 2;
    let m = out.len().checked_div(h).unwrap_or(0);
    product(cpu, a, m, w, Finish::Geglu(bias), h, out);
}

fn product<T: Element>(
    cpu: &Cpu,
    a: &[T],
    m: usize,
    w: &PackedMatrix<T>,
    finish: Finish<'_, T>,
    n: usize,
    out: &mut [T],
) {
    if n == 0 {
        // No outputs: nothing tells the number of rows, and nothing needs it.
        return assert!(out.is_empty(), "the weight has no outputs");
    }
    assert_eq!(a.len(), m * w.k(), "the input is not [{m}, {}]", w.k());
    let output = Output::new(out, m, n, finish);
    multiply(cpu, &Matrix { data: a, m, k: w.k() }, w, &output);
}
