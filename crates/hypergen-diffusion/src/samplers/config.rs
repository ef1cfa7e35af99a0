//! A scheduler's JSON fields, read strictly.
//!
//! A sampler is built as diffusers' `from_config` builds it: fields that the
//! file holds are taken, those that it lacks have the class's own defaults, and
//! fields that the class does not know are ignored. Beyond that this reader is
//! stricter than Python: a wrong type, a number out of range or a value
//! that a sampler does not honour is an error that names the field, so that
//! nobody gets a silently different picture.
//!
//! Nothing here knows a formula; that is [`super::schedule`] and up.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::SamplerError;

/// A value that a row of the table of samplers sets over whatever the file says.
#[derive(Debug, Clone, Copy)]
pub(super) enum Preset {
    Flag(bool),
    Integer(i64),
    Text(&'static str),
}

/// The fields from which one sampler is built.
#[derive(Clone)]
pub(super) struct Fields {
    class: &'static str,
    map: Map<String, Value>,
}

impl Fields {
    /// Fields of `config` for a diffusers class, under `presets`.
    pub(super) fn new(
        class: &'static str,
        config: &Value,
        presets: &[(&'static str, Preset)],
    ) -> Result<Self, SamplerError> {
        let mut map = object(config)?.clone();
        // A file that was saved through diffusers may list the fields that
        // nobody set. They count as absent.
        if let Some(Value::Array(unset)) = map.remove("_use_default_values") {
            for name in unset.iter().filter_map(Value::as_str) {
                map.remove(name);
            }
        }
        for (name, preset) in presets {
            let value = match *preset {
                Preset::Flag(v) => Value::from(v),
                Preset::Integer(v) => Value::from(v),
                Preset::Text(v) => Value::from(v),
            };
            map.insert((*name).to_owned(), value);
        }
        Ok(Self { class, map })
    }

    /// The same without some fields.
    pub(super) fn without(&self, fields: &[&str]) -> Self {
        let mut rest = self.clone();
        rest.map.retain(|name, _| !fields.contains(&name.as_str()));
        rest
    }

    /// The same without a field that is `null`, where the class never looks at it so.
    pub(super) fn without_null(&self, field: &str) -> Self {
        match self.map.get(field) {
            Some(Value::Null) => self.without(&[field]),
            _ => self.clone(),
        }
    }

    /// An error that names a field, its value and what is wrong with it.
    pub(super) fn error(&self, field: &'static str, problem: impl Into<String>) -> SamplerError {
        let mut value = self.map.get(field).map_or_else(|| "absent".to_owned(), Value::to_string);
        if value.chars().count() > 60 {
            value = value.chars().take(60).chain("...".chars()).collect();
        }
        SamplerError::Field { class: self.class, field, value, problem: problem.into() }
    }

    /// A truth value; `null` is false, as in Python.
    pub(super) fn flag(&self, field: &'static str, default: bool) -> Result<bool, SamplerError> {
        match self.map.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.error(field, "must be true or false")),
        }
    }

    /// A whole number within `range`, which may be written as `4.0`.
    pub(super) fn integer(
        &self,
        field: &'static str,
        default: i64,
        range: RangeInclusive<i64>,
    ) -> Result<i64, SamplerError> {
        // A default may lie outside as well: what fits depends on other fields.
        let value = self.map.get(field).map_or(Some(default), whole);
        value.filter(|v| range.contains(v)).ok_or_else(|| {
            self.error(field, format!("must be a whole number from {} to {}", range.start(), range.end()))
        })
    }

    /// A finite number within `range`.
    pub(super) fn number(
        &self,
        field: &'static str,
        default: f64,
        range: RangeInclusive<f64>,
    ) -> Result<f64, SamplerError> {
        match self.map.get(field) {
            None => Ok(default),
            Some(_) => self.optional_number(field, range.clone())?.ok_or_else(|| {
                self.error(field, format!("must be a number from {} to {}", range.start(), range.end()))
            }),
        }
    }

    /// A finite number within `range`, or none where the field is absent or `null`.
    pub(super) fn optional_number(
        &self,
        field: &'static str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, SamplerError> {
        let Some(value) = self.map.get(field).filter(|v| !v.is_null()) else { return Ok(None) };
        value.as_f64().filter(|v| range.contains(v)).map(Some).ok_or_else(|| {
            self.error(field, format!("must be a number from {} to {}", range.start(), range.end()))
        })
    }

    /// A number that may be infinite, which [`super::read_config`] hands on as
    /// a string.
    pub(super) fn lower_limit(&self, field: &'static str) -> Result<f64, SamplerError> {
        match self.map.get(field) {
            None => Ok(f64::NEG_INFINITY),
            Some(Value::String(text)) if text == "-Infinity" => Ok(f64::NEG_INFINITY),
            Some(Value::Number(number)) => {
                number.as_f64().ok_or_else(|| self.error(field, "must be a number"))
            }
            Some(_) => Err(self.error(field, "must be a number or -Infinity")),
        }
    }

    /// One of some words.
    pub(super) fn choice<T: Copy>(
        &self,
        field: &'static str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, SamplerError> {
        let Some(value) = self.map.get(field) else { return Ok(default) };
        let found = value.as_str().and_then(|text| choices.iter().find(|(name, _)| *name == text));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            self.error(field, format!("must be one of {}", names.join(", ")))
        })
    }

    /// A list of numbers within `range`, or none where absent or `null`. At
    /// most `longest` of them.
    pub(super) fn numbers(
        &self,
        field: &'static str,
        range: RangeInclusive<f64>,
        longest: usize,
    ) -> Result<Option<Vec<f64>>, SamplerError> {
        let Some(value) = self.map.get(field).filter(|v| !v.is_null()) else { return Ok(None) };
        let problem = || {
            self.error(
                field,
                format!(
                    "must be null or a list of 1 to {longest} numbers from {} to {}",
                    range.start(),
                    range.end()
                ),
            )
        };
        let list = value.as_array().filter(|l| (1..=longest).contains(&l.len())).ok_or_else(problem)?;
        let numbers = list.iter().map(|v| v.as_f64().filter(|n| range.contains(n)));
        numbers.collect::<Option<Vec<_>>>().map(Some).ok_or_else(problem)
    }

    /// A list of whole numbers, empty where absent or `null`.
    pub(super) fn integers(&self, field: &'static str) -> Result<Vec<i64>, SamplerError> {
        let Some(value) = self.map.get(field).filter(|v| !v.is_null()) else { return Ok(Vec::new()) };
        value
            .as_array()
            .and_then(|list| list.iter().map(whole).collect())
            .ok_or_else(|| self.error(field, "must be a list of whole numbers"))
    }

    /// A field's text, if it is one.
    pub(super) fn text(&self, field: &str) -> Option<&str> {
        self.map.get(field)?.as_str()
    }

    /// Refuses a field of the class that no sampler of ours honours, unless
    /// it is off: absent, `null` or false.
    pub(super) fn must_be_off(&self, field: &'static str) -> Result<(), SamplerError> {
        match self.map.get(field) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(()),
            Some(_) => Err(self.error(field, "is not supported")),
        }
    }
}

/// A number that is whole, however it is written.
fn whole(value: &Value) -> Option<i64> {
    let of_float = |x: f64| (x.fract() == 0.0 && x.abs() < 9e15).then_some(x as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(of_float))
}

/// The object that a scheduler's file must hold.
pub(super) fn object(config: &Value) -> Result<&Map<String, Value>, SamplerError> {
    config.as_object().ok_or(SamplerError::NotAnObject)
}

/// Reads the text of a `scheduler_config.json`.
///
/// Python's JSON writer puts a bare `-Infinity` where a number has no finite
/// value, and published files hold it (`lambda_min_clipped`). That is no JSON;
/// such words, and `NaN`, are handed on as strings for the fields' readers
/// to accept or refuse by name.
///
/// # Errors
/// When the text is no JSON even so, with the parser's position.
pub fn read_config(text: &str) -> Result<Value, SamplerError> {
    let mut quoted = String::with_capacity(text.len() + 16);
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|w| !in_string && rest.starts_with(w));
        if let Some(word) = word {
            quoted.push('"');
            quoted.push_str(word);
            quoted.push('"');
            rest = &rest[word.len()..];
            continue;
        }
        let mut length = c.len_utf8();
        if c == '"' {
            in_string = !in_string;
        } else if c == '\\' && in_string {
            // An escaped quotation mark does not end the string.
            length += rest[length..].chars().next().map_or(0, char::len_utf8);
        }
        quoted.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    serde_json::from_str(&quoted).map_err(|e| SamplerError::NotJson(e.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn infinities_of_python_are_read() {
        let config =
            read_config(r#"{"a": -Infinity, "b": [NaN, Infinity], "c": "-Infinity \" NaN", "d": -1}"#);
        let expected = json!({"a": "-Infinity", "b": ["NaN", "Infinity"], "c": "-Infinity \" NaN", "d": -1});
        assert_eq!(config.unwrap(), expected);
        assert!(matches!(read_config("{\"a\": \"\\"), Err(SamplerError::NotJson(_))));
        assert!(matches!(read_config("{"), Err(SamplerError::NotJson(_))));
    }

    #[test]
    fn unset_fields_count_as_absent() {
        let config = json!({"clip_sample": true, "_use_default_values": ["clip_sample"]});
        let fields = Fields::new("DDIMScheduler", &config, &[]).unwrap();
        assert!(!fields.flag("clip_sample", false).unwrap());
    }

    #[test]
    fn a_preset_goes_over_the_file() {
        let config = json!({"solver_order": 2});
        let fields =
            Fields::new("DPMSolverMultistepScheduler", &config, &[("solver_order", Preset::Integer(3))]);
        assert_eq!(fields.unwrap().integer("solver_order", 1, 1..=3).unwrap(), 3);
    }
}
