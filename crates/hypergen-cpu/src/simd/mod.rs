//! Vectors of float32 of one instruction set behind one trait, so that a
//! kernel is written once and compiled for each. It deliberately has no
//! integers, no shuffles and no masks beyond what kernels here need; what is
//! special to one instruction set (tiles, bfloat16 dot products) is written
//! for that set alone.
//!
//! A kernel is a value that implements [`Kernel`]; [`run`] compiles its body
//! for every set and picks one at run time. The body and everything that it
//! calls must be `#[inline(always)]`: only then do the intrinsics of the
//! chosen set melt into it.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod constant;
pub(crate) mod math;
pub(crate) mod portable;
pub(crate) mod slices;

use half::bf16;

use crate::{Element, ElementKind, Isa};

/// Vectors of one instruction set.
///
/// # Safety
/// Every method may only be called where the machine has that set, which
/// [`run`] makes sure of; loads and stores need valid pointers, of any
/// alignment that the element type itself asks for.
#[allow(clippy::missing_safety_doc, reason = "one contract for all methods, stated above")]
pub(crate) trait Simd: Copy + 'static {
    /// A vector.
    type V: Copy;
    /// Floats in a vector.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load_f32(from: *const f32) -> Self::V;
    unsafe fn store_f32(to: *mut f32, v: Self::V);
    /// Widens [`Self::LANES`] values.
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    /// Rounds to nearest, ties to even, as [`Element::from_f32`] does (some
    /// sets take subnormal numbers for zero).
    unsafe fn store_bf16(to: *mut bf16, v: Self::V);
    /// Reads [`Self::LANES`] pairs and widens them: the first of each pair,
    /// the second of each pair.
    unsafe fn load_bf16_pairs(from: *const bf16) -> (Self::V, Self::V);

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the set can.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b`, rounded once where the set can.
    unsafe fn neg_mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The smaller of each; `b` where either is not a number.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each; `b` where either is not a number.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn abs(a: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for integral `n` from -300 to 300, with underflow to zero and
    /// overflow to infinity.
    unsafe fn scale_by_pow2(a: Self::V, n: Self::V) -> Self::V;
    /// `if a < b { x } else { y }` in each lane.
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `1 / a` to about 14 bits or better: enough where the result is rounded to bfloat16.
    unsafe fn reciprocal_estimate(a: Self::V) -> Self::V;
    unsafe fn reduce_add(a: Self::V) -> f32;
    unsafe fn reduce_max(a: Self::V) -> f32;

    /// Reads the first `n` lanes, at most all; the others are zero.
    #[inline(always)]
    unsafe fn load_f32_part(from: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: `n` values are readable and fit.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
            Self::load_f32(lanes.as_ptr())
        }
    }

    /// Writes the first `n` lanes, at most all.
    #[inline(always)]
    unsafe fn store_f32_part(to: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: `n` values are writable and there are that many.
        unsafe {
            Self::store_f32(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }

    /// Reads and widens the first `n` lanes, at most all; the others are zero.
    #[inline(always)]
    unsafe fn load_bf16_part(from: *const bf16, n: usize) -> Self::V {
        let mut lanes = [bf16::ZERO; MAX_LANES];
        // SAFETY: `n` values are readable and fit.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
            Self::load_bf16(lanes.as_ptr())
        }
    }

    /// Rounds and writes the first `n` lanes, at most all.
    #[inline(always)]
    unsafe fn store_bf16_part(to: *mut bf16, v: Self::V, n: usize) {
        let mut lanes = [bf16::ZERO; MAX_LANES];
        // SAFETY: `n` values are writable and there are that many.
        unsafe {
            Self::store_bf16(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }

    /// Reads a vector of either element type.
    #[inline(always)]
    unsafe fn load<T: Element>(from: *const T) -> Self::V {
        // SAFETY: the kind says what `T` is; the rest is the caller's.
        unsafe {
            match T::KIND {
                ElementKind::F32 => Self::load_f32(from.cast()),
                ElementKind::Bf16 => Self::load_bf16(from.cast()),
            }
        }
    }

    /// Rounds and writes a vector of either element type.
    #[inline(always)]
    unsafe fn store<T: Element>(to: *mut T, v: Self::V) {
        // SAFETY: the kind says what `T` is; the rest is the caller's.
        unsafe {
            match T::KIND {
                ElementKind::F32 => Self::store_f32(to.cast(), v),
                ElementKind::Bf16 => Self::store_bf16(to.cast(), v),
            }
        }
    }

    /// Reads the first `n` lanes of either element type; the others are zero.
    #[inline(always)]
    unsafe fn load_part<T: Element>(from: *const T, n: usize) -> Self::V {
        // SAFETY: the kind says what `T` is; the rest is the caller's.
        unsafe {
            match T::KIND {
                ElementKind::F32 => Self::load_f32_part(from.cast(), n),
                ElementKind::Bf16 => Self::load_bf16_part(from.cast(), n),
            }
        }
    }

    /// Rounds and writes the first `n` lanes of either element type.
    #[inline(always)]
    unsafe fn store_part<T: Element>(to: *mut T, v: Self::V, n: usize) {
        // SAFETY: the kind says what `T` is; the rest is the caller's.
        unsafe {
            match T::KIND {
                ElementKind::F32 => Self::store_f32_part(to.cast(), v, n),
                ElementKind::Bf16 => Self::store_bf16_part(to.cast(), v, n),
            }
        }
    }
}

/// The most lanes of any set.
pub(crate) const MAX_LANES: usize = 16;

/// A piece of work that is compiled once for each instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Does the work. Must be `#[inline(always)]`.
    ///
    /// # Safety
    /// The machine has the instruction set of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs a kernel with the vectors of `isa`, which the machine must have: a
/// [`crate::Cpu`] never names another.
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    debug_assert!(isa.is_supported());
    // SAFETY: the machine has `isa`, and each set includes the lower ones.
    unsafe {
        match isa {
            Isa::Portable => kernel.run::<portable::Portable>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::AmxBf16 => avx512::run_bf16(kernel),
            #[cfg(not(target_arch = "x86_64"))]
            _ => kernel.run::<portable::Portable>(),
        }
    }
}
