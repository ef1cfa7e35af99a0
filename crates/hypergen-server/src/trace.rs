//! What happens around every request: an id for the answer and the log, one
//! line in the log, one count in the metrics. Also for a request whose client
//! left: the handler's future is dropped then, and the guard in it speaks.
//!
//! Lines name routes, not paths: the path of a picture is the key to it.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use crate::api::Reason;
use crate::app::Shared;

/// Header with the request's id: the client's own, or one that is made up.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a client.
const ID_LENGTH: usize = 128;
/// What is written for a client that left, as other servers do.
const CLIENT_LEFT: u16 = 499;

/// See the module's description.
pub(crate) async fn trace(State(app): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let route = route(&request);
    let text = id.to_str().unwrap_or_default();
    let span = tracing::info_span!("request", id = text, method = %method(&request), route);
    let start = Instant::now();
    let mut guard = Guard { app, route, span: span.clone(), start, status: CLIENT_LEFT, reason: None };
    let mut response = next.run(request).instrument(span).await;
    guard.status = response.status().as_u16();
    guard.reason = response.extensions_mut().remove();
    drop(guard);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Speaks when the request ends, however it does.
struct Guard {
    app: Arc<Shared>,
    route: &'static str,
    span: tracing::Span,
    start: Instant,
    status: u16,
    /// Why the server failed. Refusals have none: they may repeat what is private.
    reason: Option<Reason>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let elapsed = self.start.elapsed();
        self.app.metrics.request(self.route, self.status, elapsed);
        let _entered = self.span.enter();
        let (status, ms) = (self.status, elapsed.as_millis() as u64);
        match self.status {
            CLIENT_LEFT => tracing::info!(status, ms, "the client left"),
            500.. => {
                let reason = self.reason.as_ref().map(|reason| reason.0.as_str());
                tracing::error!(status, ms, reason, "answered");
            }
            // What is asked every few seconds is of no interest.
            _ if matches!(self.route, "/health" | "/metrics") => tracing::debug!(status, ms, "answered"),
            _ => tracing::info!(status, ms, "answered"),
        }
    }
}

/// The client's id if it is harmless in logs and headers, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let harmless = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
        !bytes.is_empty() && bytes.len() <= ID_LENGTH && bytes.iter().all(plain)
    };
    if let Some(id) = headers.get(REQUEST_ID).filter(harmless) {
        return id.clone();
    }
    let id = getrandom::u64().unwrap_or_default();
    HeaderValue::from_str(&format!("req-{id:016x}")).unwrap_or(HeaderValue::from_static("req"))
}

/// The request's route, from a fixed list: a label must not grow.
fn route(request: &Request) -> &'static str {
    const ROUTES: [&str; 11] = [
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{*id}",
        "/v1/loras",
        "/health",
        "/metrics",
        "/images/{name}",
        "/openapi.json",
        "/docs",
        "/docs/docs.js",
        "/docs/docs.css",
    ];
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    ROUTES.into_iter().find(|route| Some(*route) == matched).unwrap_or("other")
}

/// A method as it may be logged: clients can make up their own.
fn method(request: &Request) -> &str {
    match request.method().as_str() {
        method @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => method,
        _ => "OTHER",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_over_when_they_are_harmless() {
        let id = |sent: Option<&[u8]>| {
            let mut headers = HeaderMap::new();
            if let Some(sent) = sent {
                headers.insert(REQUEST_ID, HeaderValue::from_bytes(sent).expect("a header"));
            }
            request_id(&headers)
        };
        assert_eq!(id(Some(b"trace-1_2.3:4")), "trace-1_2.3:4");
        for bad in [None, Some(&b""[..]), Some(b"a b"), Some(b"\xff"), Some(b"a\"b"), Some(&[b'a'; 129])] {
            assert!(id(bad).to_str().expect("ASCII").starts_with("req-"), "{bad:?}");
        }
        assert_ne!(id(None), id(None));
    }
}
