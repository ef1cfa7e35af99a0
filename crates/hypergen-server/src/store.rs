//! Pictures behind `url` answers: files in one folder, found by a name that
//! cannot be guessed, gone after a while, bounded in bytes. Whoever knows the
//! name may fetch the file, so the name is the key. It blocks on the disk and
//! is to be called from threads that may.
//!
//! Nothing outside the folder can be reached: a name from a request is never
//! made into a path before it was found in the list of what was stored.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tempfile::{NamedTempFile, TempDir};
use thiserror::Error;

use crate::encode::ImageFormat;

/// Random bytes in a name: 160 bits.
const ID_BYTES: usize = 20;
/// Names of files begin so, and of unfinished ones otherwise.
const PREFIX: &str = "img-";

/// Name of a stored picture: `img-`, 40 hexadecimal digits and the format.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Name(String);

impl Name {
    fn random(format: ImageFormat) -> Result<Self, StoreError> {
        let mut bytes = [0; ID_BYTES];
        getrandom::fill(&mut bytes).map_err(|e| StoreError::Random(e.to_string()))?;
        let digits: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self(format!("{PREFIX}{digits}.{}", format.name())))
    }

    /// Reads a name of exactly our form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (id, extension) = text.strip_prefix(PREFIX)?.split_once('.')?;
        let hex = id.len() == 2 * ID_BYTES && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (hex && extension.parse::<ImageFormat>().is_ok()).then(|| Self(text.to_owned()))
    }

    /// The format that its ending says.
    pub(crate) fn format(&self) -> ImageFormat {
        self.0.rsplit_once('.').and_then(|(_, extension)| extension.parse().ok()).unwrap_or_default()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A picture that was found.
#[derive(Debug)]
pub(crate) struct Stored {
    /// The file.
    pub(crate) bytes: Vec<u8>,
    /// How long it will stay.
    pub(crate) left: Duration,
}

/// Why a picture cannot be stored.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    #[error(
        "the picture could not be kept for its URL: {} (ask for response_format b64_json, or have the server's --image-dir repaired)",
        cause(.0)
    )]
    Disk(#[from] io::Error),
    #[error(
        "the picture takes {size} bytes, but the server keeps at most {bound} for URLs (ask for response_format b64_json)"
    )]
    TooLarge { size: u64, bound: u64 },
    #[error("the system gives no random numbers: {0}")]
    Random(String),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    size: u64,
    stored: SystemTime,
    /// Counts up: clocks may jump, the order must not.
    order: u64,
}

#[derive(Debug, Default)]
struct Index {
    entries: HashMap<Name, Entry>,
    bytes: u64,
    next: u64,
}

impl Index {
    fn insert(&mut self, name: Name, size: u64, stored: SystemTime) {
        self.bytes += size;
        self.entries.insert(name, Entry { size, stored, order: self.next });
        self.next += 1;
    }
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct ImageStore {
    folder: PathBuf,
    ttl: Duration,
    bound: u64,
    index: Mutex<Index>,
    /// Removes the folder in the end, if it is ours alone. Read by whoever
    /// writes a file, so that [`ImageStore::close`] waits for it.
    temporary: RwLock<Option<TempDir>>,
}

impl ImageStore {
    /// Opens the folder, or a private temporary one. What an earlier server
    /// left in the folder is served on until its time is over.
    ///
    /// # Errors
    /// When the folder cannot be made, read, or written to.
    pub(crate) fn open(folder: Option<&Path>, ttl: Duration, bound: u64) -> io::Result<Self> {
        let (folder, temporary) = match folder {
            Some(folder) => {
                make_private(folder)?;
                (folder.to_owned(), None)
            }
            None => {
                let temporary = private_temporary()?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let store = Self { folder, ttl, bound, index: Mutex::default(), temporary: RwLock::new(temporary) };
        store.scan()?;
        store.sweep();
        // An earlier server may have had more room.
        store.shrink(&mut store.lock(), 0);
        store.probe()?;
        Ok(store)
    }

    /// Finds out by trying whether files can be written: rights alone do not
    /// tell, and nor does a disk that is full or can only be read.
    fn probe(&self) -> io::Result<()> {
        NamedTempFile::new_in(&self.folder)?.write_all(&[0; 4096])
    }

    /// Whether there is a picture of this name, without a look at the disk.
    pub(crate) fn holds(&self, name: &Name) -> bool {
        self.lock().entries.contains_key(name)
    }

    /// Where it keeps its files.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn scan(&self) -> io::Result<()> {
        let mut found = Vec::new();
        for file in std::fs::read_dir(&self.folder)? {
            let file = file?;
            let name = file.file_name().to_str().and_then(Name::parse);
            let (Some(name), Ok(metadata)) = (name, file.metadata()) else { continue };
            if metadata.is_file() {
                let stored = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push((stored, name, metadata.len()));
            }
        }
        found.sort_by_key(|(stored, ..)| *stored);
        let mut index = self.lock();
        for (stored, name, size) in found {
            index.insert(name, size, stored);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a picture: whole or not at all. The oldest ones make room.
    ///
    /// # Errors
    /// When it is larger than the bound, or the disk does not take it.
    pub(crate) fn put(&self, bytes: &[u8], format: ImageFormat) -> Result<Name, StoreError> {
        let size = bytes.len() as u64;
        if size > self.bound {
            return Err(StoreError::TooLarge { size, bound: self.bound });
        }
        let name = Name::random(format)?;
        // The place is taken before the file is written, so that the bound
        // holds on the disk as well, whoever else is writing.
        self.make_room(size, &name);
        let written = self.write(bytes, &name);
        if let Err(e) = written {
            self.forget(&name);
            return Err(StoreError::Disk(e));
        }
        Ok(name)
    }

    fn write(&self, bytes: &[u8], name: &Name) -> io::Result<()> {
        let _open = self.temporary.read().unwrap_or_else(PoisonError::into_inner);
        let mut file = NamedTempFile::new_in(&self.folder)?;
        file.write_all(bytes)?;
        file.persist(self.path(name)).map_err(|e| e.error)?;
        Ok(())
    }

    fn make_room(&self, size: u64, name: &Name) {
        let mut index = self.lock();
        self.shrink(&mut index, size);
        index.insert(name.clone(), size, SystemTime::now());
    }

    /// Removes the oldest until `more` bytes fit into the bound, or nothing is left.
    fn shrink(&self, index: &mut Index, more: u64) {
        while index.bytes.saturating_add(more) > self.bound {
            let oldest =
                index.entries.iter().min_by_key(|(_, entry)| entry.order).map(|(name, _)| name.clone());
            let Some(oldest) = oldest else { break };
            self.remove(index, &oldest);
        }
    }

    fn forget(&self, name: &Name) {
        self.remove(&mut self.lock(), name);
    }

    fn remove(&self, index: &mut Index, name: &Name) {
        if let Some(entry) = index.entries.remove(name) {
            index.bytes -= entry.size;
            match std::fs::remove_file(self.path(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, "an expired picture cannot be removed");
                }
                _ => {}
            }
        }
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.folder.join(&name.0)
    }

    /// Fetches a picture: `None` when there never was one of this name, or
    /// when its time is over.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn get(&self, name: &Name) -> io::Result<Option<Stored>> {
        let Some(entry) = self.lock().entries.get(name).copied() else { return Ok(None) };
        let left = self.left(&entry);
        if left.is_zero() {
            self.forget(name);
            return Ok(None);
        }
        match std::fs::read(self.path(name)) {
            Ok(bytes) => Ok(Some(Stored { bytes, left })),
            // Being written, swept at this moment, or removed by hand.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn left(&self, entry: &Entry) -> Duration {
        self.ttl.saturating_sub(entry.stored.elapsed().unwrap_or_default())
    }

    /// Removes what is out of time.
    pub(crate) fn sweep(&self) {
        let mut index = self.lock();
        let expired: Vec<Name> = index
            .entries
            .iter()
            .filter(|(_, e)| self.left(e).is_zero())
            .map(|(name, _)| name.clone())
            .collect();
        for name in expired {
            self.remove(&mut index, &name);
        }
    }

    /// Removes the folder if it is ours alone, and the pictures with it: for
    /// the end of a process, which waits for nobody who still holds the store.
    pub(crate) fn close(&self) {
        let temporary = self.temporary.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(e)) = temporary.map(TempDir::close) {
            tracing::warn!(error = %e, "the temporary folder of pictures cannot be removed");
        }
    }

    /// Files and bytes that it holds.
    pub(crate) fn usage(&self) -> (usize, u64) {
        let index = self.lock();
        (index.entries.len(), index.bytes)
    }
}

/// What a failure of the disk is, for answers: the system's own words may
/// hold a path, which is nobody's business.
pub(crate) fn cause(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::StorageFull => "the disk is full".to_owned(),
        io::ErrorKind::NotFound => "the folder does not exist".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the disk can only be read".to_owned(),
        kind => kind.to_string(),
    }
}

/// A new folder under the system's temporary one, for its owner alone.
fn private_temporary() -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("hypergen-images-");
    #[cfg(unix)]
    let builder = builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
    builder.tempdir()
}

/// Makes a folder that only its owner can read; one that is there is left as it is.
fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn store(bound: u64) -> ImageStore {
        ImageStore::open(None, HOUR, bound).expect("a temporary folder")
    }

    #[test]
    fn a_closed_store_leaves_no_folder_though_it_is_held() {
        let store = store(1000);
        let name = store.put(b"picture", ImageFormat::Png).expect("stored");
        store.close();
        assert!(!store.folder().exists());
        assert!(store.get(&name).expect("no failure").is_none());
        assert!(store.put(b"late", ImageFormat::Png).is_err());
        assert!(!store.folder().exists());
        let kept = tempfile::tempdir().expect("a folder");
        ImageStore::open(Some(kept.path()), HOUR, 1000).expect("opened").close();
        assert!(kept.path().exists(), "a folder that was given is not ours to remove");
    }

    #[test]
    fn what_is_put_is_got_and_the_folder_goes_in_the_end() {
        let store = store(1000);
        let folder = store.folder().to_owned();
        let name = store.put(b"picture", ImageFormat::Webp).expect("stored");
        assert_eq!(name.format(), ImageFormat::Webp);
        assert_eq!(Name::parse(&name.to_string()).as_ref(), Some(&name));
        let stored = store.get(&name).expect("read").expect("there");
        assert_eq!(stored.bytes, b"picture");
        assert!(stored.left <= HOUR && stored.left > HOUR / 2);
        assert_eq!(store.usage(), (1, 7));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
            assert_eq!(mode(&folder), 0o700);
            assert_eq!(mode(&folder.join(name.to_string())), 0o600);
        }
        drop(store);
        assert!(!folder.exists());
    }

    #[test]
    fn the_oldest_make_room_and_the_bound_holds() {
        let store = store(10);
        let first = store.put(b"12345", ImageFormat::Png).expect("stored");
        let second = store.put(b"12345", ImageFormat::Png).expect("stored");
        let third = store.put(b"123", ImageFormat::Png).expect("stored");
        assert!(store.get(&first).expect("read").is_none());
        assert!(store.get(&second).expect("read").is_some());
        assert!(store.get(&third).expect("read").is_some());
        assert_eq!(store.usage(), (2, 8));
        assert_eq!(std::fs::read_dir(store.folder()).expect("there").count(), 2);
        let error = store.put(&[0; 11], ImageFormat::Png).expect_err("too large");
        assert!(error.to_string().contains("at most 10"), "{error}");
    }

    #[test]
    fn time_ends_them() {
        let store = ImageStore::open(None, Duration::ZERO, 100).expect("a folder");
        let name = store.put(b"x", ImageFormat::Png).expect("stored");
        assert!(store.get(&name).expect("read").is_none());
        store.put(b"x", ImageFormat::Png).expect("stored");
        store.sweep();
        assert_eq!(store.usage(), (0, 0));
        assert_eq!(std::fs::read_dir(store.folder()).expect("there").count(), 0);
    }

    #[test]
    fn only_names_of_our_form_are_names() {
        let good = format!("img-{}.png", "0f".repeat(20));
        assert!(Name::parse(&good).is_some());
        for bad in [
            String::new(),
            "../../etc/passwd".to_owned(),
            good.replace("png", "txt"),
            good.replace("img-", ""),
            good.replace('f', "F"),
            good.replace('f', "/"),
            format!("{good}.png"),
            format!("img-{}.png", "0f".repeat(19)),
            good.replace(".png", ".png/../x"),
        ] {
            assert!(Name::parse(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_folder_of_ones_own_stays_and_its_pictures_are_found_again() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("a/b");
        let open = || ImageStore::open(Some(&folder), HOUR, 100).expect("opened");
        let name = open().put(b"x", ImageFormat::Jpeg).expect("stored");
        std::fs::write(folder.join("notes.txt"), "mine").expect("written");
        let again = open();
        assert_eq!(again.get(&name).expect("read").expect("there").bytes, b"x");
        assert_eq!(again.usage(), (1, 1), "other files are not ours");
        assert!(again.get(&Name::random(ImageFormat::Png).expect("random")).expect("read").is_none());
    }

    #[test]
    fn a_disk_that_fails_is_an_error_with_the_mend_and_no_place_is_lost() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("gone");
        let store = ImageStore::open(Some(&folder), HOUR, 100).expect("opened");
        std::fs::remove_dir(&folder).expect("removed");
        let error = store.put(b"x", ImageFormat::Png).expect_err("no folder");
        assert!(error.to_string().contains("b64_json"), "{error}");
        assert_eq!(store.usage(), (0, 0));
    }
}
