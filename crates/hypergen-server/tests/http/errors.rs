//! What cannot be done is said in both forms: every status, every parameter.

use axum::body::Body;
use axum::http::{Method, Request};
use bytes::Bytes;
use http_body_util::StreamBody;
use serde_json::{Value, json};

use crate::support::{GENERATIONS, TestApp, generation};

/// A request with one field replaced.
fn with(field: &str, value: Value) -> Value {
    let mut body = json!({"prompt": "x", "size": "8x8"});
    body[field] = value;
    body
}

#[tokio::test]
async fn every_parameter_says_what_was_found_and_what_is_allowed() {
    let app = TestApp::new(&[]);
    for (field, value, message) in [
        ("prompt", json!(null), "prompt is required: a string that says what to draw"),
        ("prompt", json!(""), "prompt must not be empty"),
        ("prompt", json!(5), "prompt must be a string, but is 5"),
        ("prompt", json!(["a"]), "prompt must be a string, but is an array"),
        ("n", json!(0), "n must be between 1 and 10, but is 0"),
        ("n", json!(11), "n must be between 1 and 10, but is 11"),
        ("n", json!(-1), "n must be between 1 and 10, but is -1"),
        ("n", json!(1.5), "n must be an integer between 1 and 10, but is 1.5"),
        ("n", json!("2"), "n must be an integer between 1 and 10, but is the string \"2\""),
        ("n", json!(true), "n must be an integer between 1 and 10, but is the boolean true"),
        ("size", json!("1000*1000"), "Invalid size format: 1000*1000. Use format like '1024x1024'"),
        ("size", json!("1024"), "Invalid size format: 1024. Use format like '1024x1024'"),
        ("size", json!("-8x8"), "Invalid size format: -8x8. Use format like '1024x1024'"),
        (
            "size",
            json!("100x100"),
            "Invalid size: 100x100. Width and height must be divisible by 8, for example 104x104",
        ),
        (
            "size",
            json!("0x64"),
            "Invalid size: 0x64. Width and height must be at least 8, and divisible by 8",
        ),
        ("size", json!("8192x8"), "Invalid size: 8192x8. Width and height must be at most 4096"),
        ("size", json!(512), "size must be a string, but is 512"),
        (
            "quality",
            json!("best"),
            "quality must be one of standard, hd, auto, low, medium, high, but is 'best'",
        ),
        ("response_format", json!("base64"), "response_format must be one of url, b64_json, but is 'base64'"),
        ("output_format", json!("gif"), "output_format must be one of png, jpeg, webp, but is 'gif'"),
        ("output_compression", json!(101), "output_compression must be between 0 and 100, but is 101"),
        ("negative_prompt", json!({}), "negative_prompt must be a string, but is an object"),
        ("num_inference_steps", json!(0), "num_inference_steps must be between 1 and 150, but is 0"),
        ("num_inference_steps", json!(151), "num_inference_steps must be between 1 and 150, but is 151"),
        (
            "guidance_scale",
            json!(0.5),
            "guidance_scale must be between 1 and 20, but is 0.5; this model was recognised as Fake Diffusion. A \
             distilled one (Turbo, Lightning, LCM), which draws without guidance, is recognised by its file's name \
             (xl_turbo, xl_lightning, sd_turbo), by its scheduler_config.json, or by --family (HYPERGEN_FAMILY), such \
             as --family sdxl-turbo",
        ),
        ("guidance_scale", json!(20.5), "guidance_scale must be between 1 and 20, but is 20.5"),
        (
            "guidance_scale",
            json!("7.5"),
            "guidance_scale must be a number between 1 and 20, but is the string \"7.5\"",
        ),
        (
            "guidance_scale",
            json!(false),
            "guidance_scale must be a number between 1 and 20, but is the boolean false",
        ),
        ("seed", json!(-1), "seed must be between 0 and 18446744073709551615, but is -1"),
        ("seed", json!(0.5), "seed must be an integer between 0 and 18446744073709551615, but is 0.5"),
        ("lora_path", json!(1), "lora_path must be a string, but is 1"),
        ("lora_scale", json!(2.1), "lora_scale must be between 0 and 2, but is 2.1"),
        ("lora_scale", json!(-0.1), "lora_scale must be between 0 and 2, but is -0.1"),
        (
            "loras",
            json!("x"),
            "loras must be a list of {\"path\": ..., \"scale\": ...}, but is the string \"x\"",
        ),
        ("loras", json!([1]), "loras must be a list of {\"path\": ..., \"scale\": ...}, but is an array"),
        ("loras", json!([{}]), "loras: each needs a \"path\""),
        ("loras", json!([{"path": 1}]), "loras: path must be a string, but is 1"),
        ("loras", json!([{"path": "x", "scale": 3}]), "loras: scale must be between 0 and 2, but is 3"),
        ("model", json!(1), "model must be a string, but is 1"),
        (
            "stream",
            json!(true),
            "stream is true, but this server does not stream yet: leave it out or send false, and the answer comes \
             when all is drawn",
        ),
        ("stream", json!("true"), "stream must be true or false, but is the string \"true\""),
        ("partial_images", json!(4), "partial_images must be between 0 and 3, but is 4"),
        (
            "size",
            json!("0x512"),
            "Invalid size: 0x512. Width and height must be at least 8, and divisible by 8",
        ),
    ] {
        let answer = app.post(with(field, value.clone())).await;
        let (found, kind, param, _) = answer.error(400);
        assert_eq!((found.as_str(), kind.as_str()), (message, "invalid_request_error"), "{field} {value}");
        assert_eq!(param, field, "{field} {value}");
    }
    let (message, _, param, _) = app.post(with("sampler", json!("magic"))).await.error(400);
    assert!(
        message.starts_with("sampler must be one of ") && message.ends_with("but is 'magic'"),
        "{message}"
    );
    assert_eq!(param, "sampler");
    assert_eq!(app.control.state().batches.len(), 0, "nothing of this was drawn");
}

#[tokio::test]
async fn seeds_beyond_64_bits_are_refused_not_rounded() {
    let app = TestApp::new(&[]);
    for seed in [
        "18446744073709551616",
        "1e20",
        "12345678901234567890.0",
        "9007199254740993.0",
        "9007199254740993e0",
        "0.99999999999999999999999",
        "1e-400",
        "1e99999999999999999999",
        "99999999999999999999999999999999999999999",
    ] {
        let (message, _, param, _) =
            app.post_raw(format!(r#"{{"prompt": "x", "seed": {seed}}}"#)).await.error(400);
        assert!(message.contains(seed), "{message}");
        assert_eq!(param, "seed");
    }
}

#[tokio::test]
async fn bodies_that_are_no_json_objects() {
    let app = TestApp::new(&[]);
    for (body, word) in [
        (&b""[..], "empty"),
        (b"{\"prompt\": \"x\"", "not valid JSON"),
        (b"{\"prompt\": \"x\",}", "not valid JSON"),
        (b"{'prompt': 'x'}", "not valid JSON"),
        (b"{\"prompt\": NaN}", "not valid JSON"),
        (b"\x1f\x8b\x08\x00\x00", "compressed"),
        (b"\xff\xfe{\x00}\x00", "not valid UTF-8"),
        (b"{\"prompt\": \"\xff\"}", "not valid UTF-8"),
        (b"{\"prompt\": \"\\ud800\"}", "surrogate"),
        (b"{\"prompt\": \"a\nb\"}", "not valid JSON"),
        (b"\"prompt\"", "must be a JSON object, but is the string \"prompt\""),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object, but is an array"),
    ] {
        let (message, kind, _, _) = app.post_raw(body).await.error(400);
        assert!(message.contains(word), "{message}");
        assert_eq!(kind, "invalid_request_error");
    }
    let deep = format!(
        "{{\"prompt\": \"x\", \"size\": \"8x8\", \"y\": {}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    app.post_raw(deep).await.ok();
    app.post_raw(&b"\xef\xbb\xbf{\"prompt\": \"x\", \"size\": \"8x8\"}"[..]).await.ok();
}

#[tokio::test]
async fn what_http_has_its_own_status_for() {
    let app = TestApp::new(&["--max-body-size", "1KiB"]);
    for path in ["/", "/v1", "/v1/images", "/v1/images/edits", "/healthz", "/docs/other.js"] {
        let (_, kind, _, _) = app.get(path).await.error(404);
        assert_eq!(kind, "invalid_request_error");
    }
    for (method, path, allow) in [
        (Method::GET, GENERATIONS, "POST"),
        (Method::DELETE, GENERATIONS, "POST"),
        (Method::POST, "/health", "GET,HEAD"),
        (Method::PUT, "/v1/models", "GET,HEAD"),
        (Method::OPTIONS, "/v1/models", "GET,HEAD"),
    ] {
        let request =
            Request::builder().method(method.clone()).uri(path).body(Body::empty()).expect("a request");
        let answer = app.send(request).await;
        let (message, ..) = answer.error(405);
        assert!(message.contains(path) && message.contains(method.as_str()), "{message}");
        assert_eq!(answer.header("allow"), allow, "{method} {path}");
    }
    for (coding, fine) in
        [("gzip", false), ("Identity, br", false), ("deflate", false), ("identity", true), ("", true)]
    {
        let mut request = generation(r#"{"prompt": "x", "size": "8x8"}"#);
        request.headers_mut().insert("content-encoding", coding.parse().expect("a header"));
        let answer = app.send(request).await;
        if fine {
            answer.ok();
            continue;
        }
        let (message, ..) = answer.error(415);
        assert!(message.contains("without compression"), "{message}");
        assert_eq!(answer.header("accept-encoding"), "identity", "RFC 9110, section 12.5.3");
    }
    for content_type in
        [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("multipart/form-data")]
    {
        let mut request = Request::post(GENERATIONS);
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let answer = app.send(request.body(Body::from(r#"{"prompt": "x"}"#)).expect("a request")).await;
        let (message, ..) = answer.error(415);
        assert!(message.contains("application/json"), "{message}");
    }
}

/// A base URL that is a little wrong: the answer names the right path, and
/// there is no method for what is not there.
#[tokio::test]
async fn paths_that_are_a_little_wrong_are_put_right() {
    let app = TestApp::new(&[]);
    for path in [
        "/images/generations",
        "/images/generations/",
        "/v1/v1/images/generations",
        "/v1/images/generations/",
        "//v1/images/generations",
        "/api/v1/images/generations",
    ] {
        for method in [Method::POST, Method::GET, Method::PUT] {
            let request = Request::builder().method(method.clone()).uri(path).body(Body::empty());
            let (message, ..) = app.send(request.expect("a request")).await.error(404);
            assert!(
                message.contains("it is /v1/images/generations;") && message.contains("/v1"),
                "{method}: {message}"
            );
        }
    }
    for (path, right) in [("/models", "/v1/models"), ("/v1/models/", "/v1/models"), ("/v1/health", "/health")]
    {
        let (message, ..) = app.get(path).await.error(404);
        assert!(message.contains(&format!("it is {right}")), "{message}");
    }
    for (method, path, status) in [
        ("POST", format!("/images/img-{}.png", "0".repeat(40)), 404),
        ("DELETE", "/images/x".to_owned(), 404),
        ("DELETE", "/v1/models/gone".to_owned(), 404),
        ("DELETE", "/v1/models/fake".to_owned(), 405),
    ] {
        let request = Request::builder().method(method).uri(&path).body(Body::empty()).expect("a request");
        app.send(request).await.error(status);
    }
    let body = json!({"prompt": "x", "size": "8x8", "response_format": "url"});
    let url = app.post(body).await.ok()["data"][0]["url"].as_str().expect("a link").to_owned();
    let path = &url[url.find("/images/").expect("a path")..];
    let request = Request::delete(path).body(Body::empty()).expect("a request");
    let answer = app.send(request).await;
    answer.error(405);
    assert_eq!(answer.header("allow"), "GET,HEAD");
}

/// OpenAI's clients try failures again, twice, unless they are told not to.
#[tokio::test]
async fn failures_that_stay_are_not_to_be_tried_again() {
    let app = TestApp::new(&[]);
    let body = |prompt: &str| json!({"prompt": prompt, "size": "8x8", "num_inference_steps": 2});
    for prompt in ["out of memory", "bad numbers", "never fits"] {
        let answer = app.post(body(prompt)).await;
        answer.error(500);
        assert_eq!(answer.header("x-should-retry"), "false", "{prompt}");
    }
    let lora = json!({"prompt": "x", "size": "8x8", "lora_path": "/no/such.safetensors"});
    let answer = app.post(lora).await;
    answer.error(500);
    assert_eq!(answer.header("x-should-retry"), "false");
    let answer = app.post(body("panic")).await;
    answer.error(500);
    assert_eq!(answer.header("x-should-retry"), "");
    app.app.drain();
    let answer = app.post(body("fine")).await;
    answer.error(503);
    assert_eq!(answer.header("x-should-retry"), "", "another server may be there by then");
}

#[tokio::test]
async fn a_check_that_panics_is_a_500_and_the_next_one_works() {
    let app = TestApp::new(&[]);
    let (message, kind, ..) = app.post(json!({"prompt": "panic in a check", "size": "8x8"})).await.error(500);
    assert!(message.contains("log"), "{message}");
    assert_eq!(kind, "internal_error");
    app.post(json!({"prompt": "fine", "size": "8x8"})).await.ok();
    assert_eq!(app.health().await["in_progress"], 0);
}

#[tokio::test]
async fn bodies_are_bounded_with_and_without_a_length() {
    let app = TestApp::new(&["--max-body-size", "1KiB"]);
    let body = json!({"prompt": "x".repeat(2000)}).to_string();
    let mut request = generation(body.clone());
    request.headers_mut().insert("content-length", body.len().into());
    let (message, kind, ..) = app.send(request).await.error(413);
    assert!(message.contains("1024 bytes"), "{message}");
    assert_eq!(kind, "invalid_request_error");
    let chunks =
        (0..40).map(|_| Ok::<_, std::io::Error>(hyper::body::Frame::data(Bytes::from(vec![b'x'; 100]))));
    let stream = StreamBody::new(Chunks(chunks.collect()));
    app.send(generation(Body::new(stream))).await.error(413);
    app.post(json!({"prompt": "x".repeat(900), "size": "8x8"})).await.ok();
}

/// Frames one after the other.
struct Chunks(std::collections::VecDeque<Result<hyper::body::Frame<Bytes>, std::io::Error>>);

impl futures_core::Stream for Chunks {
    type Item = Result<hyper::body::Frame<Bytes>, std::io::Error>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.pop_front())
    }
}

#[tokio::test]
async fn generations_that_fail_are_500_and_the_next_one_works() {
    let app = TestApp::new(&[]);
    let body = |prompt: &str| json!({"prompt": prompt, "size": "8x8", "num_inference_steps": 2});
    let answer = app.post(body("out of memory")).await;
    assert_eq!(
        answer.error(500),
        ("CUDA out of memory".to_owned(), "internal_error".to_owned(), json!(null), json!(null))
    );
    for prompt in ["bad numbers", "panic", "stop", "too few", "panic"] {
        let (_, kind, ..) = app.post(body(prompt)).await.error(500);
        assert_eq!(kind, "internal_error");
        app.post(body("fine")).await.ok();
    }
    let (message, _, param, _) = app.post(body("unfit")).await.error(400);
    assert_eq!((message.as_str(), param), ("size does not fit", json!("size")));
    assert_eq!(app.health().await["in_progress"], 0);
}
