//! Who may do what, and which pages of the web may.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::json;

use crate::support::{Answer, GENERATIONS, TestApp};

async fn with_key(app: &TestApp, method: &str, path: &str, authorization: Option<&str>) -> Answer {
    let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    let body = if method == "POST" { r#"{"prompt": "x", "size": "8x8"}"# } else { "" };
    app.send(request.body(Body::from(body)).expect("a request")).await
}

#[tokio::test]
async fn keys_guard_what_draws_and_what_tells() {
    let app = TestApp::new(&["--api-key", "sk-hypergen-123456", "--api-key", "sk-other"]);
    for (method, path) in
        [("POST", GENERATIONS), ("GET", "/v1/models"), ("GET", "/v1/models/fake"), ("GET", "/metrics")]
    {
        for wrong in
            [None, Some("Bearer sk-wrong"), Some("sk-hypergen-123456"), Some("Basic sk-hypergen-123456")]
        {
            let answer = with_key(&app, method, path, wrong).await;
            let (message, kind, _, code) = answer.error(401);
            assert_eq!(message, "Invalid API key");
            assert_eq!((kind.as_str(), code), ("invalid_request_error", json!("invalid_api_key")));
            assert_eq!(answer.header("www-authenticate"), "Bearer");
        }
        for right in ["Bearer sk-hypergen-123456", "bearer sk-other"] {
            let answer = with_key(&app, method, path, Some(right)).await;
            assert_eq!(answer.status, StatusCode::OK, "{path}");
        }
    }
    for path in ["/health", "/openapi.json", "/docs", "/docs/docs.js"] {
        assert_eq!(with_key(&app, "GET", path, None).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn without_keys_a_key_is_ignored() {
    let app = TestApp::new(&[]);
    let answer = with_key(&app, "POST", GENERATIONS, Some("Bearer sk-hypergen-123456")).await;
    answer.ok();
}

#[tokio::test]
async fn links_need_no_key() {
    let app = TestApp::new(&["--api-key", "sk-a"]);
    let answer = with_key(&app, "POST", GENERATIONS, Some("Bearer sk-a")).await.ok();
    let url = answer["data"][0]["url"].as_str().expect("a link").to_owned();
    let path = url.strip_prefix("http://127.0.0.1:8000").expect("this server");
    assert_eq!(app.get(path).await.status, StatusCode::OK);
}

async fn from_page(app: &TestApp, method: &str, origin: &str) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(GENERATIONS)
        .header("origin", origin)
        .header("content-type", "application/json")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-stainless-os");
    app.send(request.body(Body::from(r#"{"prompt": "x", "size": "8x8"}"#)).expect("a request")).await
}

#[tokio::test]
async fn pages_of_the_web_are_let_in_only_when_asked() {
    let app = TestApp::new(&[]);
    assert_eq!(from_page(&app, "POST", "https://a.example").await.header("access-control-allow-origin"), "");
    from_page(&app, "OPTIONS", "https://a.example").await.error(405);

    let app = TestApp::new(&["--cors-origin", "https://a.example", "--api-key", "sk-a"]);
    let preflight = from_page(&app, "OPTIONS", "https://a.example").await;
    assert_eq!(preflight.status, StatusCode::OK, "a preflight carries no key");
    assert_eq!(preflight.header("access-control-allow-origin"), "https://a.example");
    assert!(preflight.header("access-control-allow-headers").contains("x-stainless-os"));
    let answer = from_page(&app, "POST", "https://a.example").await;
    answer.error(401);
    assert_eq!(
        answer.header("access-control-allow-origin"),
        "https://a.example",
        "errors must be readable too"
    );
    assert!(answer.header("access-control-expose-headers").contains("x-request-id"));
    assert_eq!(from_page(&app, "POST", "https://b.example").await.header("access-control-allow-origin"), "");

    let app = TestApp::new(&["--cors-origin", "*"]);
    assert_eq!(from_page(&app, "POST", "https://b.example").await.header("access-control-allow-origin"), "*");
}
