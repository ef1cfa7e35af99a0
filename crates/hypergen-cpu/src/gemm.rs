//! Matrix products over packed weights: `linear` and `geglu`.

use crate::{Cpu, Element};

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

/// A weight matrix `[n, k]` (`n` outputs, as PyTorch stores a `Linear`),
/// arranged once at load in the order in which the kernels read it.
pub struct PackedMatrix<T: Element> {
    n: usize,
    k: usize,
    data: Vec<T>,
}

impl<T: Element> PackedMatrix<T> {
    /// Packs a matrix whose row `i` of `k` values is written by `row(i, out)`.
    /// `row` is called once for each row, from several threads, so that
    /// nothing but the packed form is ever held whole.
    pub fn pack(cpu: &Cpu, n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let _ = cpu;
        let mut data = vec![T::default(); n * k];
        let mut scratch = vec![0.0; k];
        for i in 0..n {
            row(i, &mut scratch);
            for (to, &from) in data[i * k..][..k].iter_mut().zip(&scratch) {
                *to = T::from_f32(from);
            }
        }
        Self { n, k, data }
    }

    /// Packs a GEGLU projection `[2 h, k]`, rows `0..h` the values and
    /// `h..2h` the gates, so that both land in the same tile. Only
    /// [`geglu`] takes the result.
    pub fn pack_geglu(cpu: &Cpu, n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        Self::pack(cpu, n, k, row)
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Memory that the packed form takes, in bytes.
    pub fn bytes(&self) -> usize {
        std::mem::size_of_val(self.data.as_slice())
    }

    pub(crate) fn row(&self, i: usize) -> &[T] {
        &self.data[i * self.k..][..self.k]
    }
}

/// `out[m, n] = epilogue(a[m, k] * w^T)`.
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
    let _ = cpu;
    let (n, k) = (w.n, w.k);
    for (m, out) in out.chunks_exact_mut(n).enumerate() {
        for (j, out) in out.iter_mut().enumerate() {
            let acc = a[m * k..][..k].iter().zip(w.row(j)).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
            *out = T::from_f32(finish(acc, m, j, n, epilogue));
        }
    }
}

/// The gated feed-forward projection: `out[m, h] = value * gelu(gate)`, where
/// `[value, gate] = a[m, k] * w^T + bias` and `bias` is `[2 h]` in the
/// checkpoint's order (values, then gates).
///
/// # Panics
/// When a slice's length does not fit the shapes.
pub fn geglu<T: Element>(cpu: &Cpu, a: &[T], w: &PackedMatrix<T>, bias: Option<&[f32]>, out: &mut [T]) {
    let h = w.n / 2;
    let m = out.len() / h;
    let mut both = vec![T::default(); m * w.n];
    linear(cpu, a, w, &Epilogue { bias, ..Epilogue::default() }, &mut both);
    for (out, both) in out.chunks_exact_mut(h).zip(both.chunks_exact(w.n)) {
        for j in 0..h {
            out[j] = T::from_f32(both[j].to_f32() * apply(Activation::Gelu, both[h + j].to_f32()));
        }
    }
}

pub(crate) fn finish<T: Element>(mut v: f32, row: usize, col: usize, n: usize, e: &Epilogue<'_, T>) -> f32 {
    if let Some(bias) = e.bias {
        v += bias[col];
    }
    if let Some(g) = e.group_bias {
        v += g.values[row / g.rows_per_group * n + col].to_f32();
    }
    v = apply(e.activation, v);
    if let Some(r) = e.residual {
        v += r[row * n + col].to_f32();
    }
    v * e.scale
}

pub(crate) fn apply(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => {
            // Abramowitz and Stegun 7.1.26 is too coarse here; this is a stand-in by series.
            0.5 * x * (1.0 + erf(f64::from(x) / std::f64::consts::SQRT_2) as f32)
        }
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
    }
}

fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..80 {
        let n = f64::from(n);
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}
