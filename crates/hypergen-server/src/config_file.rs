//! Settings from a TOML file. The file's entries become the defaults of the
//! command line's arguments of the same names, so nothing is declared a second
//! time, every value goes through the same checks, and the command line and
//! the environment overrule it without a line of code.

use std::path::Path;

use clap::{Arg, ArgAction, Command};
use thiserror::Error;
use toml::{Table, Value};

/// Why a settings file cannot be used.
#[derive(Debug, Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read the settings file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error("the settings file {path} is not TOML: {message}")]
    Syntax {
        /// The file.
        path: String,
        /// What the parser says.
        message: String,
    },
    /// It holds something that is no setting.
    #[error(
        "the settings file {path} has an unknown setting '{key}': the names are those of the command line, such as {examples}"
    )]
    Unknown {
        /// The file.
        path: String,
        /// The entry.
        key: String,
        /// Some that exist.
        examples: String,
    },
    /// An entry is neither a text, a number, a boolean nor a list of those.
    #[error("the setting '{key}' in {path} must be a text, a number, true or false, or a list of those")]
    Type {
        /// The file.
        path: String,
        /// The entry.
        key: String,
    },
}

/// Puts the file's settings under `command`, as the defaults of its arguments.
///
/// # Errors
/// When the file cannot be read, or holds what is no setting.
pub fn with_file(command: Command, path: &Path) -> Result<Command, ConfigFileError> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigFileError::Read { path: shown.clone(), source })?;
    let table: Table = text.parse().map_err(|e: toml::de::Error| ConfigFileError::Syntax {
        path: shown.clone(),
        // The parser's long form repeats the line, which may hold a key.
        message: e.message().to_owned(),
    })?;
    with_table(command, &shown, &table)
}

fn with_table(mut command: Command, path: &str, table: &Table) -> Result<Command, ConfigFileError> {
    for (key, value) in table {
        let Some(arg) = command.get_arguments().find(|arg| names(arg, key)) else {
            let known = command.get_arguments().filter_map(Arg::get_long).filter(|long| *long != "help");
            let examples = known.take(6).collect::<Vec<_>>().join(", ");
            return Err(ConfigFileError::Unknown { path: path.to_owned(), key: key.clone(), examples });
        };
        let id = arg.get_id().clone();
        let wrong = || ConfigFileError::Type { path: path.to_owned(), key: key.clone() };
        let values = match value {
            Value::Array(list) if matches!(arg.get_action(), ArgAction::Append) => {
                list.iter().map(plain).collect::<Option<Vec<_>>>().ok_or_else(wrong)?
            }
            single => vec![plain(single).ok_or_else(wrong)?],
        };
        command = command.mut_arg(id, |arg| arg.default_values(values));
    }
    Ok(command)
}

/// Whether an argument goes by this name in a file. A file that names
/// another file would only confuse.
fn names(arg: &Arg, key: &str) -> bool {
    let name = arg.get_long().unwrap_or_else(|| arg.get_id().as_str());
    name == key.replace('_', "-") && !matches!(name, "config" | "help" | "version")
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(yes) => Some(yes.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;
    use crate::config::ServeConfig;

    fn parse(toml: &str, args: &[&str]) -> Result<ServeConfig, String> {
        let table: Table = toml.parse().expect("TOML");
        let command = with_table(ServeConfig::augment_args(Command::new("serve")), "x.toml", &table)
            .map_err(|e| e.to_string())?;
        let matches =
            command.try_get_matches_from(std::iter::once(&"serve").chain(args)).map_err(|e| e.to_string())?;
        ServeConfig::from_arg_matches(&matches).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_sets_what_the_command_line_leaves_open() {
        let file = r#"
            model = "/models/one"
            port = 9000
            max-queue-size = 7
            default_guidance = 2.5
            api-key = ["sk-a", "sk-b"]
            log-prompts = true
            image-ttl = "5m"
        "#;
        let config = parse(file, &["--port", "9001"]).expect("fine");
        assert_eq!(config.model.as_deref(), Some("/models/one"));
        assert_eq!(config.port, 9001, "the command line overrules");
        assert_eq!(config.max_queue_size, 7);
        assert_eq!(config.default_guidance, Some(2.5));
        assert_eq!(config.api_keys.len(), 2);
        assert!(config.log_prompts && !config.no_metadata);
        assert_eq!(config.image_ttl.0.as_secs(), 300);
        let config = parse(file, &["--api-key", "sk-c"]).expect("fine");
        assert_eq!(config.api_keys.len(), 1, "lists are overruled whole");
    }

    #[test]
    fn what_is_no_setting_is_named() {
        assert!(parse("prot = 1", &[]).expect_err("unknown").contains("'prot'"));
        assert!(parse("config = 'y.toml'", &[]).expect_err("itself").contains("'config'"));
        assert!(parse("[port]\nx = 1", &[]).expect_err("a table").contains("'port'"));
        assert!(parse("port = 'x'", &[]).expect_err("no number").contains("--port"));
        assert!(parse("host = ['a', 'b']", &[]).expect_err("a list").contains("'host'"));
    }

    #[test]
    fn files_that_are_none_are_errors() {
        let folder = tempfile::tempdir().expect("a folder");
        let command = || ServeConfig::augment_args(Command::new("serve"));
        let missing = with_file(command(), &folder.path().join("no.toml")).expect_err("missing");
        assert!(missing.to_string().contains("no.toml"));
        let path = folder.path().join("bad.toml");
        std::fs::write(&path, "api-key = sk-secret").expect("written");
        let error = with_file(command(), &path).expect_err("no TOML").to_string();
        assert!(error.contains("not TOML") && !error.contains("sk-secret"), "{error}");
    }
}
