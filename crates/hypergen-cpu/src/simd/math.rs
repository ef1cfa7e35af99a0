//! Exponential and activations over vectors, in two precisions: to about one
//! unit in the last place of float32, and `*_bf16`, enough for a result that is
//! rounded to bfloat16 (256 steps an octave) and several times cheaper.
//! Nothing here touches memory.
//!
//! Coefficients were fitted by reweighted least squares towards the smallest
//! largest error; the errors beside them were measured by the tests below.

use super::Simd;
use crate::{Activation, Element, ElementKind};

/// `c[0] + c[1] x + c[2] x^2 + ...` by Horner's rule.
#[inline(always)]
unsafe fn polynomial<S: Simd, const N: usize>(x: S::V, c: [f32; N]) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sum = S::splat(c[N - 1]);
        for &c in c[..N - 1].iter().rev() {
            sum = S::mul_add(sum, x, S::splat(c));
        }
        sum
    }
}

/// `e^x`, relative error below 1e-7; 0 below -104, infinity above 88.73.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Cephes' coefficients of (e^r - 1 - r) / r^2.
    const C: [f32; 6] = [0.5, 0.166_666_66, 4.166_579_6e-2, 8.333_452e-3, 1.398_2e-3, 1.987_569_1e-4];
    // SAFETY: the caller's contract.
    unsafe {
        // The bounds come first so that a NaN in `x` passes through.
        let x = S::max(S::splat(-104.0), S::min(S::splat(89.0), x));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::neg_mul_add(n, S::splat(LN2_HIGH), x);
        let r = S::neg_mul_add(n, S::splat(LN2_LOW), r);
        let p = polynomial::<S, 6>(r, C);
        let p = S::add(S::mul_add(p, S::mul(r, r), r), S::splat(1.0));
        S::scale_by_pow2(p, n)
    }
}

/// `2^x` for `x` from -126 to 126, relative error below 4e-6.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn exp2_bf16<S: Simd>(x: S::V) -> S::V {
    const C: [f32; 5] = [0.999_999_3, 0.693_121_8, 0.240_247_45, 0.055_917_86, 0.009_570_102];
    // SAFETY: the caller's contract.
    unsafe {
        let n = S::round(x);
        S::scale_by_pow2(polynomial::<S, 5>(S::sub(x, n), C), n)
    }
}

/// `x * sigmoid(slope * x)`: SiLU for 1, CLIP's quick GELU for 1.702.
#[inline(always)]
unsafe fn swish<S: Simd>(x: S::V, slope: f32) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        let e = exp::<S>(S::mul(x, S::splat(-slope)));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

#[inline(always)]
unsafe fn swish_bf16<S: Simd>(x: S::V, slope: f32) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        let power = S::mul(x, S::splat(-slope * std::f32::consts::LOG2_E));
        // Bounded, so that the sum below stays finite and has a reciprocal.
        let e = exp2_bf16::<S>(S::max(S::splat(-126.0), S::min(S::splat(126.0), power)));
        S::mul(x, S::reciprocal_estimate(S::add(S::splat(1.0), e)))
    }
}

/// `x * sigmoid(x)`.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn silu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's contract.
    unsafe { swish::<S>(x, 1.0) }
}

/// `x * Phi(x)`, `Phi` the normal distribution: the exact GELU.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // Phi(-|x|) e^(x^2 / 2) is a smooth function of 1 / (1 + 0.35 |x|); this
    // one keeps a relative error of 3.2e-8 up to |x| = 14, where Phi itself has
    // left the range of float32. An error function would lose its digits to
    // 1 + erf for negative x.
    const C: [f32; 9] = [
        0.139_621_4,
        0.139_861_87,
        0.119_832_866,
        0.105_508,
        -0.023_109_837,
        0.159_174_07,
        -0.255_714_27,
        0.143_971_41,
        -0.029_145_932,
    ];
    // SAFETY: the caller's contract.
    unsafe {
        let magnitude = S::abs(x);
        let t = S::div(S::splat(1.0), S::mul_add(magnitude, S::splat(0.35), S::splat(1.0)));
        // Above 14 nothing of the tail is left; the bound keeps the square finite.
        let magnitude = S::min(magnitude, S::splat(15.0));
        // e^(-x^2 / 2) with what the square lost to rounding put back.
        let square = S::mul(magnitude, magnitude);
        let lost = S::neg_mul_add(magnitude, magnitude, square);
        let e = exp::<S>(S::mul(square, S::splat(-0.5)));
        let e = S::mul_add(S::mul(e, S::splat(0.5)), lost, e);
        let tail = S::mul(S::mul(polynomial::<S, 9>(t, C), t), e);
        S::mul(x, S::select_lt(x, S::splat(0.0), tail, S::sub(S::splat(1.0), tail)))
    }
}

/// As [`gelu`], with an absolute error of 1.6e-5 in `Phi`.
#[inline(always)]
unsafe fn gelu_bf16<S: Simd>(x: S::V) -> S::V {
    // Odd polynomial of Phi(x) - 1/2 up to 4.2, where it is made to meet 1/2,
    // so that Phi vanishes below and large negative inputs give zero.
    const BOUND: f32 = 4.2;
    const C: [f32; 9] = [
        0.398_973_54,
        -0.066_504_49,
        0.009_930_179,
        -0.001_146_670_9,
        0.000_100_318_66,
        -6.345_311e-6,
        2.686_065_8e-7,
        -6.705_62e-9,
        7.388_73e-11,
    ];
    // SAFETY: the caller's contract.
    unsafe {
        let bounded = S::max(S::splat(-BOUND), S::min(S::splat(BOUND), x));
        let p = polynomial::<S, 9>(S::mul(bounded, bounded), C);
        let phi = S::mul_add(bounded, p, S::splat(0.5));
        // The meeting at the bound is good to rounding only: never below zero.
        S::mul(x, S::max(S::splat(0.0), phi))
    }
}

/// An activation, in the precision that the result's element type keeps.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn activate<S: Simd, T: Element>(activation: Activation, x: S::V) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        match (activation, T::KIND) {
            (Activation::None, _) => x,
            (Activation::Silu, ElementKind::F32) => silu::<S>(x),
            (Activation::Silu, ElementKind::Bf16) => swish_bf16::<S>(x, 1.0),
            (Activation::Gelu, ElementKind::F32) => gelu::<S>(x),
            (Activation::Gelu, ElementKind::Bf16) => gelu_bf16::<S>(x),
            (Activation::QuickGelu, ElementKind::F32) => swish::<S>(x, 1.702),
            (Activation::QuickGelu, ElementKind::Bf16) => swish_bf16::<S>(x, 1.702),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, MAX_LANES, run};
    use super::*;
    use crate::reference;
    use crate::testing::sets;
    use half::bf16;

    /// Applies one function to every value of a slice, lane by lane.
    struct Map<'a, F>(&'a [f32], F);

    trait Function: Copy {
        unsafe fn call<S: Simd>(self, x: S::V) -> S::V;
    }

    impl<F: Function> Kernel for Map<'_, F> {
        type Output = Vec<f32>;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Vec<f32> {
            let mut out = Vec::new();
            for part in self.0.chunks(S::LANES) {
                let mut lanes = [0.0; MAX_LANES];
                // SAFETY: a chunk is at most a vector long.
                unsafe {
                    let y = self.1.call::<S>(S::load_f32_part(part.as_ptr(), part.len()));
                    S::store_f32(lanes.as_mut_ptr(), y);
                }
                out.extend_from_slice(&lanes[..part.len()]);
            }
            out
        }
    }

    #[derive(Clone, Copy)]
    struct Exp;
    impl Function for Exp {
        #[inline(always)]
        unsafe fn call<S: Simd>(self, x: S::V) -> S::V {
            // SAFETY: the caller's contract.
            unsafe { exp::<S>(x) }
        }
    }

    #[derive(Clone, Copy)]
    struct Activate<T>(Activation, std::marker::PhantomData<T>);
    impl<T: Element> Function for Activate<T> {
        #[inline(always)]
        unsafe fn call<S: Simd>(self, x: S::V) -> S::V {
            // SAFETY: the caller's contract.
            unsafe { activate::<S, T>(self.0, x) }
        }
    }

    fn points(from: f32, to: f32, n: usize) -> Vec<f32> {
        (0..=n).map(|i| from + (to - from) * i as f32 / n as f32).collect()
    }

    #[test]
    fn exp_is_exact_to_an_ulp_or_two() {
        let mut x = points(-87.0, 88.6, 200_003);
        x.extend(points(-1.0, 1.0, 50_001));
        for &isa in sets() {
            let y = run(isa, Map(&x, Exp));
            for (&x, &y) in x.iter().zip(&y) {
                let want = f64::from(x).exp();
                let error = ((f64::from(y) - want) / want).abs();
                assert!(error < 1.5e-7, "{isa}: exp({x}) = {y}, not {want}");
            }
            let edges = [f32::NEG_INFINITY, -1e30, -105.0, 0.0, 100.0, f32::INFINITY, f32::NAN];
            let y = run(isa, Map(&edges, Exp));
            assert_eq!(y[..6], [0.0, 0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY], "{isa}");
            assert!(y[6].is_nan(), "{isa}");
        }
    }

    #[test]
    fn activations_match_the_oracle() {
        let x = points(-20.0, 20.0, 100_001);
        for &isa in sets() {
            for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
                let precise = run(isa, Map(&x, Activate::<f32>(activation, std::marker::PhantomData)));
                let coarse = run(isa, Map(&x, Activate::<bf16>(activation, std::marker::PhantomData)));
                for ((&x, &precise), &coarse) in x.iter().zip(&precise).zip(&coarse) {
                    let want = reference::activation(activation, f64::from(x));
                    let error = (f64::from(precise) - want).abs();
                    // Far out the exponent is large, and without a fused
                    // multiply-add its rounding cannot be put back; the values are below 2e-6.
                    let relative = if x > -5.0 { 1e-6 } else { 1e-5 };
                    assert!(
                        error <= relative * want.abs() + 1e-37,
                        "{isa}: {activation:?}({x}) = {precise}, not {want}"
                    );
                    let error = (f64::from(coarse) - want).abs();
                    assert!(
                        error < 1e-4 * want.abs() + 7e-5,
                        "{isa}: {activation:?}({x}) = {coarse}, not {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn activations_stay_finite_far_out() {
        let x = [-3e38, -1e4, -200.0, 200.0, 1e4, 3e38];
        for &isa in sets() {
            for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
                for y in [
                    run(isa, Map(&x, Activate::<f32>(activation, std::marker::PhantomData))),
                    run(isa, Map(&x, Activate::<bf16>(activation, std::marker::PhantomData))),
                ] {
                    for (&x, &y) in x.iter().zip(&y) {
                        let want = if x < 0.0 { 0.0 } else { x };
                        assert!((y - want).abs() <= 1e-4 * x.abs(), "{isa}: {activation:?}({x}) = {y}");
                    }
                }
            }
        }
    }
}
