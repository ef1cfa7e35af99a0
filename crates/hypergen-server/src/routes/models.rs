//! `GET /v1/models` and `GET /v1/models/{id}`: the one model that is loaded,
//! for clients that ask before they draw.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};

use crate::api::{ApiError, ErrorBody, Model, ModelList};
use crate::app::Shared;

fn model(app: &Shared) -> Model {
    Model { id: app.model_id.clone(), object: "model", created: app.started, owned_by: "hypergen" }
}

/// The models that can be asked for: the one that the server was started with.
#[utoipa::path(
    get, path = "/v1/models", operation_id = "list_models", tag = "Models",
    responses(
        (status = 200, description = "The models", body = ModelList),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody)
    )
)]
pub(crate) async fn list(State(app): State<Arc<Shared>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![model(&app)] })
}

/// One model by its name, which may hold slashes.
#[utoipa::path(
    get, path = "/v1/models/{id}", operation_id = "get_model", tag = "Models",
    params(("id" = String, Path, description = "Its name", min_length = 1)),
    responses(
        (status = 200, description = "It is loaded", body = Model),
        (status = 400, description = "The name is not readable", body = ErrorBody),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 404, description = "Another one is loaded", body = ErrorBody)
    )
)]
pub(crate) async fn get(
    State(app): State<Arc<Shared>>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Ok(Path(id)) = id else {
        return Err(ApiError::bad_request("The model's name in the path is not valid UTF-8"));
    };
    match id == app.model_id {
        true => Ok(Json(model(&app))),
        false => Err(ApiError::model_not_found(&id, &app.model_id)),
    }
}
