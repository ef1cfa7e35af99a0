//! What is known of files that people download and that their tensors do not
//! tell: which schedule a model wants, and what else a file may be.

use std::path::Path;

use hypergen_tensor::Checkpoint;
use serde_json::Value;

use super::Kind;
use crate::{Error, ErrorKind};
use crate::{families, recognise};

/// Extensions of formats that can run code when they are read.
pub(crate) const PICKLES: [&str; 4] = ["ckpt", "pt", "pth", "bin"];

/// Refuses a file whose name says that it is a pickle, or of another format.
///
/// # Errors
/// With the reason and the fix.
pub(super) fn refuse_by_name(path: &Path) -> Result<(), Error> {
    if let Some(what) = recognise::extension(path) {
        return Err(Error::new(ErrorKind::Model, format!("{} is {what}", path.display())));
    }
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
    let says_v = says_v(file);
    let mut scheduler = match kind {
        Kind::Sd1 => families::sd1(),
        Kind::Sd2 if says_v == Some(false) => families::sd2_base(),
        Kind::Sd2 => families::sd2_v(),
        Kind::Xl => families::sdxl(),
    };
    mark(&mut scheduler, file);
    (scheduler, kind == Kind::Sd2 && says_v.is_none())
}

/// What a file says of its UNet's prediction, in its metadata or, as fine-tunes of
/// SDXL do, by an empty tensor.
fn says_v(file: &Checkpoint) -> Option<bool> {
    let said = file.metadata("modelspec.prediction_type").or_else(|| file.metadata("modelspec.predict_key"));
    match said {
        Some("v" | "v_prediction") => Some(true),
        Some("epsilon") => Some(false),
        _ if file.get("v_pred").is_some() => Some(true),
        _ => None,
    }
}

/// Writes into a scheduler's file what the model's own file says. As in ComfyUI, `ztsnr`
/// counts only beside v prediction: whoever predicts epsilon cannot begin at pure noise.
/// Other programs then begin at the very last timestep, which here is trailing spacing.
pub(super) fn mark(scheduler: &mut Value, file: &Checkpoint) {
    if says_v(file) != Some(true) {
        return;
    }
    scheduler["prediction_type"] = "v_prediction".into();
    if file.get("ztsnr").is_some() {
        scheduler["rescale_betas_zero_snr"] = true.into();
        scheduler["timestep_spacing"] = "trailing".into();
    }
}

/// An error for a file that is no model of ours.
pub(super) fn what_else(file: &Checkpoint) -> Error {
    let label = file.label();
    Error::new(
        ErrorKind::Model,
        match recognise::tensors(file) {
            Some(what) => format!("{label} is {what}"),
            None => format!(
                "{label} is a safetensors file, but not a checkpoint of Stable Diffusion 1.x, 2.x or SDXL (no tensor \
                 is called 'model.diffusion_model.input_blocks...')"
            ),
        },
    )
}
