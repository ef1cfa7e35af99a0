//! Links: what they point at, how it is sent, and how long it stays.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::json;

use crate::support::{Answer, GENERATIONS, TestApp};

async fn draw(app: &TestApp, host: Option<&str>, format: &str) -> String {
    let body =
        json!({"prompt": "x", "size": "8x8", "seed": 1, "response_format": "url", "output_format": format});
    let mut request = Request::post(GENERATIONS).header("content-type", "application/json");
    if let Some(host) = host {
        request = request.header("host", host);
    }
    let answer = app.send(request.body(Body::from(body.to_string())).expect("a request")).await.ok();
    answer["data"][0]["url"].as_str().expect("a link").to_owned()
}

async fn fetch(app: &TestApp, method: &str, path: &str, tag: Option<&str>) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(tag) = tag {
        request = request.header("if-none-match", tag);
    }
    app.send(request.body(Body::empty()).expect("a request")).await
}

fn path(url: &str) -> &str {
    &url[url.find("/images/").expect("a picture's path")..]
}

#[tokio::test]
async fn a_link_serves_the_file_for_a_while() {
    let app = TestApp::new(&[]);
    for (format, media_type) in [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")] {
        let url = draw(&app, None, format).await;
        let answer = fetch(&app, "GET", path(&url), None).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header("content-type"), media_type);
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        let cache = answer.header("cache-control");
        assert!(cache.starts_with("private, max-age=3") && cache.ends_with("immutable"), "{cache}");
        assert!(!answer.body.is_empty());
        let tag = answer.header("etag").to_owned();
        let again = fetch(&app, "GET", path(&url), Some(&tag)).await;
        assert_eq!((again.status, again.body.len()), (StatusCode::NOT_MODIFIED, 0));
        let other = fetch(&app, "GET", path(&url), Some("\"other\"")).await;
        assert_eq!(other.status, StatusCode::OK);
        let head = fetch(&app, "HEAD", path(&url), None).await;
        assert_eq!((head.status, head.body.len()), (StatusCode::OK, 0));
        assert_eq!(head.header("content-length"), answer.body.len().to_string());
    }
}

#[tokio::test]
async fn links_point_at_the_host_that_was_asked_or_the_public_one() {
    let app = TestApp::new(&[]);
    assert!(
        draw(&app, Some("pictures.local:1234"), "png")
            .await
            .starts_with("http://pictures.local:1234/images/img-")
    );
    assert!(draw(&app, Some("[::1]:8000"), "png").await.starts_with("http://[::1]:8000/images/"));
    assert!(draw(&app, None, "png").await.starts_with("http://127.0.0.1:8000/images/"));
    assert!(draw(&app, Some("user@evil/x"), "png").await.starts_with("http://127.0.0.1:8000/images/"));
    let app = TestApp::new(&["--public-url", "https://example.com/draw/"]);
    assert!(draw(&app, Some("inside:8000"), "png").await.starts_with("https://example.com/draw/images/img-"));
}

#[tokio::test]
async fn names_cannot_be_guessed_nor_lead_elsewhere() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("secret.png"), "secret").expect("written");
    let app = TestApp::new(&["--image-dir", folder.path().to_str().expect("UTF-8")]);
    let (one, two) = (draw(&app, None, "png").await, draw(&app, None, "png").await);
    assert_ne!(one, two, "the same picture has another name each time");
    let name = path(&one).trim_start_matches("/images/");
    assert_eq!(name.len(), "img-.png".len() + 40);
    for bad in [
        "/images/secret.png".to_owned(),
        "/images/..%2f..%2fetc%2fpasswd".to_owned(),
        "/images/../secret.png".to_owned(),
        "/images/%2e%2e%2fsecret.png".to_owned(),
        "/images/%ff%fe".to_owned(),
        "/images/".to_owned(),
        format!("/images/{}", name.replace(".png", ".jpeg")),
        format!("/images/{}x", name),
        format!("/images/img-{}.png", "0".repeat(40)),
    ] {
        fetch(&app, "GET", &bad, None).await.error(404);
    }
}

#[tokio::test]
async fn links_expire_and_make_room() {
    let app = TestApp::new(&["--image-ttl", "0"]);
    let url = draw(&app, None, "png").await;
    fetch(&app, "GET", path(&url), None).await.error(404);

    let length = { fetch_length().await };
    let app = TestApp::new(&["--image-store-size", &(length + length / 2).to_string()]);
    let (one, two) = (draw(&app, None, "png").await, draw(&app, None, "png").await);
    fetch(&app, "GET", path(&one), None).await.error(404);
    assert_eq!(fetch(&app, "GET", path(&two), None).await.status, StatusCode::OK);
    assert_eq!(app.metric("hypergen_image_store_files").await, Some(1.0));
    assert_eq!(app.metric("hypergen_image_store_bytes").await, Some(length as f64));
}

async fn fetch_length() -> usize {
    let app = TestApp::new(&[]);
    let url = draw(&app, None, "png").await;
    fetch(&app, "GET", path(&url), None).await.body.len()
}

#[tokio::test]
async fn a_disk_that_fails_is_a_500_and_the_server_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let images = folder.path().join("images");
    let app = TestApp::new(&["--image-dir", images.to_str().expect("UTF-8")]);
    std::fs::remove_dir(&images).expect("removed");
    let body = |form: &str| json!({"prompt": "x", "size": "8x8", "response_format": form});
    let answer = app.post(body("url")).await;
    assert_eq!(answer.header("x-should-retry"), "false", "each try would draw again");
    let (message, kind, ..) = answer.error(500);
    assert!(message.contains("b64_json"), "{message}");
    assert_eq!(kind, "internal_error");
    assert!(!message.contains(images.to_str().expect("UTF-8")), "no path of the server's: {message}");
    app.post(body("b64_json")).await.ok();
    // Who did not ask for the link gets the picture without it.
    let answer = app.post(json!({"prompt": "x", "size": "8x8"})).await;
    let data = answer.ok()["data"][0].clone();
    assert!(data["b64_json"].is_string() && data.get("url").is_none(), "{data}");
    let warning = answer.header("x-hypergen-warning");
    assert!(
        warning.contains("there is no url") && warning.contains("the folder does not exist"),
        "{warning}"
    );
    std::fs::create_dir(&images).expect("made again");
    app.post(body("url")).await.ok();
}

#[tokio::test]
#[cfg(target_os = "linux")]
async fn a_folder_that_cannot_be_written_to_is_found_at_the_start() {
    // Not even root may make a file there.
    let config = hypergen_server::ServeConfig::parse_from(["--image-dir", "/proc/self", "--port", "0"]);
    let error = hypergen_server::Server::bind(config.expect("arguments")).expect_err("refused").to_string();
    assert!(error.contains("/proc/self") && error.contains("--image-dir"), "{error}");
    assert_eq!(error.matches("/proc/self").count(), 1, "{error}");
}

#[tokio::test]
async fn a_picture_larger_than_the_store_is_a_500() {
    let app = TestApp::new(&["--image-store-size", "10"]);
    let (message, ..) =
        app.post(json!({"prompt": "x", "size": "8x8", "response_format": "url"})).await.error(500);
    assert!(message.contains("at most 10"), "{message}");
}
