//! `GET /metrics`: for Prometheus. Where the server has keys it needs one, as
//! Prometheus can send it: how much somebody draws is nobody else's business.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use crate::api::ErrorBody;
use crate::app::Shared;
use crate::metrics::{MEDIA_TYPE, Now};

/// Metrics in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", operation_id = "metrics", tag = "Server",
    responses(
        (status = 200, description = "The metrics", content_type = MEDIA_TYPE, body = String),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody)
    )
)]
pub(crate) async fn metrics(State(app): State<Arc<Shared>>) -> Response {
    let (store_files, store_bytes) = app.store.usage();
    let page = app.metrics.render(Now {
        queue: app.engine.snapshot(),
        store_files,
        store_bytes,
        connections: app.connections.load(Ordering::Relaxed),
    });
    ([(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE))], page).into_response()
}
