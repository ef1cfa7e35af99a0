//! Reading of `config.json` files: defaults as diffusers has them, and an
//! error for every field whose value we would not honour.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::{Error, ErrorKind, recognise};

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
/// certain values if they are there. A list stands for its elements: some
/// files say by level what holds for all levels.
pub(crate) fn parse<T: DeserializeOwned>(json: &Value, fixed: &[Fixed]) -> Result<T, Error> {
    let json = &said(whole_numbers(json));
    for Fixed { field, allowed } in fixed {
        let Some(value) = json.get(field) else { continue };
        let fits = |value: &Value| allowed.contains(&value.to_string().as_str());
        let by_level = value.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(fits));
        if !by_level && !fits(value) {
            let what =
                value.as_str().and_then(recognise::class).map_or(String::new(), |what| format!(" ({what})"));
            return Err(bad(format!(
                "'{field}' is {value}{what}; only {} can be drawn with",
                allowed.join(" or ")
            )));
        }
    }
    T::deserialize(json).map_err(|e| match culprit::<T>(json) {
        Some((field, value, e)) => bad(format!("'{field}' is {value}: {e}")),
        None => bad(e.to_string()),
    })
}

/// The same without fields that nobody set: a file that went through diffusers
/// may list them, and they then count as absent.
fn said(mut json: Value) -> Value {
    if let Some(fields) = json.as_object_mut()
        && let Some(Value::Array(unset)) = fields.remove("_use_default_values")
    {
        unset.iter().filter_map(Value::as_str).for_each(|name| drop(fields.remove(name)));
    }
    json
}

/// The same with `4` for `4.0`: Python takes either for a number, and files
/// that other programs wrote have the longer form.
fn whole_numbers(json: &Value) -> Value {
    /// Up to here a float64 has every whole number.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match json {
        Value::Number(number) if number.is_f64() => match number.as_f64() {
            Some(x) if x.fract() == 0.0 && x.abs() < EXACT => Value::from(x as i64),
            _ => json.clone(),
        },
        Value::Array(list) => list.iter().map(whole_numbers).collect(),
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), whole_numbers(v))).collect(),
        _ => json.clone(),
    }
}

/// A truth value; `null` is false, as in Python.
pub(crate) fn truth<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(false))
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
    const MOST: usize = 1 << 20;
    match value {
        1..=MOST => Ok(value),
        _ => Err(bad(format!("'{field}' is {value}, which no network has: 1 to {MOST} can be"))),
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

/// Checks that a factor can be multiplied and divided by.
pub(crate) fn factor(field: &str, value: f64) -> Result<f64, Error> {
    if value.is_normal() { Ok(value) } else { Err(bad(format!("'{field}' is {value}"))) }
}
