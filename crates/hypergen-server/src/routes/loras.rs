//! `GET /v1/loras`: the LoRAs in the server's folder, by the names that
//! `lora_path`, `loras` and a prompt's tags take.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use crate::api::{ApiError, ErrorBody, LoraInfo, LoraList};
use crate::app::Shared;

/// The LoRAs that can be asked for by name.
#[utoipa::path(
    get, path = "/v1/loras", operation_id = "list_loras", tag = "Models",
    responses(
        (status = 200, description = "Those in the folder that the server was started with; none without one", body = LoraList),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 500, description = "The folder could not be read", body = ErrorBody)
    )
)]
pub(crate) async fn list(State(app): State<Arc<Shared>>) -> Result<Json<LoraList>, ApiError> {
    let entries = tokio::task::spawn_blocking(move || app.loras.list()).await;
    let entries = entries.map_err(|_| ApiError::internal("the folder of LoRAs could not be read"))?;
    let data = entries
        .into_iter()
        .map(|entry| LoraInfo {
            id: entry.name,
            object: "lora",
            rank: entry.info.rank,
            bytes: entry.info.bytes,
            family: entry.info.family,
            modules: entry.info.modules,
        })
        .collect();
    Ok(Json(LoraList { object: "list", data }))
}
