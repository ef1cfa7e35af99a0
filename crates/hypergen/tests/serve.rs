//! The real binary as it serves: start, one picture, end. What the API does is
//! tested in the server crate and, with real clients, in `tests/clients`.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};

use common::{Sandbox, one_error, text};

/// A server that runs, and is ended with the test.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(sandbox: &Sandbox, args: &[&str]) -> Self {
        let (server, mut stderr) =
            Self::spawn(sandbox.command(&[&["serve", "--port", "0", "--log-level", "warn"], args].concat()));
        // What else it says must not fill the pipe.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        server
    }

    /// Starts it, reads until it says its address, and hands over the rest.
    fn spawn(mut command: Command) -> (Self, BufReader<ChildStderr>) {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it runs");
        let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut said = String::new();
        let address = loop {
            let start = said.len();
            assert_ne!(stderr.read_line(&mut said).expect("a line"), 0, "it ended: {said}");
            let line = &said[start..];
            // For people, or as the event of a JSON log.
            if let Some((_, rest)) = line.split_once("http://").or_else(|| line.split_once("\"address\":\""))
            {
                break rest.split(['/', '"']).next().expect("an address").to_owned();
            }
        };
        (Self { child, address }, stderr)
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

const PICTURE: &str =
    r#"{"prompt": "red apple", "size": "64x64", "num_inference_steps": 1, "response_format": "b64_json"}"#;

/// `hypergen serve 2>&1 | head -3`: the reader leaves, and every line of the
/// log fails from then on.
#[test]
#[cfg(unix)]
fn a_closed_log_does_not_end_the_server() {
    let sandbox = Sandbox::new();
    for format in ["human", "json"] {
        let mut command =
            sandbox.command(&["serve", "--port", "0", "--log-level", "trace", "--log-format", format]);
        // The backtrace of a panic would be one more text for nobody.
        command.env("RUST_BACKTRACE", "full");
        let (mut server, stderr) = Running::spawn(command);
        drop(stderr);
        for _ in 0..2 {
            let (status, body) = server.ask("POST", "/v1/images/generations", PICTURE);
            assert!(status.contains(" 200 "), "{format}: {status}: {}", text(&body));
        }
        let (status, _) =
            server.ask("POST", "/v1/images/generations", r#"{"prompt": "x", "lora_path": "gone"}"#);
        assert!(status.contains(" 500 "), "{format}: {status}");
        terminate(&server);
        assert_eq!(server.child.wait().expect("it ends").code(), Some(0), "{format}");
    }
}

#[cfg(unix)]
fn terminate(server: &Running) {
    let told =
        Command::new("kill").args(["-s", "TERM", &server.child.id().to_string()]).status().expect("kill");
    assert!(told.success());
}

/// Its log goes where nothing can be written any more, so its address is known beforehand.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_under_the_log_does_not_end_the_server() {
    let sandbox = Sandbox::new();
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        free.local_addr().expect("an address").port().to_string()
    };
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let child = sandbox.command(&["serve", "--port", &port]).stderr(full).spawn().expect("it runs");
    let mut server = Running { child, address: format!("127.0.0.1:{port}") };
    let start = std::time::Instant::now();
    while TcpStream::connect(&server.address).is_err() {
        assert_eq!(server.child.try_wait().expect("a child"), None, "it ended");
        assert!(start.elapsed().as_secs() < 120, "it does not listen");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let (status, body) = server.ask("POST", "/v1/images/generations", PICTURE);
    assert!(status.contains(" 200 "), "{status}: {}", text(&body));
    terminate(&server);
    assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
}

/// Why a LoRA cannot be had is for the operator alone.
#[test]
fn the_log_has_the_reason_of_a_failure() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.file("loras")).expect("made");
    std::fs::write(sandbox.file("secret.safetensors"), "x").expect("written");
    let (mut server, mut stderr) =
        Running::spawn(sandbox.command(&["serve", "--port", "0", "--lora-dir", "loras"]));
    let request = r#"{"prompt": "x", "size": "64x64", "lora_path": "../secret"}"#;
    let (status, body) = server.ask("POST", "/v1/images/generations", request);
    assert!(status.contains(" 500 "), "{status}");
    assert!(!text(&body).contains("outside"), "{}", text(&body));
    server.child.kill().expect("killed");
    let mut log = String::new();
    stderr.read_to_string(&mut log).expect("a log");
    let why = log.lines().find(|line| line.contains("a LoRA cannot be had")).expect("a line");
    assert!(why.contains("../secret") && why.contains("outside the folder") && why.contains("req-"), "{why}");
    let answered = log.lines().find(|line| line.contains("answered")).expect("a line");
    assert!(answered.contains("status=500") && answered.contains("no LoRA '../secret'"), "{answered}");
}

#[test]
fn a_level_that_is_none_is_wrong_usage_wherever_it_stands() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.file("loud.toml"), "log-level = \"loud\"\n").expect("written");
    let serve = |args: &[&str], variable: Option<&str>| {
        let mut command = sandbox.command(&[&["serve", "no/such/model", "--port", "0"], args].concat());
        command.envs(variable.map(|value| ("HYPERGEN_LOG_LEVEL", value)));
        let output = command.output().expect("it runs");
        (output.status.code(), text(&output.stderr))
    };
    for (args, variable, named) in [
        (&["--log-level", "loud"] as &[&str], None, "'--log-level <LEVEL>'"),
        (&["--log-level", "hypergen_server"], None, "'--log-level <LEVEL>'"),
        (&[], Some("loud"), "'HYPERGEN_LOG_LEVEL'"),
        (&["--config", "loud.toml"], None, "'log-level in loud.toml'"),
    ] {
        let (code, said) = serve(args, variable);
        assert_eq!(code, Some(2), "{args:?}: {said}");
        assert!(
            said.contains(named) && said.contains("off, error, warn, info, debug, trace"),
            "{args:?}: {said}"
        );
    }
    // These get as far as the model, and its error is said.
    for (args, variable) in [
        (&["--log-level", "warning"] as &[&str], None),
        (&["--log-level", "off"], None),
        (&["--log-level", "WARN,hypergen_server=debug"], None),
        (&["--log-level", "debug"], Some("loud")),
        (&[], Some("")),
    ] {
        let (code, said) = serve(args, variable);
        assert_eq!(code, Some(1), "{args:?}: {said}");
        assert!(one_error(&said).contains("no/such/model"), "{args:?}: {said}");
    }
}

/// Where a setting did not come from a flag, an error names where it stands.
#[test]
fn errors_name_the_variable_or_the_file_that_is_wrong() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.file("s.toml"), "image-dir = \"/proc/self\"\nport = 0\n").expect("written");
    std::fs::write(sandbox.file("t.toml"), "port = \"many\"\n").expect("written");
    let serve = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = sandbox.command(&[&["serve"], args].concat());
        let output = command.envs(variables.iter().copied()).output().expect("it runs");
        (output.status.code(), text(&output.stderr))
    };
    let no_key = [("HYPERGEN_API_KEY", ""), ("HYPERGEN_PORT", "0")];
    for (args, variables, code, named, flag) in [
        (&[] as &[&str], &[("HYPERGEN_PORT", "many")] as &[_], 2, "HYPERGEN_PORT", "--port"),
        (&[], &[("HYPERGEN_MAX_QUEUE_SIZE", "0")], 2, "HYPERGEN_MAX_QUEUE_SIZE", "--max-queue-size"),
        (&[], &[("HYPERGEN_DEVICE", "cuda")], 1, "HYPERGEN_DEVICE", "--device"),
        (&[], &no_key, 1, "HYPERGEN_API_KEY is empty", "--api-key"),
        (&["--port", "0"], &[("HYPERGEN_IMAGE_DIR", "/proc/self")], 1, "HYPERGEN_IMAGE_DIR", "--image-dir"),
        (&["--config", "s.toml"], &[], 1, "image-dir in s.toml", "--image-dir"),
        (&["--config", "t.toml"], &[], 2, "port in t.toml", "--port"),
        (&["--port", "many"], &[("HYPERGEN_PORT", "1")], 2, "--port", "HYPERGEN_PORT"),
    ] {
        if cfg!(not(target_os = "linux")) && named.contains("mage") {
            continue;
        }
        let (found, said) = serve(args, variables);
        assert_eq!(found, Some(code), "{args:?} {variables:?}: {said}");
        let line = said.lines().find(|line| line.starts_with("error: ")).expect("an error");
        assert!(line.contains(named) && !line.contains(flag), "{args:?} {variables:?}: {line}");
    }
}

/// A script that sets a variable to nothing means to leave it out.
#[test]
fn empty_variables_are_none() {
    let sandbox = Sandbox::new();
    let help = sandbox.succeed(&["serve", "--help"]);
    let mut command = sandbox.command(&["serve", "--port", "0"]);
    let names: Vec<&str> =
        help.split("[env: ").skip(1).filter_map(|rest| rest.split([']', '=']).next()).collect();
    assert!(names.len() > 30, "{names:?}");
    command.envs(names.iter().filter(|name| **name != "HYPERGEN_API_KEY").map(|name| (name, "")));
    let (server, _stderr) = Running::spawn(command);
    let (status, body) = server.ask("GET", "/health", "");
    assert!(status.contains(" 200 ") && text(&body).contains("\"emoji\""), "{status}: {}", text(&body));
}

#[test]
fn switches_take_the_usual_words() {
    let sandbox = Sandbox::new();
    for (word, code) in [("1", 1), ("0", 1), ("yes", 1), ("TRUE", 1), ("off", 1), ("", 1), ("maybe", 2)] {
        for name in ["HYPERGEN_LOG_PROMPTS", "HYPERGEN_NO_METADATA"] {
            let mut command = sandbox.command(&["serve", "no/such/model", "--port", "0"]);
            let output = command.env(name, word).output().expect("it runs");
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(code), "{name}={word}: {said}");
            assert!(said.contains(if code == 2 { name } else { "no/such/model" }), "{name}={word}: {said}");
        }
    }
}
