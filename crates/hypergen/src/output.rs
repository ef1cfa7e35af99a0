//! Where pictures go: names of files, and the promise that a file is there
//! whole or not at all.
//!
//! Everything that can be known before the work is checked before the work
//! ([`Output::plan`]): an extension, a folder, the right to write into it.
//! Pictures are encoded elsewhere.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use hypergen_server::encode::ImageFormat;
use tempfile::NamedTempFile;

/// Longest part of a file name that is taken from a prompt, in characters.
const SLUG_CHARS: usize = 40;
/// Longest part of a file name that is taken from a prompt, in bytes: with
/// seed, number and extension it stays well below the usual 255.
const SLUG_BYTES: usize = 160;

/// Where the pictures of one run go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    place: Place,
    format: ImageFormat,
    count: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Stdout,
    /// `folder/stem.extension`, or `folder/stem-1.extension` when there are several.
    Named {
        folder: PathBuf,
        stem: OsString,
        extension: OsString,
    },
    /// `folder/PROMPT-SEED.png`, under a name that is free.
    Derived {
        folder: PathBuf,
    },
}

impl Output {
    /// Understands `-o` and makes sure that `count` pictures can be written there.
    pub(crate) fn plan(output: Option<&Path>, count: usize) -> anyhow::Result<Self> {
        let (place, format) = match output {
            None => (Place::Derived { folder: PathBuf::new() }, ImageFormat::Png),
            Some(path) if path == Path::new("-") => (Place::Stdout, ImageFormat::Png),
            Some(path) if is_folder(path) => (Place::Derived { folder: path.to_owned() }, ImageFormat::Png),
            Some(path) => named(path)?,
        };
        let this = Self { place, format, count };
        match &this.place {
            Place::Stdout => this.check_stdout()?,
            Place::Named { folder, .. } | Place::Derived { folder } => check_folder(folder)?,
        }
        Ok(this)
    }

    /// The format that the name asked for.
    pub(crate) fn format(&self) -> ImageFormat {
        self.format
    }

    /// Writes picture `index`, and returns the name of its file if it has one.
    pub(crate) fn write(
        &self,
        index: usize,
        prompt: &str,
        seed: u64,
        bytes: &[u8],
    ) -> anyhow::Result<Option<PathBuf>> {
        match &self.place {
            Place::Stdout => {
                let mut out = io::stdout().lock();
                match out.write_all(bytes).and_then(|()| out.flush()) {
                    // A reader that has left (`| head`) has had what it wanted.
                    Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                        bail!("cannot write the picture to standard output: {}", words(&e))
                    }
                    _ => Ok(None),
                }
            }
            Place::Named { folder, stem, extension } => {
                let path = numbered(folder, stem, extension, (self.count > 1).then_some(index + 1));
                temporary(folder, bytes)
                    .and_then(|file| file.persist(&path).map_err(|e| e.error))
                    .map_err(|e| cannot_write(&path, &e))?;
                Ok(Some(path))
            }
            Place::Derived { folder } => {
                write_free(folder, &format!("{}-{seed}", slug(prompt)), self.format, bytes).map(Some)
            }
        }
    }

    fn check_stdout(&self) -> anyhow::Result<()> {
        if self.count > 1 {
            bail!(
                "-o - writes one picture to standard output, but -n asks for {}: name a file instead",
                self.count
            );
        }
        if io::stdout().is_terminal() {
            bail!("-o - would write a picture's bytes to the terminal: redirect it, or name a file");
        }
        Ok(())
    }
}

fn is_folder(path: &Path) -> bool {
    let ends_as_one = path.as_os_str().to_string_lossy().ends_with(std::path::is_separator);
    ends_as_one || path.is_dir()
}

fn named(path: &Path) -> anyhow::Result<(Place, ImageFormat)> {
    let shown = path.display();
    let (Some(stem), Some(extension)) = (path.file_stem(), path.extension()) else {
        bail!("'{shown}' has no extension to tell the format by: add .png, .jpg or .webp");
    };
    let format = extension.to_str().and_then(ImageFormat::from_extension).with_context(|| {
        format!(
            "'{shown}' ends in '.{}', which is no format that can be written: use .png, .jpg, .jpeg or .webp",
            extension.to_string_lossy()
        )
    })?;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    Ok((Place::Named { folder, stem: stem.to_owned(), extension: extension.to_owned() }, format))
}

/// The folder, where an empty path is the one that we are in.
fn real(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

/// Finds out by trying whether files can be made in `folder`.
fn check_folder(folder: &Path) -> anyhow::Result<()> {
    let folder = real(folder);
    let shown = folder.display();
    match fs::metadata(folder) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => bail!("'{shown}' is not a folder: name another with -o"),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            bail!("the folder '{shown}' does not exist: create it, or name another with -o")
        }
        Err(e) => bail!("the folder '{shown}' cannot be used: {}", words(&e)),
    }
    if let Err(e) = create_temporary(folder) {
        bail!("cannot write to the folder '{shown}': {}; name another with -o", words(&e));
    }
    Ok(())
}

fn create_temporary(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".hypergen-").suffix(".tmp");
    // A temporary file is private unless told otherwise, but a picture is an
    // ordinary file, with whatever rights the user's mask leaves.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

/// A temporary file in `folder` that holds `bytes`, all of them on the disk.
/// It vanishes when it is dropped.
fn temporary(folder: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    let mut file = create_temporary(real(folder))?;
    file.write_all(bytes)?;
    // Some file systems find out only now that they are full.
    file.as_file().sync_all()?;
    Ok(file)
}

/// Writes to the first of `stem.png`, `stem-2.png`, ... that is free.
fn write_free(folder: &Path, stem: &str, format: ImageFormat, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    let extension = OsStr::new(format.name());
    let mut path = numbered(folder, OsStr::new(stem), extension, None);
    let mut file = temporary(folder, bytes).map_err(|e| cannot_write(&path, &e))?;
    for number in 2.. {
        match file.persist_noclobber(&path) {
            Ok(_) => break,
            Err(e) if e.error.kind() == ErrorKind::AlreadyExists => file = e.file,
            Err(e) => return Err(cannot_write(&path, &e.error)),
        }
        path = numbered(folder, OsStr::new(stem), extension, Some(number));
    }
    Ok(path)
}

fn numbered(folder: &Path, stem: &OsStr, extension: &OsStr, number: Option<usize>) -> PathBuf {
    let mut name = stem.to_owned();
    if let Some(number) = number {
        name.push(format!("-{number}"));
    }
    name.push(".");
    name.push(extension);
    folder.join(name)
}

/// Letters and digits of a prompt, in lower case, with single hyphens between
/// the words: what every file system takes.
fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    for word in prompt.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        let gap = usize::from(!slug.is_empty());
        let room = SLUG_CHARS.saturating_sub(slug.chars().count() + gap);
        let fits = word.chars().count() <= room && slug.len() + gap + word.len() <= SLUG_BYTES;
        if !fits && gap == 1 {
            break; // Whole words only, but for a first one that is too long.
        }
        if gap == 1 {
            slug.push('-');
        }
        for c in word.chars().take(room).flat_map(char::to_lowercase) {
            if slug.len() + c.len_utf8() <= SLUG_BYTES {
                slug.push(c);
            }
        }
    }
    if slug.is_empty() { "picture".to_owned() } else { slug }
}

fn cannot_write(path: &Path, e: &io::Error) -> anyhow::Error {
    anyhow!("cannot write '{}': {}", path.display(), words(e))
}

/// What an input or output error means to a user, with the fix where there is one.
pub(crate) fn words(e: &io::Error) -> String {
    match e.kind() {
        ErrorKind::StorageFull => {
            "the disk is full; free some space, or name a folder on another disk".to_owned()
        }
        ErrorKind::QuotaExceeded => "your share of the disk is used up; free some space".to_owned(),
        ErrorKind::FileTooLarge => "the file is larger than is allowed here (see `ulimit -f`)".to_owned(),
        ErrorKind::PermissionDenied => "permission denied".to_owned(),
        ErrorKind::ReadOnlyFilesystem => "the disk can only be read".to_owned(),
        ErrorKind::BrokenPipe => "its reader has gone".to_owned(),
        _ => e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    //! Tests of names, and of what is left on the disk.
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .expect("the folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn slugs_are_short_plain_and_never_empty() {
        for (prompt, expected) in [
            ("Red Apple", "red-apple"),
            ("  a, b;c/../d\\e\0f\n", "a-b-c-d-e-f"),
            ("北京 çığ", "北京-çığ"),
            ("🍎🍎", "picture"),
            ("", "picture"),
            ("-o --help", "o-help"),
            ("one two three four five six seven eight nine ten", "one-two-three-four-five-six-seven-eight"),
        ] {
            assert_eq!(slug(prompt), expected);
        }
        assert_eq!(slug(&"x".repeat(500)), "x".repeat(SLUG_CHARS));
        for hostile in ["İ".repeat(500), "𒀀".repeat(500), "ﬃ ".repeat(500)] {
            let slug = slug(&hostile);
            assert!(!slug.is_empty() && slug.len() <= SLUG_BYTES, "{} bytes", slug.len());
        }
    }

    #[test]
    fn derived_names_never_replace_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let output = Output::plan(Some(folder.path()), 1).expect("a plan");
        for expected in ["red-apple-42.png", "red-apple-42-2.png", "red-apple-42-3.png"] {
            let path =
                output.write(0, "red apple", 42, expected.as_bytes()).expect("written").expect("a path");
            assert_eq!(path, folder.path().join(expected));
            assert_eq!(fs::read(&path).expect("the file"), expected.as_bytes());
        }
        assert_eq!(names(folder.path()), ["red-apple-42-2.png", "red-apple-42-3.png", "red-apple-42.png"]);
    }

    #[test]
    fn a_given_name_is_replaced_and_numbered_when_there_are_several() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("my.apple.WebP");
        let one = Output::plan(Some(&file), 1).expect("a plan");
        assert_eq!(one.format(), ImageFormat::Webp);
        for text in ["old", "new"] {
            assert_eq!(one.write(0, "x", 1, text.as_bytes()).expect("written"), Some(file.clone()));
        }
        assert_eq!(fs::read_to_string(&file).expect("the file"), "new");
        let three = Output::plan(Some(&file), 3).expect("a plan");
        for index in 0..3 {
            three.write(index, "x", 1, b"picture").expect("written");
        }
        assert_eq!(
            names(folder.path()),
            ["my.apple-1.WebP", "my.apple-2.WebP", "my.apple-3.WebP", "my.apple.WebP"]
        );
    }

    #[test]
    #[cfg(unix)]
    fn pictures_have_the_rights_of_ordinary_files() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let ordinary = folder.path().join("ordinary");
        fs::write(&ordinary, "x").expect("written");
        let output = Output::plan(Some(&folder.path().join("a.png")), 1).expect("a plan");
        let path = output.write(0, "x", 1, b"x").expect("written").expect("a path");
        let mode = |path: &Path| fs::metadata(path).expect("a file").permissions().mode();
        assert_eq!(mode(&path), mode(&ordinary));
    }

    #[test]
    fn plans_that_cannot_work_are_refused_and_leave_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("file"), "x").expect("written");
        for (name, words) in [
            ("apple", "has no extension"),
            ("apple.gif", "use .png, .jpg, .jpeg or .webp"),
            (".png", "has no extension"),
            ("missing/apple.png", "does not exist: create it"),
            ("missing/", "does not exist: create it"),
            ("file/apple.png", "is not a folder"),
        ] {
            let error = Output::plan(Some(&folder.path().join(name)), 1).expect_err(name).to_string();
            assert!(error.contains(words), "{name}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = Output::plan(Some(Path::new("-")), 2).expect_err("two pictures").to_string();
        assert!(error.contains("-n asks for 2"), "{error}");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn full_disks_have_words() {
        let e = io::Error::from(ErrorKind::StorageFull);
        assert!(
            cannot_write(Path::new("a.png"), &e)
                .to_string()
                .starts_with("cannot write 'a.png': the disk is full")
        );
    }
}
