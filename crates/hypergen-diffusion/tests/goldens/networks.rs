//! Single networks in float32 against diffusers and transformers: text
//! encoders, UNets (also of odd sizes), VAE decoders and encoders, timestep
//! embeddings. The blocks inside them: `src/models/goldens.rs`.

use std::path::Path;

use hypergen_diffusion::models::text_encoder::{HiddenState, TextEncoder, TextEncoderConfig};
use hypergen_diffusion::models::unet::{Added, UNet, UNetConfig, timestep_embedding};
use hypergen_diffusion::models::vae::{Decoder, Encoder, VaeConfig};
use hypergen_tensor::{Checkpoint as Weights, DType, Device, DeviceConfig, Loader, Tensor};
use serde_json::Value;

use crate::blocks::{Blocks, input};
use crate::checkpoint::{Checkpoint, Layout, Shapes, write_weights};
use crate::fixture::{to_nchw, to_nhwc};

fn device() -> Device {
    Device::cpu(&DeviceConfig { threads: Some(2) }).expect("the CPU")
}

/// A tiny checkpoint on disk.
struct Folder(tempfile::TempDir);

impl Folder {
    fn of(checkpoint: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Checkpoint::named(checkpoint).write(folder.path(), &Layout::plain());
        Self(folder)
    }

    fn config(&self, part: &str) -> Value {
        let path = self.0.path().join(part).join("config.json");
        serde_json::from_slice(&std::fs::read(path).expect("config.json")).expect("JSON")
    }

    fn weights(&self, part: &str) -> Weights {
        let stem = if part.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
        open(&self.0.path().join(part).join(format!("{stem}.safetensors")))
    }
}

fn open(path: &Path) -> Weights {
    Weights::open(path).expect("weights that open")
}

#[test]
fn text_encoders_agree() {
    let blocks = Blocks::read();
    let device = device();
    for checkpoint in ["sd1", "sd2", "sdxl"] {
        let folder = Folder::of(checkpoint);
        for (name, row) in blocks.rows(&format!("text_{checkpoint}_")) {
            let part = row["part"].as_str().unwrap();
            let weights = folder.weights(part);
            let config = TextEncoderConfig::from_json(&folder.config(part)).expect("a configuration");
            let loader = Loader::new(&weights, &device, DType::F32, &|_| {});
            let encoder = TextEncoder::load(&loader.root(), config).expect("an encoder");
            assert_eq!(loader.unused(), [""; 0], "{name}");
            let ids: Vec<Vec<u32>> = serde_json::from_value(row["ids"].clone()).unwrap();
            let normed = row["output"] == "last";
            let state = HiddenState { skip: usize::from(!normed), normed };
            let output = encoder.forward(&ids.concat(), ids[0].len(), state);
            match row["output"].as_str().unwrap() {
                "pooled" => blocks.check(&name, &output.pooled.expect("a projection")),
                _ => blocks.check(&name, &output.hidden.to_f32()),
            }
        }
    }
}

/// Loads a UNet and checks every row that uses it.
fn check_unet(blocks: &Blocks, which: &str, weights: &Weights, config: &Value) {
    let device = device();
    let loader = Loader::new(weights, &device, DType::F32, &|_| {});
    let config = UNetConfig::from_json(config).expect("a configuration");
    let context = config.levels[0].context;
    let unet = UNet::load(&loader.root(), config).expect("a UNet");
    assert_eq!(loader.unused(), [""; 0], "{which}");
    for (name, row) in blocks.rows(&format!("unet_{which}")) {
        let number = |field: &str| row[field].as_u64().unwrap() as usize;
        let (n, h, w) = (number("batch"), number("height"), number("width"));
        let tensor = |shape: &[usize], values: &[f32]| match *shape {
            [a, b, c] => Tensor::from_f32(&device, [a, b, c], DType::F32, values),
            [a, b, c, d] => Tensor::from_f32(&device, [a, b, c, d], DType::F32, values),
            _ => panic!("{shape:?}"),
        };
        let channels = unet.config().in_channels;
        let sample = to_nhwc(&input(&name, "sample", &[n, channels, h, w]), [n, channels, h, w]);
        let text = tensor(&[n, 77, context], &input(&name, "text", &[n, 77, context]));
        let pooled =
            unet.config().text_time.map(|t| input(&name, "pooled", &[n, t.inputs - 6 * t.time_embed_dim]));
        let time_ids: Vec<[f32; 6]> = serde_json::from_value(row["time_ids"].clone()).unwrap_or_default();
        let added = pooled.as_ref().map(|pooled| Added { pooled, time_ids: &time_ids });
        let conditioning = unet.condition(&text, added.as_ref(), row["guidance"].as_f64());
        let timestep = row["timestep"].as_f64().unwrap() as f32;
        let out = unet.forward(&tensor(&[n, h, w, channels], &sample), &[(&conditioning, timestep)]);
        blocks.check(&name, &to_nchw(&out.to_f32(), out.nhwc()));
    }
}

#[test]
fn unets_agree() {
    let blocks = Blocks::read();
    for checkpoint in ["sd1", "sd2", "sdxl"] {
        let folder = Folder::of(checkpoint);
        // "unet_sd1_" and not "unet_sd1", lest one name be another's beginning.
        check_unet(&blocks, &format!("{checkpoint}_"), &folder.weights("unet"), &folder.config("unet"));
    }
}

/// Middles, lists, kernels and embeddings that no common checkpoint has.
#[test]
fn uncommon_unets_agree() {
    let blocks = Blocks::read();
    for (name, fixture) in blocks.json["unets"].as_object().expect("UNets") {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(format!("unet_{name}/weights.safetensors"));
        let shapes: Shapes = serde_json::from_value(fixture["tensors"].clone()).expect("shapes");
        write_weights(&path, &shapes, &Layout::plain());
        check_unet(&blocks, name, &open(&path), &fixture["config"]);
    }
}

#[test]
fn autoencoders_agree() {
    let blocks = Blocks::read();
    let device = device();
    for checkpoint in ["sd1", "sd2"] {
        let folder = Folder::of(checkpoint);
        let config = VaeConfig::from_json(&folder.config("vae")).expect("a configuration");
        let weights = folder.weights("vae");
        let loader = Loader::new(&weights, &device, DType::F32, &|_| {});
        let encoder = Encoder::load(&loader.root(), &config).expect("an encoder");
        let decoder = Decoder::load(&loader.root(), config).expect("a decoder");
        assert_eq!(loader.unused(), [""; 0], "{checkpoint}");
        for (kind, channels, name_of_input) in [("decoder", 4, "latents"), ("encoder", 3, "picture")] {
            for (name, row) in blocks.rows(&format!("{kind}_{checkpoint}_")) {
                let (h, w) =
                    (row["height"].as_u64().unwrap() as usize, row["width"].as_u64().unwrap() as usize);
                let shape = [1, channels, h, w];
                let x = to_nhwc(&input(&name, name_of_input, &shape), shape);
                let x = Tensor::from_f32(&device, [1, h, w, channels], DType::F32, &x);
                let out = if kind == "decoder" { decoder.forward(&x) } else { encoder.forward(&x) };
                blocks.check(&name, &to_nchw(&out.to_f32(), out.nhwc()));
            }
        }
    }
}

#[test]
fn timestep_embeddings_agree() {
    let blocks = Blocks::read();
    for (name, row) in blocks.rows("time_") {
        let timesteps: Vec<f32> = serde_json::from_value(row["timesteps"].clone()).unwrap();
        let dim = row["dim"].as_u64().unwrap() as usize;
        let (flip, shift) = (row["flip_sin_to_cos"].as_bool().unwrap(), row["freq_shift"].as_f64().unwrap());
        let ours: Vec<f32> =
            timesteps.iter().flat_map(|&t| timestep_embedding(t, dim, flip, shift)).collect();
        blocks.check(&name, &ours);
    }
}
