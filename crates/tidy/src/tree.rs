//! The files of the repository in memory, or of a sample of one.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

/// Endings of the files whose text some rule reads.
const TEXT: [&str; 14] =
    ["css", "html", "js", "json", "md", "mjs", "proto", "py", "rs", "sh", "toml", "ts", "txt", "yml"];
/// Folders that hold nothing of ours; only asked where git cannot say.
const SKIPPED: [&str; 5] = ["target", "node_modules", "__pycache__", ".git", ".venv"];

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Path from the root, with `/` between its parts.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Its text, if it is a kind that rules read.
    pub text: Option<String>,
}

impl File {
    /// A file of a sample.
    pub fn sample(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), bytes: text.len() as u64, text: Some(text.to_owned()) }
    }

    /// The last part of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// Whether the name ends in a dot and one of these.
    pub fn ends_in(&self, extensions: &[&str]) -> bool {
        self.name().rsplit_once('.').is_some_and(|(_, extension)| extensions.contains(&extension))
    }
}

/// All files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    /// In the order of their paths.
    pub files: Vec<File>,
}

impl Tree {
    /// A sample from paths and texts.
    pub fn sample(files: &[(&str, &str)]) -> Self {
        Self { files: files.iter().map(|(path, text)| File::sample(path, text)).collect() }
    }

    /// The repository at `root`: what git tracks or would track, or all that
    /// is there where git cannot tell (an unpacked archive).
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(root: &Path) -> io::Result<Self> {
        let mut paths = match from_git(root) {
            Some(paths) => paths,
            None => {
                let mut paths = Vec::new();
                walk(root, "", &mut paths)?;
                paths
            }
        };
        paths.sort();
        let mut files = Vec::new();
        for path in paths {
            let full = root.join(&path);
            // Git also lists what is deleted but not yet committed.
            let Ok(metadata) = fs::metadata(&full) else { continue };
            let mut file = File { path, bytes: metadata.len(), text: None };
            if file.ends_in(&TEXT) {
                file.text = String::from_utf8(fs::read(&full)?).ok();
            }
            files.push(file);
        }
        Ok(Self { files })
    }

    /// The text of the file at `path`.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.iter().find(|file| file.path == path)?.text.as_deref()
    }

    /// Whether a file or folder of that path exists.
    pub fn exists(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        path.is_empty()
            || self.files.iter().any(|file| {
                file.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
    }

    /// Files with text, whose name ends in one of these.
    pub fn texts<'a>(&'a self, extensions: &'a [&'a str]) -> impl Iterator<Item = (&'a File, &'a str)> {
        self.files
            .iter()
            .filter(move |file| file.ends_in(extensions))
            .filter_map(|file| Some((file, file.text.as_deref()?)))
    }
}

fn from_git(root: &Path) -> Option<Vec<String>> {
    let output = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()
        .ok()?;
    if !output.status.success() {
        return None;
    }
    let list = String::from_utf8_lossy(&output.stdout);
    let paths: Vec<String> = list.split('\0').filter(|path| !path.is_empty()).map(str::to_owned).collect();
    (!paths.is_empty()).then_some(paths)
}

fn walk(root: &Path, folder: &str, paths: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        if !entry.file_type()?.is_dir() {
            paths.push(path);
        } else if !SKIPPED.contains(&name.as_str()) {
            walk(root, &path, paths)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Tests of finding and looking up files.
    use super::*;

    #[test]
    fn folders_exist_by_their_files() {
        let tree = Tree::sample(&[("docs/style.md", ""), ("docs/images/a.png", "")]);
        for path in ["docs", "docs/", "docs/images", "docs/style.md", ""] {
            assert!(tree.exists(path), "{path}");
        }
        for path in ["doc", "docs/style", "images", "docs/style.md/x"] {
            assert!(!tree.exists(path), "{path}");
        }
    }

    #[test]
    fn without_git_everything_but_what_builds_leave_is_read() {
        let root = std::env::temp_dir().join(format!("tidy-test-{}", std::process::id()));
        fs::create_dir_all(root.join("src")).expect("a folder");
        fs::create_dir_all(root.join("target/debug")).expect("a folder");
        for path in ["src/a.rs", "target/debug/b.rs", "c.bin"] {
            fs::write(root.join(path), "//! x\n").expect("a file");
        }
        let mut paths = Vec::new();
        let walked = walk(&root, "", &mut paths);
        fs::remove_dir_all(&root).expect("removed");
        walked.expect("walked");
        paths.sort();
        assert_eq!(paths, ["c.bin", "src/a.rs"]);
    }
}
