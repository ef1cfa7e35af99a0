//! The control flow of products on tiles, run with emulated tiles and vectors
//! of plain Rust on any machine, against the oracle.

use half::bf16;

use super::super::finish512::Kind;
use super::super::{Epilogue, Finish, GroupBias, Matrix};
use super::*;
use crate::simd::math;
use crate::simd::portable::Portable;
use crate::testing::{Values, assert_close, cpu};
use crate::{Activation, AlignedVec, Isa, reference};

impl Around for Portable {
    unsafe fn row<const KIND: usize, const STREAM: bool>(
        values: *const f32,
        gates: *const f32,
        bias: &[f32; 64],
        residual: *const bf16,
        to: *mut bf16,
    ) {
        for i in (0..32).step_by(Self::LANES) {
            // SAFETY: by the contract: rows have 32 values.
            unsafe {
                let load = |from: *const f32| Self::load_f32(from.add(i));
                let mut x = Self::add(load(values), load(bias.as_ptr()));
                if KIND == Kind::Residual as usize {
                    x = Self::add(x, Self::load_bf16(residual.add(i)));
                }
                if KIND == Kind::Geglu as usize {
                    let gate = Self::add(load(gates), load(bias.as_ptr().add(32)));
                    x = Self::mul(x, math::activate::<Self, bf16>(Activation::Gelu, gate));
                }
                Self::store_bf16(to.add(i), x);
            }
        }
    }

    unsafe fn all_rows(output: &Output<'_, bf16>, sums: &Sums) {
        // SAFETY: by the contract.
        unsafe { sums.finish::<Self>(output) }
    }
}

/// As [`multiply`], on any machine.
pub(crate) fn emulated<L: Left>(cpu: &Cpu, a: &L, w: &PackedMatrix<bf16>, output: &Output<'_, bf16>) {
    // SAFETY: every machine has the portable vectors; tiles are emulated.
    unsafe {
        multiply_by(cpu, a, w, output, |block, scratch, left| {
            run_with::<Portable, L>(block, scratch, left, Tiles::emulated);
        });
    }
}

/// A matrix product: `[m, k]` and `[n, k]`.
struct Product {
    n: usize,
    k: usize,
    a: AlignedVec<bf16>,
    w: Vec<bf16>,
}

impl Product {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let mut values = Values::new((m * 1000 + n * 10 + k) as u64);
        let mut a = AlignedVec::zeroed(m * k);
        a.as_mut_slice().copy_from_slice(&values.normal::<bf16>(m * k));
        Self { n, k, a, w: values.normal(n * k) }
    }

    fn pack(&self, cpu: &Cpu, geglu: bool) -> PackedMatrix<bf16> {
        let row = |i: usize, row: &mut [f32]| {
            row.iter_mut().zip(&self.w[i * self.k..]).for_each(|(to, from)| *to = from.to_f32());
        };
        let pack = if geglu { PackedMatrix::pack_geglu } else { PackedMatrix::pack };
        pack(cpu, self.n, self.k, row)
    }

    /// Where rows lie, if they can be read there, and copied.
    fn run(&self, threads: usize, rows: Range<usize>, finish: Finish<'_, bf16>) -> Vec<Vec<bf16>> {
        let cpu = cpu(Isa::Portable, threads);
        let geglu = matches!(finish, Finish::Geglu(_));
        let (w, n) = (self.pack(&cpu, geglu), if geglu { self.n / 2 } else { self.n });
        let a = &self.a.as_slice()[rows.start * self.k..rows.end * self.k];
        let mut outs = vec![];
        let mut compute = |by: &dyn Fn(&Output<'_, bf16>)| {
            let mut out = vec![bf16::NAN; rows.len() * n];
            by(&Output::new(&mut out, rows.len(), n, finish));
            outs.push(out);
        };
        let matrix = Matrix { data: a, m: rows.len(), k: self.k };
        compute(&|output| emulated(&cpu, &Gathered::new(&matrix, self.k), &w, output));
        if let Some(direct) = Direct::new(a, rows.len(), self.k) {
            compute(&|output| emulated(&cpu, &direct, &w, output));
        }
        outs
    }
}

/// Sums of `k` products that round otherwise than the oracle's.
fn tolerance(k: usize) -> f32 {
    1e-6 * (k as f32).sqrt().max(1.0) + 1e-4
}

#[test]
fn products_match_the_oracle() {
    for (m, n, k) in
        [(1, 1, 1), (5, 33, 31), (16, 32, 32), (33, 70, 96), (47, 64, 64), (100, 40, 1312), (70, 130, 2080)]
    {
        let product = Product::new(m, n, k);
        let mut values = Values::new(1);
        let (bias, residual) = (values.normal::<f32>(n), values.normal::<bf16>(m * n));
        let groups = values.normal::<bf16>(m.div_ceil(20) * n);
        let group_bias = Some(GroupBias { values: &groups, rows_per_group: 20 });
        let (plain, bias) = (Epilogue::default(), Some(bias.as_slice()));
        for epilogue in [
            plain,
            Epilogue { bias, ..plain },
            Epilogue { bias, residual: Some(&residual), ..plain },
            Epilogue { bias, group_bias, ..plain },
            Epilogue {
                bias,
                group_bias,
                activation: Activation::Silu,
                residual: Some(&residual),
                scale: 0.5,
            },
        ] {
            let want = reference::linear(product.a.as_slice(), &product.w, n, k, &epilogue);
            for got in product.run(2, 0..m, Finish::Plain(&epilogue)) {
                assert_close(&format!("{m}x{k}x{n}"), &cpu(Isa::Portable, 1), &got, &want, tolerance(k));
            }
        }
    }
}

#[test]
fn gated_products_match_the_oracle() {
    for (m, h, k) in [(3, 17, 15), (40, 70, 64), (65, 96, 320), (20, 32, 1344)] {
        let product = Product::new(m, 2 * h, k);
        let bias = Values::new(2).normal::<f32>(2 * h);
        for bias in [None, Some(bias.as_slice())] {
            let want = reference::geglu(product.a.as_slice(), &product.w, h, k, bias);
            for got in product.run(2, 0..m, Finish::Geglu(bias)) {
                // The errors of value and gate are each multiplied by the other.
                let tolerance = 4.0 * (k as f32).sqrt() * tolerance(k);
                assert_close(&format!("{m}x{k}x{h}"), &cpu(Isa::Portable, 1), &got, &want, tolerance);
            }
        }
    }
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_other_rows() {
    for (m, n, k) in [(130, 96, 96), (66, 40, 1312), (50, 70, 64)] {
        let product = Product::new(m, n, k);
        let epilogue = Epilogue::default();
        let whole = product.run(1, 0..m, Finish::Plain(&epilogue));
        for threads in [2, 3, 7] {
            assert!(product.run(threads, 0..m, Finish::Plain(&epilogue)) == whole, "{threads} threads");
        }
        for rows in [0..1, 16..m, 7..40] {
            for (part, whole) in product.run(2, rows.clone(), Finish::Plain(&epilogue)).iter().zip(&whole) {
                assert!(part[..] == whole[rows.start * n..rows.end * n], "{rows:?} of {m}");
            }
        }
    }
}
