//! A JSON object whose values are still text, so that every field can say
//! what it found, and whole numbers keep all their digits. This is not a
//! general deserializer: it knows strings, whole numbers and numbers, which
//! is what the API has.
//!
//! The rules are those of strict typed servers: `null` is the same as absent,
//! `1.0` is the whole number 1 (as JSON Schema has it), `"1"` and `true` are
//! not numbers, and of a key that is there twice the last one counts.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::error::ApiError;

/// Longest piece of a client's own text that an error repeats, in characters.
const ECHO: usize = 64;

/// A request's JSON object.
#[derive(Debug)]
pub struct Fields(BTreeMap<String, Box<RawValue>>);

/// A JSON number, as far as a whole one is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// All its digits.
    Integer(i128),
    /// Whole, but longer than any parameter is.
    Huge,
    /// A fraction, or a float so large that its last digits are a guess.
    Fraction,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// 400 when it is not UTF-8, not JSON, or not an object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|e| {
            ApiError::bad_request(format!("The body is not valid UTF-8 (at byte {})", e.valid_up_to()))
        })?;
        if text.trim().is_empty() {
            return Err(ApiError::bad_request("The body is empty: send a JSON object with a \"prompt\""));
        }
        serde_json::from_str(text).map(Self).map_err(|e| {
            ApiError::bad_request(if e.is_data() {
                format!("The body must be a JSON object, but is {}", describe(text.trim()))
            } else {
                format!("The body is not valid JSON: {e}")
            })
        })
    }

    fn raw(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|raw| raw.get()).filter(|raw| *raw != "null")
    }

    /// A string field.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn string(&self, name: &str) -> Result<Option<String>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if !raw.starts_with('"') {
            return Err(wrong_type(name, "a string", raw));
        }
        serde_json::from_str(raw).map(Some).map_err(|_| {
            ApiError::parameter(
                name,
                format!("{name} must be valid Unicode, but holds half a surrogate pair"),
            )
        })
    }

    /// Whether a field is there.
    pub fn has(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    /// A field that must be an array of objects; `wanted` says so in words.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn objects(&self, name: &str, wanted: &str) -> Result<Option<Vec<Fields>>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        match serde_json::from_str::<Vec<BTreeMap<String, Box<RawValue>>>>(raw) {
            Ok(objects) => Ok(Some(objects.into_iter().map(Self).collect())),
            Err(_) => Err(wrong_type(name, wanted, raw)),
        }
    }

    /// A field that must be a whole number; `range` says in words what is allowed.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn integer(&self, name: &str, range: &str) -> Result<Option<(Whole, &str)>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        if !is_number(raw) {
            return Err(wrong_type(name, &format!("an integer {range}"), raw));
        }
        Ok(Some((whole(raw), raw)))
    }

    /// A field that must be a number.
    ///
    /// # Errors
    /// 400 when it is something else, or so large that it is no float.
    pub fn number(&self, name: &str, range: &str) -> Result<Option<f64>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        match raw.parse::<f64>() {
            Ok(value) if is_number(raw) && value.is_finite() => Ok(Some(value)),
            _ => Err(wrong_type(name, &format!("a number {range}"), raw)),
        }
    }
}

/// The error for a field of the wrong type.
pub(super) fn wrong_type(name: &str, wanted: &str, raw: &str) -> ApiError {
    ApiError::parameter(name, format!("{name} must be {wanted}, but is {}", describe(raw)))
}

fn is_number(raw: &str) -> bool {
    raw.starts_with(|c: char| c == '-' || c.is_ascii_digit())
}

fn whole(raw: &str) -> Whole {
    /// Floats are exact up to here.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if let Ok(value) = raw.parse::<i128>() {
        return Whole::Integer(value);
    }
    if !raw.contains(['.', 'e', 'E']) {
        return Whole::Huge;
    }
    match raw.parse::<f64>() {
        #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^53")]
        Ok(value) if value.fract() == 0.0 && value.abs() <= EXACT => Whole::Integer(value as i128),
        _ => Whole::Fraction,
    }
}

/// What a piece of JSON is, in words, with as much of it as is worth repeating.
fn describe(raw: &str) -> String {
    match raw.as_bytes().first() {
        Some(b'"') => format!("the string {}", clip(raw)),
        Some(b'[') => "an array".to_owned(),
        Some(b'{') => "an object".to_owned(),
        Some(b't' | b'f') => format!("the boolean {}", clip(raw)),
        _ => clip(raw),
    }
}

/// The text itself, or its beginning and an ellipsis.
pub(super) fn clip(text: &str) -> String {
    match text.char_indices().nth(ECHO) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).expect("an object")
    }

    fn message(json: &[u8]) -> String {
        Fields::parse(json).expect_err("not an object").message
    }

    #[test]
    fn whole_numbers_keep_every_digit() {
        let f = fields(
            r#"{"a": 18446744073709551615, "b": 1.0, "c": 1.5, "d": -0, "e": 1e3, "f": 12345678901234567890.0,
            "g": 99999999999999999999999999999999999999999999, "h": 1e400}"#,
        );
        let read = |name| f.integer(name, "").expect("a number").expect("present").0;
        assert_eq!(read("a"), Whole::Integer(u64::MAX.into()));
        assert_eq!(read("b"), Whole::Integer(1));
        assert_eq!(read("c"), Whole::Fraction);
        assert_eq!(read("d"), Whole::Integer(0));
        assert_eq!(read("e"), Whole::Integer(1000));
        assert_eq!(read("f"), Whole::Fraction);
        assert_eq!(read("g"), Whole::Huge);
        assert_eq!(read("h"), Whole::Fraction);
    }

    #[test]
    fn null_is_absent_and_the_last_of_two_counts() {
        let f = fields(r#"{"a": null, "b": "x", "b": "y"}"#);
        assert_eq!(f.string("a").expect("fine"), None);
        assert_eq!(f.integer("a", "").expect("fine"), None);
        assert_eq!(f.number("missing", "").expect("fine"), None);
        assert_eq!(f.string("b").expect("fine").as_deref(), Some("y"));
    }

    #[test]
    fn what_is_of_the_wrong_type_is_named() {
        let f = fields(r#"{"n": "2", "m": true, "p": 3, "q": [1], "g": 1e999, "s": "\ud800"}"#);
        let text = |e: ApiError| e.message;
        assert_eq!(
            text(f.integer("n", "above 0").expect_err("text")),
            "n must be an integer above 0, but is the string \"2\""
        );
        assert_eq!(
            text(f.integer("m", "above 0").expect_err("a boolean")),
            "m must be an integer above 0, but is the boolean true"
        );
        assert_eq!(text(f.string("p").expect_err("a number")), "p must be a string, but is 3");
        assert_eq!(text(f.string("q").expect_err("an array")), "q must be a string, but is an array");
        assert_eq!(
            text(f.number("g", "above 0").expect_err("too large")),
            "g must be a number above 0, but is 1e999"
        );
        assert!(text(f.string("s").expect_err("half a pair")).contains("surrogate"));
    }

    #[test]
    fn bodies_that_are_no_object_are_explained() {
        assert!(message(b"").contains("empty"));
        assert!(message(b"{\"a\": \xff}").contains("UTF-8"));
        assert!(message(b"{\"a\": ").contains("not valid JSON"));
        assert!(message(b"[1]").contains("but is an array"));
        assert!(message(b"7").contains("but is 7"));
        assert!(message(b"{\"a\":1} trailing").contains("not valid JSON"));
        let deep = format!("{{\"a\": {}", "[".repeat(1_000_000));
        assert!(message(deep.as_bytes()).contains("not valid JSON"));
    }

    #[test]
    fn long_texts_are_not_repeated_whole() {
        assert_eq!(clip(&"é".repeat(100)).chars().count(), ECHO + 1);
        assert_eq!(clip("short"), "short");
    }
}
