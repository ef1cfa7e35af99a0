//! A whole HTTP request to the routes: path, query, headers, body. The parser
//! of HTTP itself is hyper's, and the model is one that draws grey.

use std::sync::{Arc, LazyLock};

use axum::body::Body;
use axum::http::{Method, Request as HttpRequest, StatusCode};
use http_body_util::BodyExt;
use hypergen_diffusion::{
    Check, Error, ErrorKind, Generator, ModelInfo, Picture, Request, Session, one_at_a_time,
};
use hypergen_server::{App, ServeConfig};
use serde_json::Value;
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::check_message;
use crate::targets::{body, itself};

/// Draws grey at once, and nothing large.
struct Grey;

impl Generator for Grey {
    fn info(&self) -> ModelInfo {
        body::model()
    }

    fn checker(&self) -> Arc<dyn Check> {
        Arc::new(Self)
    }

    fn draw(&mut self, session: &mut dyn Session) {
        one_at_a_time(session, |request, _| {
            let rgb = vec![128; 3 * request.size.width * request.size.height];
            Ok(Picture { size: request.size, rgb, warnings: vec![] })
        });
    }
}

impl Check for Grey {
    fn check(&self, request: &Request) -> Result<(), Error> {
        if request.size.width * request.size.height > 4096 {
            return Err(Error {
                param: Some("size"),
                ..Error::new(ErrorKind::Request, "size is too large for grey")
            });
        }
        Ok(())
    }
}

/// A server for everybody, and one with all locks and doors.
static APPS: LazyLock<(Runtime, [App; 2])> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let app = |args: &[&str]| {
        let args = ["--image-store-size", "1MiB", "--max-body-size", "32KiB"].iter().chain(args);
        let config = ServeConfig::parse_from(args.copied()).expect("settings");
        let _inside = runtime.enter();
        App::new(&config, Box::new(Grey), ([127, 0, 0, 1], 8000).into()).expect("an application")
    };
    let locked = ["--api-key", "sk-one", "--cors-origin", "https://example.com", "--lora-dir", "/nothing"];
    let apps = [app(&[]), app(&locked[..4])];
    (runtime, apps)
});

/// Starts the servers.
pub(crate) fn prepare() {
    LazyLock::force(&APPS);
}

/// The input is `METHOD PATH`, lines of `Name: value`, an empty line and the body.
pub(crate) fn read(data: &[u8]) -> u64 {
    let (runtime, apps) = &*APPS;
    for app in apps {
        if let Some(request) = request(data) {
            let method = request.method().clone();
            let (status, body) = runtime.block_on(async {
                let response = app.router().oneshot(request).await.expect("routes cannot fail");
                let (parts, body) = response.into_parts();
                (parts.status, body.collect().await.expect("a body").to_bytes())
            });
            check(&method, status, &body);
        }
    }
    itself(data)
}

/// The request, if hyper would hand on such a one.
fn request(data: &[u8]) -> Option<HttpRequest<Body>> {
    let mut lines = data.splitn(2, |&b| b == b'\n');
    let first = std::str::from_utf8(lines.next()?).ok()?;
    let (method, path) = first.trim_end().split_once(' ')?;
    let mut builder = HttpRequest::builder().method(method).uri(path);
    let mut rest = lines.next().unwrap_or_default();
    loop {
        let end = rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
        let line = rest[..end].trim_ascii_end();
        rest = rest.get(end + 1..).unwrap_or_default();
        if line.is_empty() {
            break;
        }
        let colon = line.iter().position(|&b| b == b':')?;
        builder = builder.header(&line[..colon], line[colon + 1..].trim_ascii());
    }
    builder.body(Body::from(rest.to_vec())).ok()
}

fn check(method: &Method, status: StatusCode, body: &[u8]) {
    let text = String::from_utf8_lossy(body);
    let json = || serde_json::from_slice::<Value>(body).unwrap_or_else(|e| panic!("{status} {text}: {e}"));
    if !status.is_client_error() && !status.is_server_error() {
        return;
    }
    // A HEAD is answered without a body.
    if method == Method::HEAD {
        return;
    }
    let json = json();
    let message = json["detail"].as_str().unwrap_or_else(|| panic!("no detail in {text}"));
    assert_eq!(json["error"]["message"].as_str(), Some(message), "{text}");
    check_message(message, &[]);
    // A request can ask for two failures: a LoRA that cannot be had, and a way of
    // sending that nobody knows.
    let of_lora = json["error"]["param"] == hypergen_diffusion::lora::PARAM;
    let asked_for = of_lora || status == StatusCode::NOT_IMPLEMENTED;
    assert!(!status.is_server_error() || asked_for, "{status}: {text}");
}
