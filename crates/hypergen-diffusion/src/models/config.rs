//! Reading of `config.json` files: defaults as diffusers has them, and an
//! error for every field whose value we would not honour.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, ErrorKind};

/// A field that is either one number for all levels or a list by level.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a whole number or a list of them is wanted")]
pub(crate) enum PerLevel {
    One(usize),
    Many(Vec<usize>),
}

impl PerLevel {
    /// The number of each of `levels` levels.
    pub(crate) fn resolve(&self, field: &str, levels: usize) -> Result<Vec<usize>, Error> {
        match self {
            Self::One(n) => Ok(vec![*n; levels]),
            Self::Many(list) if list.len() == levels => Ok(list.clone()),
            Self::Many(list) => {
                Err(bad(format!("'{field}' lists {} numbers for {levels} levels", list.len())))
            }
        }
    }
}

/// An error about a configuration; [`parse`]'s caller adds the file.
pub(crate) fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Model, message)
}

/// A field that we support only at some values.
pub(crate) struct Fixed {
    /// The field's name.
    pub(crate) field: &'static str,
    /// The values, as JSON.
    pub(crate) allowed: &'static [&'static str],
}

/// Reads a configuration, after checking the fields that have to have
/// certain values if they are there.
pub(crate) fn parse<T: DeserializeOwned>(json: &Value, fixed: &[Fixed]) -> Result<T, Error> {
    for Fixed { field, allowed } in fixed {
        let Some(value) = json.get(field) else { continue };
        let text = value.to_string();
        if !allowed.contains(&text.as_str()) {
            return Err(bad(format!("'{field}' is {text}; only {} can be drawn with", allowed.join(" or "))));
        }
    }
    T::deserialize(json).map_err(|e| match culprit::<T>(json) {
        Some((field, value, e)) => bad(format!("'{field}' is {value}: {e}")),
        None => bad(e.to_string()),
    })
}

/// The field that cannot be read, with its value and what is wrong with it.
/// All fields have defaults, so each can be read alone.
fn culprit<T: DeserializeOwned>(json: &Value) -> Option<(&String, &Value, serde_json::Error)> {
    json.as_object()?.iter().find_map(|(field, value)| {
        let alone = serde_json::Map::from_iter([(field.clone(), value.clone())]);
        Some((field, value, T::deserialize(Value::Object(alone)).err()?))
    })
}

/// Checks that a size of a network is neither zero nor absurd, before
/// anything is multiplied with it.
pub(crate) fn sane(field: &str, value: usize) -> Result<usize, Error> {
    if (1..=1 << 20).contains(&value) {
        Ok(value)
    } else {
        Err(bad(format!("'{field}' is {value}, which no network has")))
    }
}

/// Checks that channels fall into groups or heads without a remainder.
pub(crate) fn divides(field: &str, part: usize, channels: usize) -> Result<(), Error> {
    if part != 0 && channels.is_multiple_of(part) {
        Ok(())
    } else {
        Err(bad(format!("{channels} channels cannot be divided into '{field}' = {part}")))
    }
}
