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
        SUPPORTED.get_or_init(detect)
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

/// What the processor and the system must have for each set, beyond what the
/// set before it needs: every feature that a kernel of the set is compiled for
/// or names an instruction of. `cargo test -p tidy` compares this with the code.
#[cfg(target_arch = "x86_64")]
const FEATURES: [(Isa, &[&str]); 5] = [
    (Isa::Portable, &[]),
    (Isa::Avx2, &["avx2", "fma"]),
    (Isa::Avx512, &["avx512f", "avx512bw", "avx512vl", "avx512dq"]),
    (Isa::Avx512Bf16, &["avx512bf16"]),
    // Attention between its tiles looks bytes up in registers: VBMI. The
    // permission is last: it is asked for only where all else is there.
    (Isa::AmxBf16, &["avx512vbmi", "amx-tile", "amx-bf16", "amx permission"]),
];

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    usable(&FEATURES, has_feature)
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    vec![Isa::Portable]
}

/// The sets, from the first on, whose features are all there.
#[cfg(target_arch = "x86_64")]
fn usable(features: &[(Isa, &[&str])], mut has: impl FnMut(&str) -> bool) -> Vec<Isa> {
    features.iter().take_while(|(_, needs)| needs.iter().all(|f| has(f))).map(|(isa, _)| *isa).collect()
}

/// Whether the processor has a feature of [`FEATURES`] and the system saves
/// the registers that it works on.
#[cfg(target_arch = "x86_64")]
fn has_feature(feature: &str) -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    match feature {
        "avx2" => is_x86_feature_detected!("avx2"),
        "fma" => is_x86_feature_detected!("fma"),
        "avx512f" => is_x86_feature_detected!("avx512f"),
        "avx512bw" => is_x86_feature_detected!("avx512bw"),
        "avx512vl" => is_x86_feature_detected!("avx512vl"),
        "avx512dq" => is_x86_feature_detected!("avx512dq"),
        "avx512bf16" => is_x86_feature_detected!("avx512bf16"),
        "avx512vbmi" => is_x86_feature_detected!("avx512vbmi"),
        "amx-tile" => has_amx(AMX_TILE),
        "amx-bf16" => has_amx(AMX_BF16),
        "amx permission" => permit_amx(),
        _ => unreachable!("{feature} is not in the table of features"),
    }
}

/// Whether the processor has a feature of AMX, given as its bit in CPUID's leaf
/// 7, and the system saves tiles. The standard library does not tell yet.
#[cfg(target_arch = "x86_64")]
fn has_amx(feature: u32) -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 0b11 << 17;
    // An interpreter has no processor to ask.
    if cfg!(miri) || __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction is there.
    let saved = unsafe { xgetbv0() };
    __cpuid_count(7, 0).edx & feature != 0 && saved & TILE_STATE == TILE_STATE
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
    if cfg!(miri) {
        return false;
    }
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

    /// Said past the harness, which keeps what a passing test prints to itself.
    #[test]
    fn what_was_tested_is_said() {
        use std::io::Write;
        let line = crate::testing::summary(crate::testing::sets());
        assert!(Isa::ALL.iter().all(|isa| line.contains(isa.name())), "{line}");
        writeln!(std::io::stderr(), "\n{line}").unwrap();
    }

    #[test]
    fn portable_is_always_there() {
        assert_eq!(Isa::supported()[0], Isa::Portable);
        assert!(Isa::best().is_supported());
        assert!(Isa::supported().is_sorted());
    }

    /// A machine that lacks one feature, as guests of some hypervisors do, has
    /// the sets below the one that needs it, and nothing above.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn each_missing_feature_takes_its_set_away() {
        assert_eq!(usable(&FEATURES, |_| true), Isa::ALL);
        assert_eq!(usable(&FEATURES, |_| false), [Isa::Portable]);
        for (place, (_, needs)) in FEATURES.iter().enumerate() {
            for missing in *needs {
                assert_eq!(usable(&FEATURES, |f| f != *missing), Isa::ALL[..place], "without {missing}");
                // Known by name, whatever this machine answers.
                has_feature(missing);
            }
        }
    }

    /// Asking for tiles changes the process, so it is done last.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_system_is_asked_for_tiles_only_where_they_are() {
        for missing in ["avx2", "avx512vbmi", "amx-tile", "amx-bf16"] {
            usable(&FEATURES, |f| {
                assert_ne!(f, "amx permission", "asked without {missing}");
                f != missing
            });
        }
    }
}
