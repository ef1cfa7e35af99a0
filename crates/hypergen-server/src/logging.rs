//! The log: one subscriber for the process, on standard error. What is
//! logged, and what is not (prompts, keys, paths of pictures), is decided
//! where it happens.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, ServeConfig};
use crate::error::ServeError;

/// Starts the log. A process that has one already keeps it.
///
/// # Errors
/// When the level is not one.
pub fn init_logging(config: &ServeConfig) -> Result<(), ServeError> {
    let filter =
        EnvFilter::try_new(&config.log_level).map_err(|_| ServeError::LogLevel(config.log_level.clone()))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // The only failure is a log that is there already.
    let _ = match config.log_format {
        LogFormat::Human => log.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).with_span_list(false).with_ansi(false).try_init(),
    };
    Ok(())
}
