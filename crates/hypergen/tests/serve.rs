//! The real binary as it serves: start, one picture, end. What the API does is
//! tested in the server crate and, with real clients, in `tests/clients`.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use common::{Sandbox, one_error, text};

/// A server that runs, and is ended with the test.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(sandbox: &Sandbox, args: &[&str]) -> Self {
        let mut child = sandbox
            .command(&[&["serve", "--port", "0", "--log-level", "warn"], args].concat())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut said = String::new();
        let address = loop {
            let start = said.len();
            assert_ne!(stderr.read_line(&mut said).expect("a line"), 0, "it ended: {said}");
            let line = &said[start..];
            if let Some((_, rest)) = line.split_once("http://") {
                break rest.split('/').next().expect("an address").to_owned();
            }
        };
        // What else it says must not fill the pipe.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Self { child, address }
    }

    /// Sends a request, and returns its status line with the body.
    fn ask(&self, method: &str, path: &str, body: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}",
            self.address
        )
        .expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let split = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("an empty line");
        let head = text(&answer[..split]);
        (head.lines().next().expect("a status").to_owned(), answer[split + 4..].to_vec())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[cfg(unix)]
fn a_server_draws_what_generate_draws_and_ends_well() {
    let sandbox = Sandbox::new();
    let mut server = Running::start(&sandbox, &[]);
    let (status, _) = server.ask("GET", "/health", "");
    assert!(status.contains(" 200 "), "{status}");
    let request = r#"{"prompt": "red apple", "seed": 7, "size": "auto", "num_inference_steps": 2, "response_format": "url"}"#;
    let (status, body) = server.ask("POST", "/v1/images/generations", request);
    assert!(status.contains(" 200 "), "{status}: {}", text(&body));
    let answer: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
    let url = answer["data"][0]["url"].as_str().expect("a link");
    let path = url.strip_prefix(&format!("http://{}", server.address)).expect("a link to this server");
    let (status, picture) = server.ask("GET", path, "");
    assert!(status.contains(" 200 "), "{status}");
    let drawn =
        sandbox.run(&["generate", "red apple", "--seed", "7", "--size", "auto", "--steps", "2", "-o", "-"]);
    assert!(drawn.stdout == picture, "the same file, byte for byte");

    assert_eq!(sandbox.temporary().len(), 1, "the pictures' folder");
    // A client that stays connected must not hold that folder.
    let _idle = TcpStream::connect(&server.address).expect("it listens");
    let told =
        Command::new("kill").args(["-s", "TERM", &server.child.id().to_string()]).status().expect("kill");
    assert!(told.success());
    assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
    assert_eq!(sandbox.temporary(), [""; 0], "nothing is left behind");
}

#[test]
fn a_settings_file_is_read_and_overruled() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.file("settings.toml"), "port = 1\napi-key = \"sk-test\"\n").expect("written");
    let server = Running::start(&sandbox, &["--config", "settings.toml"]);
    let (status, _) = server.ask("GET", "/v1/models", "");
    assert!(status.contains(" 401 "), "the file's key is needed: {status}");
}

#[test]
fn what_cannot_be_served_is_one_line() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.file("bad.toml"), "prot = 1\n").expect("written");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    for (args, words) in [
        (&["no/such/model", "--port", "0"] as &[&str], "no/such/model"),
        (&["--config", "bad.toml"], "'prot'"),
        (&["--config", "missing.toml"], "missing.toml"),
        (&["no/such/model", "--port", &port], "cannot listen on 127.0.0.1"),
        (&["--device", "cuda"], "--device cpu"),
    ] {
        let output = sandbox.run(&[&["serve"], args].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let line = one_error(&text(&output.stderr));
        assert!(line.contains(words), "{args:?}: {line}");
    }
    assert_eq!(sandbox.run(&["serve", "--port", "many"]).status.code(), Some(2));
}
