//! From the process's arguments and environment to a parsed command line: an
//! empty variable is none, and an error names the place where the wrong value
//! stands, which need not be a flag. What the arguments are is declared elsewhere.

use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches};
use hypergen_server::{ConfigFileError, with_file};

use crate::cli::Cli;

/// The one variable that must not be empty: a server that was meant to have a
/// key must not start without one because a script came out empty.
const KEY_VARIABLE: &str = "HYPERGEN_API_KEY";

/// A flag, and what its user calls it: the variable or the file's entry that it came from.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Origins(Vec<(String, String)>);

impl Origins {
    /// A message about flags, as one about the places where their values stand.
    pub(crate) fn apply(&self, message: &str) -> String {
        let mut message = message.to_owned();
        for (flag, origin) in &self.0 {
            message = replace_word(&message, flag, origin);
        }
        message
    }
}

/// Parses the process's command line, or ends the process with clap's words.
pub(crate) fn parse() -> (Cli, Origins) {
    let mut command = command();
    command.build();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let matches = matches(&command, &arguments);
    let matches = matches.unwrap_or_else(|e| from_variable(e, &command, &arguments).exit());
    read(&matches, &command, None)
}

/// Parses it once more with a settings file beneath it. All that was wrong
/// elsewhere is known by then, so that a wrong value is the file's.
pub(crate) fn parse_with_file(path: &Path) -> Result<(Cli, Origins), ConfigFileError> {
    let mut command = command();
    if let Some(serve) = command.find_subcommand_mut("serve") {
        *serve = with_file(serve.clone(), path)?;
    }
    command.build();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let matches = matches(&command, &arguments).unwrap_or_else(|e| from_file(e, &command, path).exit());
    Ok(read(&matches, &command, Some(path)))
}

fn read(matches: &ArgMatches, parsed_by: &Command, file: Option<&Path>) -> (Cli, Origins) {
    let cli = Cli::from_arg_matches(matches).unwrap_or_else(|e| e.exit());
    let origins = matches.subcommand().and_then(|(name, matches)| {
        let (plain, parsed_by) = (command(), parsed_by.find_subcommand(name)?);
        Some(origins(matches, plain.find_subcommand(name)?, parsed_by, file))
    });
    (cli, origins.unwrap_or_default())
}

/// The command line's declaration, with what holds for every argument.
pub(crate) fn command() -> Command {
    Cli::command().mut_subcommands(|command| {
        command.mut_args(|arg| {
            let empty = arg.get_env().is_some_and(|name| {
                name != KEY_VARIABLE
                    && std::env::var_os(name).is_some_and(|value| value.to_string_lossy().trim().is_empty())
            });
            if empty { arg.env(None::<&str>) } else { arg }
        })
    })
}

/// Parses arguments, the program's name first. What begins like a negative
/// number after a flag is that flag's value, `--size -8x8` as `--size=-8x8`: it
/// may be wrong, and is told so, but it is never a flag that is not known.
pub(crate) fn matches(command: &Command, arguments: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let subcommand = arguments.get(1).and_then(|name| command.find_subcommand(name));
    let takes_value = |flag: &OsString| {
        let named = |arg: &&Arg| {
            arg.get_long().is_some_and(|long| *flag == *format!("--{long}"))
                || arg.get_short().is_some_and(|short| *flag == *format!("-{short}"))
        };
        let arg = subcommand.and_then(|command| command.get_arguments().find(named));
        arg.is_some_and(|arg| arg.get_action().takes_values())
    };
    let mut joined: Vec<OsString> = Vec::with_capacity(arguments.len());
    for argument in arguments {
        let negative = argument
            .to_string_lossy()
            .strip_prefix('-')
            .is_some_and(|rest| rest.trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit()));
        match joined.last_mut().filter(|last| negative && takes_value(last)) {
            Some(flag) => {
                flag.push("=");
                flag.push(argument);
            }
            None => joined.push(argument.clone()),
        }
    }
    command.clone().try_get_matches_from(joined)
}

/// Where the values come from that were not given as flags. What a file says
/// is a default of the command that parsed, and none of the `plain` one.
fn origins(matches: &ArgMatches, plain: &Command, parsed_by: &Command, file: Option<&Path>) -> Origins {
    let origin = |arg: &Arg| {
        let flag = format!("--{}", arg.get_long()?);
        match matches.value_source(arg.get_id().as_str())? {
            ValueSource::EnvVariable => Some((flag, arg.get_env()?.to_str()?.to_owned())),
            ValueSource::DefaultValue => {
                let own = plain.get_arguments().find(|own| own.get_id() == arg.get_id())?;
                let file = file.filter(|_| own.get_default_values() != arg.get_default_values())?;
                Some((flag, format!("{} in {}", arg.get_long()?, file.display())))
            }
            _ => None,
        }
    };
    Origins(parsed_by.get_arguments().filter_map(origin).collect())
}

/// The error with the variable's name in the flag's place, if it was the
/// variable whose value is wrong.
fn from_variable(error: clap::Error, command: &Command, arguments: &[OsString]) -> clap::Error {
    let subcommand = arguments.get(1).and_then(|name| command.find_subcommand(name));
    let Some(arg) = subcommand.and_then(|command| wrong(&error, command)) else { return error };
    let given = arguments.iter().any(|given| stands_for(&given.to_string_lossy(), arg));
    match arg.get_env().filter(|name| !given && std::env::var_os(name).is_some()) {
        Some(name) => renamed(error, name.to_string_lossy().into_owned()),
        None => error,
    }
}

fn from_file(error: clap::Error, command: &Command, path: &Path) -> clap::Error {
    let arg = command.find_subcommand("serve").and_then(|command| wrong(&error, command));
    match arg.map(|arg| arg.get_long().unwrap_or_else(|| arg.get_id().as_str())) {
        Some(name) => renamed(error, format!("{name} in {}", path.display())),
        None => error,
    }
}

/// The argument whose value an error is about.
fn wrong<'a>(error: &clap::Error, command: &'a Command) -> Option<&'a Arg> {
    if !matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return None;
    }
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else { return None };
    command.get_arguments().find(|arg| arg.to_string() == *shown)
}

fn renamed(mut error: clap::Error, name: String) -> clap::Error {
    error.insert(ContextKind::InvalidArg, ContextValue::String(name));
    error
}

/// Whether an argument of the process gives this one's value.
fn stands_for(given: &str, arg: &Arg) -> bool {
    let long = arg.get_long().is_some_and(|long| {
        given
            .strip_prefix("--")
            .and_then(|rest| rest.strip_prefix(long))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    });
    let short = arg.get_short().is_some_and(|short| given.starts_with(&format!("-{short}")));
    long || short
}

/// Replaces a flag where it stands by itself: `--lora`, but not in `--lora-dir`.
fn replace_word(text: &str, flag: &str, by: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(flag) {
        let (before, after) = (&rest[..at], &rest[at + flag.len()..]);
        let whole = !after.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
        out.push_str(before);
        out.push_str(if whole { by } else { flag });
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_place_of_a_value() {
        let origins = Origins(vec![
            ("--lora".to_owned(), "HYPERGEN_LORA".to_owned()),
            ("--port".to_owned(), "port in x.toml".to_owned()),
        ]);
        assert_eq!(
            origins.apply("--lora: gone; --lora-dir and (--port): --lora"),
            "HYPERGEN_LORA: gone; --lora-dir and (port in x.toml): HYPERGEN_LORA"
        );
    }

    #[test]
    fn the_declaration_is_sound() {
        command().debug_assert();
    }
}
