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

/// Floats hold every whole number up to here.
pub(super) const EXACT: u64 = 1 << 53;
const BYTE_ORDER_MARK: char = '\u{feff}';
/// How files of gzip begin.
const GZIP: [u8; 2] = [0x1f, 0x8b];

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
    /// A fraction.
    Fraction,
    /// A float so large that floats no longer hold every whole number: its
    /// last digits may be a guess.
    Inexact,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// 400 when it is not UTF-8, not JSON, or not an object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        if body.starts_with(&GZIP) {
            return Err(ApiError::bad_request("The body is compressed: send it as it is"));
        }
        let text = std::str::from_utf8(body).map_err(|e| {
            ApiError::bad_request(format!("The body is not valid UTF-8 (at byte {})", e.valid_up_to()))
        })?;
        // RFC 8259, section 8.1: a parser may ignore the mark, which some systems write before every text.
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
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

    /// A field that must be true or false.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.raw(name) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(raw) => Err(wrong_type(name, "true or false", raw)),
        }
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

/// Reads a number's digits themselves: as a float it might lose some, and a
/// fraction that is lost with them would pass for a whole number.
fn whole(raw: &str) -> Whole {
    if let Ok(value) = raw.parse::<i128>() {
        return Whole::Integer(value);
    }
    if !raw.contains(['.', 'e', 'E']) {
        return Whole::Huge;
    }
    let (negative, number) = raw.strip_prefix('-').map_or((false, raw), |rest| (true, rest));
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = [integer, fraction].concat();
    let digits = all.trim_start_matches('0').trim_end_matches('0');
    if digits.is_empty() {
        return Whole::Integer(0);
    }
    // The number is `digits` and this many zeros.
    let zeros = exponent.parse::<i64>().ok().and_then(|exponent| {
        let trailing = all.len() - all.trim_end_matches('0').len();
        exponent.checked_add(i64::try_from(trailing).ok()?)?.checked_sub(i64::try_from(fraction.len()).ok()?)
    });
    let Some(zeros) = zeros else {
        // An exponent of twenty digits.
        return if exponent.starts_with('-') { Whole::Fraction } else { Whole::Inexact };
    };
    let Ok(zeros) = usize::try_from(zeros) else { return Whole::Fraction };
    // 2^53 has 16 digits.
    if digits.len().saturating_add(zeros) > 16 {
        return Whole::Inexact;
    }
    match format!("{digits}{}", "0".repeat(zeros)).parse::<i128>() {
        Ok(value) if value <= i128::from(EXACT) => Whole::Integer(if negative { -value } else { value }),
        _ => Whole::Inexact,
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
        let f = fields(r#"{"a": 18446744073709551615, "g": 99999999999999999999999999999999999999999999}"#);
        let read = |name| f.integer(name, "").expect("a number").expect("present").0;
        assert_eq!(read("a"), Whole::Integer(u64::MAX.into()));
        assert_eq!(read("g"), Whole::Huge);
    }

    #[test]
    fn floats_are_whole_numbers_where_they_lose_no_digit() {
        let small = format!("1{}e-50", "0".repeat(50));
        for (raw, expected) in [
            ("1.0", Whole::Integer(1)),
            ("-0", Whole::Integer(0)),
            ("-0.0", Whole::Integer(0)),
            ("0e99999999999999999999", Whole::Integer(0)),
            ("0.0e-5", Whole::Integer(0)),
            ("1e3", Whole::Integer(1000)),
            ("1E+3", Whole::Integer(1000)),
            ("-1.5e1", Whole::Integer(-15)),
            ("100e-2", Whole::Integer(1)),
            ("0.01e2", Whole::Integer(1)),
            (small.as_str(), Whole::Integer(1)),
            ("9007199254740992.0", Whole::Integer(1 << 53)),
            ("9007199254740993.0", Whole::Inexact),
            ("9007199254740992.5", Whole::Fraction),
            ("12345678901234567890.0", Whole::Inexact),
            ("1e20", Whole::Inexact),
            ("1e400", Whole::Inexact),
            ("1e99999999999999999999", Whole::Inexact),
            ("1.5", Whole::Fraction),
            ("1.00000000000000000000000001", Whole::Fraction),
            ("0.99999999999999999999999999", Whole::Fraction),
            ("1e-400", Whole::Fraction),
            ("1e-99999999999999999999", Whole::Fraction),
            ("15e-1", Whole::Fraction),
        ] {
            assert_eq!(whole(raw), expected, "{raw}");
        }
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
        assert!(message(b"\x1f\x8b\x08\x00").contains("compressed"));
        assert!(message(b"\xff\xfe{\x00").contains("UTF-8"));
        assert!(Fields::parse(b"\xef\xbb\xbf{}").is_ok(), "a byte order mark says nothing");
        assert!(message(b"\xef\xbb\xbf").contains("empty"));
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
