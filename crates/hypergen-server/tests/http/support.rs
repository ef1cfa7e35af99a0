//! What the tests share: an application on a fake, requests without a socket,
//! answers taken apart.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt;
use hypergen_server::{App, ServeConfig};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::fake::{Control, Fake, PATIENCE};

pub(crate) const GENERATIONS: &str = "/v1/images/generations";

/// An application and the fake behind it.
pub(crate) struct TestApp {
    pub(crate) app: App,
    pub(crate) control: Arc<Control>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// The JSON of a success.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// Checks that this is an error in both forms, and returns (message, type, param, code).
    pub(crate) fn error(&self, status: u16) -> (String, String, Value, Value) {
        assert_eq!(self.status.as_u16(), status, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.header("content-type"), "application/json");
        let body = self.json();
        let error = &body["error"];
        let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("no text in {body}")).to_owned();
        assert_eq!(body["detail"], error["message"]);
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{body}");
        (text(&error["message"]), text(&error["type"]), error["param"].clone(), error["code"].clone())
    }

    /// The file of picture `index`.
    pub(crate) fn file(&self, index: usize) -> Vec<u8> {
        let body = self.ok();
        STANDARD.decode(body["data"][index]["b64_json"].as_str().expect("a file")).expect("base64")
    }
}

impl TestApp {
    /// With these arguments on the command line.
    pub(crate) fn new(args: &[&str]) -> Self {
        Self::with(args, Fake::new())
    }

    pub(crate) fn with(args: &[&str], fake: Fake) -> Self {
        let config = ServeConfig::parse_from(args).expect("good arguments");
        let control = Arc::clone(&fake.control);
        let address = "127.0.0.1:8000".parse().expect("an address");
        let app = App::new(&config, Box::new(fake), address).expect("an application");
        Self { app, control }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        send(self.app.router(), request).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    /// Asks for pictures.
    pub(crate) async fn post(&self, body: Value) -> Answer {
        self.send(generation(body.to_string())).await
    }

    /// Asks for pictures with a body as it is.
    pub(crate) async fn post_raw(&self, body: impl Into<Body>) -> Answer {
        self.send(generation(body)).await
    }

    /// Asks for pictures in the background; dropping the handle leaves.
    pub(crate) fn spawn(&self, body: Value) -> Client {
        let router = self.app.router();
        Client(tokio::spawn(send(router, generation(body.to_string()))))
    }

    pub(crate) async fn health(&self) -> Value {
        self.get("/health").await.json()
    }

    /// Waits until the queue is so.
    pub(crate) async fn until_queue(&self, waiting: usize, in_progress: usize) {
        let start = Instant::now();
        loop {
            let health = self.health().await;
            if health["queue_size"] == json!(waiting) && health["in_progress"] == json!(in_progress) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "wanted {waiting} and {in_progress}, but it is {health}");
            tokio::task::yield_now().await;
        }
    }

    /// The value of a metric.
    pub(crate) async fn metric(&self, line: &str) -> Option<f64> {
        let page = self.get("/metrics").await.text();
        let value = page.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '))?;
        Some(value.parse().expect("a number"))
    }
}

/// A client in the background, which leaves when it is dropped.
pub(crate) struct Client(tokio::task::JoinHandle<Answer>);

impl Client {
    pub(crate) async fn answer(mut self) -> Answer {
        (&mut self.0).await.expect("no panic")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A request for pictures.
pub(crate) fn generation(body: impl Into<Body>) -> Request<Body> {
    Request::post(GENERATIONS)
        .header("content-type", "application/json")
        .body(body.into())
        .expect("a request")
}

pub(crate) async fn send(router: Router, request: Request<Body>) -> Answer {
    let response = router.oneshot(request).await.expect("routes cannot fail");
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a body").to_bytes().to_vec();
    Answer { status: parts.status, headers: parts.headers, body }
}

/// Returns once `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}

/// Width, height and pixels of a PNG, and its `parameters` text.
pub(crate) fn decode_png(file: &[u8]) -> (u32, u32, Vec<u8>, Option<String>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
    let info = reader.next_frame(&mut pixels).expect("pixels");
    reader.finish().expect("an end");
    let meta = reader.info();
    let latin =
        meta.uncompressed_latin1_text.iter().find(|t| t.keyword == "parameters").map(|t| t.text.clone());
    let utf8 = meta.utf8_text.iter().find(|t| t.keyword == "parameters").map(|t| t.get_text().expect("text"));
    (info.width, info.height, pixels, latin.or(utf8))
}
