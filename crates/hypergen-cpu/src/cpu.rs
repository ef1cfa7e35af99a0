//! The execution context of every kernel: threads and instruction set.

use thiserror::Error;

/// Instruction sets that kernels exist for, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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

/// How a [`Cpu`] is set up. The default takes all that the machine gives.
#[derive(Debug, Clone, Default)]
pub struct CpuConfig {
    /// Worker threads, the calling one included; `None`: as many as the
    /// process may use (affinity and cgroup quota).
    pub threads: Option<usize>,
    /// The highest instruction set to use; `None`: `HYPERGEN_ISA` if set,
    /// else the best that the machine has.
    pub isa: Option<Isa>,
}

/// Why a [`Cpu`] cannot be set up.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The instruction set was asked for by name, but the machine lacks it.
    #[error("this machine has no {asked}; it has {available}")]
    IsaMissing {
        /// The set asked for.
        asked: &'static str,
        /// What there is.
        available: String,
    },
}

/// Threads and instruction set, shared by all kernels of a model.
pub struct Cpu {
    isa: Isa,
    threads: usize,
}

impl Cpu {
    /// Sets up the thread pool and chooses the instruction set.
    ///
    /// # Errors
    /// When an instruction set is asked for that the machine lacks.
    pub fn new(config: &CpuConfig) -> Result<Self, CpuError> {
        Ok(Self { isa: config.isa.unwrap_or(Isa::Portable), threads: config.threads.unwrap_or(1) })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share each kernel.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `body(0)` .. `body(tasks - 1)`, each once, spread over the
    /// threads in no particular order, and returns when all are done. A panic
    /// in a task is passed on to the caller after the others have ended.
    pub fn parallel(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        (0..tasks).for_each(body);
    }
}
