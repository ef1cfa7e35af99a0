//! The two streams that a command speaks on: results for programs on standard
//! output, everything for people on standard error.
//!
//! It is passed in rather than reached for, so that tests read what was said.

use std::io::{self, IsTerminal, Write};

/// Where to speak, and whether a person listens.
pub(crate) struct Console<'a> {
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    out_is_terminal: bool,
    err_is_terminal: bool,
}

impl Console<'_> {
    /// Runs `f` with the process's own streams.
    pub(crate) fn real<T>(f: impl FnOnce(&mut Console<'_>) -> T) -> T {
        let (mut out, mut err) = (io::stdout(), io::stderr());
        let (out_is_terminal, err_is_terminal) = (out.is_terminal(), err.is_terminal());
        f(&mut Console { out: &mut out, err: &mut err, out_is_terminal, err_is_terminal })
    }

    /// Runs `f` with two pipes, and returns what it wrote to them.
    #[cfg(test)]
    pub(crate) fn piped<T>(f: impl FnOnce(&mut Console<'_>) -> T) -> (T, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let result =
            f(&mut Console { out: &mut out, err: &mut err, out_is_terminal: false, err_is_terminal: false });
        (result, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&err).into_owned())
    }

    /// Writes a result to standard output. A reader that has left (`| head`) is no failure.
    pub(crate) fn print(&mut self, text: &str) -> anyhow::Result<()> {
        match self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                Err(anyhow::anyhow!("cannot write to standard output: {}", crate::output::words(&e)))
            }
            _ => Ok(()),
        }
    }

    /// Tells what must be told, person or not.
    pub(crate) fn tell(&mut self, text: &str) {
        // When standard error is closed nobody is there to be told.
        let _ = writeln!(self.err, "{text}");
    }

    /// Tells of a written file: programs its name, and people how it went.
    pub(crate) fn announce(&mut self, name: &str, details: &str) -> anyhow::Result<()> {
        if self.err_is_terminal {
            self.tell(&format!("{name}: {details}"));
        }
        // A terminal that shows both streams needs the name only once.
        if self.err_is_terminal && self.out_is_terminal { Ok(()) } else { self.print(&format!("{name}\n")) }
    }
}
