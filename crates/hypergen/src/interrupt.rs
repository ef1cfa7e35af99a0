//! Ctrl-C and `kill`: while a picture is drawn they ask it to stop at the next
//! step; at all other times, and when asked twice, they end the process.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The process was told to stop: no error, but an exit code of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stopped {
    /// 128 and the signal's number.
    pub(crate) exit_code: u8,
    /// What became of the work.
    pub(crate) message: String,
}

impl Stopped {
    /// After `written` of `count` pictures.
    pub(crate) fn drawing(exit_code: u8, written: usize, count: usize) -> Self {
        let message = match written {
            0 => "stopped: nothing was written".to_owned(),
            written => format!("stopped: {written} of {count} pictures were written"),
        };
        Self { exit_code, message }
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Stopped {}

/// What the signal handlers and the drawing loop share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    /// Exit code of the signal that came, or 0.
    exit_code: Arc<AtomicUsize>,
    /// Whether a signal ends the process there and then.
    at_once: Arc<AtomicBool>,
}

/// Makes a file that outgrows `ulimit -f` an error of its write, as a full
/// disk is: by itself the system ends the process.
pub(crate) fn survive_file_limits() {
    #[cfg(unix)]
    {
        // A handler that does nothing of use is enough. Without one all is as before.
        let _ = flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    }
}

impl Interrupt {
    /// Takes the signals over. Until [`Interrupt::defer`] they still end the
    /// process at once, because loading has no step at which to stop.
    pub(crate) fn install() -> anyhow::Result<Self> {
        let this = Self::default();
        this.at_once.store(true, Ordering::SeqCst);
        for signal in [SIGINT, SIGTERM] {
            let code = 128 + signal;
            // The handlers run in this order: the first signal sets both
            // flags, and the second finds `at_once` set.
            flag::register_conditional_shutdown(signal, code, Arc::clone(&this.at_once))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&this.exit_code), code as usize))
                .and_then(|_| flag::register(signal, Arc::clone(&this.at_once)))
                .context("cannot watch for Ctrl-C")?;
        }
        Ok(this)
    }

    /// From now on a first signal only asks.
    pub(crate) fn defer(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// The exit code of the signal that came, if one did.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        match self.exit_code.load(Ordering::SeqCst) {
            0 => None,
            code => Some(code as u8),
        }
    }

    /// As if a signal had come, for tests.
    #[cfg(test)]
    pub(crate) fn pretend(&self, code: usize) {
        self.exit_code.store(code, Ordering::SeqCst);
    }
}
