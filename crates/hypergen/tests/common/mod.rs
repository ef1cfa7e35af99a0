//! Runs the real binary in a folder of its own. It asserts nothing by itself.

#![allow(dead_code, reason = "each test file is a program that uses a part of this")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A new folder, and the binary that runs in it.
pub(crate) struct Sandbox {
    folder: TempDir,
    /// What the binary takes for the system's folder of temporary files: a
    /// server that is killed cannot tidy up.
    temporary: TempDir,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        let folder = || tempfile::tempdir().expect("a temporary folder");
        Self { folder: folder(), temporary: folder() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Names of everything in the folder, hidden files too.
    pub(crate) fn names(&self) -> Vec<String> {
        Self::list(self.path())
    }

    /// Names of temporary files and folders.
    pub(crate) fn temporary(&self) -> Vec<String> {
        Self::list(self.temporary.path())
    }

    fn list(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .expect("the folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The binary, with pipes for its streams and none of the user's settings.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypergen"));
        command.args(args).current_dir(self.path()).stdin(Stdio::null());
        command.env("TMPDIR", self.temporary.path());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HYPERGEN_") {
                command.env_remove(name);
            }
        }
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    /// Runs, and returns what was written to standard output.
    pub(crate) fn succeed(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs what must fail with exit code 1, and returns its one line.
    pub(crate) fn fail(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {line}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
        one_error(&line)
    }
}

/// Checks that `stderr` ends with its only error, and returns that.
pub(crate) fn one_error(stderr: &str) -> String {
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && stderr.ends_with(&format!("{}\n", errors[0])), "{stderr:?}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    errors[0].to_owned()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}
