//! The execution context of every kernel: threads and instruction set. The
//! threads themselves live in `pool`, detection in `isa`.

use thiserror::Error;

use crate::isa::{Isa, join};
use crate::pool::Pool;

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
    /// No instruction set has this name.
    #[error("there is no instruction set {asked:?}; choose one of {known}")]
    IsaUnknown {
        /// The name given.
        asked: String,
        /// The names that there are.
        known: String,
    },
    /// Zero threads were asked for.
    #[error("0 threads cannot compute anything; ask for 1 or more, or leave the number out")]
    NoThreads,
    /// The system gives no more threads.
    #[error("cannot start {threads} threads: {source}; ask for fewer")]
    Spawn {
        /// The number asked for.
        threads: usize,
        /// What the system says.
        source: std::io::Error,
    },
}

/// The variable that forces a lower instruction set.
const ISA_VARIABLE: &str = "HYPERGEN_ISA";

/// Threads and instruction set, shared by all kernels of a model.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
}

impl Cpu {
    /// Sets up the thread pool and chooses the instruction set.
    ///
    /// # Errors
    /// When an instruction set is asked for that the machine lacks, and when
    /// threads cannot be had.
    pub fn new(config: &CpuConfig) -> Result<Self, CpuError> {
        let isa = match (config.isa, std::env::var(ISA_VARIABLE)) {
            (Some(isa), _) => isa,
            (None, Ok(name)) if !name.trim().is_empty() => name.parse()?,
            (None, _) => Isa::best(),
        };
        if !isa.is_supported() {
            return Err(CpuError::IsaMissing { asked: isa.name(), available: join(Isa::supported()) });
        }
        let threads = match config.threads {
            Some(0) => return Err(CpuError::NoThreads),
            Some(threads) => threads,
            // Honours affinity and the cgroup's quota.
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let pool = Pool::new(threads).map_err(|source| CpuError::Spawn { threads, source })?;
        Ok(Self { isa, pool })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share each kernel.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `body(0)` .. `body(tasks - 1)`, each once, spread over the
    /// threads in no particular order, and returns when all are done. A panic
    /// in a task is passed on to the caller after the others have ended.
    /// Calls from inside a task run on the thread that makes them.
    pub fn parallel(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        self.pool.run(tasks, &body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_to_what_the_process_may_use() {
        let cpu = Cpu::new(&CpuConfig::default()).unwrap();
        assert_eq!(cpu.threads(), std::thread::available_parallelism().unwrap().get());
    }

    #[test]
    fn zero_threads_is_an_error() {
        let error = Cpu::new(&CpuConfig { threads: Some(0), isa: None }).err().unwrap();
        assert!(error.to_string().contains("1 or more"), "{error}");
    }

    #[test]
    fn each_set_is_taken_or_refused_by_name() {
        for isa in Isa::ALL {
            match Cpu::new(&CpuConfig { threads: Some(1), isa: Some(isa) }) {
                Ok(cpu) => assert!(cpu.isa() == isa && isa.is_supported()),
                Err(error) => {
                    assert!(!isa.is_supported() && error.to_string().contains(isa.name()), "{error}");
                }
            }
        }
    }
}
