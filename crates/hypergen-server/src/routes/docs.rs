//! `GET /openapi.json` and `/docs`: the API's description, and a page that
//! shows it and lets one try it. The page's parts are inside the binary and
//! load nothing from elsewhere.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use crate::app::Shared;

const PAGE: &str = include_str!("../web/docs.html");
const SCRIPT: &str = include_str!("../web/docs.js");
const STYLE: &str = include_str!("../web/docs.css");
/// The page may load its own parts and show pictures that it was given.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// This description.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "openapi", tag = "Server",
    responses((status = 200, description = "An OpenAPI document", content_type = "application/json"))
)]
pub(crate) async fn openapi(State(app): State<Arc<Shared>>) -> Response {
    let json = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (json, app.openapi.clone()).into_response()
}

/// A page that shows the API and lets one try it.
#[utoipa::path(
    get, path = "/docs", operation_id = "docs", tag = "Server",
    responses((status = 200, description = "The page", content_type = "text/html; charset=utf-8", body = String))
)]
pub(crate) async fn page() -> Response {
    asset("text/html; charset=utf-8", PAGE)
}

pub(crate) async fn script() -> Response {
    asset("text/javascript; charset=utf-8", SCRIPT)
}

pub(crate) async fn style() -> Response {
    asset("text/css; charset=utf-8", STYLE)
}

fn asset(media_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(media_type)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, text).into_response()
}
