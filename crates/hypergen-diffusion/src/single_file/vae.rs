//! The autoencoder of a single file, and one that is given apart: a file in
//! either layout, a folder with a `config.json`, or a whole model's folder.

use std::path::Path;

use hypergen_tensor::{Checkpoint, Renamed};
use serde_json::Value;

use super::shapes::{self, Shapes};
use super::{names, published, renamed};
use crate::files::ModelFiles;
use crate::{Error, ErrorKind, recognise};

/// Factor of the latents in Stable Diffusion 1.x and 2.x, which no tensor tells.
pub(crate) const SCALING: f64 = 0.18215;
/// And in SDXL.
pub(crate) const SCALING_XL: f64 = 0.13025;

/// Below which an autoencoder lies in a single file. Files of an autoencoder
/// alone have no prefix.
const PREFIXES: [&str; 3] = ["first_stage_model.", "vae.", ""];

/// An autoencoder, ready to load.
pub(crate) struct Vae {
    /// Its `config.json`, or what stands for it.
    pub(crate) config: Value,
    /// Where that is from, for messages.
    pub(crate) shown: String,
    pub(crate) checkpoint: Checkpoint,
}

/// The autoencoder's tensors under diffusers' names, if there is one.
pub(super) fn view(file: &Checkpoint) -> Result<Option<Checkpoint>, Error> {
    let has = |name: String| file.get(&name).is_some();
    let Some(prefix) = PREFIXES.into_iter().find(|p| has(format!("{p}decoder.conv_in.weight"))) else {
        return Ok(None);
    };
    let levels = shapes::vae_levels(&Shapes { file, prefix });
    let names: Vec<Renamed> = match levels {
        // diffusers' own names.
        0 => renamed(file, prefix, |name| Some(name.to_owned())),
        _ => renamed(file, prefix, |name| names::vae(name, levels)),
    };
    let kept = names.into_iter().filter(|n| !beside(n.from.strip_prefix(prefix).unwrap_or(&n.from)));
    Ok(Some(file.view(file.label().to_owned(), &kept.collect::<Vec<_>>())?))
}

/// What training leaves beside an autoencoder.
fn beside(name: &str) -> bool {
    ["loss.", "model_ema.", "discriminator."].iter().any(|p| name.starts_with(p))
}

/// Opens an autoencoder that is given apart. `own` is the configuration of the
/// model's own one, whose scaling holds where the other says nothing.
///
/// # Errors
/// When there is none at that place, or it cannot be read.
pub(crate) fn open(path: &Path, own: &dyn Fn() -> Result<f64, Error>) -> Result<Vae, Error> {
    published::refuse_by_name(path)?;
    let metadata = std::fs::metadata(path).map_err(|e| {
        Error::new(
            ErrorKind::Model,
            format!("cannot read the VAE {}: {e}; give a .safetensors file or a folder", path.display()),
        )
    })?;
    if metadata.is_dir() {
        return open_folder(path);
    }
    let file = Checkpoint::open(path)?;
    let view = view(&file)?.ok_or_else(|| {
        Error::new(
            ErrorKind::Model,
            match recognise::tensors(&file) {
                Some(what) => format!("{} holds no VAE: it is {what}", path.display()),
                None => {
                    format!("{} holds no VAE (no tensor is called 'decoder.conv_in.weight')", path.display())
                }
            },
        )
    })?;
    let beside = path.with_file_name("config.json");
    let diffusers = file.get("decoder.mid_block.resnets.0.conv1.weight").is_some();
    if diffusers && beside.exists() {
        let folder = ModelFiles::Folder(path.parent().unwrap_or(Path::new(".")).to_owned());
        return Ok(Vae {
            config: folder.json("config.json")?,
            shown: folder.show("config.json"),
            checkpoint: view,
        });
    }
    let config = shapes::vae(&Shapes { file: &view, prefix: "" }, own()?)?;
    Ok(Vae { config, shown: file.label().to_owned(), checkpoint: view })
}

fn open_folder(path: &Path) -> Result<Vae, Error> {
    let inner = path.join("vae");
    let folder = if inner.is_dir() { inner } else { path.to_owned() };
    if !folder.join("config.json").exists() {
        return Err(Error::new(
            ErrorKind::Model,
            format!(
                "{} holds no config.json, so it is no VAE in the diffusers layout; a single .safetensors file works too",
                folder.display()
            ),
        ));
    }
    let files = ModelFiles::Folder(folder);
    Ok(Vae {
        config: files.json("config.json")?,
        shown: files.show("config.json"),
        checkpoint: files.checkpoint("", "diffusion_pytorch_model")?,
    })
}

/// The scaling that a configuration names, or the default of its class.
pub(crate) fn scaling(config: &Value) -> f64 {
    config.get("scaling_factor").and_then(Value::as_f64).unwrap_or(SCALING)
}
