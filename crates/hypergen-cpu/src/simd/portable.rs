//! The vectors of plain Rust: arrays that the compiler may turn into whatever
//! the target's baseline has.

use half::bf16;

use super::Simd;
use crate::Element;

/// Plain Rust, eight floats at a time.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn map(a: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[allow(clippy::undocumented_unsafe_blocks, reason = "the trait's contract: valid pointers")]
impl Simd for Portable {
    type V = [f32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::V {
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_f32(to: *mut f32, v: Self::V) {
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        std::array::from_fn(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut bf16, v: Self::V) {
        let rounded: [bf16; LANES] = std::array::from_fn(|i| Element::from_f32(v[i]));
        unsafe { to.cast::<[bf16; LANES]>().write_unaligned(rounded) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const bf16) -> (Self::V, Self::V) {
        let bits = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        (
            std::array::from_fn(|i| f32::from_bits(u32::from(bits[i][0]) << 16)),
            std::array::from_fn(|i| f32::from_bits(u32::from(bits[i][1]) << 16)),
        )
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    // Not `f32::mul_add`: without the instruction that is a call of the C library.
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn neg_mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| c[i] - a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::V) -> Self::V {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        // Adding 1.5 * 2^23 leaves no room for a fraction; the hardware then
        // rounds to nearest even. `round_ties_even` would call the C library.
        const MAGIC: f32 = 12_582_912.0;
        map(a, |a| if a.abs() < 4_194_304.0 { (a + MAGIC) - MAGIC } else { a })
    }
    #[inline(always)]
    unsafe fn scale_by_pow2(a: Self::V, n: Self::V) -> Self::V {
        // Two factors, because one alone cannot span the range of subnormals.
        std::array::from_fn(|i| {
            let n = n[i] as i32;
            let half = n >> 1;
            let pow2 = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
            a[i] * pow2(half) * pow2(n - half)
        })
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    unsafe fn reciprocal_estimate(a: Self::V) -> Self::V {
        map(a, |a| 1.0 / a)
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
}
