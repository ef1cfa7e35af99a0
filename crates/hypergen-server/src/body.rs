//! Reading request bodies: JSON only, bounded in bytes and in time. It turns
//! bytes into [`Fields`]; what the fields may hold is decided elsewhere.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::api::{ApiError, Fields};

/// What a request's body may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyLimits {
    /// Bytes.
    pub(crate) size: usize,
    /// Time from the head to the last byte.
    pub(crate) time: Duration,
}

/// Longest time that is spent on a body which nobody will look at.
const DISCARD_TIME: Duration = Duration::from_secs(5);
/// How much of a body that is too large is still taken, as a multiple of the limit.
const DISCARD_FACTOR: usize = 16;

/// Reads a JSON object.
///
/// # Errors
/// 415 (also for a body that is compressed), 413, 408, or 400 when it is cut off or no JSON object.
pub(crate) async fn read_json(request: Request, limits: BodyLimits) -> Result<Fields, ApiError> {
    let (parts, body) = request.into_parts();
    if let Err(error) = check_head(&parts.headers, limits) {
        discard(&parts.headers, body, limits).await;
        return Err(error);
    }
    let bytes = read(&parts.headers, body, limits).await?;
    Fields::parse(&bytes)
}

fn check_head(headers: &HeaderMap, limits: BodyLimits) -> Result<(), ApiError> {
    let content_type =
        headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or("not readable"));
    if !content_type.is_some_and(is_json) {
        return Err(ApiError::unsupported_media_type(content_type));
    }
    let identity = |coding: &&str| coding.is_empty() || coding.eq_ignore_ascii_case("identity");
    let codings = headers.get_all(header::CONTENT_ENCODING).iter();
    let codings = codings.flat_map(|value| value.to_str().unwrap_or("not readable").split(','));
    if let Some(coding) = codings.map(str::trim).find(|coding| !identity(coding)) {
        return Err(ApiError::unsupported_encoding(&coding.chars().take(64).collect::<String>()));
    }
    let length =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limits.size as u64) {
        return Err(ApiError::too_large(limits.size));
    }
    Ok(())
}

/// `application/json` or `application/SOMETHING+json`, whatever the
/// parameters. Anything else is refused, also an absent one: a page in a
/// browser can send those to any server without asking, but not JSON.
fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.strip_prefix("application/").is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}

async fn read(headers: &HeaderMap, body: Body, limits: BodyLimits) -> Result<Bytes, ApiError> {
    let mut body = Limited::new(body, limits.size.saturating_mul(DISCARD_FACTOR));
    let mut bytes = Vec::new();
    let mut too_large = false;
    let reading = async {
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            too_large |= bytes.len() + data.len() > limits.size;
            if too_large {
                // The rest is taken in and forgotten: a connection closed on a
                // client that still sends would lose it the answer.
                bytes = Vec::new();
            } else {
                bytes.extend_from_slice(&data);
            }
        }
        Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    };
    match tokio::time::timeout(limits.time, reading).await {
        _ if too_large => Err(ApiError::too_large(limits.size)),
        Ok(Ok(())) => Ok(bytes.into()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(ApiError::too_large(limits.size)),
        Ok(Err(_)) => Err(ApiError::bad_request(match headers.contains_key(header::TRANSFER_ENCODING) {
            true => "The body could not be read: it ended early, or its chunks are malformed",
            false => "The body could not be read: it ended before its Content-Length",
        })),
        Err(_) => Err(ApiError::request_timeout(limits.time.as_secs())),
    }
}

/// Takes in a body that does not matter, within reason, so that the client
/// has sent it all before it reads the answer.
pub(crate) async fn discard(headers: &HeaderMap, body: Body, limits: BodyLimits) {
    if headers.contains_key(header::EXPECT) {
        // This client waits to be told to send, and will not be.
        return;
    }
    let mut body = Limited::new(body, limits.size.saturating_mul(DISCARD_FACTOR));
    let reading = async { while let Some(Ok(_)) = body.frame().await {} };
    // Out of time: the answer goes out all the same.
    let _ = tokio::time::timeout(limits.time.min(DISCARD_TIME), reading).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_known_by_its_media_type() {
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert!(is_json(good), "{good}");
        }
        for bad in ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "text/json"] {
            assert!(!is_json(bad), "{bad}");
        }
    }
}
