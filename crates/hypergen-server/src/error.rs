//! Why a server cannot start. What goes wrong later is an answer to somebody
//! ([`crate::ApiError`]) or a line in the log.

use std::path::PathBuf;

use thiserror::Error;

/// One line with the cause and the fix.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Settings that do not go together, or not with the model.
    #[error("{0}")]
    Config(String),
    /// The address is not one, or is taken.
    #[error("cannot listen on {address}: {source} (choose another with --host and --port)")]
    Listen {
        /// As the user gave it.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The folder for pictures cannot be used.
    #[error("cannot keep pictures in {folder}: {cause} (choose another folder with --image-dir)")]
    ImageDir {
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        cause: String,
    },
    /// The system has no thread left.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
