//! Models by their hub id: finds them in the cache folder that other tools
//! share, or downloads the files that are needed into it.
//!
//! The cache's layout is that of the `hf-hub` crate; requests are made here,
//! because a download has to be resumed, checked and explained. A model that
//! lies whole in the cache is used without asking anybody; [`Hub::pull`] asks
//! whether there is a newer one.

mod client;
mod download;
mod plan;

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::{Cache, Repo, RepoType};

use crate::{Error, ErrorKind};
use client::{Client, Failure};

/// Where models are downloaded from, unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
const REVISION: &str = "main";

/// A model on the hub: `owner/name`, with `/FILE.safetensors` for one of its
/// files, and `@REVISION` for another branch, tag or commit than `main`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// `owner/name`.
    pub repository: String,
    /// A single-file checkpoint in it.
    pub file: Option<String>,
    /// Branch, tag or commit.
    pub revision: String,
}

impl ModelId {
    /// How people call it.
    pub fn name(&self) -> String {
        match &self.file {
            None => self.repository.clone(),
            Some(file) => format!("{}/{file}", self.repository),
        }
    }
}

impl FromStr for ModelId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (path, revision) = text.split_once('@').unwrap_or((text, REVISION));
        let word = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-+ ()".contains(c))
        };
        let parts: Vec<&str> = path.split('/').collect();
        let is_id = parts.len() == 2 || (parts.len() > 2 && path.ends_with(".safetensors"));
        if !is_id || !parts.iter().all(|p| word(p)) || !revision.split('/').all(word) || path.contains("--") {
            return Err(error(format!(
                "'{text}' is no model on the hub: those are called OWNER/NAME, or OWNER/NAME/FILE.safetensors"
            )));
        }
        Ok(Self {
            repository: parts[..2].join("/"),
            file: (parts.len() > 2).then(|| parts[2..].join("/")),
            revision: revision.to_owned(),
        })
    }
}

/// How far a download has come.
#[derive(Debug, Clone, Copy)]
pub struct PullProgress<'a> {
    /// The file that is being downloaded.
    pub file: &'a str,
    /// Bytes of all files that are there.
    pub done: u64,
    /// Bytes of all files.
    pub total: u64,
}

/// A hub and the cache in front of it.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Address, without a slash at its end.
    pub endpoint: String,
    /// The folder that holds `models--owner--name`.
    pub cache: PathBuf,
    /// What private and gated models are asked for with.
    pub token: Option<String>,
    /// Never ask, use only what is in the cache.
    pub offline: bool,
}

impl Hub {
    /// As the environment has it: `HF_ENDPOINT`, `HF_HUB_CACHE` or `HF_HOME`,
    /// `HF_TOKEN` or the token that other tools have stored, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// When no cache folder is named and there is no home folder for it.
    pub fn from_env() -> Result<Self, Error> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let named = variable("HF_HUB_CACHE").map(PathBuf::from);
        let cache = match named {
            Some(folder) => Cache::new(folder),
            // The crate's own way, which panics where there is no home.
            None if variable("HF_HOME").is_some() || std::env::home_dir().is_some() => Cache::from_env(),
            None => return Err(error("there is no home folder for the cache of models: set HF_HOME".into())),
        };
        let stored = || {
            let file = variable("HF_TOKEN_PATH").map(PathBuf::from);
            file.map_or_else(|| cache.token(), |f| fs::read_to_string(f).ok())
        };
        Ok(Self {
            endpoint: variable("HF_ENDPOINT")
                .unwrap_or_else(|| ENDPOINT.into())
                .trim_end_matches('/')
                .to_owned(),
            token: variable("HF_TOKEN").or_else(stored).map(|t| t.trim().to_owned()),
            offline: variable("HF_HUB_OFFLINE")
                .is_some_and(|v| matches!(v.as_str(), "1" | "true" | "TRUE" | "yes")),
            cache: cache.path().clone(),
        })
    }

    /// Where the model lies: in the cache, or downloaded into it now.
    ///
    /// # Errors
    /// As [`Hub::pull`], if it is not in the cache.
    pub fn locate(&self, id: &ModelId, progress: &mut dyn FnMut(PullProgress<'_>)) -> Result<PathBuf, Error> {
        match self.cached(id) {
            Some(path) => Ok(path),
            None => self.pull(id, progress),
        }
    }

    /// The model's folder or file in the cache, if it is there whole.
    pub fn cached(&self, id: &ModelId) -> Option<PathBuf> {
        let folder = self.folder(id);
        let named = fs::read_to_string(folder.join("refs").join(&id.revision)).ok();
        let commit = named.map_or_else(|| id.revision.clone(), |c| c.trim().to_owned());
        let snapshot = folder.join("snapshots").join(commit);
        if let Some(file) = &id.file {
            let path = snapshot.join(file);
            return path.is_file().then_some(path);
        }
        let files = plan::files_below(&snapshot);
        plan::is_whole(&snapshot, &files).then_some(snapshot)
    }

    /// Downloads what is needed of a model and not in the cache yet, and
    /// returns its folder or file.
    ///
    /// # Errors
    /// One line with the fix, for a missing or gated model, no network, a
    /// full disk, a damaged download, and a model without usable files.
    pub fn pull(&self, id: &ModelId, progress: &mut dyn FnMut(PullProgress<'_>)) -> Result<PathBuf, Error> {
        if self.offline {
            return Err(error(format!(
                "{} is not whole in the cache at {}, and HF_HUB_OFFLINE forbids to download it",
                id.name(),
                self.cache.display()
            )));
        }
        let client = Client::new(self);
        let listing = download::retried(|| client.listing(id)).map_err(|f| self.explain(f, id))?;
        let files = match &id.file {
            Some(file) if listing.files.contains(file) => vec![file.clone()],
            Some(file) => return Err(self.explain(Failure::NoFile(file.clone()), id)),
            None => plan::needed(&listing.files)
                .map_err(|why| error(format!("{} cannot be used: {why}", id.repository)))?,
        };
        let repository = Repo::with_revision(id.repository.clone(), RepoType::Model, id.revision.clone());
        let cached = Cache::new(self.cache.clone()).repo(repository);
        let folder = self.folder(id);
        let snapshot = cached.pointer_path(&listing.commit);
        download::all(&client, id, &listing.commit, &files, &folder, &snapshot, progress)
            .map_err(|f| self.explain(f, id))?;
        cached.create_ref(&listing.commit).map_err(|e| self.explain(Failure::Disk(folder, e), id))?;
        Ok(match &id.file {
            Some(file) => snapshot.join(file),
            None => snapshot,
        })
    }

    fn folder(&self, id: &ModelId) -> PathBuf {
        self.cache.join(Repo::model(id.repository.clone()).folder_name())
    }

    /// What went wrong, in one line with the fix.
    fn explain(&self, failure: Failure, id: &ModelId) -> Error {
        let (repository, endpoint) = (&id.repository, &self.endpoint);
        error(match failure {
            Failure::Missing => {
                let token = match &self.token {
                    None => "if it is private, set HF_TOKEN",
                    Some(_) => "or the token has no access to it",
                };
                format!("there is no model {repository} at {endpoint}: check its name; {token}")
            }
            Failure::NoRevision => format!("{repository} has no revision '{}'", id.revision),
            Failure::NoFile(file) => format!("{repository} has no file {file}"),
            Failure::Gated => {
                let token = match &self.token {
                    None => "then set HF_TOKEN to a token of that account",
                    Some(_) => "with the account that the token is of",
                };
                format!("{repository} is gated: accept its terms at {endpoint}/{repository}, {token}")
            }
            Failure::BadToken => format!("{endpoint} does not know the token: check HF_TOKEN, or unset it"),
            Failure::Status(status, what) => {
                format!("{endpoint} answered {status} for {what}; try again later")
            }
            Failure::Network(why) => format!(
                "cannot reach {endpoint}: {why}; {repository} is not whole in the cache at {}. What was downloaded \
                 is kept: run the command again to go on",
                self.cache.display()
            ),
            Failure::Disk(path, e) if is_full(&e) => format!(
                "the disk is full: {} could not be written; free some space, or set HF_HOME to a folder on another disk",
                path.display()
            ),
            Failure::Disk(path, e) => format!("cannot write {}: {e}", path.display()),
            Failure::Damaged(file, why) => {
                format!(
                    "{file} of {repository} came damaged ({why}) and was thrown away; run the command again"
                )
            }
            Failure::Protocol(why) => {
                format!("{endpoint} does not answer as a hub does: {why}; check HF_ENDPOINT")
            }
        })
    }
}

fn is_full(e: &std::io::Error) -> bool {
    matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

fn error(message: String) -> Error {
    Error::new(ErrorKind::Model, message)
}

/// What a user names: something on this machine, which wins, or a model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// A file or folder.
    Path(PathBuf),
    /// A model on the hub.
    Id(ModelId),
}

impl Named {
    /// Looks whether there is such a path, and else reads it as an id.
    ///
    /// # Errors
    /// When it is neither; the message says what was tried.
    pub fn find(text: &str) -> Result<Self, Error> {
        let path = Path::new(text);
        if path.exists() {
            return Ok(Self::Path(path.to_owned()));
        }
        text.parse().map(Self::Id).map_err(|_| {
            error(format!(
                "there is no model at {text}, and that is no name on the hub either: give a folder in the diffusers \
                 layout (it holds model_index.json), a .safetensors file, or OWNER/NAME"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read() {
        let id = |text: &str| text.parse::<ModelId>();
        let plain = id("owner/some-model_v1.5").expect("an id");
        assert_eq!((plain.repository.as_str(), plain.revision.as_str()), ("owner/some-model_v1.5", "main"));
        assert_eq!(id("a/b@refs/pr/1").expect("an id").revision, "refs/pr/1");
        let file = id("a/b/c/d.safetensors").expect("an id");
        assert_eq!((file.repository.as_str(), file.file.as_deref()), ("a/b", Some("c/d.safetensors")));
        for wrong in [
            "a",
            "a/",
            "/b",
            "./b",
            "../b",
            "a/b/c",
            "a/../b.safetensors",
            "a/b c\n",
            "a//b",
            "~/b",
            "a--x/b",
            "a/b@..",
        ] {
            assert!(id(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_here_wins() {
        let here = env!("CARGO_MANIFEST_DIR");
        assert_eq!(Named::find(here).expect("a folder"), Named::Path(here.into()));
        assert!(matches!(Named::find("owner/name"), Ok(Named::Id(_))));
        let error = Named::find("./models/none").expect_err("neither").message;
        assert!(error.contains("./models/none") && error.contains("OWNER/NAME"), "{error}");
    }
}
