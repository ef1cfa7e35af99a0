//! The limit that kernels are held against: products from registers alone,
//! on all threads, with no memory in the way.

use std::time::{Duration, Instant};

use crate::{Cpu, ElementKind, Isa};

/// Long enough for clocks to settle, short enough not to be noticed.
const SHARE: Duration = Duration::from_millis(60);

impl Cpu {
    /// Floating-point operations a second that this machine's multipliers
    /// give for a type, with the instruction set and the threads in use.
    /// Machines are shared, so it is the best of several short tries.
    pub fn measure_peak(&self, kind: ElementKind) -> f64 {
        let run = kernel(self.isa(), kind);
        let rate = || {
            let rates: Vec<std::sync::Mutex<f64>> = (0..self.threads()).map(|_| Default::default()).collect();
            self.parallel(self.threads(), |i| {
                let (started, mut flop) = (Instant::now(), 0u64);
                while started.elapsed() < SHARE {
                    flop += run();
                }
                let rate = flop as f64 / started.elapsed().as_secs_f64();
                *rates[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = rate;
            });
            rates.into_iter().map(|r| r.into_inner().unwrap_or_default()).sum::<f64>()
        };
        (0..5).map(|_| rate()).fold(0.0, f64::max)
    }
}

/// A burst of products; returns how many operations it did.
fn kernel(isa: Isa, kind: ElementKind) -> fn() -> u64 {
    match (isa, kind) {
        #[cfg(target_arch = "x86_64")]
        (Isa::AmxBf16, ElementKind::Bf16) => x86::amx,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, ElementKind::Bf16) => x86::avx512_bf16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16, _) => x86::avx512,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => x86::avx2,
        _ => portable,
    }
}

/// Products of eight independent sums of eight values each, which compilers
/// put into whatever vectors the target has.
fn portable() -> u64 {
    const ROUNDS: u64 = 10_000;
    let mut sums = [[1.0f32; 8]; 8];
    let factor = std::hint::black_box([0.999f32; 8]);
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for (s, f) in sum.iter_mut().zip(factor) {
                *s = *s * f + f;
            }
        }
    }
    std::hint::black_box(sums);
    ROUNDS * 8 * 8 * 2
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! One instruction each, on enough registers to hide its latency.
    use std::arch::asm;

    use crate::gemm::amx::Tiles;

    const ROUNDS: u64 = 10_000;

    /// 16 x 16 x 32 multiply-adds an instruction.
    pub(super) fn amx() -> u64 {
        // SAFETY: chosen only where the set is AMX, whose permission the
        // process has; the tiles are configured first and no memory is touched.
        unsafe {
            let _tiles = Tiles::configure();
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}", "jnz 2b",
                n = inout(reg) ROUNDS => _, options(nomem, nostack)
            );
        }
        ROUNDS * 4 * 2 * 16 * 16 * 32
    }

    /// A loop of one three-operand instruction over twelve sums.
    macro_rules! burst {
        ($instruction:literal, $register:literal, $clear:literal) => {
            asm!(
                concat!($clear, " zmm30, zmm30, zmm30"), concat!($clear, " zmm31, zmm31, zmm31"),
                "2:",
                concat!($instruction, " ", $register, "0, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "1, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "2, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "3, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "4, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "5, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "6, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "7, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "8, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "9, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "10, ", $register, "30, ", $register, "31"),
                concat!($instruction, " ", $register, "11, ", $register, "30, ", $register, "31"),
                "dec {n}", "jnz 2b",
                n = inout(reg) ROUNDS => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm30") _, out("xmm31") _,
                options(nomem, nostack)
            )
        };
    }

    /// 16 multiply-adds an instruction.
    pub(super) fn avx512() -> u64 {
        // SAFETY: chosen only where the machine has AVX-512; registers alone.
        unsafe { burst!("vfmadd231ps", "zmm", "vpxord") }
        ROUNDS * 12 * 2 * 16
    }

    /// 32 multiply-adds an instruction.
    pub(super) fn avx512_bf16() -> u64 {
        // SAFETY: chosen only where the machine has AVX-512 BF16; registers alone.
        unsafe { burst!("vdpbf16ps", "zmm", "vpxord") }
        ROUNDS * 12 * 2 * 32
    }

    /// 8 multiply-adds an instruction.
    pub(super) fn avx2() -> u64 {
        // SAFETY: chosen only where the machine has AVX2 and FMA; registers alone.
        unsafe {
            asm!(
                "vxorps xmm14, xmm14, xmm14", "vxorps xmm15, xmm15, xmm15",
                "2:",
                "vfmadd231ps ymm0, ymm14, ymm15", "vfmadd231ps ymm1, ymm14, ymm15",
                "vfmadd231ps ymm2, ymm14, ymm15", "vfmadd231ps ymm3, ymm14, ymm15",
                "vfmadd231ps ymm4, ymm14, ymm15", "vfmadd231ps ymm5, ymm14, ymm15",
                "vfmadd231ps ymm6, ymm14, ymm15", "vfmadd231ps ymm7, ymm14, ymm15",
                "vfmadd231ps ymm8, ymm14, ymm15", "vfmadd231ps ymm9, ymm14, ymm15",
                "vfmadd231ps ymm10, ymm14, ymm15", "vfmadd231ps ymm11, ymm14, ymm15",
                "dec {n}", "jnz 2b",
                n = inout(reg) ROUNDS => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm14") _, out("ymm15") _,
                options(nomem, nostack)
            );
        }
        ROUNDS * 12 * 2 * 8
    }
}
