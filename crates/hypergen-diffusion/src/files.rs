//! Where a model's files are: a folder in the diffusers layout, a single file,
//! or the binary itself. Says which file of a part to take, and names it in every error.

use std::borrow::Cow;
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypergen_tensor::Checkpoint;
use serde_json::Value;

use crate::presets::Preset;
use crate::single_file::SingleFile;
use crate::{Error, ErrorKind, embedded, recognise};

/// JSON and text files larger than this are no configuration.
const MAX_TEXT: u64 = 64 << 20;

/// A model's files.
#[derive(Debug, Clone)]
pub enum ModelFiles {
    /// A folder in the diffusers layout.
    Folder(PathBuf),
    /// A single-file checkpoint in the original layout.
    Single(Arc<SingleFile>),
    /// The model inside the binary.
    Embedded,
    /// A family's published shapes with random weights, for measurements.
    Random(Preset),
}

impl ModelFiles {
    /// The model at a path: a single file, or a folder if it looks like a model.
    ///
    /// # Errors
    /// When there is nothing, or neither of both.
    pub fn at(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        let metadata = std::fs::metadata(path).map_err(|e| match e.kind() {
            IoKind::NotFound => model_error(format!(
                "there is no model at {shown}: give a folder in the diffusers layout (it holds model_index.json), a \
                 .safetensors file, or leave the model out to use the embedded one"
            )),
            _ => model_error(format!("cannot read {shown}: {e}")),
        })?;
        if !metadata.is_dir() {
            return Ok(Self::Single(Arc::new(SingleFile::open(path)?)));
        }
        if !path.join("model_index.json").exists() {
            return Err(model_error(format!(
                "{shown} holds no model_index.json, so it is not a model in the diffusers layout; {}",
                recognise::folder(path)
            )));
        }
        Ok(Self::Folder(path.to_owned()))
    }

    /// The file's name for messages.
    pub fn show(&self, file: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(file).display().to_string(),
            Self::Single(single) => single.show(file),
            Self::Embedded => format!("embedded {file}"),
            Self::Random(preset) => format!("preset {} {file}", preset.name()),
        }
    }

    /// The file's contents, if it exists.
    ///
    /// # Errors
    /// When it exists but cannot be read, or is absurdly large.
    pub fn bytes(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, Error> {
        let folder = match self {
            Self::Folder(folder) => folder,
            Self::Single(single) => return Ok(single.file(file)),
            Self::Embedded => return Ok(embedded::file(file).map(Cow::Borrowed)),
            Self::Random(preset) => return Ok(preset.file(file)),
        };
        let path = folder.join(file);
        let failed = |e: std::io::Error| model_error(format!("cannot read {}: {e}", path.display()));
        match std::fs::metadata(&path) {
            Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
            // A pipe or a device would be read without end.
            Ok(m) if !m.is_file() => return Err(model_error(format!("{} is not a file", path.display()))),
            Ok(m) if m.len() > MAX_TEXT => {
                return Err(model_error(format!(
                    "{} has {} bytes, and no configuration has more than {MAX_TEXT}; is it another file under this name?",
                    path.display(),
                    m.len()
                )));
            }
            Ok(_) => {}
        }
        Ok(Some(std::fs::read(&path).map_err(failed)?.into()))
    }

    /// The contents of a file that has to be there.
    ///
    /// # Errors
    /// Also when it does not exist.
    pub fn required_bytes(&self, file: &str) -> Result<Cow<'static, [u8]>, Error> {
        self.bytes(file)?.ok_or_else(|| {
            model_error(format!("{} is missing; is the download of the model complete?", self.show(file)))
        })
    }

    /// A JSON file, if it exists.
    ///
    /// # Errors
    /// When it cannot be read or does not parse.
    pub fn optional_json(&self, file: &str) -> Result<Option<Value>, Error> {
        let Some(bytes) = self.bytes(file)? else { return Ok(None) };
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|e| model_error(format!("{} is not valid JSON: {e}", self.show(file))))?;
        if !json.is_object() {
            return Err(model_error(format!("{} does not hold a JSON object", self.show(file))));
        }
        Ok(Some(json))
    }

    /// A JSON file that has to be there.
    ///
    /// # Errors
    /// Also when it does not exist.
    pub fn json(&self, file: &str) -> Result<Value, Error> {
        self.required_bytes(file)?;
        Ok(self.optional_json(file)?.unwrap_or_default())
    }

    /// The weights of a part: `stem` is `model` for text encoders and
    /// `diffusion_pytorch_model` otherwise. Full precision is preferred to a
    /// half-precision variant, one file to several.
    ///
    /// # Errors
    /// When there are none, or only pickles.
    pub fn checkpoint(&self, part: &str, stem: &str) -> Result<Checkpoint, Error> {
        let file = format!("{part}/{stem}.safetensors");
        let folder = match self {
            Self::Folder(folder) => folder,
            Self::Single(single) => return single.checkpoint(part),
            Self::Random(_) => return Ok(Checkpoint::random(&self.show(&file))),
            Self::Embedded => {
                let bytes = embedded::file(&file)
                    .ok_or_else(|| model_error(format!("the embedded model has no {file}")))?;
                return Ok(Checkpoint::from_static(&self.show(&file), bytes)?);
            }
        };
        let folder = folder.join(part);
        for variant in ["", ".fp16", ".bf16"] {
            let file = folder.join(format!("{stem}{variant}.safetensors"));
            if file.exists() {
                return Ok(Checkpoint::open(&file)?);
            }
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if index.exists() {
                return Ok(Checkpoint::open_index(&index)?);
            }
        }
        Err(model_error(no_weights(&folder, part, stem)))
    }
}

/// Why a part's folder has no weights, with what to do.
fn no_weights(folder: &Path, part: &str, stem: &str) -> String {
    let shown = folder.display();
    let has = |extensions: &[&str]| extensions.iter().any(|e| has_extension(folder, e));
    if has(&["bin", "ckpt", "pt"]) {
        return format!(
            "{shown} has its weights only as a pickle, which can run code when it is read, and is never read here; \
             save the model as safetensors (diffusers: pipe.save_pretrained(folder, safe_serialization=True))"
        );
    }
    if has(&["onnx", "msgpack", "gguf"]) {
        return format!(
            "{shown} has its weights only for other programs (ONNX, JAX or GGUF); look for the same model as safetensors"
        );
    }
    let missing = match folder.exists() {
        true => format!("{shown} has no {stem}.safetensors"),
        false => format!("there is no folder {shown}"),
    };
    let fix = if part == "vae" { ", or give a VAE with --vae" } else { "" };
    format!("{missing}; is the download of the model complete?{fix}")
}

fn has_extension(folder: &Path, extension: &str) -> bool {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files.into_iter().any(|f| f.path().extension().is_some_and(|e| e == extension))
}

fn model_error(message: String) -> Error {
    Error::new(ErrorKind::Model, message)
}
