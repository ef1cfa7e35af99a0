//! Where LoRA files are found: any readable file by its path, or, where there
//! is a folder for them, what lies in it and nothing else, links followed.
//!
//! Messages about a file that cannot be had are the same whatever the reason,
//! so that nobody learns from them what else is on the disk.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Lora, LoraInfo, inspect, lora_error};
use crate::prompt::LoraTag;
use crate::{Error, ErrorKind};

/// Files that can be asked for.
#[derive(Debug, Clone, Default)]
pub struct LoraLibrary {
    /// Canonical.
    folder: Option<PathBuf>,
}

/// A file of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraEntry {
    /// By which it is asked for: its path in the folder, without the extension.
    pub name: String,
    /// What it is.
    pub info: LoraInfo,
}

/// Ending of LoRA files.
const EXTENSION: &str = "safetensors";
/// Folders in folders that are looked into.
const DEPTH: usize = 4;
/// Files that are listed at most.
const LISTED: usize = 10_000;
/// Scales of a prompt's tags lie within this of 0; larger ones are mistakes.
const TAG_SCALE: f64 = 10.0;

impl LoraLibrary {
    /// Without a folder every readable file can be asked for by its path; with
    /// one, only what lies in it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn new(folder: Option<&Path>) -> Result<Self, Error> {
        let canonical = |folder: &Path| {
            let found = folder.canonicalize().ok().filter(|f| fs::read_dir(f).is_ok());
            found.ok_or_else(|| {
                Error::new(
                    ErrorKind::Model,
                    format!("the folder of LoRAs {} cannot be read: give one that exists", folder.display()),
                )
            })
        };
        Ok(Self { folder: folder.map(canonical).transpose()? })
    }

    /// A LoRA by its path or, where there is a folder, its name in it.
    ///
    /// # Errors
    /// With [`ErrorKind::Model`] when there is none.
    pub fn find(&self, name: &str, scale: f64) -> Result<Lora, Error> {
        let path = match &self.folder {
            None => file(Path::new(name)),
            Some(folder) => inside(folder, name),
        };
        let path = path.ok_or_else(|| {
            let name: String = name.chars().take(200).collect();
            lora_error(match &self.folder {
                None => format!(
                    "there is no readable LoRA file '{name}': give the path of a .{EXTENSION} file on the server's disk"
                ),
                Some(_) => format!(
                    "there is no LoRA '{name}' in the folder of LoRAs: GET /v1/loras lists those that there are"
                ),
            })
        })?;
        Ok(Lora { name: name.to_owned(), path, scale })
    }

    /// The LoRA that a prompt names.
    ///
    /// # Errors
    /// When there is no folder to look the name up in, or nothing of that name.
    pub fn find_tag(&self, tag: &LoraTag) -> Result<Lora, Error> {
        if tag.scale.abs() > TAG_SCALE {
            return Err(Error {
                param: Some("prompt"),
                ..Error::new(
                    ErrorKind::Request,
                    format!(
                        "prompt: the scale of <lora:{}> must be between -{TAG_SCALE} and {TAG_SCALE}",
                        tag.name
                    ),
                )
            });
        }
        if self.folder.is_none() {
            return Err(Error {
                param: Some("prompt"),
                ..lora_error(format!(
                    "prompt: <lora:{}> is a name, and there is no folder to look it up in: start with --lora-dir",
                    tag.name
                ))
            });
        }
        self.find(&tag.name, tag.scale)
    }

    /// The folder's files, by name; those that are no LoRAs are left out.
    pub fn list(&self) -> Vec<LoraEntry> {
        let mut files = vec![];
        if let Some(folder) = &self.folder {
            collect(folder, folder, DEPTH, &mut files);
        }
        files.sort();
        let entry = |path: PathBuf| {
            let folder = self.folder.as_deref()?;
            let name = path.strip_prefix(folder).ok()?.with_extension("").to_str()?.replace('\\', "/");
            let canonical = path.canonicalize().ok().filter(|p| p.starts_with(folder))?;
            Some(LoraEntry { info: inspect(&canonical, &name).ok()?, name })
        };
        files.into_iter().filter_map(entry).collect()
    }
}

/// The path itself, if it is a LoRA's file.
fn file(path: &Path) -> Option<PathBuf> {
    let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case(EXTENSION));
    let path = path.canonicalize().ok().filter(|_| named)?;
    fs::File::open(&path).and_then(|f| f.metadata()).is_ok_and(|m| m.is_file()).then_some(path)
}

/// What a name or path means in the folder, if the file really lies in it.
fn inside(folder: &Path, name: &str) -> Option<PathBuf> {
    // An absolute path replaces the folder here, and has to lead into it.
    let plain = folder.join(name);
    let mut named = plain.clone().into_os_string();
    named.push(format!(".{EXTENSION}"));
    [PathBuf::from(named), plain].iter().filter_map(|p| file(p)).find(|p| p.starts_with(folder))
}

fn collect(root: &Path, folder: &Path, depth: usize, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if into.len() >= LISTED {
            return;
        }
        if path.is_dir() {
            // A link may lead out of the folder, or back up into it.
            let below = path.canonicalize().is_ok_and(|p| p.starts_with(root) && p != *folder);
            if depth > 0 && below {
                collect(root, &path, depth - 1, into);
            }
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case(EXTENSION)) {
            into.push(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::PARAM;

    fn write(path: &Path) {
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        let header = r#"{"lora_unet_a.alpha":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[0; 4]);
        fs::write(path, bytes).expect("written");
    }

    #[test]
    fn a_folder_confines_what_can_be_asked_for() {
        let root = tempfile::tempdir().expect("a folder");
        let (dir, outside) = (root.path().join("loras"), root.path().join("secret.safetensors"));
        write(&dir.join("ink.safetensors"));
        write(&dir.join("style/paint.v2.safetensors"));
        write(&outside);
        fs::write(dir.join("note.txt"), "x").expect("written");
        #[cfg(unix)]
        std::os::unix::fs::symlink(&outside, dir.join("link.safetensors")).expect("a link");
        let library = LoraLibrary::new(Some(&dir)).expect("a folder");
        let absolute = dir.canonicalize().expect("there").join("ink.safetensors");
        for good in
            ["ink", "ink.safetensors", "style/paint.v2", "./style/../ink", absolute.to_str().expect("UTF-8")]
        {
            assert!(library.find(good, 1.0).is_ok(), "{good}");
        }
        let mut words = vec![];
        for bad in [
            "gone",
            "link",
            "../secret",
            "../gone",
            "note.txt",
            "style",
            "",
            "/etc/passwd",
            outside.to_str().expect("UTF-8"),
        ] {
            let error = library.find(bad, 1.0).expect_err(bad);
            assert_eq!(error.param, Some(PARAM));
            words.push(error.message.replacen(&format!("'{bad}'"), "''", 1));
        }
        words.dedup();
        assert_eq!(words.len(), 1, "all are told the same: {words:?}");
        let names: Vec<String> = library.list().into_iter().map(|l| l.name).collect();
        assert_eq!(names, ["ink", "style/paint.v2"]);
    }

    #[test]
    fn without_a_folder_any_readable_file_can_be_asked_for() {
        let root = tempfile::tempdir().expect("a folder");
        let path = root.path().join("ink.safetensors");
        write(&path);
        let library = LoraLibrary::new(None).expect("no folder");
        assert!(library.find(path.to_str().expect("UTF-8"), 1.0).is_ok());
        let mut words = vec![];
        for bad in [root.path().join("gone.safetensors"), root.path().to_owned(), "/etc/passwd".into()] {
            let bad = bad.to_str().expect("UTF-8").to_owned();
            words.push(library.find(&bad, 1.0).expect_err("refused").message.replacen(&bad, "", 1));
        }
        words.dedup();
        assert_eq!(words.len(), 1, "all are told the same: {words:?}");
        assert!(library.list().is_empty());
        let tag = LoraTag { name: "ink".to_owned(), scale: 1.0 };
        assert!(library.find_tag(&tag).expect_err("no folder").message.contains("--lora-dir"));
        assert!(LoraLibrary::new(Some(&root.path().join("none"))).is_err());
    }
}
