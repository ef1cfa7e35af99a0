//! What HTTP/1.1 asks of a request before anybody looks at what it wants, and
//! the HTTP library leaves open (RFC 9112): one `Host`, and no way of sending
//! but chunks. It is for requests from a socket; routes called without one
//! need neither.

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::api::ApiError;

/// Refuses a request that is none; its connection ends with the answer, for
/// where its body ends may be another's opinion.
pub(crate) async fn check(request: Request, next: Next) -> Response {
    let found = match request.version() {
        Version::HTTP_11 => check_host(request.headers()).and_then(|()| check_transfer(request.headers())),
        // Older requests have neither header.
        _ => Ok(()),
    };
    match found {
        Ok(()) => next.run(request).await,
        Err(error) => {
            let close = [(header::CONNECTION, HeaderValue::from_static("close"))];
            (close, error).into_response()
        }
    }
}

/// Section 3.2: a server must refuse a request without `Host`, with several,
/// or with one that is no host. An empty one is allowed.
fn check_host(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let Some(host) = hosts.next() else {
        return Err(ApiError::bad_request("The request has no Host header, which HTTP/1.1 asks for"));
    };
    if hosts.next().is_some() {
        return Err(ApiError::bad_request("The request has several Host headers: send one"));
    }
    let good = host.to_str().is_ok_and(|host| {
        host.is_empty() || host.parse::<Authority>().is_ok_and(|host| !host.as_str().contains('@'))
    });
    match good {
        true => Ok(()),
        false => Err(ApiError::bad_request("The request's Host header is no host: send NAME or NAME:PORT")),
    }
}

/// Section 6.1: a server should answer 501 to a coding that it does not know.
fn check_transfer(headers: &HeaderMap) -> Result<(), ApiError> {
    let codings =
        headers.get_all(header::TRANSFER_ENCODING).iter().map(|value| value.to_str().unwrap_or("?"));
    let codings = codings.collect::<Vec<_>>().join(", ");
    match codings.is_empty() || codings.trim().eq_ignore_ascii_case("chunked") {
        true => Ok(()),
        false => Err(ApiError::unsupported_transfer(&codings.chars().take(64).collect::<String>())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, values: &[&str]) -> HeaderMap {
        // Bytes beyond ASCII are allowed in headers, one for each of these characters.
        let value = |value: &&str| {
            let bytes: Vec<u8> = value.chars().map(|c| c as u8).collect();
            (name.clone(), HeaderValue::from_bytes(&bytes).expect("a header"))
        };
        values.iter().map(value).collect()
    }

    #[test]
    fn there_is_one_host() {
        for good in ["x", "x:80", "[::1]:8000", "127.0.0.1", ""] {
            assert_eq!(check_host(&headers(header::HOST, &[good])), Ok(()));
        }
        for bad in [&[] as &[&str], &["x", "x"], &["a b"], &["a/b"], &["me@x"], &["\u{ff}"], &["http://x"]] {
            let error = check_host(&headers(header::HOST, bad)).expect_err("no host");
            assert_eq!(error.status, 400);
            assert!(error.message.contains("Host"), "{}", error.message);
        }
    }

    #[test]
    fn bodies_come_in_chunks_or_whole() {
        for good in [&[] as &[&str], &["chunked"], &["Chunked"]] {
            assert_eq!(check_transfer(&headers(header::TRANSFER_ENCODING, good)), Ok(()));
        }
        for bad in [&["gzip, chunked"] as &[&str], &["gzip", "chunked"], &["chunked, chunked"], &["identity"]]
        {
            let error = check_transfer(&headers(header::TRANSFER_ENCODING, bad)).expect_err("unknown");
            assert_eq!(error.status, 501);
        }
    }
}
