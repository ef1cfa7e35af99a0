//! The OpenAPI document: the routes' own descriptions, and the request's
//! schema from its parameters' declarations.

use utoipa::OpenApi as _;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::schema::Schema;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{OpenApi, RefOr, Required};

use crate::api::Parameters;
use crate::routes::{docs, generations, health, images, loras, metrics, models};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "HyperGen",
        description = "Pictures from text, behind OpenAI's image API. Every error has a `detail` and OpenAI's `error`.",
        license(name = "MIT", identifier = "MIT")
    ),
    paths(
        generations::create,
        images::get,
        models::list,
        models::get,
        loras::list,
        health::health,
        metrics::metrics,
        docs::openapi,
        docs::page
    ),
    tags(
        (name = "Images", description = "Drawing, and fetching what was drawn"),
        (name = "Models", description = "What draws"),
        (name = "Server", description = "How it is")
    )
)]
struct Document;

/// Name of the only security scheme.
const BEARER: &str = "bearer";

/// The document as JSON. Without keys the routes that would need one take
/// one all the same, and ignore it.
pub(crate) fn document(parameters: &Parameters, keys: bool) -> Vec<u8> {
    let mut document: OpenApi = Document::openapi();
    let components = document.components.get_or_insert_default();
    components.schemas.insert("ImageRequest".to_owned(), RefOr::T(Schema::Object(parameters.schema())));
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("One of the keys that the server was started with"))
        .build();
    components.add_security_scheme(BEARER, SecurityScheme::Http(scheme));
    for (path, item) in &mut document.paths.paths {
        if path.starts_with("/v1/") || path == "/metrics" {
            operations(item).for_each(|operation| operation.security = Some(security(keys)));
        }
        for operation in operations(item) {
            if let Some(RefOr::T(body)) = &mut operation.request_body {
                body.required = Some(Required::True);
            }
        }
    }
    // It is made of plain maps and texts; an empty document is better than a panic.
    serde_json::to_vec(&document).unwrap_or_default()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    item.get.iter_mut().chain(item.post.iter_mut())
}

fn security(keys: bool) -> Vec<SecurityRequirement> {
    let bearer = SecurityRequirement::new(BEARER, std::iter::empty::<&str>());
    match keys {
        true => vec![bearer],
        false => vec![SecurityRequirement::default(), bearer],
    }
}
