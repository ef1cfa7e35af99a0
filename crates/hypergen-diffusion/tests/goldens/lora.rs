//! LoRA files of every format against what diffusers and PEFT draw with them,
//! and the promise that a model is itself again after each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use hypergen_diffusion::lora::{Lora, inspect};
use hypergen_diffusion::{DTypeChoice, Generator, LoadOptions, Pipeline, Request, Silent, Size, load};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::checkpoint::{Checkpoint, Layout};
use crate::fixture::{self, Numbers, psnr};
use crate::formula::uniform;

/// What all cases are drawn with.
#[derive(Debug, Deserialize)]
struct Settings {
    size: usize,
    steps: usize,
    seed: u64,
    prompt: String,
    negative_prompt: String,
    guidance_scale: f64,
    sampler: String,
}

#[derive(Debug, Deserialize)]
struct Case {
    checkpoint: String,
    loras: Vec<(String, f64)>,
}

/// A LoRA file of the fixture: center, spread and dimensions of each tensor.
#[derive(Debug, Deserialize)]
struct LoraFile {
    tensors: BTreeMap<String, Vec<f64>>,
    dtype: String,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    config: Option<Value>,
}

impl LoraFile {
    /// Writes it as its trainer would, in a folder of its own.
    fn write(&self, folder: &Path, name: &str) -> PathBuf {
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
struct Goldens {
    settings: Settings,
    cases: BTreeMap<String, Case>,
    files: BTreeMap<String, LoraFile>,
}

impl Goldens {
    fn read() -> Self {
        serde_json::from_value(fixture::json("lora.json")).expect("a fixture")
    }

    fn request(&self, loras: Vec<Lora>) -> Request {
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
    fn model(&self, checkpoint: &str, options: &LoadOptions) -> Model {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Checkpoint::named(checkpoint).write(folder.path(), &Layout::plain());
        let pipeline = load(folder.path().to_str(), options, &mut |_| {}).expect("a checkpoint that loads");
        let files = self.files.iter().filter(|(name, _)| name.starts_with(&format!("{checkpoint}_")));
        let files = files.map(|(name, file)| (name.clone(), file.write(&folder.path().join("loras"), name)));
        Model { pipeline, files: files.collect(), _folder: folder }
    }
}

struct Model {
    pipeline: Pipeline,
    files: BTreeMap<String, PathBuf>,
    _folder: TempDir,
}

impl Model {
    fn lora(&self, name: &str, scale: f64) -> Lora {
        Lora { name: name.to_owned(), path: self.files[name].clone(), scale }
    }

    fn draw(&mut self, request: &Request) -> Vec<u8> {
        self.pipeline.generate(std::slice::from_ref(request), &mut Silent).expect("a picture").remove(0).rgb
    }
}

fn float32() -> LoadOptions {
    LoadOptions { dtype: DTypeChoice::Float32, threads: Some(2), ..LoadOptions::default() }
}

/// Smallest PSNR in dB. Promised are 50; a picture of 3,072 numbers of which
/// one rounds otherwise makes 83.
const PICTURE: f64 = 70.0;

fn check(checkpoint: &str) {
    let goldens = Goldens::read();
    let numbers = Numbers::open("lora.safetensors");
    let mut model = goldens.model(checkpoint, &float32());
    let plain = model.draw(&goldens.request(vec![]));
    let mut wrong = vec![];
    for (name, case) in goldens.cases.iter().filter(|(_, c)| c.checkpoint == checkpoint) {
        let loras = case.loras.iter().map(|(lora, scale)| model.lora(lora, *scale)).collect();
        let picture = psnr(&model.draw(&goldens.request(loras)), &numbers.bytes(name));
        println!("{name}: {picture:.1} dB");
        if picture < PICTURE {
            wrong.push(format!("{name}: {picture:.1} dB"));
        }
        assert!(model.draw(&goldens.request(vec![])) == plain, "{name}: the model is not itself again");
    }
    assert!(wrong.is_empty(), "not what diffusers and PEFT draw:\n{}", wrong.join("\n"));
}

#[test]
fn stable_diffusion_1_with_loras_is_what_diffusers_draws() {
    check("sd1");
}

#[test]
fn sdxl_with_loras_is_what_diffusers_draws() {
    check("sdxl");
}

#[test]
fn scale_0_is_the_base_model_bit_for_bit() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &LoadOptions { dtype: DTypeChoice::Bfloat16, ..float32() });
    let plain = model.draw(&goldens.request(vec![]));
    for name in ["sd1_kohya", "sd1_dora", "sd1_loha"] {
        let with = |scale| goldens.request(vec![model.lora(name, scale)]);
        let (zero, one) = (with(0.0), with(1.0));
        assert!(model.draw(&zero) == plain, "{name} at 0");
        assert!(model.draw(&one) != plain, "{name} at 1");
        assert!(model.draw(&zero) == plain, "{name} at 0, after 1");
    }
}

/// Three LoRAs and none in turns, through every size of cache: each picture is
/// what it was the first time, whatever was applied before.
#[test]
fn alternating_loras_leave_no_trace() {
    let goldens = Goldens::read();
    for cache in [0, 300_000, 1 << 30] {
        let options = LoadOptions { dtype: DTypeChoice::Bfloat16, lora_cache: Some(cache), ..float32() };
        let mut model = goldens.model("sd1", &options);
        let kinds: Vec<Vec<Lora>> = vec![
            vec![],
            vec![model.lora("sd1_kohya", 0.8)],
            vec![model.lora("sd1_locon", 1.0)],
            vec![model.lora("sd1_kohya", 0.8), model.lora("sd1_loha", 0.5)],
            vec![model.lora("sd1_kohya", 0.9)],
        ];
        let mut first: Vec<Option<Vec<u8>>> = vec![None; kinds.len()];
        for i in 0..20 {
            let kind = i * 7 % 13 % kinds.len();
            let picture = model.draw(&goldens.request(kinds[kind].clone()));
            match &first[kind] {
                None => first[kind] = Some(picture),
                Some(twin) => assert!(*twin == picture, "cache {cache}, round {i}, kind {kind}"),
            }
        }
        let pictures: Vec<_> = first.iter().flatten().collect();
        assert_eq!(pictures.len(), kinds.len(), "all were drawn");
        for (i, a) in pictures.iter().enumerate() {
            assert!(pictures[..i].iter().all(|b| a != b), "kind {i} is the picture of another");
        }
    }
}

#[test]
fn a_file_that_was_replaced_is_read_anew() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let request = goldens.request(vec![model.lora("sd1_kohya", 1.0)]);
    let before = model.draw(&request);
    fs::copy(&model.files["sd1_diffusers"], &model.files["sd1_kohya"]).expect("replaced");
    let after = model.draw(&request);
    assert!(before != after);
    let other = goldens.request(vec![model.lora("sd1_diffusers", 1.0)]);
    assert!(model.draw(&other) == after);
}

#[test]
fn files_say_what_they_are() {
    let goldens = Goldens::read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, rank) in [("sd1_kohya", 4), ("sd1_loha", 3), ("sdxl_peft", 4), ("sdxl_lokr", 3)] {
        let path = goldens.files[name].write(folder.path(), name);
        let info = inspect(&path, name).expect("a LoRA");
        assert_eq!(info.rank, Some(rank), "{name}");
        assert_eq!(info.bytes, fs::metadata(&path).expect("a file").len());
        assert!(info.modules > 10, "{name}: {info:?}");
    }
}
