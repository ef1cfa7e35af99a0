//! The hub's protocol: listing a repository, asking for a file's identity, and
//! reading its bytes from anywhere on. Nothing here touches the disk.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{Hub, ModelId};

/// Longest wait for a connection or the begin of an answer.
const WAIT: Duration = Duration::from_secs(30);
/// Longest time for one answer's bytes. A download that takes longer is cut
/// and goes on where it was, so that one that stalls does too.
const BODY: Duration = Duration::from_secs(300);
/// A listing is no larger than this.
const MAX_LISTING: u64 = 64 << 20;
/// Redirections within the hub that are followed for a file's identity.
const REDIRECTIONS: usize = 5;

/// Why there is no answer that can be used.
#[derive(Debug)]
pub(super) enum Failure {
    Missing,
    NoRevision,
    NoFile(String),
    Gated,
    BadToken,
    Status(u16, String),
    Network(String),
    Disk(PathBuf, io::Error),
    Damaged(String, String),
    Protocol(String),
}

/// A repository's files at one commit.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What tells a file's contents apart from any other's.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// SHA-256 of large files, git's hash of small ones.
    pub(super) etag: String,
    pub(super) size: u64,
}

/// A connection to a hub.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls_graviola::default_provider()))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .user_agent(concat!("hypergen/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(WAIT))
            .timeout_recv_response(Some(WAIT))
            .timeout_recv_body(Some(BODY))
            .build();
        Self { hub, agent: config.new_agent() }
    }

    fn token(&self) -> String {
        self.hub.token.as_ref().map(|t| format!("Bearer {t}")).unwrap_or_default()
    }

    /// The repository's files, and the commit that its revision is at.
    pub(super) fn listing(&self, id: &ModelId) -> Result<Listing, Failure> {
        let revision = id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.hub.endpoint, id.repository);
        let mut request = self.agent.get(&url);
        if self.hub.token.is_some() {
            request = request.header("authorization", self.token());
        }
        let response = request.call().map_err(network)?;
        let mut response = self.accepted(response, &id.repository)?;
        let bytes = response.body_mut().with_config().limit(MAX_LISTING).read_to_vec().map_err(network)?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|e| {
            Failure::Protocol(format!("its list of {}'s files is no JSON ({e})", id.repository))
        })?;
        let commit = json.get("sha").and_then(Value::as_str).filter(|c| is_plain(c));
        let siblings = json.get("siblings").and_then(Value::as_array);
        let (Some(commit), Some(siblings)) = (commit, siblings) else {
            return Err(Failure::Protocol(format!(
                "its list of {}'s files has no 'sha' or 'siblings'",
                id.repository
            )));
        };
        let files = siblings.iter().filter_map(|s| s.get("rfilename")?.as_str());
        // A name that climbs out of the folder is not one that a model needs.
        let files = files.filter(|f| f.split('/').all(|p| !p.is_empty() && p != "." && p != ".."));
        Ok(Listing { commit: commit.to_owned(), files: files.map(str::to_owned).collect() })
    }

    fn url(&self, id: &ModelId, commit: &str, file: &str) -> String {
        let file = file.replace('%', "%25").replace(' ', "%20").replace('#', "%23").replace('?', "%3F");
        format!("{}/{}/resolve/{commit}/{file}", self.hub.endpoint, id.repository)
    }

    /// What a file's contents are known by, and how long they are.
    pub(super) fn identity(&self, id: &ModelId, commit: &str, file: &str) -> Result<Identity, Failure> {
        let mut url = self.url(id, commit, file);
        for _ in 0..REDIRECTIONS {
            let mut request =
                self.agent.head(&url).config().max_redirects(0).max_redirects_will_error(false).build();
            if self.hub.token.is_some() {
                request = request.header("authorization", self.token());
            }
            let response = request.header("accept-encoding", "identity").call().map_err(network)?;
            let location = header(response.headers(), "location").map(str::to_owned);
            match location.filter(|l| response.status().is_redirection() && l.starts_with('/')) {
                // Within the hub: to a repository's new name, say.
                Some(path) => url = format!("{}{path}", self.hub.endpoint),
                None => {
                    if !response.status().is_redirection() {
                        let response = self.accepted(response, file)?;
                        return identity(response.headers(), file);
                    }
                    // To where the bytes lie; the hub itself says what they are.
                    return identity(response.headers(), file);
                }
            }
        }
        Err(Failure::Protocol(format!("it redirects without end for {file}")))
    }

    /// The file's bytes from `start` on, and where they really begin.
    pub(super) fn read(
        &self,
        id: &ModelId,
        commit: &str,
        file: &str,
        start: u64,
    ) -> Result<(u64, impl Read + use<>), Failure> {
        let mut request = self.agent.get(self.url(id, commit, file)).header("accept-encoding", "identity");
        if self.hub.token.is_some() {
            // Not sent on to another host.
            request = request.header("authorization", self.token());
        }
        if start > 0 {
            request = request.header("range", format!("bytes={start}-"));
        }
        let response = self.accepted(request.call().map_err(network)?, file)?;
        let begins = match response.status().as_u16() {
            206 => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                let begin = range.strip_prefix("bytes ").and_then(|r| r.split('-').next()?.parse().ok());
                begin.ok_or_else(|| Failure::Protocol(format!("it answers with the range '{range}'")))?
            }
            _ => 0,
        };
        Ok((begins, response.into_body().into_reader()))
    }

    /// The answer, if it is what was asked for.
    fn accepted(&self, response: Response<Body>, what: &str) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        Err(match (header(response.headers(), "x-error-code"), status.as_u16()) {
            (Some("GatedRepo"), _) => Failure::Gated,
            (Some("RevisionNotFound"), _) => Failure::NoRevision,
            (Some("EntryNotFound"), _) => Failure::NoFile(what.to_owned()),
            (Some("RepoNotFound"), _) => Failure::Missing,
            // Who may not see a repository is told no more than that.
            (_, 401) if self.hub.token.is_some() => Failure::BadToken,
            (_, 401 | 404) => Failure::Missing,
            (_, 403) => Failure::Gated,
            (_, status) => Failure::Status(status, what.to_owned()),
        })
    }
}

fn identity(headers: &HeaderMap, file: &str) -> Result<Identity, Failure> {
    let first = |names: [&str; 2]| names.iter().find_map(|name| header(headers, name));
    let etag = first(["x-linked-etag", "etag"]).map(|e| e.trim_start_matches("W/").trim_matches('"'));
    let size = first(["x-linked-size", "content-length"]).and_then(|s| s.parse().ok());
    match (etag.filter(|e| is_plain(e)), size) {
        (Some(etag), Some(size)) => Ok(Identity { etag: etag.to_owned(), size }),
        _ => Err(Failure::Protocol(format!("it does not say what {file} is known by and how long it is"))),
    }
}

/// Whether a hash or commit may be a file's name.
fn is_plain(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 128
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn network(e: ureq::Error) -> Failure {
    Failure::Network(e.to_string())
}
