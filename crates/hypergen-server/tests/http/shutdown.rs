//! The way to the end: what runs may finish, what waits is told, and nobody
//! waits longer than was said.

use hypergen_server::Exit;
use serde_json::Value;

use crate::sockets::{Connection, Running, picture};

async fn answer(mut connection: Connection) -> (u16, Value) {
    tokio::task::spawn_blocking(move || {
        let (status, body) = connection.answer();
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    })
    .await
    .expect("no panic")
}

/// A server with one request that runs, held, and one that waits.
async fn busy(args: &[&str]) -> (Running, Connection, Connection) {
    let server = Running::new(args);
    server.control.hold();
    let mut running = server.connect().await;
    running.send(&picture(1, 3));
    server.control.until("the step", |s| s.waiting).await;
    let mut waiting = server.connect().await;
    waiting.send(&picture(2, 3));
    server.until_queue(1, 1).await;
    (server, running, waiting)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_finishes_and_what_waits_is_refused() {
    let (server, running, waiting) = busy(&["--shutdown-timeout", "1h"]).await;
    let idle = server.connect().await;
    // Connections are taken in their order: once this answer is there, the idle one is in.
    server.health().await;
    server.stop.send(()).expect("listening");
    let (status, body) = answer(waiting).await;
    assert_eq!((status, body["error"]["type"].as_str()), (503, Some("server_error")), "{body}");
    let (status, _) = answer(idle).await;
    assert_eq!(status, 0, "idle connections are closed");
    crate::support::until("nobody is let in any more", || {
        std::net::TcpStream::connect(server.address).is_err()
    })
    .await;
    assert!(!server.exit.is_finished());
    server.control.release();
    let (status, body) = answer(running).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["data"][0]["seed"], 1);
    assert_eq!(server.exit.await.expect("no panic").expect("served"), Exit::Graceful);
    assert_eq!(server.control.state().batches, [[1]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_the_time_what_runs_is_stopped() {
    let (server, running, waiting) = busy(&["--shutdown-timeout", "50ms"]).await;
    server.stop.send(()).expect("listening");
    assert_eq!(answer(waiting).await.0, 503);
    let (status, body) = answer(running).await;
    assert_eq!((status, body["error"]["type"].as_str()), (503, Some("server_error")), "{body}");
    assert_eq!(server.exit.await.expect("no panic").expect("served"), Exit::Graceful);
    // The model itself stops as soon as it looks up.
    server.control.release();
    server.control.until("the model to stop", |s| s.cancelled == 1).await;
    assert!(server.control.state().steps <= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_twice_it_stops_at_once() {
    let (server, running, _waiting) = busy(&["--shutdown-timeout", "1h"]).await;
    server.stop.send(()).expect("listening");
    server.stop.send(()).expect("listening");
    assert_eq!(server.exit.await.expect("no panic").expect("served"), Exit::Forced);
    drop(running);
    server.control.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_server_ends_at_once_and_takes_its_pictures_along() {
    let server = Running::new(&[]);
    let (status, body) =
        server.ask("draw", r#"{"prompt": "x", "size": "8x8", "response_format": "url"}"#).await;
    assert_eq!(status, 200, "{body}");
    server.stop.send(()).expect("listening");
    assert_eq!(server.exit.await.expect("no panic").expect("served"), Exit::Graceful);
}
