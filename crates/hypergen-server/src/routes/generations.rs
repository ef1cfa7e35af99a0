//! `POST /v1/images/generations`: from a body to pictures. The order is the
//! one in which things get more expensive: read, check, take a place in the queue,
//! wait, encode, store, answer. Dropping the handler's future at any point,
//! which is what a closed connection does, gives everything back.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hypergen_diffusion::Picture;
use tokio::task::JoinSet;

use crate::api::{ApiError, ErrorBody, ImageData, ImageRequest, ImageResponse};
use crate::app::Shared;
use crate::body;
use crate::encode::{Metadata, encode};
use crate::engine::{Refusal, Ticket};
use crate::queue::Failure;

/// What the user should know about the pictures, a sentence each.
pub(crate) const WARNING: HeaderName = HeaderName::from_static("x-hypergen-warning");
/// How many requests were in front of this one when it came.
pub(crate) const QUEUE_POSITION: HeaderName = HeaderName::from_static("x-hypergen-queue-position");
/// Longest warning that fits into a header everywhere.
const WARNING_LENGTH: usize = 1000;

/// Draws pictures from a prompt.
#[utoipa::path(
    post, path = "/v1/images/generations", operation_id = "create_image", tag = "Images",
    request_body(content = ref("#/components/schemas/ImageRequest"), content_type = "application/json"),
    responses(
        (status = 200, description = "The pictures", body = ImageResponse, headers(
            ("x-hypergen-warning" = String, description = "What to know about the pictures, such as a prompt that was cut; absent where there is nothing"),
            ("x-hypergen-queue-position" = u64, description = "Requests that waited or were being drawn when this one came")
        )),
        (status = 400, description = "A parameter is missing, of the wrong type or out of range, or the body is no JSON object", body = ErrorBody),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not sent as JSON, or is compressed", body = ErrorBody),
        (status = 429, description = "The queue is full", body = ErrorBody, headers(
            ("retry-after" = u64, description = "Seconds after which the queue should be empty, as measured")
        )),
        (status = 500, description = "The generation failed", body = ErrorBody, headers(
            ("x-should-retry" = String, description = "false where trying again is known to be in vain")
        )),
        (status = 503, description = "The server is shutting down", body = ErrorBody)
    )
)]
pub(crate) async fn create(State(app): State<Arc<Shared>>, request: Request) -> Result<Response, ApiError> {
    let base = base_url(&app, request.uri(), request.headers());
    let fields = body::read_json(request, app.body_limits).await?;
    let request = app.parameters.read(&fields, random_seed)?;
    drop(fields);
    let request = checked(&app, request).await?;
    log(&app, &request);
    let ticket = app.engine.submit(request.requests()).map_err(refused)?;
    let ahead = ticket.ahead();
    let files = files(&app, Arc::new(request), base.into(), ticket).await?;
    let mut response = answer(files).await?;
    response.headers_mut().insert(QUEUE_POSITION, HeaderValue::from(ahead));
    Ok(response)
}

/// Finds the files of the LoRAs that a request means, and asks what the model
/// can do: everything that can be known before the request waits. The disk may
/// be slow and a prompt long, so on a thread that may take its time.
async fn checked(app: &Arc<Shared>, mut request: ImageRequest) -> Result<ImageRequest, ApiError> {
    let app = Arc::clone(app);
    let checking = blocking(move || {
        if app.loras.concerns(&request.loras, &request.first) {
            request.first.loras = app.loras.resolve(&request.loras, &request.first)?;
        }
        // The others differ by their seeds alone.
        app.checker.check(&request.first)?;
        Ok::<_, hypergen_diffusion::Error>(request)
    });
    let failed = |_| ApiError::internal("the request could not be checked; the server's log says more");
    Ok(tokio::task::spawn_blocking(checking).await.map_err(failed)??)
}

/// Work for another thread, whose lines in the log are this request's.
fn blocking<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let span = tracing::Span::current();
    move || span.in_scope(work)
}

fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Full { capacity, retry_after } => {
            ApiError::queue_full(capacity, retry_after.as_secs_f64().ceil() as u64)
        }
        Refusal::ShuttingDown => ApiError::shutting_down(),
    }
}

fn failed(failure: Failure) -> ApiError {
    match failure {
        Failure::Generation(e) => e.into(),
        Failure::Panicked => {
            ApiError::internal("the generation failed unexpectedly; the server's log says more")
        }
        Failure::ShuttingDown => ApiError::shutting_down(),
    }
}

fn log(app: &Shared, request: &ImageRequest) {
    let first = &request.first;
    let size = first.size.to_string();
    let (n, steps, guidance, seed) = (request.n, first.steps, first.guidance_scale, first.seed);
    if app.log_prompts {
        let (prompt, negative) =
            (first.prompt.as_str(), first.negative_prompt.as_deref().unwrap_or_default());
        tracing::info!(n, size, steps, guidance, seed, prompt, negative_prompt = negative, "queued");
    } else {
        tracing::info!(n, size, steps, guidance, seed, "queued");
    }
}

/// A picture as it is sent, and what there is to say about it.
struct File {
    index: usize,
    data: ImageData,
    warnings: Vec<String>,
}

/// Waits for the pictures; each is encoded while the next one is drawn.
async fn files(
    app: &Arc<Shared>,
    request: Arc<ImageRequest>,
    base: Arc<str>,
    mut ticket: Ticket,
) -> Result<Vec<File>, ApiError> {
    let mut encoding = JoinSet::new();
    while let Some(result) = ticket.next().await {
        let (index, picture) = result.map_err(failed)?;
        let (app, request, base) = (Arc::clone(app), Arc::clone(&request), Arc::clone(&base));
        encoding.spawn_blocking(blocking(move || file(&app, &request, &base, index, picture)));
    }
    let mut files = Vec::with_capacity(request.n);
    while let Some(result) = encoding.join_next().await {
        files.push(result.map_err(|_| ApiError::internal("the picture could not be encoded"))??);
    }
    files.sort_by_key(|file| file.index);
    Ok(files)
}

/// Makes a picture into what is sent. On a thread that may take its time.
fn file(
    app: &Shared,
    request: &ImageRequest,
    base: &str,
    index: usize,
    picture: Picture,
) -> Result<File, ApiError> {
    let start = Instant::now();
    let mut drawn = request.first.clone();
    drawn.seed = drawn.seed.wrapping_add(index as u64);
    let metadata = app.metadata.then(|| Metadata::new(&drawn, &app.model));
    let bytes = encode(&picture, request.format, request.quality, metadata.as_ref())
        .map_err(|e| ApiError::internal(e.to_string()))?;
    app.metrics.encoded(start.elapsed());
    let mut warnings = picture.warnings;
    let url = match request.form.wants_url().then(|| app.store.put(&bytes, request.format)) {
        Some(Ok(name)) => Some(format!("{base}/images/{name}")),
        Some(Err(e)) => {
            tracing::error!(error = %e, folder = %app.store.folder().display(), "a picture could not be stored");
            if !request.form.wants_base64() {
                return Err(ApiError::internal(e.to_string()).lasting());
            }
            // The picture itself is there: an answer without its link is better than none.
            warnings.push(format!("there is no url: {e}"));
            None
        }
        None => None,
    };
    let b64_json = request.form.wants_base64().then(|| STANDARD.encode(&bytes));
    let data = ImageData { b64_json, url, revised_prompt: drawn.prompt, seed: drawn.seed };
    Ok(File { index, data, warnings })
}

async fn answer(files: Vec<File>) -> Result<Response, ApiError> {
    let mut warnings: Vec<String> = Vec::new();
    let mut data = Vec::with_capacity(files.len());
    for file in files {
        for warning in file.warnings {
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
        data.push(file.data);
    }
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let response = ImageResponse { created, data };
    // Ten large pictures are many megabytes: too long for a thread that others wait for.
    let body = tokio::task::spawn_blocking(move || serde_json::to_vec(&response)).await;
    let Ok(Ok(body)) = body else { return Err(ApiError::internal("the answer could not be written")) };
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for warning in &warnings {
        headers.append(WARNING, header_safe(warning));
    }
    Ok(response)
}

/// A text as a header can carry it: visible ASCII, one line, not too long.
fn header_safe(text: &str) -> HeaderValue {
    let line: String = text
        .chars()
        .take(WARNING_LENGTH)
        .map(|c| match c {
            ' '..='~' => c,
            c if c.is_whitespace() || c.is_control() => ' ',
            _ => '?',
        })
        .collect();
    HeaderValue::from_str(line.trim()).unwrap_or(HeaderValue::from_static("see the server's log"))
}

/// Small enough for every client's numbers, JavaScript's among them.
fn random_seed() -> u64 {
    getrandom::u32().map_or_else(
        // No random numbers: the clock will do for a seed.
        |_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos().into(),
        u64::from,
    )
}

/// This server's address as the client knows it.
fn base_url(app: &Shared, uri: &Uri, headers: &HeaderMap) -> String {
    if let Some(url) = &app.public_url {
        return url.clone();
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let host = uri.authority().cloned().or(host).filter(|host| !host.as_str().contains('@'));
    host.map_or_else(|| format!("http://{}", app.address), |host| format!("http://{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_fit_into_headers() {
        assert_eq!(header_safe("cut at \"日本\"\r\nX: y"), "cut at \"??\"  X: y");
        assert_eq!(header_safe(&"x".repeat(5000)).len(), WARNING_LENGTH);
    }
}
