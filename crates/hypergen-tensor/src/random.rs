//! Normal draws as PyTorch's CPU generator makes them, so that a seed gives
//! the noise, and with it the picture, that diffusers gives for
//! `torch.Generator("cpu").manual_seed(seed)`.
//!
//! What torch does, found by experiment and checked against goldens:
//!
//! - The engine is the 32-bit Mersenne twister (Matsumoto and Nishimura 1998).
//!   A seed is 64 bits wide but only its low 32 bits reach the engine: seeds 0
//!   and 2^32 draw the same numbers.
//! - A draw of **16 numbers or more** takes one 24-bit uniform for each number,
//!   then turns every block of 16 into normals by the Box-Muller transform: the
//!   first eight uniforms give radii, the last eight angles, the cosines land
//!   in the first half and the sines in the second. When the length is no
//!   multiple of 16, the last 16 places are drawn *again* with 16 fresh
//!   uniforms, over part of the last full block.
//! - A draw of **fewer than 16** takes 53-bit uniforms, two for every second
//!   number: Box-Muller in float64, where the second normal of a pair is kept
//!   for the next *small* draw. Large draws neither use nor drop the kept one.
//! - `torch.randn(dtype=torch.bfloat16)` (and float16) on the CPU is the float32
//!   stream rounded, and leaves the generator in the same state. So casting
//!   what this module draws is right for every activation type. float64 is
//!   another stream, which diffusers never draws.
//!
//! torch's vector code takes logarithm, sine and cosine from the single-precision
//! polynomials of the Cephes library (Moshier 1989), with fused multiply-adds. The
//! same is done here, so that large draws equal torch's on x86-64 with AVX2 or
//! AVX-512 to the bit, and are the same on every machine. (A sampler that starts
//! from a huge sigma cancels most of it again: there even the last bit shows.)
//! This is not a general random number library: nothing but what a sampler
//! asks for is here.

use std::f64::consts::PI;

/// Words of state of the Mersenne twister.
const STATE: usize = 624;
/// Distance between the words that a step of the twister mixes.
const SHIFT: usize = 397;
/// Numbers that one Box-Muller block of a large draw makes.
const BLOCK: usize = 16;

/// The 32-bit Mersenne twister.
#[derive(Clone)]
struct MersenneTwister {
    state: [u32; STATE],
    /// Next word to hand out; [`STATE`] when all are spent.
    next: usize,
}

impl MersenneTwister {
    fn new(seed: u32) -> Self {
        let mut state = [0; STATE];
        state[0] = seed;
        for i in 1..STATE {
            let previous: u32 = state[i - 1];
            state[i] = (previous ^ (previous >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: STATE }
    }

    /// Replaces all words of the state.
    fn twist(&mut self) {
        for i in 0..STATE {
            let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7fff_ffff);
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == STATE {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Uniform in [0, 1) with 24 bits, from one word.
    fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [0, 1) with 53 bits, from two words, the high one first.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.next_u32());
        let low = u64::from(self.next_u32());
        let bits = ((high << 32) | low) & ((1 << 53) - 1);
        bits as f64 * (1.0 / 9_007_199_254_740_992.0)
    }
}

/// `torch.Generator("cpu").manual_seed(seed)`, as far as `torch.randn` goes.
#[derive(Clone)]
pub struct TorchGenerator {
    engine: MersenneTwister,
    /// The second normal of a small draw's last pair, until it is used.
    kept: Option<f64>,
}

impl std::fmt::Debug for TorchGenerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // 624 words of state help nobody.
        f.debug_struct("TorchGenerator").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl TorchGenerator {
    /// A generator with a seed. As in torch, only the low 32 bits count.
    pub fn new(seed: u64) -> Self {
        Self { engine: MersenneTwister::new(seed as u32), kept: None }
    }

    /// Fills `out` with standard normal draws, as `torch.randn(out.len(),
    /// generator=...)` would, and leaves the generator where torch leaves its own.
    /// One call stands for one `randn`: two calls for halves of a slice
    /// draw other numbers than one call for the whole.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        if out.len() < BLOCK {
            out.fill_with(|| self.normal_f64() as f32);
            return;
        }
        out.fill_with(|| self.engine.uniform_f32());
        let (blocks, tail) = out.as_chunks_mut::<BLOCK>();
        blocks.iter_mut().for_each(box_muller);
        if tail.is_empty() {
            return;
        }
        if let Some(last) = out.last_chunk_mut::<BLOCK>() {
            last.fill_with(|| self.engine.uniform_f32());
            box_muller(last);
        }
    }

    /// One normal of the small path.
    fn normal_f64(&mut self) -> f64 {
        if let Some(kept) = self.kept.take() {
            return kept;
        }
        let angle = 2.0 * PI * self.engine.uniform_f64();
        let radius = (-2.0 * (-self.engine.uniform_f64()).ln_1p()).sqrt();
        self.kept = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Turns 16 uniforms into 16 normals in place.
fn box_muller(block: &mut [f32; BLOCK]) {
    for i in 0..BLOCK / 2 {
        let radius = (-2.0 * log(1.0 - block[i])).sqrt();
        let (sine, cosine) = sine_and_cosine(std::f32::consts::TAU * block[i + BLOCK / 2]);
        block[i] = radius * cosine;
        block[i + BLOCK / 2] = radius * sine;
    }
}

/// A polynomial by Horner's rule, from the highest coefficient down.
fn polynomial(x: f32, coefficients: &[f32]) -> f32 {
    coefficients.iter().fold(0.0, |sum, &c| f32::mul_add(sum, x, c))
}

/// Natural logarithm of a normal float32 in (0, 1].
fn log(value: f32) -> f32 {
    const COEFFICIENTS: [f32; 9] = [
        0.070_376_836,
        -0.115_146_1,
        0.116_769_984,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_57,
        0.200_007_14,
        -0.249_999_94,
        0.333_333_3,
    ];
    // value = mantissa * 2^exponent with the mantissa within sqrt(1/2) and sqrt(2).
    let bits = value.to_bits();
    let mut exponent = (bits >> 23) as i32 - 126;
    let mut mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1;
        mantissa += mantissa;
    }
    let exponent = exponent as f32;
    let x = mantissa - 1.0;
    let square = x * x;
    let cubic = polynomial(x, &COEFFICIENTS) * x;
    // ln 2 in two parts, the larger of which is exact in few bits.
    let low = f32::mul_add(cubic, square, exponent * -0.000_212_194_44);
    let low = f32::mul_add(square, -0.5, low);
    f32::mul_add(exponent, 0.693_359_4, x + low)
}

/// Sine and cosine of an angle from 0 to a full turn.
fn sine_and_cosine(angle: f32) -> (f32, f32) {
    // The nearest even eighth of a turn, taken away in three parts that are
    // exact in few bits.
    let eighth = ((angle * 1.273_239_5) as i32 + 1) & !1;
    let turns = eighth as f32;
    let x = f32::mul_add(turns, -0.785_156_25, angle);
    let x = f32::mul_add(turns, -0.000_241_875_65, x);
    let x = f32::mul_add(turns, -3.774_895e-8, x);
    let square = x * x;
    let cosine = polynomial(square, &[2.443_315_7e-5, -0.001_388_731_6, 0.041_666_646]);
    let cosine = f32::mul_add(cosine * square, square, -(square * 0.5)) + 1.0;
    let sine = polynomial(square, &[-0.000_195_152_96, 0.008_332_161, -0.166_666_55]);
    let sine = f32::mul_add(sine * square, x, x);
    match eighth & 6 {
        0 => (sine, cosine),
        2 => (cosine, -sine),
        4 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_twister_is_the_published_one() {
        // First output of the reference implementation for its default seed,
        // and its ten-thousandth, which the C++ standard prescribes.
        let mut engine = MersenneTwister::new(5489);
        assert_eq!(engine.next_u32(), 3_499_211_612);
        let mut last = 0;
        for _ in 1..10_000 {
            last = engine.next_u32();
        }
        assert_eq!(last, 4_123_659_995);
    }

    #[test]
    fn an_empty_draw_changes_nothing() {
        let mut a = TorchGenerator::new(7);
        let mut b = TorchGenerator::new(7);
        a.fill_normal(&mut []);
        let (mut x, mut y) = ([0.0; 20], [0.0; 20]);
        a.fill_normal(&mut x);
        b.fill_normal(&mut y);
        assert_eq!(x, y);
    }

    #[test]
    fn draws_are_finite_and_standard() {
        let mut x = vec![0.0; 1 << 20];
        TorchGenerator::new(3).fill_normal(&mut x);
        assert!(x.iter().all(|v| v.is_finite()));
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.005, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.01, "variance {variance}");
    }
}
