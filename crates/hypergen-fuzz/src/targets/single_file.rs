//! A checkpoint in one file: recognised by its names and shapes, and shown as
//! the folder that diffusers would make of it.

use hypergen_diffusion::files::ModelFiles;
use hypergen_diffusion::models::text_encoder::TextEncoderConfig;
use hypergen_diffusion::models::unet_config::UNetConfig;
use hypergen_diffusion::models::vae::VaeConfig;
use hypergen_diffusion::samplers::Sampler;
use hypergen_diffusion::{Error, ErrorKind};
use serde_json::Value;

use crate::{check_message, files};

/// The input describes the tensors in lines. Its values are holes, as nothing
/// here looks at them, so that tensors may be as large as they like.
pub(crate) fn read(data: &[u8]) -> u64 {
    let path = files::path("single.safetensors");
    let Ok(text) = std::str::from_utf8(data) else { return 0 };
    if files::write_described(&path, text).is_none() {
        return 0;
    }
    // Its header is what is read.
    let bytes = 4 * data.len() as u64;
    let files = match ModelFiles::at(&path) {
        Ok(files) => files,
        Err(error) => {
            check(&error);
            return bytes;
        }
    };
    checked(files.checkpoint("unet", "diffusion_pytorch_model").map(drop));
    checked(files.checkpoint("text_encoder", "model").map(drop));
    checked(files.checkpoint("vae", "diffusion_pytorch_model").map(drop));
    let json = |file: &str| files.json(file).unwrap_or_else(|e| panic!("{e}"));
    words(UNetConfig::from_json(&json("unet/config.json")).map(drop));
    words(TextEncoderConfig::from_json(&json("text_encoder/config.json")).map(drop));
    if let Ok(Some(vae)) = files.optional_json("vae/config.json") {
        words(VaeConfig::from_json(&vae).map(drop));
    }
    let class = json("model_index.json")["_class_name"].clone();
    assert!(class.as_str().is_some_and(|class| class.starts_with("StableDiffusion")), "{class}");
    let scheduler: Value = json("scheduler/scheduler_config.json");
    Sampler::new(None, &scheduler, 20).unwrap_or_else(|e| panic!("{scheduler}: {e}"));
    bytes
}

fn checked(result: Result<(), Error>) {
    if let Err(error) = result {
        check(&error);
    }
}

fn check(error: &Error) {
    assert_eq!(error.kind, ErrorKind::Model, "{error}");
    check_message(&error.message, &["single.safetensors"]);
}

/// An error of a configuration: whoever reads it adds the file.
fn words(result: Result<(), Error>) {
    if let Err(error) = result {
        check_message(&error.message, &["'", "kernel"]);
    }
}
