//! `GET /health`: how the server is, for people and load balancers. It needs
//! no key, and tells nothing about anybody's requests but their number.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::Health;
use crate::app::Shared;

/// How the server is.
#[utoipa::path(
    get, path = "/health", operation_id = "health", tag = "Server",
    responses(
        (status = 200, description = "It serves", body = Health),
        (status = 503, description = "It is shutting down", body = Health)
    )
)]
pub(crate) async fn health(State(app): State<Arc<Shared>>) -> Response {
    let queue = app.engine.snapshot();
    let (status, word) = match queue.shutting_down {
        true => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        false => (StatusCode::OK, "ok"),
    };
    let body = Health {
        status: word,
        model: app.model_id.clone(),
        family: app.model.family.clone(),
        device: app.model.device.clone(),
        isa: app.model.isa.clone(),
        dtype: app.model.dtype.clone(),
        queue_size: queue.waiting,
        max_queue_size: queue.capacity,
        in_progress: queue.in_progress,
        queue_seconds: queue.time_left.map(|left| (left.as_secs_f64() * 10.0).round() / 10.0),
        version: env!("CARGO_PKG_VERSION"),
    };
    let no_store = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (status, no_store, Json(body)).into_response()
}
