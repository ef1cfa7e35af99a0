//! PEFT's patterns: module names, or ends of them, or regular expressions that
//! match such ends, each with a number (an alpha or a rank).
//!
//! A pattern matches where Python's `re.match(rf"(.*\.)?({pattern})$", module)`
//! does. Expressions run in linear time; those that need more (look-around,
//! references to groups) are refused.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use regex::bytes::{Regex, RegexBuilder};

use super::some_of;

/// Patterns of one field at most: more than any model has modules.
const MOST: usize = 10_000;
/// Those among them that are more than names: people write a handful.
const EXPRESSIONS: usize = 256;
/// Longest expression, in bytes.
const LENGTH: usize = 1_000;
/// Memory of one compiled expression, in bytes.
const COMPILED: usize = 1 << 16;

/// Patterns with their numbers, in the file's order.
#[derive(Debug, Default)]
pub(super) struct Patterns(Vec<(Pattern, f64)>);

#[derive(Debug)]
enum Pattern {
    /// The end of a name, at a dot or at the name's beginning. Saved files
    /// list every module so, and a thousand expressions would take long.
    End {
        /// Bytes, with [`ANY`] for any character.
        bytes: Vec<u8>,
        /// It is the whole name.
        whole: bool,
    },
    Expression(Regex),
}

/// An unescaped dot.
const ANY: u8 = b'\n';

impl Patterns {
    /// Reads patterns with their numbers.
    ///
    /// # Errors
    /// When there are too many, or one cannot be read: what is wrong with them.
    pub(super) fn new(pairs: &[(&str, f64)]) -> Result<Self, String> {
        if pairs.len() > MOST {
            return Err(format!("has {} patterns; at most {MOST} are read", pairs.len()));
        }
        let expressions = pairs.iter().filter(|(text, _)| end(text).is_none()).count();
        if expressions > EXPRESSIONS {
            return Err(format!("has {expressions} regular expressions; at most {EXPRESSIONS} are read"));
        }
        let mut patterns: Vec<(Pattern, f64)> = vec![];
        let mut places: HashMap<&str, usize> = HashMap::new();
        for &(text, number) in pairs {
            // A field that is repeated has its last value, at its first place.
            match places.entry(text) {
                Entry::Occupied(earlier) => patterns[*earlier.get()].1 = number,
                Entry::Vacant(place) => {
                    place.insert(patterns.len());
                    let pattern = end(text).map_or_else(|| expression(text).map(Pattern::Expression), Ok)?;
                    patterns.push((pattern, number));
                }
            }
        }
        Ok(Self(patterns))
    }

    /// The number of the first pattern that matches one of a module's names.
    pub(super) fn find(&self, names: &[&str]) -> Option<f64> {
        let found = self.0.iter().find(|(pattern, _)| names.iter().any(|name| pattern.matches(name)));
        found.map(|(_, number)| *number)
    }
}

impl Pattern {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Expression(regex) => regex.is_match(name.as_bytes()),
            Self::End { bytes, whole } => {
                let name = name.as_bytes();
                let Some(start) = name.len().checked_sub(bytes.len()) else { return false };
                (start == 0 || !whole && name[start - 1] == b'.')
                    && bytes.iter().zip(&name[start..]).all(|(&p, &c)| p == c || p == ANY)
            }
        }
    }
}

/// A pattern that is a name or the end of one, if it is no more than that.
fn end(text: &str) -> Option<Pattern> {
    let (whole, text) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
    let mut bytes = vec![];
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'.' => ANY,
            b'\\' => rest.next().filter(|escaped| b".-_".contains(escaped))?,
            b'-' | b'_' => byte,
            _ if byte.is_ascii_alphanumeric() => byte,
            _ => return None,
        });
    }
    Some(Pattern::End { bytes, whole })
}

/// Module names are ASCII, so the classes of an expression are ASCII's too:
/// compiled, they are a hundredth as large.
fn expression(text: &str) -> Result<Regex, String> {
    let fault = |why: &str| {
        Err(format!(
            "has the pattern {}, which is no regular expression that can be read here: {why}",
            some_of(&[text])
        ))
    };
    if text.len() > LENGTH {
        return fault(&format!("it has {} bytes, and at most {LENGTH} are read", text.len()));
    }
    let whole = format!(r"\A(?:(?:.*\.)?({text})$)");
    let built = RegexBuilder::new(&whole).unicode(false).size_limit(COMPILED).nest_limit(64).build();
    match built {
        Ok(regex) => Ok(regex),
        Err(regex::Error::CompiledTooBig(_)) => fault("compiled it is too large"),
        Err(e) => {
            // The last of its lines says what is wrong, those before where.
            let words = e.to_string();
            let last = words.lines().last().unwrap_or_default();
            fault(last.trim_start_matches("error: "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, module: &str) -> bool {
        Patterns::new(&[(pattern, 1.0)]).expect(pattern).find(&[module]).is_some()
    }

    /// What Python says of each: `re.match(rf"(.*\.)?({pattern})$", module)`.
    #[test]
    fn patterns_match_as_pefts_do() {
        let module = "down_blocks.0.attn1.to_q";
        for (pattern, hit) in [
            ("to_q", true),
            ("attn1.to_q", true),
            (r"attn1\.to_q", true),
            ("o_q", false),
            ("to_k", false),
            ("to.q", true),
            (r"to\.q", false),
            ("^down_blocks.0.attn1.to_q", true),
            (r"^down_blocks\.0\.attn1\.to_q", true),
            ("^attn1.to_q", false),
            ("down_blocks.0.attn1.to_q", true),
            ("x.down_blocks.0.attn1.to_q", false),
            (r"down_blocks\.\d+\..*\.to_q", true),
            (r"down_blocks\.\d\..*\.attn2\.to_q", false),
            (r"^.*attn1.*$", true),
            (".*", true),
            ("to_(q|k)", true),
            ("to_k|to_q", true),
            ("to_k|down_blocks", false),
            ("(?i)TO_Q", true),
            ("[a-z]+_[qkv]", true),
            (r"\w+", true),
            (r"\w+\.\w+", true),
            ("down", false),
            ("to_q$", true),
            ("", false),
        ] {
            assert_eq!(matches(pattern, module), hit, "{pattern}");
        }
        assert!(matches("", "a."));
    }

    /// A name as a pattern means the same as the expression that it is.
    #[test]
    fn names_match_as_the_expressions_that_they_are() {
        use proptest::prelude::*;
        let names = || proptest::collection::vec("[a-b_.]{0,3}", 0..5).prop_map(|parts| parts.concat());
        let pattern = (any::<bool>(), "([ab_.]|\\\\\\.){0,6}")
            .prop_map(|(anchored, text)| format!("{}{text}", if anchored { "^" } else { "" }));
        proptest!(|(pattern in pattern, module in names())| {
            let fast = end(&pattern).expect("a name");
            let slow = Pattern::Expression(expression(&pattern).expect("an expression"));
            prop_assert_eq!(fast.matches(&module), slow.matches(&module), "{} {}", pattern, module);
        });
    }

    #[test]
    fn what_takes_too_much_is_refused() {
        for (pattern, words) in [
            ("(?=a)b", "look-around"),
            (r"(a)\1", "backreferences"),
            ("a{", "repetition quantifier"),
            ("(", "unclosed group"),
            ("(a{100}){100}", "too large"),
        ] {
            let error = Patterns::new(&[(pattern, 1.0)]).expect_err(pattern);
            assert!(error.contains(words) && error.contains(pattern) && !error.contains('\n'), "{error}");
        }
        let long = "(a)".repeat(LENGTH);
        assert!(Patterns::new(&[(&long, 1.0)]).expect_err("too long").contains("at most 1000"));
        let many: Vec<String> = (0..=MOST).map(|i| format!("({i})")).collect();
        let pairs: Vec<(&str, f64)> = many.iter().map(|p| (p.as_str(), 1.0)).collect();
        assert!(Patterns::new(&pairs).expect_err("too many").contains("10001 patterns"));
        assert!(Patterns::new(&pairs[..=EXPRESSIONS]).expect_err("too many").contains("257 regular"));
        assert!(Patterns::new(&pairs[..EXPRESSIONS]).is_ok());
    }
}
