//! Writes the fixture's LoRA files and the tiny models that they are for, and
//! draws with both. The values are a formula, as those of checkpoints are.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use hypergen_diffusion::lora::Lora;
use hypergen_diffusion::{DTypeChoice, Generator, LoadOptions, Pipeline, Request, Silent, Size, load};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use super::checkpoint::{Checkpoint, Layout};
use super::fixture;
use super::formula::uniform;

/// What all cases are drawn with.
#[derive(Debug, Deserialize)]
pub(crate) struct Settings {
    size: usize,
    steps: usize,
    seed: u64,
    prompt: String,
    negative_prompt: String,
    guidance_scale: f64,
    sampler: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    pub(crate) checkpoint: String,
    pub(crate) loras: Vec<(String, f64)>,
    /// Where it is not that of all others.
    pub(crate) prompt: Option<String>,
}

/// A LoRA file of the fixture: center, spread and dimensions of each tensor.
#[derive(Debug, Deserialize)]
pub(crate) struct LoraFile {
    tensors: BTreeMap<String, Vec<f64>>,
    dtype: String,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    config: Option<Value>,
}

impl LoraFile {
    /// Writes it as its trainer would, in a folder of its own.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).expect("a folder");
        let dtype = if self.dtype == "float16" { Dtype::F16 } else { Dtype::F32 };
        let tensors: BTreeMap<&String, (Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(key, row)| {
                let (center, spread) = (row[0] as f32, row[1] as f32);
                let shape: Vec<usize> = row[2..].iter().map(|&d| d as usize).collect();
                let values = uniform(&format!("{name}/{key}"), shape.iter().product());
                let values = values.map(|u| center + spread * u);
                let bytes = match dtype {
                    Dtype::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
                    _ => values.flat_map(f32::to_le_bytes).collect(),
                };
                (key, (shape, bytes))
            })
            .collect();
        let views = tensors.iter().map(|(key, (shape, bytes))| {
            (key, TensorView::new(dtype, shape.clone(), bytes).expect("a shape that fits its bytes"))
        });
        let metadata = self.metadata.clone().into_iter().collect();
        let path = folder.join("adapter_model.safetensors");
        safetensors::serialize_to_file(views, Some(metadata), &path).expect("a LoRA file");
        if let Some(config) = &self.config {
            fs::write(folder.join("adapter_config.json"), config.to_string()).expect("its settings");
        }
        path
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Goldens {
    settings: Settings,
    pub(crate) cases: BTreeMap<String, Case>,
    pub(crate) files: BTreeMap<String, LoraFile>,
}

impl Goldens {
    pub(crate) fn read() -> Self {
        serde_json::from_value(fixture::json("lora.json")).expect("a fixture")
    }

    pub(crate) fn request(&self, loras: Vec<Lora>) -> Request {
        let s = &self.settings;
        Request {
            negative_prompt: Some(s.negative_prompt.clone()),
            size: Size::new(s.size, s.size).expect("a size"),
            steps: s.steps,
            guidance_scale: s.guidance_scale,
            seed: s.seed,
            sampler: Some(s.sampler.parse().expect("a sampler")),
            loras,
            ..Request::new(&s.prompt)
        }
    }

    /// A tiny model, all LoRA files for it, and the folder that holds both.
    pub(crate) fn model(&self, checkpoint: &str, options: &LoadOptions) -> Model {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Checkpoint::named(checkpoint).write(folder.path(), &Layout::plain());
        let pipeline = load(folder.path().to_str(), options, &mut |_| {}).expect("a checkpoint that loads");
        let files = self.files.iter().filter(|(name, _)| name.starts_with(&format!("{checkpoint}_")));
        let files = files.map(|(name, file)| (name.clone(), file.write(&folder.path().join("loras"), name)));
        Model { pipeline, files: files.collect(), _folder: folder }
    }
}

pub(crate) struct Model {
    pub(crate) pipeline: Pipeline,
    pub(crate) files: BTreeMap<String, PathBuf>,
    _folder: TempDir,
}

impl Model {
    pub(crate) fn lora(&self, name: &str, scale: f64) -> Lora {
        Lora { name: name.to_owned(), path: self.files[name].clone(), scale }
    }

    pub(crate) fn draw(&mut self, request: &Request) -> Vec<u8> {
        self.pipeline.generate(std::slice::from_ref(request), &mut Silent).expect("a picture").remove(0).rgb
    }
}

pub(crate) fn float32() -> LoadOptions {
    LoadOptions { dtype: DTypeChoice::Float32, threads: Some(2), ..LoadOptions::default() }
}
