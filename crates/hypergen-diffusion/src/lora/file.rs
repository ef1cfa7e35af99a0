//! A LoRA file, read and sorted: which modules it changes, with which tensors.
//! What those tensors mean for a model's weights is `bind`'s business, and what
//! a trainer wrote beside them that of `settings`.

use std::collections::BTreeMap;
use std::path::Path;

use hypergen_tensor::Checkpoint;

use super::names::{Component, Place, Role, bundled, place, split};
use super::settings::Settings;
use super::{clipped, lora_error, some_of};
use crate::Error;

/// What a LoRA file is, for people who choose one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraInfo {
    /// The largest rank of its modules, where it says.
    pub rank: Option<usize>,
    /// Size of the file.
    pub bytes: u64,
    /// The family that it was trained for, where its shapes or its settings say.
    pub family: Option<&'static str>,
    /// Modules that it changes.
    pub modules: usize,
}

/// Looks at a file without reading its weights. Errors call it `name`.
///
/// # Errors
/// When it is not a LoRA that we understand.
pub fn inspect(path: &Path, name: &str) -> Result<LoraInfo, Error> {
    let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    let file = LoraFile::open(path, name)?;
    let rank = file.entries.iter().filter_map(|e| file.rank(e)).max();
    Ok(LoraInfo { rank, bytes, family: file.family(), modules: file.entries.len() })
}

/// The tensors of one module.
pub(super) struct Entry {
    /// As the file calls it.
    pub(super) name: String,
    pub(super) place: Place,
    /// Full names of its tensors.
    pub(super) tensors: BTreeMap<Role, String>,
}

/// A file whose tensors are all understood.
pub(super) struct LoraFile {
    pub(super) checkpoint: Checkpoint,
    pub(super) entries: Vec<Entry>,
    /// Embeddings by name, each with its vectors' names and their tensors'.
    pub(super) embeddings: BTreeMap<String, BTreeMap<String, String>>,
    settings: Settings,
}

/// The most that a file may have: what rank 256 on every layer of SDXL takes in
/// float32, and some.
const LIMIT: u64 = 8 << 30;

impl LoraFile {
    /// Maps a file: enough to look at its names and shapes.
    ///
    /// # Errors
    /// When it cannot be read or is not understood.
    pub(super) fn open(path: &Path, label: &str) -> Result<Self, Error> {
        readable(path, label)?;
        Self::sort(Checkpoint::open_as(path, label).map_err(|e| lora_error(e.to_string()))?, path)
    }

    /// Reads a file into memory.
    ///
    /// # Errors
    /// As [`LoraFile::open`].
    pub(super) fn read(path: &Path, label: &str) -> Result<Self, Error> {
        // Another kind of file may be large: its names say so before it is read.
        Self::open(path, label)?;
        Self::sort(Checkpoint::read(path, label, LIMIT).map_err(|e| lora_error(e.to_string()))?, path)
    }

    fn sort(checkpoint: Checkpoint, path: &Path) -> Result<Self, Error> {
        let label = checkpoint.label().to_owned();
        let mut keys: Vec<&str> = checkpoint.names().collect();
        keys.sort_unstable();
        if keys.is_empty() {
            return Err(lora_error(format!("{label} holds no tensors, so it is no LoRA")));
        }
        let mut modules: BTreeMap<&str, BTreeMap<Role, String>> = BTreeMap::new();
        let mut unknown = vec![];
        let mut embeddings: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for key in keys {
            if let Some((name, vectors)) = bundled(key) {
                let embedding = embeddings.entry(name.to_owned()).or_default();
                embedding.insert(vectors.to_owned(), key.to_owned());
                continue;
            }
            let Some((module, role)) = split(key) else {
                unknown.push(key);
                continue;
            };
            if let Some(twin) = modules.entry(module).or_default().insert(role, key.to_owned()) {
                let (twin, key) = (clipped(&twin), clipped(key));
                return Err(lora_error(format!("{label}: '{twin}' and '{key}' are the same of one module")));
            }
        }
        if modules.is_empty() && embeddings.is_empty() {
            let what = other_kind(&unknown).unwrap_or("it holds no adapter of a kind that is known here");
            return Err(lora_error(format!(
                "{label} is not a LoRA: {what} (its tensors: {})",
                some_of(&unknown)
            )));
        }
        if !unknown.is_empty() {
            return Err(lora_error(format!(
                "{label} holds tensors that are not understood, and the LoRA is not what it was trained to be \
                 without them: {}",
                some_of(&unknown)
            )));
        }
        let entries: Vec<Entry> = modules
            .into_iter()
            .map(|(name, tensors)| Entry { name: name.to_owned(), place: place(name), tensors })
            .collect();
        let settings = Settings::of(&checkpoint, path, entries.iter().map(|e| e.name.as_str()))?;
        Ok(Self { checkpoint, entries, embeddings, settings })
    }

    /// Dimensions of one of a module's tensors.
    pub(super) fn shape(&self, entry: &Entry, role: Role) -> Option<&[usize]> {
        let info = self.checkpoint.get(entry.tensors.get(&role)?)?;
        Some(&info.shape)
    }

    /// A module's rank, where a tensor shows it.
    pub(super) fn rank(&self, entry: &Entry) -> Option<usize> {
        let first = [Role::Down, Role::HadaW1B, Role::KronW2B, Role::KronW1B]
            .iter()
            .find_map(|&role| self.shape(entry, role)?.first().copied());
        // Two orders of GLoRA's factors are about; a rank is the smaller side of either.
        first.or_else(|| self.shape(entry, Role::GloraA1)?.iter().take(2).min().copied())
    }

    /// What the file's settings say of a module's strength: alpha over rank.
    /// 1 where there are none.
    pub(super) fn configured_scale(&self, entry: &Entry, rank: Option<usize>) -> f64 {
        self.settings.scale(&entry.name, entry.place.component, rank)
    }

    /// The family whose shapes these are.
    pub(super) fn family(&self) -> Option<&'static str> {
        let any = |part: &str| self.entries.iter().any(|e| e.place.path.contains(part));
        if TRANSFORMERS.iter().any(|part| any(part)) {
            return Some("a diffusion transformer such as Flux or SD 3");
        }
        let widths = self.entries.iter().filter(|e| {
            let path = &e.place.path;
            path.contains("attn2_to_k") || path.contains("attn2_to_v")
        });
        let by_width = widths.filter_map(|e| self.inputs(e)).find_map(|width| match width {
            768 => Some(SD1),
            1024 => Some(SD2),
            2048 => Some(SDXL),
            _ => None,
        });
        let by_text = || {
            let text2 = self.entries.iter().any(|e| e.place.component == Some(Component::Text2));
            let width = || {
                self.entries.iter().filter(|e| e.place.path.ends_with("q_proj")).find_map(|e| self.inputs(e))
            };
            match (text2, self.unet().next().is_some()) {
                (true, _) => Some(SDXL),
                (false, false) if width() == Some(1024) => Some(SD2),
                _ => None,
            }
        };
        let by_trainer = || match self.checkpoint.metadata("ss_base_model_version")? {
            version if version.starts_with("sdxl") => Some(SDXL),
            version if version.starts_with("sd_v1") => Some(SD1),
            version if version.starts_with("sd_v2") => Some(SD2),
            _ => None,
        };
        by_width.or_else(by_text).or_else(by_trainer)
    }

    fn unet(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|e| !matches!(e.place.component, Some(Component::Text | Component::Text2)))
    }

    /// Inputs of a matrix.
    fn inputs(&self, entry: &Entry) -> Option<usize> {
        let second = |role| self.shape(entry, role)?.get(1).copied();
        let kronecker = || {
            let left = second(Role::KronW1).or_else(|| second(Role::KronW1B))?;
            left.checked_mul(second(Role::KronW2).or_else(|| second(Role::KronW2B))?)
        };
        let glora = || self.shape(entry, Role::GloraA1)?.iter().take(2).max().copied();
        let whole = || second(Role::Diff);
        second(Role::Down).or_else(|| second(Role::HadaW1B)).or_else(kronecker).or_else(glora).or_else(whole)
    }
}

pub(super) const SD1: &str = "Stable Diffusion 1.x";
pub(super) const SD2: &str = "Stable Diffusion 2.x";
pub(super) const SDXL: &str = "Stable Diffusion XL";

/// Parts of module names that only transformers without a UNet have.
const TRANSFORMERS: &[&str] = &[
    "single_transformer_blocks",
    "double_blocks_",
    "single_blocks_",
    "joint_blocks_",
    "transformer_transformer_blocks",
];

/// What a file is that holds no adapter at all.
fn other_kind(keys: &[&str]) -> Option<&'static str> {
    let any = |part: &str| keys.iter().any(|k| k.contains(part));
    if any("model.diffusion_model.") || any("down_blocks.0.resnets") {
        return Some("these are the weights of a whole model");
    }
    if any("emb_params") || any("clip_l") || keys == ["<concept>"] {
        return Some("this is a textual inversion");
    }
    any("oft_").then_some("this is an orthogonal adapter (OFT), which is not supported")
}

/// The same words for whatever cannot be opened, so that nobody learns from
/// them what else there is on the disk.
fn readable(path: &Path, label: &str) -> Result<(), Error> {
    let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"));
    // A pipe would wait for its writer when it is opened.
    let is_file = || std::fs::metadata(path).is_ok_and(|m| m.is_file());
    if named && is_file() && std::fs::File::open(path).is_ok() {
        return Ok(());
    }
    Err(lora_error(format!(
        "there is no readable LoRA file '{label}': give the path of a .safetensors file on the server's disk"
    )))
}
