//! The application: a model and settings made into routes. It has no socket,
//! so tests call it directly; [`crate::Server`] puts it behind one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{
    CLIP_SKIP, Check, Extent, GUIDANCE_SCALE, Generator, ModelInfo, Request, STEPS, SizeConditioning,
};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer, ExposeHeaders};

use crate::api::{ApiError, Parameters, SHOULD_RETRY, Takes};
use crate::auth::{self, ApiKey};
use crate::body::BodyLimits;
use crate::config::ServeConfig;
use crate::engine::Engine;
use crate::error::ServeError;
use crate::loras::Loras;
use crate::metrics::Metrics;
use crate::routes::{docs, generations, health, images, loras, metrics, models};
use crate::store::{ImageStore, cause};
use crate::{message, nothing, openapi, trace};

/// What all the handlers share.
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    /// Checks requests while the engine draws.
    pub(crate) checker: Arc<dyn Check>,
    pub(crate) store: ImageStore,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) parameters: Parameters,
    pub(crate) loras: Loras,
    pub(crate) model: ModelInfo,
    /// The model's name as the API has it: without the folders of a path.
    pub(crate) model_id: String,
    /// Where the server listens.
    pub(crate) address: SocketAddr,
    pub(crate) public_url: Option<String>,
    pub(crate) body_limits: BodyLimits,
    pub(crate) metadata: bool,
    pub(crate) log_prompts: bool,
    pub(crate) keys: Vec<ApiKey>,
    /// When the model was loaded, in seconds since 1970.
    pub(crate) started: u64,
    pub(crate) openapi: Bytes,
    pub(crate) connections: AtomicUsize,
}

/// A model behind the API's routes.
#[derive(Clone)]
pub struct App {
    pub(crate) shared: Arc<Shared>,
    router: Router,
    connected: Router,
}

impl App {
    /// Starts the engine on `generator` and builds the routes. `address` is
    /// where they will be reached.
    ///
    /// # Errors
    /// When the settings do not fit the model, or the picture store cannot be made.
    pub fn new(
        config: &ServeConfig,
        generator: Box<dyn Generator>,
        address: SocketAddr,
    ) -> Result<Self, ServeError> {
        config.check().map_err(ServeError::Config)?;
        let model = generator.info();
        let checker = generator.checker();
        let takes = Takes {
            samplers: samplers(&*checker, &model),
            sizes: takes_sizes(&*checker, &model),
            clip_skip: takes_clip_skip(&*checker, &model),
        };
        let parameters = Parameters::new(&model, &takes, &config.defaults());
        if config.clip_skip > takes.clip_skip {
            return Err(ServeError::Config(format!(
                "--clip-skip {} is too large for {}: it takes {} or less",
                config.clip_skip, model.name, takes.clip_skip
            )));
        }
        if parameters.default_guidance() < parameters.min_guidance() {
            return Err(ServeError::Config(format!(
                "--default-guidance {} is too small for {}: it takes {} or more; {}",
                parameters.default_guidance(),
                model.name,
                parameters.min_guidance(),
                model.guidance_hint()
            )));
        }
        let loras = Loras::new(config).map_err(|e| ServeError::Config(format!("--lora-dir: {e}")))?;
        // What every request would stumble over is said at once.
        let usual = loras.default_loras(None).and_then(|loras| generator.check_loras(&loras));
        usual.map_err(|e| ServeError::Config(format!("--lora: {e}")))?;
        let store = open_store(config)?;
        let metrics = Arc::new(Metrics::new(&model));
        let engine =
            Engine::start(generator, config.max_queue_size, config.max_batch_size, Arc::clone(&metrics))
                .map_err(ServeError::Thread)?;
        let shared = Arc::new(Shared {
            engine,
            checker,
            store,
            metrics,
            model_id: model_id(&model.name),
            address,
            public_url: config.public_url.clone(),
            body_limits: BodyLimits {
                size: usize::try_from(config.max_body_size.0).unwrap_or(usize::MAX),
                time: config.read_timeout.0,
            },
            metadata: !config.no_metadata,
            log_prompts: config.log_prompts,
            keys: config.api_keys.clone(),
            started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            openapi: openapi::document(&parameters, !config.api_keys.is_empty()).into(),
            connections: AtomicUsize::new(0),
            parameters,
            loras,
            model,
        });
        let routes = routes(Arc::clone(&shared), &config.cors_origins);
        let traced = middleware::from_fn_with_state(Arc::clone(&shared), trace::trace);
        let checked = routes.clone().layer(middleware::from_fn(message::check));
        Ok(Self { shared, router: routes.layer(traced.clone()), connected: checked.layer(traced) })
    }

    /// The routes, as a service.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// The same for requests from a socket, which must be ones of HTTP/1.1.
    pub(crate) fn connected(&self) -> Router {
        self.connected.clone()
    }

    /// Refuses new generations and answers those that wait with 503; those
    /// that have begun go on.
    pub fn drain(&self) {
        self.shared.engine.drain();
    }

    /// Answers those that have begun with 503 too, and stops them at their next step.
    pub fn stop(&self) {
        self.shared.engine.stop();
    }

    /// Returns once no generation waits or runs.
    pub async fn idle(&self) {
        self.shared.engine.idle().await;
    }
}

/// Opens the store that the settings describe.
///
/// # Errors
/// When its folder cannot be written to.
pub(crate) fn open_store(config: &ServeConfig) -> Result<ImageStore, ServeError> {
    let folder = config.image_dir.as_deref();
    ImageStore::open(folder, config.image_ttl.0, config.image_store_size.0).map_err(|e| {
        let folder = config.image_dir.clone().unwrap_or_else(std::env::temp_dir);
        ServeError::ImageDir { folder, cause: cause(&e) }
    })
}

/// Whether the model can be told of sizes, as SDXL can.
fn takes_sizes(checker: &dyn Check, model: &ModelInfo) -> bool {
    let size = Extent { width: model.native_size.width, height: model.native_size.height };
    let sizes = SizeConditioning { original_size: Some(size), ..SizeConditioning::default() };
    let told = checker.check(&Request { size: model.native_size, sizes, ..Request::new("") });
    !told.is_err_and(|e| e.param == Some("original_size"))
}

/// The most layers of its text encoder that the model can do without.
fn takes_clip_skip(checker: &dyn Check, model: &ModelInfo) -> usize {
    let able = |&clip_skip: &usize| {
        let told = checker.check(&Request { size: model.native_size, clip_skip, ..Request::new("") });
        !told.is_err_and(|e| e.param == Some(CLIP_SKIP.name))
    };
    (CLIP_SKIP.min..=CLIP_SKIP.max).rev().find(able).unwrap_or(CLIP_SKIP.min)
}

/// The samplers that this model can be drawn with: its schedule may not suit
/// each. Asked once, so that a request for another is refused before it waits.
fn samplers(checker: &dyn Check, model: &ModelInfo) -> Vec<SamplerKind> {
    let able = |sampler| {
        let request = Request {
            size: model.native_size,
            steps: model.default_steps.unwrap_or(STEPS.default),
            guidance_scale: model.default_guidance.unwrap_or(GUIDANCE_SCALE.default),
            sampler,
            ..Request::new("")
        };
        checker.check(&request).is_ok()
    };
    // A model whose own sampler cannot be used may still be drawn with others.
    let all = SamplerKind::ALL;
    let takes: Vec<_> = all.iter().copied().filter(|sampler| able(Some(*sampler))).collect();
    if takes.is_empty() { all.to_vec() } else { takes }
}

fn routes(shared: Arc<Shared>, cors_origins: &[String]) -> Router {
    let keyed = Router::new()
        .route("/v1/images/generations", post(generations::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/loras", get(loras::list))
        .route("/metrics", get(metrics::metrics))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&shared), require_key));
    let open = Router::new()
        .route("/health", get(health::health))
        .route("/images/{name}", get(images::get))
        .route("/openapi.json", get(docs::openapi))
        .route("/docs", get(docs::page))
        .route("/docs/docs.js", get(docs::script))
        .route("/docs/docs.css", get(docs::style));
    let mut router = keyed
        .merge(open)
        .fallback(nothing::not_found)
        .method_not_allowed_fallback(nothing::method_not_allowed)
        .with_state(shared)
        .layer(CatchPanicLayer::custom(panicked));
    if !cors_origins.is_empty() {
        router = router.layer(cors(cors_origins));
    }
    router
}

async fn require_key(State(app): State<Arc<Shared>>, request: HttpRequest, next: Next) -> Response {
    if auth::allowed(&app.keys, request.headers()) {
        return next.run(request).await;
    }
    nothing::refuse(&app, request, ApiError::unauthorized()).await
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a handler panicked; the server goes on");
    ApiError::internal("the server failed unexpectedly; its log says more").into_response()
}

/// Lets pages of these origins use the API. Which headers they send is not
/// restricted: OpenAI's own client sends a handful of its own.
fn cors(origins: &[String]) -> CorsLayer {
    let origin = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::list([
            trace::REQUEST_ID,
            generations::WARNING,
            generations::QUEUE_POSITION,
            header::RETRY_AFTER,
            SHOULD_RETRY,
            HeaderName::from_static("etag"),
        ]))
}

/// A hub's name as it is; of a path only the last part, which tells nobody
/// where files are kept.
fn model_id(name: &str) -> String {
    let is_path =
        name.starts_with(['/', '.', '~', '\\']) || name.contains('\\') || name.matches('/').count() > 1;
    let trimmed = name.trim_end_matches(['/', '\\']);
    let last = trimmed.rsplit(['/', '\\']).next().filter(|last| !last.is_empty());
    match last {
        Some(last) if is_path => last.to_owned(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_do_not_show_in_names() {
        assert_eq!(model_id("emoji"), "emoji");
        assert_eq!(model_id("stabilityai/sdxl-turbo"), "stabilityai/sdxl-turbo");
        assert_eq!(model_id("/srv/models/sd15/"), "sd15");
        assert_eq!(model_id("./sd15.safetensors"), "sd15.safetensors");
        assert_eq!(model_id("models/a/b"), "b");
        assert_eq!(model_id(r"C:\models\sd15"), "sd15");
    }
}
