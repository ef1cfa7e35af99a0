//! The log: one subscriber for the process, on standard error. What is
//! logged, and what is not (prompts, keys, paths of pictures), is decided
//! where it happens.

use std::io::{self, IsTerminal, Write};
use std::str::FromStr;

use tracing::Level;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFormat, ServeConfig};

/// The levels, from the least to the most.
const LEVELS: [(&str, LevelFilter); 6] = [
    ("off", LevelFilter::OFF),
    ("error", LevelFilter::ERROR),
    ("warn", LevelFilter::WARN),
    ("info", LevelFilter::INFO),
    ("debug", LevelFilter::DEBUG),
    ("trace", LevelFilter::TRACE),
];

/// What is logged: a level, and levels of their own for parts of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLevel {
    level: LevelFilter,
    /// Modules with levels of their own, the modules within them included.
    parts: Vec<(String, LevelFilter)>,
}

impl FromStr for LogLevel {
    type Err = String;

    /// Reads `warn`, `hypergen_server=debug`, or several of those with commas
    /// between them. A word that is no level is refused: taken for the name of
    /// a part, as filters of this kind have it, it would silence all others.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut this = Self { level: LevelFilter::INFO, parts: Vec::new() };
        for part in text.split(',').map(str::trim) {
            match part.split_once('=') {
                None => this.level = level(part)?,
                Some((name, word)) => this.parts.push((part_name(name.trim())?, level(word.trim())?)),
            }
        }
        // The innermost module has the last word.
        this.parts.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        Ok(this)
    }
}

impl LogLevel {
    /// Whether a line is logged. (The filters of `tracing_subscriber` compare
    /// beginnings, so that `hyper` would be `hypergen_server` too.)
    fn logs(&self, target: &str, level: &Level) -> bool {
        let within = |name: &str| {
            target.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        let own = self.parts.iter().find(|(name, _)| within(name));
        *level <= own.map_or(self.level, |(_, level)| *level)
    }

    /// The most that any part logs.
    fn most(&self) -> LevelFilter {
        self.parts.iter().map(|(_, level)| *level).fold(self.level, LevelFilter::max)
    }
}

fn level(word: &str) -> Result<LevelFilter, String> {
    let lower = word.to_ascii_lowercase();
    // What other programs call it.
    let name = if lower == "warning" { "warn" } else { &lower };
    LEVELS.iter().find(|(known, _)| *known == name).map(|(_, level)| *level).ok_or_else(|| {
        let names = LEVELS.map(|(name, _)| name).join(", ");
        format!("'{word}' is no level: use one of {names}, or PART=LEVEL such as hypergen_server=debug")
    })
}

fn part_name(name: &str) -> Result<String, String> {
    let module = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':' | b'-');
    match !name.is_empty() && name.bytes().all(module) {
        true => Ok(name.to_owned()),
        false => {
            Err(format!("'{name}' is no part of the program: a part is a module such as hypergen_server"))
        }
    }
}

/// Standard error, whose failures are kept quiet: a reader that has gone or a
/// disk that is full must not end the server, and there is nowhere to say so.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the log. A process that has one already keeps it.
pub fn init_logging(config: &ServeConfig) {
    // Its own complaints would go to standard error by a macro that panics there.
    let log = tracing_subscriber::fmt::layer().with_writer(|| Stderr).log_internal_errors(false);
    let log = match config.log_format {
        LogFormat::Human => log.with_ansi(io::stderr().is_terminal()).with_target(false).boxed(),
        LogFormat::Json => log.json().flatten_event(true).with_span_list(false).with_ansi(false).boxed(),
    };
    // The only failure is a log that is there already.
    let (level, most) = (config.log_level.clone(), config.log_level.most());
    let filter = filter_fn(move |line| level.logs(line.target(), line.level())).with_max_level_hint(most);
    let _ = tracing_subscriber::registry().with(log.with_filter(filter)).try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled(text: &str, target: &str, level: Level) -> bool {
        text.parse::<LogLevel>().expect(text).logs(target, &level)
    }

    #[test]
    fn a_level_is_for_all_and_a_part_has_its_own() {
        for warn in ["warn", "warning", "WARN", " Warning "] {
            assert!(enabled(warn, "any", Level::WARN) && !enabled(warn, "any", Level::INFO), "{warn}");
        }
        assert!(!enabled("off", "any", Level::ERROR));
        for both in ["hypergen_server=debug,warning", "warn, hypergen_server = DEBUG"] {
            assert!(enabled(both, "hypergen_server::trace", Level::DEBUG), "{both}");
            assert!(enabled(both, "hyper", Level::WARN) && !enabled(both, "hyper", Level::INFO), "{both}");
        }
        assert!(enabled("hyper=off", "hypergen_server", Level::INFO), "the others stay at info");
        assert!(!enabled("hyper=off", "hyper::proto", Level::ERROR));
        let nested = "hypergen_server=warn,hypergen_server::trace=trace";
        assert!(enabled(nested, "hypergen_server::trace", Level::TRACE));
        assert!(!enabled(nested, "hypergen_server::engine", Level::INFO));
        assert_eq!(nested.parse::<LogLevel>().expect(nested).most(), LevelFilter::TRACE);
    }

    #[test]
    fn what_is_no_level_is_refused_with_the_levels() {
        for wrong in
            ["", "wran", "loud", "hypergen_server", "info,loud", "hyper=loud", "hyper=", "3", "info,"]
        {
            let error = wrong.parse::<LogLevel>().expect_err(wrong);
            assert!(error.contains("off, error, warn, info, debug, trace"), "{wrong}: {error}");
        }
        for wrong in ["=info", "a b=info", "[span]=info"] {
            assert!(wrong.parse::<LogLevel>().expect_err(wrong).contains("no part"), "{wrong}");
        }
    }
}
