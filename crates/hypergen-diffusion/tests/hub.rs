//! Models by their hub id, against a local server that speaks the hub's
//! protocol and can be told to cut connections, to refuse and to lie.

#![cfg(feature = "hub")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use hypergen_diffusion::hub::{Hub, ModelId};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server holds and how it behaves.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Bytes after which a file's next answers break off.
    cuts: HashMap<String, Vec<usize>>,
    /// Status and error code of every answer.
    refuse: Option<(u16, &'static str)>,
    /// Whether ranges are ignored.
    no_ranges: bool,
    /// A byte that goes wrong on the way.
    spoil: Option<String>,
    /// What was asked: method, path, range.
    log: Vec<(String, String, Option<String>)>,
    /// Last token.
    token: Option<String>,
}

struct Server {
    state: Arc<Mutex<State>>,
    endpoint: String,
}

impl Server {
    fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that leaves is part of the tests.
                let _ = answer(stream, &shared);
            }
        });
        Self { state, endpoint }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panicked with it")
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub { endpoint: self.endpoint.clone(), cache: cache.to_owned(), token: None, offline: false }
    }

    /// Requests for a file's bytes since the last call, with their ranges.
    fn gets(&self, file: &str) -> Vec<Option<String>> {
        let mut state = self.state();
        let log = std::mem::take(&mut state.log);
        log.into_iter()
            .filter(|(m, p, _)| m == "GET" && p.ends_with(file))
            .map(|(_, _, range)| range)
            .collect()
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let mut state = state.lock().expect("no test panicked with it");
    state.log.push((method.clone(), path.clone(), headers.get("range").cloned()));
    state.token = headers.get("authorization").cloned();
    if let Some((status, code)) = state.refuse {
        let code = if code.is_empty() { String::new() } else { format!("X-Error-Code: {code}\r\n") };
        return write!(
            stream,
            "HTTP/1.1 {status} No\r\n{code}Content-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    if path.starts_with("/api/models/") {
        let files: Vec<_> = state.files.keys().map(|f| serde_json::json!({"rfilename": f})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": files}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let name = path.split_once(&format!("/resolve/{COMMIT}/")).map_or(path.as_str(), |(_, name)| name);
    let name = name.trim_start_matches("/elsewhere/").to_owned();
    let Some(bytes) = state.files.get(&name).cloned() else {
        return write!(
            stream,
            "HTTP/1.1 404 No\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let large = name.ends_with(".safetensors");
    if large && !path.starts_with("/elsewhere/") {
        // Large files lie elsewhere; the hub says what they are and where.
        let etag = hex(&Sha256::digest(&bytes));
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n\
             Location: http://{}/elsewhere/{name}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            bytes.len(),
            stream.local_addr()?
        );
    }
    let range = headers.get("range").filter(|_| !state.no_ranges);
    let start = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let begin = start.unwrap_or(0).min(bytes.len());
    let status = if start.is_some() { "206 Partial Content" } else { "200 OK" };
    let etag = hex(&Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat()));
    write!(
        stream,
        "HTTP/1.1 {status}\r\nX-Repo-Commit: {COMMIT}\r\nETag: W/\"{etag}\"\r\nContent-Length: {}\r\n\
         Content-Range: bytes {begin}-{}/{}\r\nConnection: close\r\n\r\n",
        bytes.len() - begin,
        bytes.len().saturating_sub(1),
        bytes.len()
    )?;
    if method == "HEAD" {
        return Ok(());
    }
    let mut body = bytes[begin..].to_vec();
    if state.spoil.as_ref() == Some(&name) {
        body.iter_mut().for_each(|b| *b ^= 1);
    }
    let cut = state.cuts.get_mut(&name).and_then(|cuts| (!cuts.is_empty()).then(|| cuts.remove(0)));
    body.truncate(cut.unwrap_or(body.len()));
    stream.write_all(&body)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A model's files; contents count only for the hub.
fn model() -> Vec<(&'static str, Vec<u8>)> {
    let large: Vec<u8> = (0..100_000u32).flat_map(|i| i.to_le_bytes()).collect();
    vec![
        (
            "model_index.json",
            br#"{"unet": ["diffusers", "X"], "vae": ["diffusers", "X"], "text_encoder": ["t", "X"], "scheduler": ["d", "X"], "tokenizer": ["t", "X"], "safety_checker": [null, null]}"#.to_vec(),
        ),
        ("scheduler/scheduler_config.json", b"{}".to_vec()),
        ("tokenizer/vocab.json", b"{\"a\": 0}".to_vec()),
        ("tokenizer/merges.txt", b"#version\n".to_vec()),
        ("text_encoder/config.json", b"{\"b\": 1}".to_vec()),
        ("text_encoder/model.safetensors", large[..1000].to_vec()),
        ("text_encoder/model.fp16.safetensors", large[..500].to_vec()),
        ("unet/config.json", b"{\"c\": 2}".to_vec()),
        ("unet/diffusion_pytorch_model.safetensors", large.clone()),
        ("vae/config.json", b"{\"d\": 3}".to_vec()),
        ("vae/diffusion_pytorch_model.safetensors", large[4..2000].to_vec()),
        ("safety_checker/model.safetensors", large[..16].to_vec()),
        ("README.md", b"words".to_vec()),
        ("old.ckpt", b"PK".to_vec()),
    ]
}

fn id() -> ModelId {
    "owner/model".parse().expect("an id")
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn a_model_is_downloaded_once_and_laid_out_as_other_tools_do() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    let hub = server.hub(cache.path());
    assert_eq!(hub.cached(&id()), None);
    let mut seen = vec![];
    let folder =
        hub.locate(&id(), &mut |p| seen.push((p.file.to_owned(), p.done, p.total))).expect("a model");
    let home = cache.path().join("models--owner--model");
    assert_eq!(folder, home.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(home.join("refs/main")).expect("a reference"), COMMIT);
    for (name, bytes) in model() {
        let wanted =
            !["safety", "README", "old", "text_encoder/model.safe"].iter().any(|p| name.starts_with(p));
        assert_eq!(folder.join(name).exists(), wanted, "{name}");
        if wanted {
            assert_eq!(fs::read(folder.join(name)).expect("a file"), bytes, "{name}");
        }
    }
    #[cfg(unix)]
    {
        let target = fs::read_link(folder.join(UNET)).expect("a link");
        let etag = hex(&Sha256::digest(&server.state().files[UNET]));
        assert_eq!(target, Path::new("../../../blobs").join(etag));
    }
    // The bar begins at nothing, never goes back, and ends at the whole.
    assert!(seen.windows(2).all(|w| w[0].1 <= w[1].1), "{seen:?}");
    assert_eq!(seen.last().map(|l| l.1), seen.last().map(|l| l.2));

    // Whole in the cache: nobody is asked, server or none.
    server.state().log.clear();
    assert_eq!(hub.locate(&id(), &mut |_| {}).expect("a model"), folder);
    assert!(server.state().log.is_empty());
    let away = Hub { endpoint: "http://127.0.0.1:9".into(), offline: true, ..hub.clone() };
    assert_eq!(away.locate(&id(), &mut |_| {}).expect("a model"), folder);

    // Pulling again asks, and downloads nothing.
    hub.pull(&id(), &mut |_| {}).expect("a model");
    assert!(server.gets(".safetensors").is_empty());
    // A file that is gone is downloaded again, and no other.
    fs::remove_file(folder.join(UNET).canonicalize().expect("a blob")).expect("removed");
    assert_eq!(hub.cached(&id()), None);
    hub.locate(&id(), &mut |_| {}).expect("a model");
    assert_eq!(server.gets(".safetensors").len(), 2, "the hub, and where the bytes lie");
}

#[test]
fn a_cut_download_goes_on_where_it_was() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    server.state().cuts.insert(UNET.into(), vec![150_000, 0, 100_000]);
    let folder = server.hub(cache.path()).locate(&id(), &mut |_| {}).expect("a model");
    assert_eq!(fs::read(folder.join(UNET)).expect("a file"), server.state().files[UNET]);
    let ranges: Vec<_> = server.gets(&format!("/elsewhere/{UNET}")).into_iter().flatten().collect();
    assert_eq!(ranges, ["bytes=150000-", "bytes=150000-", "bytes=250000-"]);
}

#[test]
fn a_download_that_is_given_up_goes_on_in_the_next_run() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    server.state().cuts.insert(UNET.into(), [vec![30_000], vec![0; 5]].concat());
    let hub = server.hub(cache.path());
    let error = hub.locate(&id(), &mut |_| {}).expect_err("cut off").message;
    assert!(error.contains("cannot reach") && error.contains("run the command again"), "{error}");
    assert_eq!(hub.cached(&id()), None);
    server.state().log.clear();
    hub.locate(&id(), &mut |_| {}).expect("a model");
    assert_eq!(server.gets(&format!("/elsewhere/{UNET}")), [Some("bytes=30000-".to_owned())]);
}

#[test]
fn a_server_without_ranges_begins_again() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    server.state().cuts.insert(UNET.into(), vec![30_000]);
    server.state().no_ranges = true;
    let folder = server.hub(cache.path()).locate(&id(), &mut |_| {}).expect("a model");
    assert_eq!(fs::read(folder.join(UNET)).expect("a file"), server.state().files[UNET]);
}

#[test]
fn what_comes_damaged_is_thrown_away() {
    for file in [UNET, "unet/config.json"] {
        let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
        server.state().spoil = Some(file.into());
        let hub = server.hub(cache.path());
        let error = hub.locate(&id(), &mut |_| {}).expect_err("damaged").message;
        assert!(error.contains(file) && error.contains("came damaged"), "{error}");
        let blobs = fs::read_dir(cache.path().join("models--owner--model/blobs")).expect("blobs").flatten();
        assert!(blobs.into_iter().all(|b| !b.file_name().to_string_lossy().contains("incomplete")));
        server.state().spoil = None;
        hub.locate(&id(), &mut |_| {}).expect("a model, the second time");
    }
}

#[test]
fn each_refusal_has_its_own_line() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    let hub = server.hub(cache.path());
    let known = Hub { token: Some("secret-token".into()), ..hub.clone() };
    let cases: &[(&Hub, (u16, &str), &[&str])] = &[
        (&hub, (401, "RepoNotFound"), &["there is no model owner/model", "set HF_TOKEN"]),
        (&hub, (404, ""), &["there is no model owner/model", "check its name"]),
        (&known, (404, "RepoNotFound"), &["there is no model owner/model", "the token has no access"]),
        (&hub, (401, "GatedRepo"), &["owner/model is gated", "accept its terms", "set HF_TOKEN"]),
        (&known, (403, "GatedRepo"), &["owner/model is gated", "the account that the token is of"]),
        (&known, (401, ""), &["does not know the token", "HF_TOKEN"]),
        (&hub, (404, "RevisionNotFound"), &["no revision 'main'"]),
        (&hub, (500, ""), &["answered 500", "try again later"]),
    ];
    for (hub, refuse, words) in cases {
        server.state().refuse = Some(*refuse);
        let error = hub.locate(&id(), &mut |_| {}).expect_err("refused").message;
        for word in *words {
            assert!(error.contains(word), "{refuse:?}: no '{word}' in: {error}");
        }
        assert!(!error.contains("secret") && !error.contains('\n'), "{error}");
    }
    let token = server.state().token.clone();
    assert_eq!(token, None, "the last request had none");
    server.state().refuse = None;
    known.locate(&id(), &mut |_| {}).expect("a model");
    let asked = |id: &str| hub.locate(&id.parse().expect("an id"), &mut |_| {}).expect_err("none").message;
    assert!(asked("owner/other/no.safetensors").contains("no file no.safetensors"));
}

#[test]
fn no_network_is_said_to_be_that() {
    let cache = tempfile::tempdir().expect("a folder");
    // A port that was free a moment ago: nobody listens there.
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let hub = Hub {
        endpoint: format!("http://127.0.0.1:{port}"),
        cache: cache.path().to_owned(),
        token: None,
        offline: false,
    };
    let error = hub.locate(&id(), &mut |_| {}).expect_err("no network").message;
    assert!(error.contains("cannot reach") && error.contains("not whole in the cache"), "{error}");
    let hub = Hub { offline: true, ..hub };
    let error = hub.locate(&id(), &mut |_| {}).expect_err("offline").message;
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
}

/// A device that is always full stands in for the disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_to_be_that() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    let etag = hex(&Sha256::digest(&server.state().files[UNET]));
    let blobs = cache.path().join("models--owner--model/blobs");
    fs::create_dir_all(&blobs).expect("a folder");
    std::os::unix::fs::symlink("/dev/full", blobs.join(format!("{etag}.incomplete"))).expect("a link");
    let error = server.hub(cache.path()).locate(&id(), &mut |_| {}).expect_err("a full disk").message;
    assert!(error.contains("the disk is full") && error.contains("HF_HOME"), "{error}");
}

#[test]
fn a_single_file_of_a_repository_is_enough() {
    let files =
        [("sd_xl.safetensors", vec![7; 5000]), ("other.safetensors", vec![8; 10]), ("README.md", vec![])];
    let (server, cache) = (Server::start(&files), tempfile::tempdir().expect("a folder"));
    let hub = server.hub(cache.path());
    let id: ModelId = "owner/files/sd_xl.safetensors".parse().expect("an id");
    let path = hub.locate(&id, &mut |_| {}).expect("a file");
    assert_eq!(fs::read(&path).expect("a file"), [7; 5000]);
    assert_eq!(hub.cached(&id), Some(path));
    assert!(server.gets("other.safetensors").is_empty());
    let error =
        hub.locate(&"owner/files".parse().expect("an id"), &mut |_| {}).expect_err("no folder").message;
    assert!(
        error.contains("no model_index.json") && error.contains("OWNER/NAME/other.safetensors"),
        "{error}"
    );
}

/// Both want the same files at the same time, and get them.
#[test]
fn two_at_once_do_not_disturb_each_other() {
    let (server, cache) = (Server::start(&model()), tempfile::tempdir().expect("a folder"));
    let hub = server.hub(cache.path());
    std::thread::scope(|scope| {
        let runs = [(); 2].map(|()| scope.spawn(|| hub.pull(&id(), &mut |_| {}).expect("a model")));
        let folders = runs.map(|run| run.join().expect("no panic"));
        assert_eq!(folders[0], folders[1]);
    });
    assert!(hub.cached(&id()).is_some());
    let elsewhere = server.gets(&format!("/elsewhere/{UNET}"));
    assert_eq!(elsewhere.len(), 1, "{elsewhere:?}");
}
