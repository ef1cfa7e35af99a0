//! Files of a model into the cache: each into `blobs`, under the name of its
//! contents and only when they are whole and right; a link in `snapshots` gives
//! it its name. What is cut off goes on where it was, in this run or the next.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::client::{Client, Failure, Identity};
use super::{ModelId, PullProgress};

/// Tries in a row that brought nothing, after which a download is given up.
const TRIES: u32 = 5;
const CHUNK: usize = 1 << 18;

/// Downloads all files that the cache lacks.
pub(super) fn all(
    client: &Client<'_>,
    id: &ModelId,
    commit: &str,
    files: &[String],
    folder: &Path,
    snapshot: &Path,
    progress: &mut dyn FnMut(PullProgress<'_>),
) -> Result<(), Failure> {
    let mut identities = vec![];
    for file in files {
        let identity = retried(|| client.identity(id, commit, file))?;
        identities.push((file, identity));
    }
    let total = identities.iter().map(|(_, i)| i.size).sum();
    let mut done = 0;
    for (file, identity) in &identities {
        let blob = folder.join("blobs").join(&identity.etag);
        if !blob.exists() {
            let mut report = |part: u64| progress(PullProgress { file, done: done + part, total });
            let source = Source { client, id, commit, file };
            one(&source, identity, &blob, folder, &mut report)?;
        }
        done += identity.size;
        progress(PullProgress { file, done, total });
        link(&blob, &snapshot.join(file), snapshot)?;
    }
    Ok(())
}

/// A few tries for an answer without a body.
pub(super) fn retried<T>(ask: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
    let mut tries = 0;
    loop {
        match ask() {
            Err(Failure::Network(_) | Failure::Status(429 | 500..=599, _)) if tries + 1 < TRIES => {
                pause(tries);
            }
            answer => return answer,
        }
        tries += 1;
    }
}

/// Longer after each failure: 0.1, 0.2, 0.4 ... seconds.
fn pause(tries: u32) {
    std::thread::sleep(Duration::from_millis(100 << tries.min(6)));
}

/// One file at one commit.
struct Source<'a> {
    client: &'a Client<'a>,
    id: &'a ModelId,
    commit: &'a str,
    file: &'a str,
}

fn one(
    source: &Source<'_>,
    identity: &Identity,
    blob: &Path,
    folder: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Failure> {
    let partial = blob.with_file_name(format!("{}.incomplete", identity.etag));
    let disk = |e: io::Error| Failure::Disk(partial.clone(), e);
    fs::create_dir_all(folder.join("blobs")).map_err(disk)?;
    // Another process may download the same file: the second waits, and then
    // finds it there. Other tools lock the same files.
    let _lock = lock(folder, &identity.etag)?;
    if blob.exists() {
        return Ok(());
    }
    let mut out = OpenOptions::new().create(true).append(true).open(&partial).map_err(disk)?;
    let mut have = out.metadata().map_err(disk)?.len();
    if have > identity.size {
        out.set_len(0).map_err(disk)?;
        have = 0;
    }
    let mut tries = 0;
    while have < identity.size {
        progress(have);
        let before = have;
        let failure = match append(source, &mut out, &mut have, identity.size, progress) {
            Ok(()) => {
                Failure::Network(format!("{} ended after {have} of {} bytes", source.file, identity.size))
            }
            Err(Part::Network(
                failure @ (Failure::Network(_) | Failure::Status(429 | 416 | 500..=599, _)),
            )) => failure,
            Err(Part::Network(failure)) => return Err(failure),
            Err(Part::Disk(e)) => return Err(disk(e)),
        };
        if have < identity.size {
            tries = if have > before { 0 } else { tries + 1 };
            if tries == TRIES {
                return Err(failure);
            }
            pause(tries);
        }
    }
    out.sync_all().or_else(|e| if is_special(&out) { Ok(()) } else { Err(e) }).map_err(disk)?;
    drop(out);
    if let Some(why) = wrong(&partial, identity).map_err(disk)? {
        fs::remove_file(&partial).map_err(disk)?;
        return Err(Failure::Damaged(source.file.to_owned(), why));
    }
    fs::rename(&partial, blob).map_err(disk)
}

/// Devices and pipes cannot be synchronised.
fn is_special(file: &File) -> bool {
    file.metadata().is_ok_and(|m| !m.is_file())
}

/// Whose failure a part's is.
enum Part {
    Network(Failure),
    Disk(io::Error),
}

/// Appends what one answer brings, at most up to `size`.
fn append(
    source: &Source<'_>,
    out: &mut File,
    have: &mut u64,
    size: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Part> {
    let (begins, mut body) =
        source.client.read(source.id, source.commit, source.file, *have).map_err(Part::Network)?;
    if begins != *have {
        // The server does not go on in the middle.
        out.set_len(0).map_err(Part::Disk)?;
        *have = 0;
        if begins != 0 {
            return Ok(());
        }
    }
    let mut chunk = vec![0; CHUNK];
    while *have < size {
        let room = usize::try_from(size - *have).unwrap_or(CHUNK).min(CHUNK);
        let read = match body.read(&mut chunk[..room]) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) => return Err(Part::Network(Failure::Network(e.to_string()))),
        };
        out.write_all(&chunk[..read]).map_err(Part::Disk)?;
        *have += read as u64;
        progress(*have);
    }
    Ok(())
}

/// What is wrong with a file's contents, if anything.
fn wrong(path: &Path, identity: &Identity) -> io::Result<Option<String>> {
    let hex = identity.etag.len();
    let is_hash = identity.etag.chars().all(|c| c.is_ascii_hexdigit());
    let found = match hex {
        64 if is_hash => hash::<Sha256>(path, b"")?,
        // git's hash of a blob.
        40 if is_hash => hash::<Sha1>(path, format!("blob {}\0", identity.size).as_bytes())?,
        _ => return Ok(None),
    };
    Ok((found != identity.etag.to_lowercase())
        .then(|| format!("its hash is {found} and not {}", identity.etag)))
}

fn hash<D: Digest>(path: &Path, begin: &[u8]) -> io::Result<String> {
    let mut digest = D::new();
    digest.update(begin);
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            read => digest.update(&chunk[..read]),
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Waits for whoever else downloads this file.
fn lock(folder: &Path, etag: &str) -> Result<File, Failure> {
    let name = folder.file_name().unwrap_or_default();
    let locks = folder.with_file_name(".locks").join(name);
    let path = locks.join(format!("{etag}.lock"));
    let disk = |e: io::Error| Failure::Disk(path.clone(), e);
    fs::create_dir_all(&locks).map_err(disk)?;
    let file = OpenOptions::new().create(true).append(true).open(&path).map_err(disk)?;
    match file.lock() {
        // A file system without locks is no reason not to download.
        Err(e) if e.kind() != io::ErrorKind::Unsupported => Err(disk(e)),
        _ => Ok(file),
    }
}

/// Gives a blob its name in the snapshot.
fn link(blob: &Path, name: &Path, snapshot: &Path) -> Result<(), Failure> {
    let disk = |e: io::Error| Failure::Disk(name.to_owned(), e);
    if name.exists() {
        return Ok(());
    }
    if let Some(parent) = name.parent() {
        fs::create_dir_all(parent).map_err(disk)?;
    }
    // A link to a blob that is gone.
    if name.is_symlink() {
        fs::remove_file(name).map_err(disk)?;
    }
    let below = name.strip_prefix(snapshot).map_or(1, |rest| rest.components().count());
    let relative = "../".repeat(below + 1);
    let target = Path::new(&relative).join("blobs").join(blob.file_name().unwrap_or_default());
    // Whoever downloads the same model may have been faster.
    let or_there = |e: io::Error| if name.exists() { Ok(()) } else { Err(disk(e)) };
    #[cfg(unix)]
    std::os::unix::fs::symlink(target, name).or_else(or_there)?;
    #[cfg(not(unix))]
    {
        let _ = target;
        fs::hard_link(blob, name).or_else(|_| fs::copy(blob, name).map(drop)).or_else(or_there)?;
    }
    Ok(())
}
