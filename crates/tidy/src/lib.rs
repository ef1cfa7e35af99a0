//! The rules of the house, as tests: which crate may know which, how a source
//! file opens, where `unsafe` may stand, how long files and functions may be, and that links
//! lead somewhere.
//!
//! Every rule is a function from files in memory to findings, so that the
//! rules themselves are tested on samples that break them. It deliberately
//! repeats nothing that rustc and clippy already check.

#![forbid(unsafe_code)]

pub mod crates;
pub mod documents;
pub mod features;
pub mod lengths;
pub mod lexer;
pub mod sizes;
pub mod sources;
pub mod tree;

pub use tree::{File, Tree};

use std::fmt;

/// A rule that is broken somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// File, from the root of the repository.
    pub path: String,
    /// Line, from 1, where there is one.
    pub line: Option<usize>,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Finding {
    /// A finding about a whole file.
    pub fn file(path: &str, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line: None, message: message.into() }
    }

    /// A finding about the line with this index, from 0.
    pub fn line(path: &str, index: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line: Some(index + 1), message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Every rule, on every file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let rules: [fn(&Tree) -> Vec<Finding>; 6] =
        [crates::check, sources::check, lengths::check, features::check, documents::check, sizes::check];
    rules.iter().flat_map(|rule| rule(tree)).collect()
}
