//! `GET /images/{name}`: the pictures behind `url` answers. No key: whoever
//! has the link may see the picture, as a browser sends no key for one.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::{ApiError, ErrorBody};
use crate::app::Shared;
use crate::nothing::no_such_path;
use crate::store::{Name, cause};

/// A picture that was drawn lately.
#[utoipa::path(
    get, path = "/images/{name}", operation_id = "get_image", tag = "Images",
    params(("name" = String, Path, description = "The last part of the link in an answer", min_length = 1)),
    responses(
        (status = 200, description = "The file", content(
            (String = "image/png"), (String = "image/jpeg"), (String = "image/webp")
        )),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "No such picture, or its time is over", body = ErrorBody),
        (status = 500, description = "The disk failed", body = ErrorBody)
    )
)]
pub(crate) async fn get(
    State(app): State<Arc<Shared>>,
    name: Result<Path<String>, axum::extract::rejection::PathRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let unknown = || ApiError::not_found("No such picture: links work for a limited time");
    let name = name.ok().and_then(|Path(name)| Name::parse(&name));
    let name = name.ok_or_else(|| no_such_path(request.uri().path()))?;
    let stored = {
        let (app, name) = (Arc::clone(&app), name.clone());
        tokio::task::spawn_blocking(move || app.store.get(&name)).await
    };
    let stored = match stored {
        Ok(Ok(stored)) => stored.ok_or_else(unknown)?,
        Ok(Err(e)) => return Err(ApiError::internal(format!("the picture cannot be read: {}", cause(&e)))),
        Err(_) => return Err(ApiError::internal("the picture cannot be read")),
    };
    // A name is never used for a second picture, so it can be its own tag.
    let tag = format!("\"{name}\"");
    let seconds = stored.left.as_secs();
    let mut headers = HeaderMap::new();
    let mut set = |name, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    set(header::CONTENT_TYPE, name.format().media_type());
    set(header::CACHE_CONTROL, &format!("private, max-age={seconds}, immutable"));
    set(header::ETAG, &tag);
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(header::CONTENT_SECURITY_POLICY, "default-src 'none'");
    if has_already(request.headers(), &tag) {
        headers.remove(header::CONTENT_TYPE);
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    Ok((headers, Body::from(stored.bytes)).into_response())
}

fn has_already(headers: &HeaderMap, tag: &str) -> bool {
    let tags = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).unwrap_or_default();
    tags.split(',').map(|one| one.trim().trim_start_matches("W/")).any(|one| one == tag || one == "*")
}
