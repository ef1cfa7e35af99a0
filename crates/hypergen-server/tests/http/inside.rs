//! What an operator sees: health, models, metrics, ids, the API's description.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use hypergen_diffusion::{IMAGES, LORA_SCALE, STEPS};
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::support::TestApp;

#[tokio::test]
async fn health_tells_how_it_is() {
    let app = TestApp::new(&["--max-queue-size", "5"]);
    let health = app.health().await;
    assert_eq!(
        health,
        json!({"status": "ok", "model": "fake", "family": "Fake Diffusion", "device": "cpu", "isa": "portable",
            "dtype": "float32", "queue_size": 0, "max_queue_size": 5, "in_progress": 0, "queue_seconds": null,
            "version": env!("CARGO_PKG_VERSION")})
    );
    app.app.drain();
    let answer = app.get("/health").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json()["status"], "shutting_down");
    let (_, kind, ..) = app.post(json!({"prompt": "x"})).await.error(503);
    assert_eq!(kind, "server_error");
}

#[tokio::test]
async fn models_are_listed_as_clients_know_them() {
    let mut fake = Fake::new();
    fake.info.name = "org/model-1".to_owned();
    let app = TestApp::with(&[], fake);
    let list = app.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(
        (&model["id"], &model["object"], &model["owned_by"]),
        (&json!("org/model-1"), &json!("model"), &json!("hypergen"))
    );
    assert!(model["created"].as_u64().expect("a time") > 1_700_000_000);
    assert_eq!(&app.get("/v1/models/org/model-1").await.ok(), model);
    assert_eq!(&app.get("/v1/models/org%2Fmodel-1").await.ok(), model);
    let (message, _, _, code) = app.get("/v1/models/dall-e-3").await.error(404);
    assert!(message.contains("dall-e-3") && message.contains("org/model-1"));
    assert_eq!(code, "model_not_found");
    app.get("/v1/models/%ff").await.error(400);
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let app = TestApp::new(&[]);
    let body = json!({"prompt": "x", "size": "8x8", "n": 2, "num_inference_steps": 3});
    let answer = app.post(body).await;
    answer.ok();
    app.get("/nothing").await.error(404);
    let page = app.get("/metrics").await;
    assert!(page.header("content-type").starts_with("application/openmetrics-text"));
    let text = page.text();
    for line in [
        "hypergen_requests_total{route=\"/v1/images/generations\",status=\"200\"} 1",
        "hypergen_requests_total{route=\"other\",status=\"404\"} 1",
        "hypergen_pictures_total 2",
        "hypergen_queue_length 0",
        "hypergen_queue_capacity 100",
        "hypergen_requests_in_progress 0",
        "hypergen_queue_wait_seconds_count 1",
        "hypergen_batch_size_count 6",
        "hypergen_stage_duration_seconds_count{stage=\"text\"} 2",
        "hypergen_stage_duration_seconds_count{stage=\"step\"} 6",
        "hypergen_stage_duration_seconds_count{stage=\"decode\"} 2",
        "hypergen_stage_duration_seconds_count{stage=\"encode\"} 2",
        "hypergen_request_duration_seconds_count{route=\"/v1/images/generations\"} 1",
        "hypergen_image_store_files 2",
        "hypergen_model_weight_bytes 1048576",
        "# EOF",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    if cfg!(target_os = "linux") {
        assert!(app.metric("process_resident_memory_bytes").await.expect("there") > 1e6);
        assert!(app.metric("process_open_fds").await.expect("there") > 0.0);
    }
    assert!(!text.contains("prompt"));
}

#[tokio::test]
async fn every_answer_has_an_id() {
    let app = TestApp::new(&[]);
    for path in ["/health", "/nothing", "/v1/models"] {
        assert!(app.get(path).await.header("x-request-id").starts_with("req-"), "{path}");
    }
    let request =
        Request::get("/health").header("x-request-id", "mine-1").body(Body::empty()).expect("a request");
    assert_eq!(app.send(request).await.header("x-request-id"), "mine-1");
}

fn paths(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(target)) = map.get("$ref") {
                found.push(target.clone());
            }
            map.values().for_each(|v| paths(v, found));
        }
        Value::Array(list) => list.iter().for_each(|v| paths(v, found)),
        _ => {}
    }
}

#[tokio::test]
async fn the_document_says_what_the_code_does() {
    let mut fake = Fake::new();
    fake.info.default_steps = Some(4);
    let app = TestApp::with(&["--default-guidance", "3"], fake);
    let document = app.get("/openapi.json").await.ok();
    assert!(document["openapi"].as_str().expect("a version").starts_with("3."));
    let listed: Vec<_> = document["paths"].as_object().expect("paths").keys().map(String::as_str).collect();
    for path in [
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{id}",
        "/health",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/images/{name}",
    ] {
        assert!(listed.contains(&path), "{path} is not in {listed:?}");
    }
    let text = app.get("/openapi.json").await.text();
    let place = |path: &str| text.find(&format!("\"{path}\":")).expect(path);
    assert!(place("/v1/images/generations") < place("/docs"), "what people come for is first");
    assert!(place("prompt") < place("clip_skip"), "and what they need");
    let operations = document["paths"].as_object().expect("paths").values();
    let operations = operations.flat_map(|item| item.as_object().expect("methods").values());
    let mut ids: Vec<_> = operations.map(|o| o["operationId"].as_str().expect("an id")).collect();
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "each has its own id: {ids:?}");
    let mut targets = Vec::new();
    paths(&document, &mut targets);
    for target in targets {
        assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target} leads nowhere");
    }
    let request = &document["components"]["schemas"]["ImageRequest"];
    let property = |name: &str| &request["properties"][name];
    let names = request["properties"].as_object().expect("properties");
    assert!(names.contains_key("stream") && names.contains_key("partial_images"));
    assert_eq!(request["required"], json!(["prompt"]));
    assert_eq!(property("n")["maximum"], json!(IMAGES.max));
    assert_eq!(property("num_inference_steps")["maximum"], json!(STEPS.max));
    assert_eq!(property("num_inference_steps")["default"], 4);
    assert_eq!(property("guidance_scale")["default"].as_f64(), Some(3.0));
    assert_eq!(property("lora_scale")["maximum"].as_f64(), Some(LORA_SCALE.max));
    assert_eq!(property("seed")["maximum"], json!(u64::MAX));
    assert_eq!(property("size")["default"], "1024x1024");
    let statuses =
        document["paths"]["/v1/images/generations"]["post"]["responses"].as_object().expect("answers");
    let statuses: Vec<_> = statuses.keys().map(String::as_str).collect();
    assert_eq!(statuses, ["200", "400", "401", "408", "413", "415", "429", "500", "503"]);
}

#[tokio::test]
async fn the_docs_load_nothing_from_elsewhere() {
    let app = TestApp::new(&[]);
    for (path, media_type) in [
        ("/docs", "text/html; charset=utf-8"),
        ("/docs/docs.js", "text/javascript; charset=utf-8"),
        ("/docs/docs.css", "text/css; charset=utf-8"),
    ] {
        let answer = app.get(path).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header("content-type"), media_type);
        assert!(answer.header("content-security-policy").contains("default-src 'none'"));
        let text = answer.text();
        assert!(text.len() > 200, "{path} is empty");
        assert!(!text.contains("//cdn") && !text.contains("https://"), "{path} names another server");
    }
    let page = app.get("/docs").await.text();
    assert!(page.contains("/docs/docs.js") || page.contains("docs/docs.js"));
}
