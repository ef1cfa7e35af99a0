//! Where LoRA files are found: any readable file by its path, or, where there
//! is a folder for them, what lies in it and nothing else, links followed. What
//! a file is, its name there says, whatever it is a link to: the hub's cache
//! keeps all files without a name of their own.
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
    folder: Option<Folder>,
}

/// A folder of LoRAs; both paths are canonical.
#[derive(Debug, Clone)]
struct Folder {
    path: PathBuf,
    /// Where the links of the hub's cache lead, if it is a part of that.
    blobs: Option<PathBuf>,
}

/// A file of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraEntry {
    /// By which it is asked for: its path in the folder, without the extension
    /// unless that takes it to tell files apart.
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
        let found = folder.map(canonical).transpose()?;
        Ok(Self { folder: found.map(|path| Folder { blobs: blobs(&path), path }) })
    }

    /// A LoRA by its path or, where there is a folder, its name in it.
    ///
    /// # Errors
    /// With [`ErrorKind::Model`] when there is none.
    pub fn find(&self, name: &str, scale: f64) -> Result<Lora, Error> {
        let path = match &self.folder {
            None => file(Path::new(name)).map(|_| PathBuf::from(name)),
            Some(folder) => folder.find(name),
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
        self.find(&tag.name, tag.scale).map_err(|e| match tag.name.contains(':') {
            // More likely a scale that is none than a name with a colon.
            true => Error {
                param: Some("prompt"),
                ..Error::new(
                    ErrorKind::Request,
                    format!(
                        "prompt: <lora:{}> names no LoRA of the folder; write <lora:NAME:SCALE> with one number as \
                         its scale",
                        tag.name.chars().take(200).collect::<String>()
                    ),
                )
            },
            false => e,
        })
    }

    /// The folder's files, by name; those that are no LoRAs are left out.
    pub fn list(&self) -> Vec<LoraEntry> {
        let Some(folder) = &self.folder else { return vec![] };
        let mut files = vec![];
        collect(&folder.path, &folder.path, DEPTH, &mut files);
        files.sort();
        let entry = |path: PathBuf| {
            let name = folder.name(&path)?;
            Some(LoraEntry { info: inspect(&path, &name).ok()?, name })
        };
        files.into_iter().filter_map(entry).collect()
    }
}

impl Folder {
    /// What a name or path means here, if the file really lies here.
    fn find(&self, name: &str) -> Option<PathBuf> {
        // An absolute path replaces the folder here, and has to lead into it.
        let plain = self.path.join(name);
        let mut longer = plain.clone().into_os_string();
        longer.push(format!(".{EXTENSION}"));
        let exact = [plain.clone(), PathBuf::from(longer)].into_iter().find_map(|path| self.admit(path));
        exact.or_else(|| self.other_cases(&plain).into_iter().find_map(|path| self.admit(path)))
    }

    /// The path, if it is a LoRA's file of this folder.
    fn admit(&self, path: PathBuf) -> Option<PathBuf> {
        let real = file(&path)?;
        if !self.holds(&path) {
            // It may lead into the folder from elsewhere, but what else lies
            // there is none of a request's business.
            return real.starts_with(&self.path).then_some(real);
        }
        let is_blob = || self.blobs.as_deref().is_some_and(|blobs| real.parent() == Some(blobs));
        (real.starts_with(&self.path) || is_blob()).then_some(path)
    }

    /// Whether a path's own folder is this one or one in it.
    fn holds(&self, path: &Path) -> bool {
        let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
        parent.is_some_and(|parent| parent.starts_with(&self.path))
    }

    /// Files of this name whose extension is written otherwise (`.SAFETENSORS`).
    fn other_cases(&self, plain: &Path) -> Vec<PathBuf> {
        let parent = plain.parent().filter(|_| self.holds(plain));
        let entries = parent.and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten();
        let mut found: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| path.file_stem() == plain.file_name() && is_named(path))
            .collect();
        found.sort();
        found
    }

    /// The name by which a file of this folder can be asked for.
    fn name(&self, path: &Path) -> Option<String> {
        let inside = path.strip_prefix(&self.path).ok()?;
        [inside.with_extension(""), inside.to_owned()].iter().find_map(|name| {
            let parts: Option<Vec<&str>> = name.iter().map(|part| part.to_str()).collect();
            Some(parts?.join("/")).filter(|name| self.find(name).as_deref() == Some(path))
        })
    }
}

/// Where the links of a folder lead that is a snapshot in the hub's cache
/// (`models--a--b/snapshots/REVISION`), or lies in one.
fn blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.ancestors().skip(1).find(|f| f.file_name().is_some_and(|n| n == "snapshots"))?;
    snapshots.with_file_name("blobs").canonicalize().ok().filter(|blobs| blobs.is_dir())
}

/// Whether a file is a LoRA's by its name.
fn is_named(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(EXTENSION))
}

/// What a path leads to, if it is a LoRA's file by its name.
fn file(path: &Path) -> Option<PathBuf> {
    let real = path.canonicalize().ok().filter(|_| is_named(path))?;
    // A pipe would wait for its writer when it is opened.
    let is_file = fs::metadata(&real).is_ok_and(|m| m.is_file());
    (is_file && fs::File::open(&real).is_ok()).then_some(real)
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
        } else if is_named(&path) {
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

    /// Whatever is listed can be asked for by that name, as a parameter and,
    /// where a tag can hold it, in a prompt, and is that very file.
    #[test]
    fn what_is_listed_can_be_used() {
        let root = tempfile::tempdir().expect("a folder");
        let dir = root.path().canonicalize().expect("there").join("loras");
        for file in [
            "UPPER.SAFETENSORS",
            "Mixed.SafeTensors",
            "both.safetensors",
            "both.SAFETENSORS",
            "double.safetensors.safetensors",
            "double.safetensors",
            "a, b: c.safetensors",
            "x:1.safetensors",
            " spaces .safetensors",
            "dots.v1.5..safetensors",
            "日本 é.safetensors",
            "e\u{301}.safetensors",
            "back\\slash.safetensors",
            "q'\"<[(.safetensors",
            "folder.safetensors/in.safetensors",
            "folder.safetensors/UPPER.Safetensors",
            "a/b/c/d/deep.safetensors",
            "new\nline.safetensors",
        ] {
            write(&dir.join(file));
        }
        fs::write(dir.join("broken.safetensors"), "x").expect("written");
        fs::write(dir.join(".safetensors"), "x").expect("written");
        let library = LoraLibrary::new(Some(&dir)).expect("a folder");
        let listed = library.list();
        assert_eq!(listed.len(), 18, "{listed:?}");
        let mut found: Vec<PathBuf> = vec![];
        for LoraEntry { name, .. } in &listed {
            let lora = library.find(name, 1.0).expect(name);
            let text = format!("a <lora:{name}:0.5>");
            let tags = crate::prompt::parse("prompt", &text).expect(name).loras;
            if name.trim() == name {
                assert_eq!(library.find_tag(&tags[0]).expect(name), Lora { scale: 0.5, ..lora.clone() });
            }
            found.push(lora.path);
        }
        found.sort();
        found.dedup();
        assert_eq!(found.len(), listed.len(), "each is another file");
        let names: Vec<&str> = listed.iter().map(|l| l.name.as_str()).collect();
        for name in
            ["UPPER", "Mixed", "both", "both.SAFETENSORS", "double", "a, b: c", "folder.safetensors/UPPER"]
        {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        for (name, file) in [("UPPER", "UPPER.SAFETENSORS"), ("double.safetensors", "double.safetensors")] {
            assert_eq!(library.find(name, 1.0).expect(name).path, dir.join(file));
        }
    }

    /// What follows a tag's last colon is its scale if it is a number; a name
    /// that is none of a file was probably meant to end before.
    #[test]
    fn a_tag_with_two_scales_or_a_word_for_one_is_a_mistake_in_the_prompt() {
        let root = tempfile::tempdir().expect("a folder");
        write(&root.path().join("ink.safetensors"));
        let library = LoraLibrary::new(Some(root.path())).expect("a folder");
        for text in ["<lora:ink:1:0.5>", "<lora:ink:strong>", "<lora:ink:0,8>"] {
            let tag = crate::prompt::parse("prompt", text).expect(text).loras.remove(0);
            let error = library.find_tag(&tag).expect_err(text);
            assert_eq!((error.kind, error.param), (ErrorKind::Request, Some("prompt")), "{error}");
            assert!(error.message.contains("<lora:NAME:SCALE>"), "{error}");
        }
        let tag = LoraTag { name: "gone".to_owned(), scale: 1.0 };
        assert_eq!(library.find_tag(&tag).expect_err("gone").kind, ErrorKind::Model);
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
