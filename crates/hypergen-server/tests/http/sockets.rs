//! Over real sockets: clients that go away, stall, or talk nonsense.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hypergen_server::{Exit, ServeConfig, ServeError, Server};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::fake::{Control, Fake, PATIENCE};

/// A server on a free port.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) control: Arc<Control>,
    pub(crate) stop: UnboundedSender<()>,
    pub(crate) exit: JoinHandle<Result<Exit, ServeError>>,
}

impl Running {
    pub(crate) fn new(args: &[&str]) -> Self {
        let args = args.iter().copied().chain(["--port", "0", "--log-format", "json"]);
        let server = Server::bind(ServeConfig::parse_from(args).expect("arguments")).expect("a port");
        let address = server.address();
        let fake = Fake::new();
        let control = Arc::clone(&fake.control);
        let (stop, receiver) = unbounded_channel();
        let exit = tokio::spawn(server.run_until(Box::new(fake), receiver));
        Self { address, control, stop, exit }
    }

    /// A connection, once the server takes some.
    pub(crate) async fn connect(&self) -> Connection {
        let mut connected = None;
        crate::support::until("the server to listen", || {
            connected = TcpStream::connect(self.address).ok();
            connected.is_some()
        })
        .await;
        let stream = connected.expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        Connection { stream }
    }

    /// Asks for pictures on a connection of its own.
    pub(crate) async fn ask(&self, what: &str, body: &str) -> (u16, Value) {
        let mut connection = self.connect().await;
        let head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n";
        let text = request(head, body);
        let asking = tokio::task::spawn_blocking(move || {
            connection.send(&text);
            connection.answer()
        });
        let (status, body) = asking.await.expect("no panic");
        (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{what}: {e} in {body}")))
    }

    pub(crate) async fn health(&self) -> Value {
        let mut connection = self.connect().await;
        tokio::task::spawn_blocking(move || {
            connection.send("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            serde_json::from_str(&connection.answer().1).expect("JSON")
        })
        .await
        .expect("no panic")
    }

    pub(crate) async fn until_queue(&self, waiting: usize, in_progress: usize) {
        let start = std::time::Instant::now();
        loop {
            let health = self.health().await;
            if health["queue_size"] == json!(waiting) && health["in_progress"] == json!(in_progress) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "wanted {waiting} and {in_progress}, but it is {health}");
        }
    }
}

/// A client's end of a connection.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
}

impl Connection {
    pub(crate) fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("sent");
    }

    /// Status and body of the next answer, by its Content-Length.
    pub(crate) fn answer(&mut self) -> (u16, String) {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if self.stream.read(&mut byte).expect("an answer") == 0 {
                return (0, String::from_utf8_lossy(&head).into_owned());
            }
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("ASCII").to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).expect("a body");
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    /// Whether the server closes, having said nothing more.
    pub(crate) fn closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}

/// A request with a body.
fn request(head: &str, body: &str) -> String {
    format!("{head}content-length: {}\r\n\r\n{body}", body.len())
}

/// A request for a picture of so many steps.
pub(crate) fn picture(seed: u64, steps: usize) -> String {
    let body = json!({"prompt": "x", "size": "8x8", "seed": seed, "num_inference_steps": steps}).to_string();
    let head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    request(head, &body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_a_client_leaves_it_is_noticed_at_once() {
    let server = Running::new(&[]);
    server.control.hold();
    let leave: [fn(Connection); 3] = [
        drop,
        |connection| {
            // Half closed: what a killed client's system sends looks the same.
            connection.stream.shutdown(Shutdown::Write).expect("half closed");
            std::thread::spawn(move || {
                let mut connection = connection;
                let _ = connection.closed();
            });
        },
        |connection| {
            // Reset: what a crash with unread data does.
            socket2::SockRef::from(&connection.stream).set_linger(Some(Duration::ZERO)).expect("set");
        },
    ];
    for (i, leave) in leave.into_iter().enumerate() {
        let mut running = server.connect().await;
        running.send(&picture(100, 50));
        server.control.until("the step", |s| s.waiting && s.batches.len() == i + 1).await;
        server.until_queue(0, 1).await;
        let mut waiting = server.connect().await;
        waiting.send(&picture(200, 50));
        server.until_queue(1, 1).await;
        leave(waiting);
        server.until_queue(0, 1).await;
        leave(running);
        // The running one is only seen to be unwanted at the next step.
        let before = server.control.state().steps;
        let start = std::time::Instant::now();
        while server.control.state().cancelled <= i {
            server.control.permit(1);
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert!(start.elapsed() < PATIENCE, "way {i} of leaving is not noticed");
        }
        server.until_queue(0, 0).await;
        let steps = server.control.state().steps;
        assert!(steps < before + 50, "it was drawn to the end");
        server.control.release();
        server.control.hold();
    }
    assert_eq!(server.control.state().batches, [[100], [100], [100]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_serves_many_requests() {
    let server = Running::new(&[]);
    let mut connection = server.connect().await;
    tokio::task::spawn_blocking(move || {
        for seed in 0..3 {
            connection.send(&picture(seed, 2));
            let (status, body) = connection.answer();
            assert_eq!(status, 200, "{body}");
            assert!(body.contains(&format!("\"seed\":{seed}")));
        }
        connection.send("GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!(connection.answer().0, 404);
        connection.send(&request("POST /nothing HTTP/1.1\r\nhost: x\r\n", "x".repeat(100_000).as_str()));
        assert_eq!(connection.answer().0, 404, "a body that nobody reads is taken in");
        connection.send(&picture(7, 2));
        assert_eq!(connection.answer().0, 200);
    })
    .await
    .expect("no panic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_stalled_clients_are_given_up() {
    let server = Running::new(&["--read-timeout", "300ms"]);
    let mut body = server.connect().await;
    let mut head = server.connect().await;
    let mut idle = server.connect().await;
    tokio::task::spawn_blocking(move || {
        body.send("POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"prompt\"");
        let (status, text) = body.answer();
        assert_eq!(status, 408, "{text}");
        assert!(text.contains("\"detail\"") && text.contains("did not arrive"), "{text}");
        assert!(body.closed(), "the rest of the body is not a request");
        head.send("GET /health HTTP/1.1\r\nhost:");
        assert!(matches!(head.answer().0, 0 | 408));
        assert!(idle.closed());
    })
    .await
    .expect("no panic");
    assert_eq!(server.ask("after it all", r#"{"prompt": "x", "size": "8x8"}"#).await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_body_gets_its_answer_before_the_connection_ends() {
    let server = Running::new(&["--max-body-size", "10KiB"]);
    for size in [20_000, 150_000] {
        let (status, body) = server.ask("large", &"x".repeat(size)).await;
        assert_eq!(status, 413, "{body}");
        assert!(body["detail"].as_str().expect("text").contains("10240"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_leaves_it_serving() {
    let server = Running::new(&["--read-timeout", "2s"]);
    let nonsense: [&[u8]; 9] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n\r\n\r\n\r\n",
    ];
    for bytes in nonsense {
        let mut connection = server.connect().await;
        let status = tokio::task::spawn_blocking(move || {
            connection.stream.write_all(bytes).expect("sent");
            let _ = connection.stream.shutdown(Shutdown::Write);
            connection.answer().0
        });
        let status = status.await.expect("no panic");
        assert!(status < 500, "{status} for {}", bytes.escape_ascii());
    }
    assert_eq!(server.ask("after it all", r#"{"prompt": "x", "size": "8x8"}"#).await.0, 200);
    assert_eq!(server.health().await["status"], "ok");
}

/// What RFC 9112 asks of a server: one Host (3.2), and 501 for a coding that
/// it does not know (6.1).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_http_forbids_are_refused() {
    let server = Running::new(&[]);
    let post = |headers: &str, body: &str| {
        format!(
            "POST /v1/images/generations HTTP/1.1\r\ncontent-type: application/json\r\n{headers}\r\n{body}"
        )
    };
    let chunks = "1e\r\n{\"prompt\": \"x\", \"size\": \"8x8\"}\r\n0\r\n\r\n";
    for (text, expected, word) in [
        ("GET /health HTTP/1.1\r\n\r\n".to_owned(), 400, "no Host"),
        ("GET /health HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n".to_owned(), 400, "several Host"),
        ("GET /health HTTP/1.1\r\nhost: a b\r\n\r\n".to_owned(), 400, "is no host"),
        ("GET /health HTTP/1.1\r\nhost:\r\n\r\n".to_owned(), 200, "ok"),
        ("GET /health HTTP/1.0\r\n\r\n".to_owned(), 200, "ok"),
        (post("host: x\r\ntransfer-encoding: chunked\r\n", chunks), 200, "b64_json"),
        (post("host: x\r\ntransfer-encoding: gzip, chunked\r\n", chunks), 501, "'gzip, chunked'"),
        (post("transfer-encoding: chunked\r\n", chunks), 400, "no Host"),
    ] {
        let mut connection = server.connect().await;
        let sent = text.clone();
        let answer = tokio::task::spawn_blocking(move || {
            connection.send(&sent);
            connection.answer()
        });
        let (status, body) = answer.await.expect("no panic");
        assert_eq!(status, expected, "{text:?}: {body}");
        assert!(body.contains(word), "{text:?}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_the_others_wait() {
    let server = Running::new(&["--max-connections", "2", "--read-timeout", "500ms"]);
    let _one = server.connect().await;
    let _two = server.connect().await;
    // The third is taken once the first two were given up for saying nothing.
    assert_eq!(server.health().await["status"], "ok");
}

#[tokio::test]
async fn an_address_that_is_taken_is_an_error_with_the_mend() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let error =
        Server::bind(ServeConfig::parse_from(["--port", &port]).expect("arguments")).expect_err("taken");
    let text = error.to_string();
    assert!(text.contains(&port) && text.contains("--port"), "{text}");
    let config = ServeConfig::parse_from(["--host", "no such host"]).expect("arguments");
    assert!(Server::bind(config).expect_err("no host").to_string().contains("--host"));
}
