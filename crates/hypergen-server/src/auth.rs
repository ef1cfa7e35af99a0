//! Who may ask: bearer keys, compared in constant time. Keys are never
//! printed: [`ApiKey`] has no text form but a row of stars. There are no
//! users and no rights here, one key is as good as another.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use axum::http::{HeaderMap, header};
use subtle::{Choice, ConstantTimeEq};

/// A key that opens the API.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl FromStr for ApiKey {
    type Err = Infallible;

    /// Takes any text: a parser's error would repeat it. [`ApiKey::check`] judges it.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.trim().to_owned()))
    }
}

impl ApiKey {
    /// Whether it can be used.
    ///
    /// # Errors
    /// In words that do not hold the key: it may be all but a good one.
    pub fn check(&self) -> Result<(), &'static str> {
        match self.0.as_str() {
            "" => Err("--api-key is empty: give it a value, or leave it out for a server without keys"),
            key if key.bytes().all(|b| b.is_ascii_graphic()) => Ok(()),
            _ => Err("--api-key must be printable ASCII without spaces, to fit into a header"),
        }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Whether the request carries one of `keys`; with no keys, everybody may.
pub(crate) fn allowed(keys: &[ApiKey], headers: &HeaderMap) -> bool {
    if keys.is_empty() {
        return true;
    }
    let Some(token) = bearer(headers) else { return false };
    // Every key is compared, so that the time does not tell which one is near.
    let hit = keys.iter().fold(Choice::from(0), |hit, key| hit | key.0.as_bytes().ct_eq(token));
    hit.into()
}

/// The token of `Authorization: Bearer TOKEN`; the scheme in either case, as HTTP has it.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next()?.as_bytes();
    if values.next().is_some() {
        return None;
    }
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn check(keys: &[&str], authorization: &[&str]) -> bool {
        let keys: Vec<ApiKey> = keys.iter().map(|key| key.parse().expect("a key")).collect();
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(header::AUTHORIZATION, HeaderValue::from_str(value).expect("a header"));
        }
        allowed(&keys, &headers)
    }

    #[test]
    fn any_of_the_keys_opens_and_nothing_else_does() {
        let keys = ["sk-one", "sk-two"];
        assert!(check(&keys, &["Bearer sk-one"]));
        assert!(check(&keys, &["bearer sk-two "]));
        for wrong in [
            "Bearer sk-thr",
            "Bearer sk-on",
            "Bearer sk-one2",
            "Bearer ",
            "Bearer",
            "Basic sk-one",
            "sk-one",
            "",
        ] {
            assert!(!check(&keys, &[wrong]), "{wrong}");
        }
        assert!(!check(&keys, &[]));
        assert!(!check(&keys, &["Bearer sk-one", "Bearer sk-two"]), "two headers are nobody's form");
    }

    #[test]
    fn without_keys_everybody_may() {
        assert!(check(&[], &[]));
        assert!(check(&[], &["Bearer whatever"]));
    }

    #[test]
    fn keys_are_not_printed_and_bad_ones_are_not_repeated() {
        let key: ApiKey = "sk-secret".parse().expect("a key");
        assert_eq!(format!("{key:?}"), "***");
        for bad in ["sk secret", "", " ", "schl\u{fc}ssel"] {
            let error = bad.parse::<ApiKey>().expect("any text").check().expect_err(bad);
            assert!(!error.contains("secret"));
        }
        assert_eq!(key.check(), Ok(()));
    }
}
