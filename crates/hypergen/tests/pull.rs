//! The real binary and models by their hub id: what it finds in a cache, and
//! what it says where there is none. Downloads are tested where they are made.

mod common;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use common::{Sandbox, one_error, text};

/// An address where nobody listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    format!("http://{}", listener.local_addr().expect("an address"))
}

fn command(sandbox: &Sandbox, args: &[&str]) -> Command {
    let mut command = sandbox.command(args);
    for name in [
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    command.env("HF_HOME", sandbox.file("home")).env("HF_ENDPOINT", nowhere());
    command
}

fn error(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("the binary runs");
    assert_eq!(status.code(), Some(1), "{}", text(&stderr));
    assert!(stdout.is_empty());
    one_error(&text(&stderr))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("a copy")),
        }
    }
}

#[test]
fn a_model_in_the_cache_is_drawn_with_by_its_name_and_without_a_network() {
    let sandbox = Sandbox::new();
    let home = sandbox.file("home/hub/models--owner--kitten");
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/emoji");
    copy(&emoji, &home.join("snapshots/0123abc"));
    fs::create_dir(home.join("refs")).expect("a folder");
    fs::write(home.join("refs/main"), "0123abc").expect("written");
    let args =
        ["generate", "red apple", "--model", "owner/kitten", "--steps", "1", "--seed", "1", "-o", "a.png"];
    let output = command(&sandbox, &args).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let png = fs::read(sandbox.file("a.png")).expect("a picture");
    let name = b"Model: kitten,";
    assert!(png.windows(name.len()).any(|w| w == name), "the picture says which model drew it");
}

#[test]
fn what_is_nowhere_says_what_was_tried() {
    let sandbox = Sandbox::new();
    let line = error(command(&sandbox, &["generate", "x", "--model", "owner/name"]));
    for words in ["there is no owner/name here", "cannot reach http://127.0.0.1:", "home/hub"] {
        assert!(line.contains(words), "{line}");
    }
    let line = error(command(&sandbox, &["generate", "x", "--model", "./no/model"]));
    assert!(line.contains("there is no model at ./no/model") && line.contains("OWNER/NAME"), "{line}");
    let line = error(command(&sandbox, &["serve", "--port", "0", "owner/name"]));
    assert!(line.contains("cannot reach"), "{line}");
    let line = error(command(&sandbox, &["pull", "owner/name"]));
    assert!(line.contains("cannot reach"), "{line}");
    let line = error(command(&sandbox, &["pull", "name"]));
    assert!(line.contains("OWNER/NAME"), "{line}");
    fs::write(sandbox.file("here"), "").expect("written");
    let line = error(command(&sandbox, &["pull", "here"]));
    assert!(line.contains("is on this machine already"), "{line}");
    let mut offline = command(&sandbox, &["generate", "x", "--model", "owner/name"]);
    offline.env("HF_HUB_OFFLINE", "1");
    assert!(error(offline).contains("HF_HUB_OFFLINE"));
}
