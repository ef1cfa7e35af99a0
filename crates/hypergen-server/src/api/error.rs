//! The one error of the API: a status and a body that both kinds of reader
//! understand. It is not a Rust error that travels through the crate; things
//! fail in their own terms and are turned into this at the edge.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hypergen_diffusion::{ErrorKind, ParameterError, clipped};
use serde::Serialize;
use utoipa::ToSchema;

/// What every answer that is not a success holds: the specification's
/// `detail` and OpenAI's `error`, with the same message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong and, where there is one, the fix.
    pub detail: String,
    /// The same in OpenAI's form.
    pub error: ErrorDetail,
}

/// OpenAI's form of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// As in `detail`.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_exceeded`, `internal_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The parameter that is to blame, if one is.
    pub param: Option<String>,
    /// A word for programs, where the type does not say it all.
    pub code: Option<&'static str>,
}

/// An answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// Status of the answer.
    pub status: StatusCode,
    /// For the user.
    pub message: String,
    /// The parameter that is to blame, if one is.
    pub param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u64>,
    /// The same request will fail again.
    lasting: bool,
    /// The answer says that bodies come without compression.
    accept_identity: bool,
}

/// Tells OpenAI's clients whether to try again, whatever the status.
pub(crate) const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Why a request failed, for the line that the log has of every answer.
#[derive(Debug, Clone)]
pub(crate) struct Reason(pub(crate) String);

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let message = clipped(message);
        Self {
            status,
            message,
            param: None,
            code: None,
            retry_after: None,
            lasting: false,
            accept_identity: false,
        }
    }

    /// The same failure, of which it is known that trying again cannot fix it.
    pub(crate) fn lasting(self) -> Self {
        Self { lasting: true, ..self }
    }

    /// 400: the request is at fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400: one parameter is at fault.
    pub fn parameter(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::bad_request(message) }
    }

    /// Status 401. The text is the specification's for every cause, so that
    /// nobody learns from it how near a guess was.
    pub fn unauthorized() -> Self {
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, "Invalid API key") }
    }

    /// 404 for a path that is nothing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 404 for a model that is not the one being served.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".to_owned()),
            ..Self::not_found(format!("No model '{asked}' here: this server has '{served}'"))
        }
    }

    /// 405 for a path that is there.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, format!("{path} does not take {method}"))
    }

    /// 408: the body came too slowly.
    pub fn request_timeout(seconds: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("The request's body did not arrive within {seconds} seconds"),
        )
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The request's body is larger than the {limit} bytes that this server takes"),
        )
    }

    /// 415.
    pub fn unsupported_media_type(found: Option<&str>) -> Self {
        let found = match found {
            Some(found) => format!("'{found}'"),
            None => "missing".to_owned(),
        };
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("Send JSON with the header 'Content-Type: application/json' (it is {found})"),
        )
    }

    /// 415 for a body that is compressed.
    pub fn unsupported_encoding(found: &str) -> Self {
        let message =
            format!("The body's Content-Encoding is '{found}': send it as it is, without compression");
        Self { accept_identity: true, ..Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message) }
    }

    /// 501 for a way of sending that this server does not know.
    pub fn unsupported_transfer(found: &str) -> Self {
        let message = format!(
            "The body's Transfer-Encoding is '{found}': send it with a Content-Length, or with 'chunked' alone"
        );
        Self::new(StatusCode::NOT_IMPLEMENTED, message).lasting()
    }

    /// 429, with the seconds after which trying again makes sense.
    pub fn queue_full(capacity: usize, retry_after: u64) -> Self {
        Self {
            code: Some("queue_full"),
            retry_after: Some(retry_after),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!(
                    "The queue is full: {capacity} requests are waiting. Try again in {retry_after} seconds"
                ),
            )
        }
    }

    /// 500: the generation failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 503.
    pub fn shutting_down() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "The server is shutting down")
    }

    /// OpenAI's word for the class of this error.
    pub fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_exceeded",
            StatusCode::SERVICE_UNAVAILABLE => "server_error",
            StatusCode::NOT_IMPLEMENTED => "invalid_request_error",
            status if status.is_server_error() => "internal_error",
            _ => "invalid_request_error",
        }
    }

    /// The body that is sent.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            detail: self.message.clone(),
            error: ErrorDetail {
                message: self.message.clone(),
                kind: self.kind(),
                param: self.param.clone(),
                code: self.code,
            },
        }
    }
}

impl From<ParameterError> for ApiError {
    fn from(e: ParameterError) -> Self {
        Self::parameter(e.param, e.message)
    }
}

impl From<hypergen_diffusion::Error> for ApiError {
    /// The one place where the model's errors become statuses. A cancelled
    /// generation has nobody left to read its answer, or was stopped by a
    /// shutdown: that is what the answer says. All others depend on nothing
    /// but the request, the model and the machine, so that trying again is in vain.
    fn from(e: hypergen_diffusion::Error) -> Self {
        let mut error = match e.kind {
            ErrorKind::Request => Self::bad_request(e.message),
            ErrorKind::Cancelled => Self::shutting_down(),
            ErrorKind::Model | ErrorKind::OutOfMemory | ErrorKind::Internal => {
                Self::internal(e.message).lasting()
            }
        };
        error.param = e.param.map(str::to_owned);
        error
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self.status, StatusCode::REQUEST_TIMEOUT | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.lasting {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.accept_identity {
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        if self.status.is_server_error() {
            response.extensions_mut().insert(Reason(self.message));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_the_models_errors_has_a_status() {
        let statuses = ErrorKind::ALL.map(|kind| {
            let error = ApiError::from(hypergen_diffusion::Error::new(kind, "why"));
            (kind, error.status.as_u16(), error.kind())
        });
        assert_eq!(
            statuses,
            [
                (ErrorKind::Request, 400, "invalid_request_error"),
                (ErrorKind::Cancelled, 503, "server_error"),
                (ErrorKind::Model, 500, "internal_error"),
                (ErrorKind::OutOfMemory, 500, "internal_error"),
                (ErrorKind::Internal, 500, "internal_error"),
            ]
        );
    }

    #[test]
    fn the_body_holds_both_forms() {
        let body = serde_json::to_value(ApiError::parameter("n", "n must be 1").body()).expect("plain data");
        assert_eq!(
            body,
            serde_json::json!({
                "detail": "n must be 1",
                "error": {"message": "n must be 1", "type": "invalid_request_error", "param": "n", "code": null}
            })
        );
    }
}
