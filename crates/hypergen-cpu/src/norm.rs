//! Group and layer normalisation. Both are bound by memory: group norm reads
//! its input twice (statistics, then the result), layer norm once.
//!
//! The statistics of a picture are summed in chunks whose size depends on the
//! picture's shape alone, never on threads or batch. Within a chunk float32
//! sums are taken of differences to the chunk's first pixel, so that a large
//! mean cannot cancel; chunks are put together in float64 by their means and
//! squared deviations.

use std::marker::PhantomData;

use crate::simd::constant::{ConstActivation, with_activation};
use crate::simd::math::activate;
use crate::simd::slices::{load, store};
use crate::simd::{Kernel, Simd, run};
use crate::split::{Shared, elements_per_task, parallel_chunks};
use crate::{Activation, Cpu, Element};

/// Sizes of a group normalisation over `[batch, pixels, channels]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNormShape {
    /// Pictures.
    pub batch: usize,
    /// Height times width.
    pub pixels: usize,
    /// Channels, a multiple of `groups`.
    pub channels: usize,
    /// Groups of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
}

impl GroupNormShape {
    /// Pixels that one task sums: at most 256, so that in float32 the
    /// difference to the first one stays harmless whatever the values; fewer
    /// where channels are many, to leave work for all threads.
    fn chunk(&self) -> usize {
        (131_072 / self.channels.max(1)).clamp(16, 256)
    }

    fn check(&self, what: &str, x: usize, gamma: usize, beta: usize) {
        assert_eq!(x, self.batch * self.pixels * self.channels, "{what}: the input is not {self:?}");
        assert!(gamma == self.channels && beta == self.channels, "{what}: gamma or beta is not [channels]");
        assert!(
            self.groups > 0 && self.channels.is_multiple_of(self.groups),
            "{what}: {} channels do not make {} groups",
            self.channels,
            self.groups
        );
    }
}

/// Mean and sum of squared deviations of some number of values.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Those of both sets together (Chan, Golub and LeVeque 1979).
    fn join(self, other: Self) -> Self {
        let count = self.count + other.count;
        if other.count == 0.0 || count == 0.0 {
            return self;
        }
        let delta = other.mean - self.mean;
        let share = other.count / count;
        Self {
            count,
            mean: self.mean + delta * share,
            squares: self.squares + other.squares + delta * delta * self.count * share,
        }
    }
}

/// `out = activation((x - mean) / sqrt(var + eps) * gamma + beta)`, with mean
/// and variance over the pixels and channels of each group of each picture.
///
/// # Panics
/// When a slice's length does not fit the shape.
pub fn group_norm<T: Element>(
    cpu: &Cpu,
    x: &[T],
    shape: &GroupNormShape,
    gamma: &[f32],
    beta: &[f32],
    activation: Activation,
    out: &mut [T],
) {
    assert_eq!(x.len(), out.len(), "group_norm: input and output differ in length");
    let mut factors = vec![0.0; 2 * shape.batch * shape.channels];
    let (scale, shift) = factors.split_at_mut(shape.batch * shape.channels);
    group_norm_scale_shift(cpu, x, shape, gamma, beta, scale, shift);
    if out.is_empty() {
        return;
    }
    let (channels, picture) = (shape.channels, shape.pixels * shape.channels);
    let pixels_per_task = (elements_per_task(cpu, picture) / channels).max(1);
    let tasks = shape.pixels.div_ceil(pixels_per_task);
    let shared = Shared::new(out);
    cpu.parallel(shape.batch * tasks, |task| {
        let (b, first) = (task / tasks, task % tasks * pixels_per_task);
        let start = b * picture + first * channels;
        let len = pixels_per_task.min(shape.pixels - first) * channels;
        let (scale, shift) = (&scale[b * channels..][..channels], &shift[b * channels..][..channels]);
        // SAFETY: every task has its own pixels.
        let out = unsafe { shared.part(start, len) };
        let x = &x[start..][..len];
        with_activation!(activation, A => run(
            cpu.isa(),
            Apply { x, scale, shift, out, function: PhantomData::<A> },
        ));
    });
}

/// Group normalisation as one factor and one summand for each picture and
/// channel, `gamma / sqrt(var + eps)` and `beta - mean * gamma / sqrt(var + eps)`,
/// both `[batch, channels]`: for kernels that apply it while they read `x`, so
/// that the normalised activation is never written.
///
/// # Panics
/// When a slice's length does not fit the shape.
pub fn group_norm_scale_shift<T: Element>(
    cpu: &Cpu,
    x: &[T],
    shape: &GroupNormShape,
    gamma: &[f32],
    beta: &[f32],
    scale: &mut [f32],
    shift: &mut [f32],
) {
    let s = *shape;
    s.check("group_norm", x.len(), gamma.len(), beta.len());
    assert!(
        scale.len() == s.batch * s.channels && shift.len() == scale.len(),
        "group_norm: scale and shift are not [batch, channels]"
    );
    let chunks = s.pixels.div_ceil(s.chunk());
    let mut parts = vec![Moments::default(); s.batch * chunks * s.groups];
    parallel_chunks(cpu, &mut parts, s.groups, |task, parts| {
        let (b, first) = (task / chunks, task % chunks * s.chunk());
        let pixels = s.chunk().min(s.pixels - first);
        let x = &x[(b * s.pixels + first) * s.channels..][..pixels * s.channels];
        run(cpu.isa(), Statistics { x, channels: s.channels, parts });
    });
    let width = s.channels / s.groups;
    for b in 0..s.batch {
        for g in 0..s.groups {
            let parts = parts[b * chunks * s.groups..][..chunks * s.groups].iter().skip(g).step_by(s.groups);
            let all = parts.fold(Moments::default(), |all, part| all.join(*part));
            let inv = 1.0 / (all.squares / all.count + f64::from(s.eps)).sqrt();
            for c in g * width..(g + 1) * width {
                let factor = f64::from(gamma[c]) * inv;
                scale[b * s.channels + c] = factor as f32;
                shift[b * s.channels + c] = (f64::from(beta[c]) - all.mean * factor) as f32;
            }
        }
    }
}

/// The moments of each group over the pixels of a chunk.
struct Statistics<'a, T> {
    x: &'a [T],
    channels: usize,
    parts: &'a mut [Moments],
}

impl<T: Element> Kernel for Statistics<'_, T> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the machine has the set, by the contract.
        unsafe {
            const VECTORS: usize = 4;
            let channels = self.channels;
            // Mean and squared deviations of each channel.
            let mut scratch = vec![0.0_f32; 2 * channels];
            let (means, squares) = scratch.split_at_mut(channels);
            let mut c = 0;
            while c + VECTORS * S::LANES <= channels {
                strip::<S, T, VECTORS>(self.x, channels, c, &mut means[c..], &mut squares[c..]);
                c += VECTORS * S::LANES;
            }
            while c < channels {
                strip::<S, T, 1>(self.x, channels, c, &mut means[c..], &mut squares[c..]);
                c += S::LANES;
            }
            // All channels of a group have the same number of values, so its mean
            // is the mean of theirs.
            let pixels = (self.x.len() / channels) as f64;
            let width = channels / self.parts.len();
            for (g, part) in self.parts.iter_mut().enumerate() {
                let means = &means[g * width..][..width];
                let mean = means.iter().map(|&m| f64::from(m)).sum::<f64>() / width as f64;
                let between: f64 = means.iter().map(|&m| (f64::from(m) - mean) * (f64::from(m) - mean)).sum();
                let within: f64 = squares[g * width..][..width].iter().map(|&q| f64::from(q)).sum();
                *part = Moments { count: pixels * width as f64, mean, squares: within + pixels * between };
            }
        }
    }
}

/// Mean and squared deviations over all pixels of `N` vectors of channels from
/// `c` on; several at a time hide the latency of the sums.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
unsafe fn strip<S: Simd, T: Element, const N: usize>(
    x: &[T],
    channels: usize,
    c: usize,
    means: &mut [f32],
    squares: &mut [f32],
) {
    // SAFETY: the machine has the set, by the contract.
    unsafe {
        let len = (N * S::LANES).min(channels - c);
        let mut first = [S::splat(0.0); N];
        for (i, first) in first.iter_mut().enumerate() {
            *first = load::<S, _>(&x[c + i * S::LANES..c + len]);
        }
        let (mut sum, mut square) = ([S::splat(0.0); N], [S::splat(0.0); N]);
        for pixel in x.chunks_exact(channels) {
            let pixel = &pixel[c..c + len];
            for i in 0..N {
                let x = S::sub(load::<S, _>(&pixel[i * S::LANES..]), first[i]);
                sum[i] = S::add(sum[i], x);
                square[i] = S::mul_add(x, x, square[i]);
            }
        }
        let per_pixel = S::splat(1.0 / (x.len() / channels) as f32);
        for i in 0..N {
            let mean = S::mul(sum[i], per_pixel);
            let range = i * S::LANES..len.min((i + 1) * S::LANES);
            store::<S, _>(&mut means[range.clone()], S::add(first[i], mean));
            store::<S, _>(&mut squares[range], S::sub(square[i], S::mul(sum[i], mean)));
        }
    }
}

/// `out = activation(x * scale + shift)` over pixels of `scale.len()` channels.
struct Apply<'a, T, A> {
    x: &'a [T],
    scale: &'a [f32],
    shift: &'a [f32],
    out: &'a mut [T],
    function: PhantomData<A>,
}

impl<T: Element, A: ConstActivation> Kernel for Apply<'_, T, A> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the machine has the set, by the contract.
        unsafe {
            let channels = self.scale.len();
            for (x, out) in self.x.chunks_exact(channels).zip(self.out.chunks_exact_mut(channels)) {
                affine::<S, T, A>(x, self.scale, self.shift, out);
            }
        }
    }
}

/// `out = A(x * scale + shift)`, all of the same length.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
unsafe fn affine<S: Simd, T: Element, A: ConstActivation>(
    x: &[T],
    scale: &[f32],
    shift: &[f32],
    out: &mut [T],
) {
    // SAFETY: the machine has the set, by the contract.
    unsafe {
        let (mut x, mut out) = (x.chunks_exact(S::LANES), out.chunks_exact_mut(S::LANES));
        let (mut scale, mut shift) = (scale.chunks_exact(S::LANES), shift.chunks_exact(S::LANES));
        for (((x, out), scale), shift) in (&mut x).zip(&mut out).zip(&mut scale).zip(&mut shift) {
            store::<S, _>(
                out,
                activate::<S, T>(
                    A::ACTIVATION,
                    S::mul_add(load::<S, _>(x), load::<S, _>(scale), load::<S, _>(shift)),
                ),
            );
        }
        let (scale, shift) = (load::<S, _>(scale.remainder()), load::<S, _>(shift.remainder()));
        let out = out.into_remainder();
        if !out.is_empty() {
            store::<S, _>(
                out,
                activate::<S, T>(A::ACTIVATION, S::mul_add(load::<S, _>(x.remainder()), scale, shift)),
            );
        }
    }
}

/// Normalises each row of `[rows, channels]` to mean 0 and variance 1, then
/// applies `gamma` and `beta`.
///
/// # Panics
/// When a slice's length does not fit.
pub fn layer_norm<T: Element>(
    cpu: &Cpu,
    x: &[T],
    channels: usize,
    eps: f32,
    gamma: &[f32],
    beta: &[f32],
    out: &mut [T],
) {
    assert_eq!(x.len(), out.len(), "layer_norm: input and output differ in length");
    assert!(gamma.len() == channels && beta.len() == channels, "layer_norm: gamma or beta is not [channels]");
    if x.is_empty() {
        return;
    }
    assert!(x.len().is_multiple_of(channels), "layer_norm: the input is not [rows, {channels}]");
    let chunk = (elements_per_task(cpu, x.len()) / channels).max(1) * channels;
    parallel_chunks(cpu, out, chunk, |i, out| {
        let x = &x[i * chunk..][..out.len()];
        run(cpu.isa(), LayerNorm { x, eps, gamma, beta, out });
    });
}

struct LayerNorm<'a, T> {
    x: &'a [T],
    eps: f32,
    gamma: &'a [f32],
    beta: &'a [f32],
    out: &'a mut [T],
}

impl<T: Element> Kernel for LayerNorm<'_, T> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the machine has the set, by the contract.
        unsafe {
            let channels = self.gamma.len();
            for (x, out) in self.x.chunks_exact(channels).zip(self.out.chunks_exact_mut(channels)) {
                let (mean, inv) = row_moments::<S, T>(x, self.eps);
                let (mean, inv) = (S::splat(mean), S::splat(inv));
                let mut c = 0;
                while c < channels {
                    let end = channels.min(c + S::LANES);
                    let y = S::mul(S::sub(load::<S, _>(&x[c..end]), mean), inv);
                    let y =
                        S::mul_add(y, load::<S, _>(&self.gamma[c..end]), load::<S, _>(&self.beta[c..end]));
                    store::<S, _>(&mut out[c..end], y);
                    c = end;
                }
            }
        }
    }
}

/// Mean and `1 / sqrt(var + eps)` of a row, which stays in the first cache
/// between the two sweeps.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
unsafe fn row_moments<S: Simd, T: Element>(row: &[T], eps: f32) -> (f32, f32) {
    // SAFETY: the machine has the set, by the contract.
    unsafe {
        let per_row = 1.0 / row.len() as f32;
        let whole = row.len() / S::LANES * S::LANES;
        let mut sum = [S::splat(0.0); 2];
        for (i, x) in row[..whole].chunks_exact(S::LANES).enumerate() {
            sum[i % 2] = S::add(sum[i % 2], load::<S, _>(x));
        }
        let mut total = S::reduce_add(S::add(sum[0], sum[1]));
        for x in &row[whole..] {
            total += x.to_f32();
        }
        let mean = total * per_row;
        let mut square = [S::splat(0.0); 2];
        for (i, x) in row[..whole].chunks_exact(S::LANES).enumerate() {
            let x = S::sub(load::<S, _>(x), S::splat(mean));
            square[i % 2] = S::mul_add(x, x, square[i % 2]);
        }
        let mut total = S::reduce_add(S::add(square[0], square[1]));
        for x in &row[whole..] {
            total += (x.to_f32() - mean) * (x.to_f32() - mean);
        }
        (mean, 1.0 / (total * per_row + eps).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::testing::{Values, assert_close, cpu, every_cpu, sets};
    use crate::{Isa, reference};

    /// Batch, pixels, channels, groups.
    const SHAPES: [[usize; 4]; 9] = [
        [0, 4, 8, 2],
        [2, 0, 8, 2],
        [1, 1, 1, 1],
        [1, 15, 3, 3],
        [2, 17, 63, 9],
        [1, 257, 96, 32],
        [2, 300, 64, 1],
        [3, 61, 130, 13],
        [1, 1031, 320, 32],
    ];

    fn values<T: Element>(seed: u64, len: usize, mean: f32) -> Vec<T> {
        Values::new(seed).normal::<f32>(len).iter().map(|x| T::from_f32(x * 2.0 + mean)).collect()
    }

    fn check_group_norm<T: Element>(shapes: &[[usize; 4]], mean: f32, tolerance: f32) {
        for cpu in every_cpu() {
            for &[batch, pixels, channels, groups] in shapes {
                let shape = GroupNormShape { batch, pixels, channels, groups, eps: 1e-5 };
                let x: Vec<T> = values(1, batch * pixels * channels, mean);
                let (gamma, beta): (Vec<f32>, Vec<f32>) =
                    (values(2, channels, 1.0), values(3, channels, 0.0));
                let mut out = vec![T::default(); x.len()];
                for act in [Activation::None, Activation::Silu] {
                    group_norm(&cpu, &x, &shape, &gamma, &beta, act, &mut out);
                    let want = reference::group_norm(&x, &shape, &gamma, &beta, act);
                    assert_close("group_norm", &cpu, &out, &want, tolerance);
                }
                if pixels > 0 {
                    let (mut scale, mut shift) = (vec![0.0; batch * channels], vec![0.0; batch * channels]);
                    group_norm_scale_shift(&cpu, &x, &shape, &gamma, &beta, &mut scale, &mut shift);
                    let want = reference::group_norm_scale_shift(&x, &shape, &gamma, &beta);
                    assert_close("scale", &cpu, &scale, &want.0, 3e-6);
                    assert_close("shift", &cpu, &shift, &want.1, 3e-6);
                }
            }
        }
    }

    #[test]
    fn group_norm_matches_the_reference() {
        check_group_norm::<f32>(&SHAPES, 0.5, 1e-5);
        check_group_norm::<bf16>(&SHAPES, 0.5, 1e-5);
    }

    /// The variance is a ten-thousandth of the squared mean: sums of squares
    /// in float32 would have lost most of it.
    #[test]
    fn group_norm_survives_a_large_mean() {
        check_group_norm::<f32>(&[[2, 1031, 64, 8]], 200.0, 5e-5);
    }

    #[test]
    fn layer_norm_matches_the_reference() {
        for cpu in every_cpu() {
            for (rows, channels) in [(0, 8), (1, 1), (3, 15), (5, 17), (2, 63), (130, 320), (7, 1031)] {
                let (gamma, beta): (Vec<f32>, Vec<f32>) =
                    (values(2, channels, 1.0), values(3, channels, 0.0));
                for mean in [0.0, 200.0] {
                    let x: Vec<f32> = values(4, rows * channels, mean);
                    let mut out = vec![0.0; x.len()];
                    layer_norm(&cpu, &x, channels, 1e-5, &gamma, &beta, &mut out);
                    let want = reference::layer_norm(&x, channels, 1e-5, &gamma, &beta);
                    assert_close("layer_norm", &cpu, &out, &want, if mean == 0.0 { 1e-5 } else { 3e-4 });
                }
                let x: Vec<bf16> = values(5, rows * channels, 1.0);
                let mut out = vec![bf16::ZERO; x.len()];
                layer_norm(&cpu, &x, channels, 1e-5, &gamma, &beta, &mut out);
                let want = reference::layer_norm(&x, channels, 1e-5, &gamma, &beta);
                assert_close("layer_norm", &cpu, &out, &want, 1e-5);
            }
        }
    }

    /// The last picture of a batch, and any number of threads, give the bytes
    /// of the picture alone on one thread.
    #[test]
    fn batch_and_threads_leave_no_trace() {
        let (pixels, channels) = (1031, 96);
        let one = GroupNormShape { batch: 1, pixels, channels, groups: 32, eps: 1e-6 };
        let three = GroupNormShape { batch: 3, ..one };
        let x: Vec<bf16> = values(1, 3 * pixels * channels, 0.3);
        let (gamma, beta): (Vec<f32>, Vec<f32>) = (values(2, channels, 1.0), values(3, channels, 0.0));
        let last = 2 * pixels * channels;
        for &isa in sets() {
            let run = |threads, shape: &GroupNormShape, x: &[bf16]| {
                let (cpu, mut out) = (cpu(isa, threads), vec![bf16::ZERO; x.len()]);
                group_norm(&cpu, x, shape, &gamma, &beta, Activation::Silu, &mut out);
                let mut rows = vec![bf16::ZERO; x.len()];
                layer_norm(&cpu, x, channels, 1e-5, &gamma, &beta, &mut rows);
                (out, rows)
            };
            let alone = run(1, &one, &x[last..]);
            for threads in [1, 2, 5] {
                let together = run(threads, &three, &x);
                assert!(together.0[last..] == alone.0, "group_norm, {isa}, {threads} threads");
                assert!(together.1[last..] == alone.1, "layer_norm, {isa}, {threads} threads");
            }
        }
    }

    #[test]
    #[should_panic(expected = "4 channels do not make 3 groups")]
    fn groups_that_do_not_divide_are_refused() {
        let shape = GroupNormShape { batch: 1, pixels: 2, channels: 4, groups: 3, eps: 1e-5 };
        let ones = [1.0; 4];
        let cpu = cpu(Isa::Portable, 1);
        group_norm(&cpu, &[0.0_f32; 8], &shape, &ones, &ones, Activation::None, &mut [0.0; 8]);
    }

    #[test]
    #[should_panic(expected = "not [rows, 4]")]
    fn broken_rows_are_refused() {
        let ones = [1.0; 4];
        layer_norm(&cpu(Isa::Portable, 1), &[0.0_f32; 9], 4, 1e-5, &ones, &ones, &mut [0.0; 9]);
    }
}
