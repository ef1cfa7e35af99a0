//! What tells whether a file is still the one that was read.

use std::fs::Metadata;
use std::path::{Path, PathBuf};

/// A file at one moment: the same stamp is the same content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    path: PathBuf,
    /// `None` where there is no file.
    state: Option<State>,
}

impl Stamp {
    /// The stamp of what lies at a path now, links followed.
    pub(super) fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), state: std::fs::metadata(path).ok().as_ref().map(state) }
    }
}

/// Which file it is and when it was changed last. Its modification time alone
/// may be set at will and is often copied along; its inode and the time of its
/// last change of any kind are the system's.
#[cfg(unix)]
type State = [i64; 7];

#[cfg(unix)]
fn state(metadata: &Metadata) -> State {
    use std::os::unix::fs::MetadataExt;
    [
        metadata.dev().cast_signed(),
        metadata.ino().cast_signed(),
        metadata.size().cast_signed(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ]
}

#[cfg(not(unix))]
type State = (u64, Option<std::time::SystemTime>, Option<std::time::SystemTime>);

#[cfg(not(unix))]
fn state(metadata: &Metadata) -> State {
    (metadata.len(), metadata.modified().ok(), metadata.created().ok())
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn another_file_of_the_same_size_and_time_has_another_stamp() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, new, link) =
            (folder.path().join("a"), folder.path().join("b"), folder.path().join("link"));
        let none = Stamp::of(&path);
        fs::write(&path, "one").expect("written");
        let first = Stamp::of(&path);
        assert_ne!(none, first);
        assert_eq!(first, Stamp::of(&path));
        fs::write(&new, "two").expect("written");
        let time = fs::metadata(&path).and_then(|m| m.modified()).expect("a time");
        fs::File::options().write(true).open(&new).and_then(|f| f.set_modified(time)).expect("set");
        std::os::unix::fs::symlink(&path, &link).expect("a link");
        let linked = Stamp::of(&link);
        fs::rename(&new, &path).expect("replaced");
        assert_ne!(first, Stamp::of(&path));
        assert_ne!(linked, Stamp::of(&link), "a link is what it leads to");
        fs::remove_file(&path).expect("removed");
        assert_eq!(none, Stamp::of(&path));
    }
}
