//! Answers for what is not there: a path that is none, and a method that a
//! path does not take. Most who ask so have a base URL that is a little wrong,
//! so the answer names the path that they mean. It serves nothing in its place.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::response::{IntoResponse, Response};

use crate::api::ApiError;
use crate::app::Shared;
use crate::body;
use crate::store::Name;

/// Paths without parameters, as they are.
const PATHS: [&str; 7] =
    ["/v1/images/generations", "/v1/models", "/v1/loras", "/health", "/metrics", "/docs", "/openapi.json"];
/// Longest path that an error repeats.
const ECHO: usize = 100;

/// The fallback for paths.
pub(crate) async fn not_found(State(app): State<Arc<Shared>>, request: Request) -> Response {
    let error = no_such_path(request.uri().path());
    refuse(&app, request, error).await
}

/// The fallback for methods. A route with a parameter matches more paths than
/// there are, and what is not there takes no method at all.
pub(crate) async fn method_not_allowed(
    State(app): State<Arc<Shared>>,
    parameter: Result<Path<String>, PathRejection>,
    request: Request,
) -> Response {
    let path = request.uri().path();
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let parameter = parameter.map(|Path(parameter)| parameter).unwrap_or_default();
    let error = match route {
        Some("/images/{name}") if !Name::parse(&parameter).is_some_and(|name| app.store.holds(&name)) => {
            no_such_path(path)
        }
        Some("/v1/models/{*id}") if parameter != app.model_id => {
            ApiError::model_not_found(&parameter, &app.model_id)
        }
        _ => ApiError::method_not_allowed(request.method().as_str(), path),
    };
    refuse(&app, request, error).await
}

/// 404 that names the path that is meant, where that can be told.
pub(crate) fn no_such_path(path: &str) -> ApiError {
    let Some(meant) = meant(path) else {
        return ApiError::not_found("Nothing is here: /docs lists what there is");
    };
    let base = if meant.starts_with("/v1/") { "; a client's base URL ends in /v1" } else { "" };
    let shown: String = path.chars().take(ECHO).collect();
    ApiError::not_found(format!("Nothing is at {shown}: it is {meant}{base}"))
}

/// The path that ends as this one does, whatever comes before: `/v1` may be
/// missing or there twice, slashes may be doubled, and proxies add words.
fn meant(path: &str) -> Option<String> {
    let words = |path: &str| -> Vec<String> {
        let words = path.split('/').filter(|word| !word.is_empty()).map(str::to_ascii_lowercase);
        words.filter(|word| word != "v1").collect()
    };
    let asked = words(path);
    let known = PATHS.iter().find(|known| asked.ends_with(&words(known)));
    known.map(|known| (*known).to_owned()).filter(|known| known != path)
}

/// Answers a request whose body nobody will read.
pub(crate) async fn refuse(app: &Shared, request: Request, error: ApiError) -> Response {
    let (parts, body) = request.into_parts();
    body::discard(&parts.headers, body, app.body_limits).await;
    error.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_a_little_wrong_is_put_right() {
        for (path, expected) in [
            ("/images/generations", "/v1/images/generations"),
            ("/v1/v1/images/generations", "/v1/images/generations"),
            ("/v1/images/generations/", "/v1/images/generations"),
            ("//v1//images/generations", "/v1/images/generations"),
            ("/V1/Images/Generations", "/v1/images/generations"),
            ("/api/v1/images/generations", "/v1/images/generations"),
            ("/models", "/v1/models"),
            ("/v1/models/", "/v1/models"),
            ("/loras", "/v1/loras"),
            ("/v1/health", "/health"),
            ("/health/", "/health"),
        ] {
            assert_eq!(meant(path).as_deref(), Some(expected), "{path}");
        }
        for path in [
            "/",
            "/v1",
            "/v1/images",
            "/v1/images/edits",
            "/generations",
            "/healthz",
            "/v1/images/generations",
        ] {
            assert_eq!(meant(path), None, "{path}");
        }
        let long = no_such_path(&format!("/{}/health", "x".repeat(1000))).message;
        assert!(long.len() < 200, "{long}");
    }
}
