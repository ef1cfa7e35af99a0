//! Single-file checkpoints in the original key layout (Stable Diffusion 1.x,
//! 2.x and SDXL as people download them), shown as the folder that diffusers
//! would make of them: the same names, configurations read off the shapes, and
//! CLIP's tokenizer, which such a file leaves out. Nothing is converted or
//! copied; the names are looked up in the mapped file.
//!
//! Averaged weights beside the trained ones (`model_ema.`) are left alone, as
//! in diffusers. So is everything else that lies beside the three networks.

mod names;
mod published;
mod shapes;
pub(crate) mod vae;
mod vocabulary;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use hypergen_tensor::{Checkpoint, Part, Renamed};
use serde_json::{Value, json};

use crate::{Error, ErrorKind, recognise};
use shapes::Shapes;

const UNET: &str = "model.diffusion_model.";
/// CLIP ViT-L of Stable Diffusion 1.x, under transformers' names.
const CLIP: &str = "cond_stage_model.transformer.";
/// OpenCLIP ViT-H of Stable Diffusion 2.x.
const OPEN_CLIP: &str = "cond_stage_model.model.";
/// SDXL's CLIP ViT-L and OpenCLIP ViT-bigG.
const XL_CLIP: &str = "conditioner.embedders.0.transformer.";
const XL_OPEN_CLIP: &str = "conditioner.embedders.1.model.";

/// A single file, seen as a folder in the diffusers layout.
pub struct SingleFile {
    label: String,
    json: BTreeMap<&'static str, Value>,
    parts: BTreeMap<&'static str, Checkpoint>,
    /// Pads of the tokenizers by folder.
    pads: BTreeMap<&'static str, &'static str>,
    /// Neither name nor metadata says whether the UNet predicts epsilon or v.
    prediction_unknown: bool,
    /// All of the file, for what else it says of itself.
    file: Checkpoint,
}

impl fmt::Debug for SingleFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SingleFile").field(&self.label).finish()
    }
}

/// Which of the original code's models a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sd1,
    Sd2,
    Xl,
}

impl SingleFile {
    /// Opens a file and finds out what it is.
    ///
    /// # Errors
    /// When it cannot be read, is not a whole model, or one of another kind.
    pub fn open(path: &Path) -> Result<Self, Error> {
        published::refuse_by_name(path)?;
        let file = Checkpoint::open(path)?;
        let kind = kind(&file)?;
        let mut whole = Self {
            label: file.label().to_owned(),
            json: BTreeMap::new(),
            parts: BTreeMap::new(),
            pads: BTreeMap::new(),
            prediction_unknown: false,
            file: file.clone(),
        };
        let class = if kind == Kind::Xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
        whole
            .json
            .insert("model_index.json", json!({"_class_name": class, "force_zeros_for_empty_prompt": true}));
        let (scheduler, prediction_unknown) = published::scheduler(kind, path, &file);
        whole.json.insert("scheduler/scheduler_config.json", scheduler);
        whole.prediction_unknown = prediction_unknown;
        let pooled = whole.add_texts(kind, &file)?;
        whole.add_unet(&file, pooled)?;
        whole.add_vae(kind, &file)?;
        Ok(whole)
    }

    fn add_texts(&mut self, kind: Kind, file: &Checkpoint) -> Result<Option<usize>, Error> {
        match kind {
            Kind::Sd1 => {
                self.add_text(
                    file,
                    "text_encoder",
                    "text_encoder/config.json",
                    clip(file, CLIP),
                    "quick_gelu",
                    false,
                )?;
                self.pads.insert("tokenizer", vocabulary::END);
                Ok(None)
            }
            Kind::Sd2 => {
                // The family conditions on the penultimate layer, so diffusers leaves the last one out.
                let names = open_clip(file, OPEN_CLIP, true);
                self.add_text(file, "text_encoder", "text_encoder/config.json", names, "gelu", false)?;
                self.pads.insert("tokenizer", vocabulary::EXCLAMATION);
                Ok(None)
            }
            Kind::Xl => {
                let (first, second) = (clip(file, XL_CLIP), open_clip(file, XL_OPEN_CLIP, false));
                self.add_text(file, "text_encoder", "text_encoder/config.json", first, "quick_gelu", false)?;
                self.add_text(file, "text_encoder_2", "text_encoder_2/config.json", second, "gelu", true)?;
                self.pads.insert("tokenizer", vocabulary::END);
                self.pads.insert("tokenizer_2", vocabulary::EXCLAMATION);
                let pooled = self.json["text_encoder_2/config.json"]["projection_dim"].as_u64();
                Ok(pooled.map(|p| p as usize))
            }
        }
    }

    fn add_text(
        &mut self,
        file: &Checkpoint,
        part: &'static str,
        config: &'static str,
        names: Vec<Renamed>,
        hidden_act: &str,
        projects: bool,
    ) -> Result<(), Error> {
        let view = file.view(file.label().to_owned(), &names)?;
        let shapes = Shapes { file: &view, prefix: "" };
        self.json.insert(config, shapes::text(&shapes, hidden_act, projects)?);
        self.parts.insert(part, view);
        Ok(())
    }

    fn add_unet(&mut self, file: &Checkpoint, pooled: Option<usize>) -> Result<(), Error> {
        let shapes = Shapes { file, prefix: UNET };
        let (layers, _) = shapes::unet_blocks(&shapes)?;
        self.json.insert("unet/config.json", shapes::unet(&shapes, pooled)?);
        let names = renamed(file, UNET, |name| names::unet(name, layers));
        self.parts.insert("unet", file.view(file.label().to_owned(), &names)?);
        Ok(())
    }

    /// A file may come without an autoencoder; then one has to be given apart.
    fn add_vae(&mut self, kind: Kind, file: &Checkpoint) -> Result<(), Error> {
        let Some(view) = vae::view(file)? else { return Ok(()) };
        let scaling = if kind == Kind::Xl { vae::SCALING_XL } else { vae::SCALING };
        self.json.insert("vae/config.json", shapes::vae(&Shapes { file: &view, prefix: "" }, scaling)?);
        self.parts.insert("vae", view);
        Ok(())
    }

    /// A file of the folder that this one stands for.
    pub(crate) fn file(&self, name: &str) -> Option<Cow<'static, [u8]>> {
        if let Some(json) = self.json.get(name) {
            return Some(json.to_string().into_bytes().into());
        }
        let (folder, file) = name.split_once('/')?;
        vocabulary::file(file, self.pads.get(folder)?)
    }

    /// How a file of that folder is called in messages.
    pub(crate) fn show(&self, name: &str) -> String {
        format!("{} (as {name})", self.label)
    }

    /// The weights of a part.
    ///
    /// # Errors
    /// When the file has none.
    pub(crate) fn checkpoint(&self, part: &str) -> Result<Checkpoint, Error> {
        self.parts.get(part).cloned().ok_or_else(|| {
            let fix = if part == "vae" { "; give one with --vae" } else { "" };
            Error::new(ErrorKind::Model, format!("{} holds no {part}{fix}", self.label))
        })
    }

    /// A family's scheduler, with what this file says of its prediction.
    pub(crate) fn marked(&self, mut scheduler: Value) -> Value {
        published::mark(&mut scheduler, &self.file);
        scheduler
    }

    /// Whether only the UNet itself can tell what it predicts.
    pub(crate) fn prediction_unknown(&self) -> bool {
        self.prediction_unknown
    }
}

/// What a file is, by the tensors that each kind has.
fn kind(file: &Checkpoint) -> Result<Kind, Error> {
    let any = |prefix: &str| file.names().any(|name| name.starts_with(prefix));
    if !any(&format!("{UNET}input_blocks.")) {
        return Err(published::what_else(file));
    }
    let wrong = |what: String| Err(Error::new(ErrorKind::Model, format!("{} is {what}", file.label())));
    if let Some(what) = recognise::changed(file) {
        return wrong(what);
    }
    let without = |which: &str| {
        let prefix = if which == "first" { XL_CLIP } else { XL_OPEN_CLIP };
        wrong(format!(
            "an SDXL model without its {which} text encoder (no tensor is called '{prefix}...'): use the whole checkpoint"
        ))
    };
    match () {
        () if any(XL_OPEN_CLIP) && any(XL_CLIP) => Ok(Kind::Xl),
        () if any(XL_CLIP) => without("second"),
        () if any(XL_OPEN_CLIP) => without("first"),
        () if any(&format!("{UNET}label_emb.")) && (any(OPEN_CLIP) || any(CLIP)) => wrong(
            "a model whose UNet takes a picture or a class beside the text, which is not supported".into(),
        ),
        () if any(OPEN_CLIP) => Ok(Kind::Sd2),
        () if any(CLIP) => Ok(Kind::Sd1),
        () => Err(published::what_else(file)),
    }
}

/// All tensors below a prefix under their new names. What has none keeps its
/// own, so that the loader finds it left over and says so.
fn renamed(file: &Checkpoint, prefix: &str, rename: impl Fn(&str) -> Option<String>) -> Vec<Renamed> {
    let below = file.names().filter_map(|from| Some((from, from.strip_prefix(prefix)?)));
    below
        .map(|(from, name)| Renamed {
            to: rename(name).unwrap_or_else(|| from.to_owned()),
            from: from.to_owned(),
            part: Part::Whole,
        })
        .collect()
}

/// A text encoder that has transformers' names already.
fn clip(file: &Checkpoint, prefix: &str) -> Vec<Renamed> {
    renamed(file, prefix, |name| Some(name.strip_prefix("text_model.").unwrap_or(name).to_owned()))
}

/// OpenCLIP's text encoder, with or without its last layer and projection.
fn open_clip(file: &Checkpoint, prefix: &str, penultimate: bool) -> Vec<Renamed> {
    let below = || file.names().filter_map(|from| Some((from, from.strip_prefix(prefix)?)));
    let layer = |name: &str| -> Option<usize> {
        name.strip_prefix("transformer.resblocks.")?.split('.').next()?.parse().ok()
    };
    let last = below().filter_map(|(_, name)| layer(name)).max();
    below()
        .filter(|(_, name)| {
            !penultimate || (*name != "text_projection" && (layer(name).is_none() || layer(name) != last))
        })
        .flat_map(|(from, name)| {
            names::open_clip(from, name).unwrap_or_else(|| {
                vec![Renamed { to: from.to_owned(), from: from.to_owned(), part: Part::Whole }]
            })
        })
        .collect()
}
