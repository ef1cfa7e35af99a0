//! The queue: its bound, its order, its batches, and clients that leave.

use serde_json::{Value, json};

use crate::support::{TestApp, decode_png};

fn body(seed: u64, steps: usize) -> Value {
    json!({"prompt": "x", "size": "8x8", "seed": seed, "num_inference_steps": steps, "response_format": "b64_json"})
}

#[tokio::test]
async fn a_full_queue_is_a_429_that_says_when_to_come_back() {
    let app = TestApp::new(&["--max-queue-size", "2"]);
    app.control.hold();
    let running = app.spawn(body(0, 10));
    app.until_queue(0, 1).await;
    app.control.permit(1);
    app.control.until("a step", |s| s.steps == 1 && s.waiting).await;
    let first = app.spawn(body(1, 10));
    app.until_queue(1, 1).await;
    let second = app.spawn(body(2, 10));
    app.until_queue(2, 1).await;
    let answer = app.post(body(3, 10)).await;
    let (message, kind, _, code) = answer.error(429);
    assert!(message.contains("2 requests are waiting"), "{message}");
    assert_eq!((kind.as_str(), code), ("rate_limit_exceeded", json!("queue_full")));
    // A step takes the fake 100 ms (and its text 1 ms): 9 + 10 + 10 of them are left.
    assert_eq!(answer.header("retry-after"), "3");
    assert_eq!(app.health().await["queue_seconds"], 2.9);
    app.control.release();
    for (client, ahead) in [(running, "0"), (first, "1"), (second, "2")] {
        let answer = client.answer().await;
        answer.ok();
        assert_eq!(answer.header("x-hypergen-queue-position"), ahead);
    }
    assert_eq!(app.control.state().batches, [[0], [1], [2]], "first in, first out");
    app.post(body(4, 1)).await.ok();
    assert_eq!(
        app.metric("hypergen_requests_total{route=\"/v1/images/generations\",status=\"429\"}").await,
        Some(1.0)
    );
    assert_eq!(app.metric("hypergen_queue_wait_seconds_count").await, Some(4.0));
}

/// What can be known without the model's thread is said before the queue:
/// here that thread never moves.
#[tokio::test]
async fn a_bad_parameter_does_not_wait_behind_ten_long_requests() {
    let app = TestApp::new(&[]);
    app.control.hold();
    let waiting: Vec<_> = (0..10).map(|seed| app.spawn(body(seed, 150))).collect();
    app.until_queue(9, 1).await;
    for (bad, status) in [
        (json!({"original_size": "1024x1024"}), 400),
        (json!({"prompt": "unfit"}), 400),
        (json!({"prompt": ""}), 400),
        (json!({"size": "100x100"}), 400),
        (json!({"n": 11}), 400),
        (json!({"seed": -1}), 400),
        (json!({"stream": true}), 400),
        (json!({"sampler": "magic"}), 400),
        (json!({"clip_skip": 99}), 400),
        (json!({"prompt": "<lora:x:99>", "prompt_syntax": "a1111"}), 400),
        (json!({"prompt": "never fits"}), 500),
        (json!({"lora_path": "gone"}), 500),
    ] {
        let mut request = body(99, 1);
        request.as_object_mut().expect("an object").extend(bad.as_object().expect("an object").clone());
        app.post(request).await.error(status);
    }
    assert_eq!(app.health().await["queue_size"], 9, "none of them took a place");
    drop(waiting);
    app.control.release();
    app.until_queue(0, 0).await;
}

#[tokio::test]
async fn who_leaves_the_queue_costs_nothing() {
    let app = TestApp::new(&["--max-queue-size", "2"]);
    app.control.hold();
    let running = app.spawn(body(0, 2));
    app.until_queue(0, 1).await;
    let leaving = app.spawn(body(1, 2));
    app.until_queue(1, 1).await;
    let staying = app.spawn(body(2, 2));
    app.until_queue(2, 1).await;
    drop(leaving);
    // The place is free at once, while the model is still busy with the first.
    app.until_queue(1, 1).await;
    app.control.release();
    running.answer().await.ok();
    staying.answer().await.ok();
    assert_eq!(app.control.state().batches, [[0], [2]]);
    assert_eq!(app.control.state().steps, 4);
    assert_eq!(app.metric("hypergen_clients_left_total{while=\"waiting\"}").await, Some(1.0));
    let left = app.metric("hypergen_requests_total{route=\"/v1/images/generations\",status=\"499\"}").await;
    assert_eq!(left, Some(1.0));
}

#[tokio::test]
async fn who_leaves_in_mid_generation_stops_it_at_the_next_step() {
    let app = TestApp::new(&[]);
    app.control.hold();
    let leaving = app.spawn(body(0, 50));
    app.control.until("the first step", |s| s.waiting).await;
    app.control.permit(3);
    app.control.until("three steps", |s| s.steps == 3 && s.waiting).await;
    let next = app.spawn(body(1, 2));
    app.until_queue(1, 1).await;
    drop(leaving);
    crate::support::until("the handler to be dropped", || app.control.state().waiting).await;
    until_left(&app).await;
    app.control.release();
    next.answer().await.ok();
    let state = app.control.state();
    assert_eq!(state.cancelled, 1);
    assert_eq!(state.steps, 3 + 1 + 2, "the step that ran, and no other");
    app.until_queue(0, 0).await;
}

async fn until_left(app: &TestApp) {
    while app.metric("hypergen_clients_left_total{while=\"running\"}").await != Some(1.0) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_pictures_that_are_left_of_a_request_are_not_drawn_for_nobody() {
    let app = TestApp::new(&[]);
    app.control.hold();
    let mut many = body(0, 2);
    many["n"] = json!(10);
    let leaving = app.spawn(many);
    app.control.until("the first step", |s| s.waiting).await;
    app.control.permit(3);
    app.control.until("the second picture", |s| s.batches.len() == 2 && s.waiting).await;
    drop(leaving);
    until_left(&app).await;
    app.control.release();
    app.until_queue(0, 0).await;
    assert_eq!(app.control.state().batches, [[0], [1]]);
}

#[tokio::test]
async fn requests_join_at_the_next_step_and_their_pictures_do_not_change() {
    let app = TestApp::new(&["--max-batch-size", "4"]);
    app.control.hold();
    let first = app.spawn(body(100, 2));
    app.control.until("the first step", |s| s.waiting).await;
    let mut clients = vec![first];
    let mut bodies = vec![body(100, 2)];
    for (seed, steps, n) in [(0, 2, 1), (10, 2, 2), (20, 2, 3), (30, 3, 1), (40, 3, 1), (50, 2, 1)] {
        let mut b = body(seed, steps);
        b["n"] = json!(n);
        clients.push(app.spawn(b.clone()));
        bodies.push(b);
        app.until_queue(clients.len() - 1, 1).await;
    }
    app.control.release();
    let mut answers = Vec::new();
    for client in clients {
        answers.push(client.answer().await);
    }
    let batches = app.control.state().batches;
    let shared = [
        vec![100],
        vec![100, 0, 10, 11],
        vec![0, 10, 11, 20],
        vec![20, 21, 22, 30],
        vec![21, 22, 30, 40],
        vec![30, 40, 50],
        vec![40, 50],
    ];
    assert_eq!(batches, shared);
    let alone = TestApp::new(&[]);
    for (answer, body) in answers.iter().zip(bodies) {
        let expected = alone.post(body.clone()).await;
        for i in 0..body["n"].as_u64().unwrap_or(1) as usize {
            assert_eq!(answer.file(i), expected.file(i));
            assert_eq!(decode_png(&answer.file(i)).0, 8);
        }
    }
    assert_eq!(app.metric("hypergen_batch_size_sum").await, Some(22.0));
    assert_eq!(app.metric("hypergen_batch_size_count").await, Some(7.0));
}

#[tokio::test]
async fn nobody_fails_for_anothers_request() {
    let app = TestApp::new(&["--max-batch-size", "8"]);
    for bad in ["panic", "out of memory"] {
        app.control.hold();
        let first = app.spawn(body(0, 1));
        app.control.until("the first step", |s| s.waiting).await;
        let mut clients = Vec::new();
        for prompt in ["a", bad, "b"] {
            let mut b = body(1, 1);
            b["prompt"] = json!(prompt);
            clients.push(app.spawn(b));
            app.until_queue(clients.len(), 1).await;
        }
        app.control.release();
        first.answer().await.ok();
        let mut statuses = Vec::new();
        for client in clients {
            statuses.push(client.answer().await.status.as_u16());
        }
        assert_eq!(statuses, [200, 500, 200], "{bad}");
        app.until_queue(0, 0).await;
    }
}

#[tokio::test]
async fn one_of_a_batch_may_leave() {
    let app = TestApp::new(&["--max-batch-size", "4"]);
    app.control.hold();
    let first = app.spawn(body(0, 1));
    app.control.until("the first step", |s| s.waiting).await;
    let leaving = app.spawn(body(1, 5));
    app.until_queue(1, 1).await;
    let staying = app.spawn(body(2, 5));
    app.until_queue(2, 1).await;
    app.control.permit(1);
    app.control.until("the batch", |s| s.batches.len() == 2 && s.waiting).await;
    drop(leaving);
    until_left(&app).await;
    app.control.release();
    first.answer().await.ok();
    let expected = TestApp::new(&[]).post(body(2, 5)).await.file(0);
    assert_eq!(staying.answer().await.file(0), expected);
    app.until_queue(0, 0).await;
}
