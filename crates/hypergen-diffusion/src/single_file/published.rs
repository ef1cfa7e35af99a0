//! What is known of files that people download and that their tensors do not
//! tell: which schedule a model wants, and what else a file may be.

use std::path::Path;

use hypergen_tensor::Checkpoint;
use serde_json::Value;

use super::Kind;
use crate::families;
use crate::{Error, ErrorKind};

/// Extensions of formats that can run code when they are read.
pub(crate) const PICKLES: [&str; 4] = ["ckpt", "pt", "pth", "bin"];

/// Refuses a file whose name says that it is a pickle.
///
/// # Errors
/// With the reason and the mend.
pub(super) fn refuse_pickle(path: &Path) -> Result<(), Error> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    if !PICKLES.contains(&extension.as_str()) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Model,
        format!(
            "{} is a pickle by its name: reading such a file can run code that is hidden in it, so it is never read \
             here; use the .safetensors file that most models also have, or convert it (diffusers: \
             StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER, safe_serialization=True))",
            path.display()
        ),
    ))
}

/// Makes a scheduler's file.
type Scheduler = fn() -> Value;

/// Files of distilled models whose tensors are those of the base model: by
/// their published names, or the titles that they carry.
const DISTILLED: &[(Kind, &str, Scheduler)] = &[
    (Kind::Xl, "xl_turbo", families::sdxl_turbo),
    (Kind::Xl, "xl_lightning_1step", families::lightning_one),
    (Kind::Xl, "xl_lightning", families::lightning),
    (Kind::Sd2, "sd_turbo", families::sd_turbo),
];

/// The scheduler's file, and whether what the UNet predicts is still open.
///
/// Like diffusers, which takes the file of one published model for all: that
/// of 1.5, of 2.1, of SDXL base. Where a file says more, it is heard.
pub(super) fn scheduler(kind: Kind, path: &Path, file: &Checkpoint) -> (Value, bool) {
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let title = file.metadata("modelspec.title").unwrap_or_default();
    let plain = |text: &str| text.to_lowercase().replace(['-', ' ', '.'], "_");
    let names = [plain(&stem), plain(title)];
    let distilled =
        DISTILLED.iter().find(|(k, name, _)| *k == kind && names.iter().any(|n| n.contains(name)));
    if let Some((_, _, scheduler)) = distilled {
        return (scheduler(), false);
    }
    // The second way to say it is that of fine-tunes of SDXL.
    let says_v = match file.metadata("modelspec.prediction_type") {
        Some("v" | "v_prediction") => Some(true),
        Some("epsilon") => Some(false),
        _ if file.get("v_pred").is_some() => Some(true),
        _ => None,
    };
    let mut scheduler = match kind {
        Kind::Sd1 => families::sd1(),
        Kind::Sd2 if says_v == Some(false) => families::sd2_base(),
        Kind::Sd2 => families::sd2_v(),
        Kind::Xl => families::sdxl(),
    };
    if says_v == Some(true) {
        scheduler["prediction_type"] = "v_prediction".into();
    }
    if file.get("ztsnr").is_some() {
        scheduler["rescale_betas_zero_snr"] = true.into();
    }
    (scheduler, kind == Kind::Sd2 && says_v.is_none())
}

/// Tensors by which other kinds of files are known, and what these are.
const ELSE: &[(&str, &str)] = &[
    ("lora_", "a LoRA, which is no model: load one beside a model"),
    ("joint_blocks.", "a Stable Diffusion 3 model, which is not supported"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model, which is not supported"),
    ("double_blocks.", "a Flux model, which is not supported"),
    ("model.diffusion_model.double_blocks.", "a Flux model, which is not supported"),
    ("edm_mean", "a Playground model, which is not supported"),
    ("conditioner.embedders.0.model.", "an SDXL refiner, which is not supported"),
    ("control_model.", "a ControlNet, which is not supported"),
    ("controlnet_cond_embedding.", "a ControlNet, which is not supported"),
    ("model.diffusion_model.input_blocks.", "a UNet without its text encoder: use the whole checkpoint"),
    ("input_blocks.", "a UNet alone: use the whole checkpoint"),
    (
        "down_blocks.",
        "the UNet of a folder in the diffusers layout: give the folder that holds model_index.json",
    ),
    (
        "text_model.",
        "the text encoder of a folder in the diffusers layout: give the folder that holds model_index.json",
    ),
    (
        "encoder.layers.",
        "the text encoder of a folder in the diffusers layout: give the folder that holds model_index.json",
    ),
    ("first_stage_model.", "a VAE alone: give it with --vae beside a model"),
    ("decoder.", "a VAE alone: give it with --vae beside a model"),
];

/// An error for a file that is no model of ours.
pub(super) fn what_else(file: &Checkpoint) -> Error {
    let has = |prefix: &str| file.names().any(|name| name.starts_with(prefix));
    let low_rank = file.names().any(|name| name.contains(".lora_A.") || name.contains(".lora_down."));
    let found = ELSE.iter().find(|(prefix, _)| has(prefix)).map(|(_, what)| *what);
    let found = if low_rank { Some(ELSE[0].1) } else { found };
    let label = file.label();
    Error::new(
        ErrorKind::Model,
        match found {
            Some(what) => format!("{label} is {what}"),
            None => format!(
                "{label} is a safetensors file, but not a checkpoint of Stable Diffusion 1.x, 2.x or SDXL (no tensor \
                 is called 'model.diffusion_model.input_blocks...')"
            ),
        },
    )
}
