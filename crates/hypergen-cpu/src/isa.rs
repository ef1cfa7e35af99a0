//! Which instruction sets kernels exist for, and which of them this machine
//! has. Detection is at run time; nothing here computes.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use crate::CpuError;

/// Instruction sets that kernels exist for, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, on any machine.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 (F, BW, VL, DQ), float32 arithmetic.
    Avx512,
    /// AVX-512 with bfloat16 dot products.
    Avx512Bf16,
    /// Advanced Matrix Extensions in bfloat16, with AVX-512 around them.
    AmxBf16,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::AmxBf16];

    /// The name by which users choose it, in `HYPERGEN_ISA` for one.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::AmxBf16 => "amx-bf16",
        }
    }

    /// Those that this machine and its operating system support, slowest
    /// first. Asking the system for the use of AMX is part of finding out.
    pub fn supported() -> &'static [Self] {
        static SUPPORTED: OnceLock<Vec<Isa>> = OnceLock::new();
        SUPPORTED.get_or_init(|| Self::ALL.into_iter().filter(|isa| detect(*isa)).collect())
    }

    /// The fastest that this machine supports.
    pub fn best() -> Self {
        Self::supported().last().copied().unwrap_or(Self::Portable)
    }

    /// Whether this machine supports it.
    pub fn is_supported(self) -> bool {
        Self::supported().contains(&self)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = CpuError;

    fn from_str(name: &str) -> Result<Self, CpuError> {
        let wanted = name.trim();
        Self::ALL
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(wanted))
            .ok_or_else(|| CpuError::IsaUnknown { asked: name.to_owned(), known: join(&Self::ALL) })
    }
}

/// Names separated by commas, for messages.
pub(crate) fn join(sets: &[Isa]) -> String {
    sets.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(target_arch = "x86_64")]
fn detect(isa: Isa) -> bool {
    let avx2 = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = || {
        avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
    };
    let avx512_bf16 = || avx512() && is_x86_feature_detected!("avx512bf16");
    match isa {
        Isa::Portable => true,
        Isa::Avx2 => avx2(),
        Isa::Avx512 => avx512(),
        Isa::Avx512Bf16 => avx512_bf16(),
        Isa::AmxBf16 => avx512_bf16() && has_amx_bf16() && permit_amx(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect(isa: Isa) -> bool {
    isa == Isa::Portable
}

/// Whether the processor has AMX tiles with bfloat16 and the system saves them.
#[cfg(target_arch = "x86_64")]
fn has_amx_bf16() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 0b11 << 17;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: OSXSAVE says that the instruction is there.
    let enabled = unsafe { xgetbv0() };
    features & AMX_BF16 != 0 && features & AMX_TILE != 0 && enabled & TILE_STATE == TILE_STATE
}

/// The register that says which states the system saves.
///
/// # Safety
/// The processor must report OSXSAVE.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "xsave")]
unsafe fn xgetbv0() -> u64 {
    // SAFETY: by this function's contract.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}

/// Linux hands out tile registers only to processes that ask: threads would
/// otherwise pay eight KiB of saved state that they never use. The permission
/// holds for the whole process and all threads to come.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn permit_amx() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn permit_amx() -> bool {
    // Other systems have their own ways; none has been tried.
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        }
        let message = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(message.contains("sse9") && message.contains("avx512-bf16"), "{message}");
    }

    #[test]
    fn portable_is_always_there() {
        assert_eq!(Isa::supported()[0], Isa::Portable);
        assert!(Isa::best().is_supported());
    }
}
