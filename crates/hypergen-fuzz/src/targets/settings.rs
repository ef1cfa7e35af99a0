//! A settings file of the server.

use clap::{Args, Command, FromArgMatches};
use hypergen_server::{ServeConfig, with_file};
use toml::{Table, Value};

use crate::targets::itself;
use crate::{check_message, files};

/// Shortest key that no message may hold; shorter ones are parts of words.
const SECRET: usize = 8;

/// The input is the file.
pub(crate) fn read(data: &[u8]) -> u64 {
    let path = files::path("settings.toml");
    files::write(&path, data);
    let secrets = secrets(data);
    let check = |message: &str, names: &[&str]| {
        // The help that clap adds is no part of the message.
        let message = message.split("  Usage:").next().unwrap_or_default().trim_end();
        // A wrong value is repeated, whatever its length: it is the operator's own.
        let clipped: String = message.chars().take(crate::LONGEST_MESSAGE).collect();
        check_message(&clipped, names);
        for secret in &secrets {
            assert!(!message.contains(secret.as_str()), "a key in: {message}");
        }
    };
    match with_file(ServeConfig::augment_args(Command::new("serve")), &path) {
        Err(error) => check(&error.to_string(), &["settings.toml"]),
        Ok(command) => {
            let parsed = command
                .try_get_matches_from(["serve"])
                .and_then(|matches| ServeConfig::from_arg_matches(&matches));
            match parsed {
                Err(error) => check(&error.to_string(), &[]),
                Ok(config) => {
                    if let Err(message) = config.check() {
                        check(&message, &["--", "API key", "key"]);
                    }
                    let shown = format!("{config:?}");
                    assert!(
                        secrets.iter().all(|secret| !shown.contains(secret.as_str())),
                        "a key in: {shown}"
                    );
                }
            }
        }
    }
    itself(data)
}

/// The keys in a file, where no other setting holds the same text.
fn secrets(data: &[u8]) -> Vec<String> {
    let table =
        std::str::from_utf8(data).ok().and_then(|text| text.parse::<Table>().ok()).unwrap_or_default();
    let is_key = |name: &str| name.replace('_', "-") == "api-key";
    let texts = |value: &Value| -> Vec<String> {
        let list = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        list.iter().filter_map(Value::as_str).flat_map(|text| text.split(',')).map(str::to_owned).collect()
    };
    let keys: Vec<String> =
        table.iter().filter(|(name, _)| is_key(name)).flat_map(|(_, v)| texts(v)).collect();
    let others: String =
        table.iter().filter(|(name, _)| !is_key(name)).map(|(k, v)| format!("{k} {v} ")).collect();
    let words =
        "the setting in must be a text number true or false list of those serve api-key settings.toml";
    keys.into_iter()
        .map(|key| key.trim().to_owned())
        .filter(|key| key.len() >= SECRET && !others.contains(key.as_str()) && !words.contains(key.as_str()))
        .collect()
}
