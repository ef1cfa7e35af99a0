//! Single files in the original key layout against the folder of the same
//! model, bit for bit, and against what diffusers draws from such a file. And
//! autoencoders that are given apart, in every form.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use hypergen_diffusion::{DTypeChoice, Generator, LoadOptions, Pipeline, Request, Silent, Size, load};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checkpoint::{Checkpoint, Layout, Tensors, stored, write_json, write_safetensors};
use crate::fixture::{self, Numbers, psnr, to_nchw, worst};
use crate::formula::{canonical, weight};
use crate::tokens::{merges, vocabulary};

const FOX: &str = "a red fox in the snow, oil painting";
const CAFE: &str = "カフェの猫 ☕ naïve Ünïcode 🦊";

/// A checkpoint of the fixture, in a temporary folder.
struct Model {
    scratch: TempDir,
    checkpoint: Checkpoint,
    /// How each tensor of the single file is made.
    single: BTreeMap<String, Vec<Value>>,
    dtype: Dtype,
}

impl Model {
    fn new(name: &str, half: bool) -> Self {
        let mut fixture = fixture::json("single_file.json")[name].take();
        Self {
            scratch: tempfile::tempdir().expect("a temporary folder"),
            single: serde_json::from_value(fixture["single"].take()).expect("the single file"),
            checkpoint: serde_json::from_value(fixture).expect("a checkpoint"),
            dtype: if half { Dtype::F16 } else { Dtype::F32 },
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Shape and values of a tensor, called `part/name`.
    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (part, key) = name.split_once('/').expect("part and name");
        let row = self.checkpoint.tensors.iter().find(|(file, _)| file.split('/').next() == Some(part));
        let row = &row.expect("a part").1[key];
        let shape: Vec<usize> = row[1..].iter().map(|&d| d as usize).collect();
        let values = weight(&canonical(part, key), &shape, row[0]);
        (shape, values)
    }

    /// A tensor of the single file.
    fn single_tensor(&self, name: &str, recipe: &[Value]) -> (Vec<usize>, Vec<f32>) {
        let source = |i: usize| self.tensor(recipe[i].as_str().expect("a tensor's name"));
        match recipe[0].as_str().expect("how") {
            "copy" => source(1),
            "image" => {
                let (mut shape, values) = source(1);
                shape.extend([1, 1]);
                (shape, values)
            }
            "stack" => {
                let parts = [source(1), source(2), source(3)];
                let mut shape = parts[0].0.clone();
                shape[0] *= 3;
                (shape, parts.into_iter().flat_map(|(_, values)| values).collect())
            }
            "turn" => {
                let (shape, values) = source(1);
                let [rows, columns] = shape[..] else { panic!("{name} is no matrix") };
                let turned = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
                (vec![columns, rows], turned)
            }
            "noise" => {
                let shape: Vec<usize> =
                    recipe[1..].iter().map(|d| d.as_u64().expect("a dimension") as usize).collect();
                let values = weight(name, &shape, 1.0);
                (shape, values)
            }
            other => panic!("the fixture has {other}"),
        }
    }

    fn folder(&self) -> PathBuf {
        let folder = self.path("folder");
        let dtype = if self.dtype == Dtype::F16 { "float16" } else { "float32" };
        self.checkpoint.write(&folder, &Layout { dtype: dtype.into(), ..Layout::plain() });
        let merges = merges();
        let vocabulary = Value::Object(vocabulary(&merges));
        for tokenizer in ["tokenizer", "tokenizer_2"].map(|t| folder.join(t)).iter().filter(|t| t.exists()) {
            write_json(&tokenizer.join("vocab.json"), &vocabulary);
            fs::write(tokenizer.join("merges.txt"), &merges).expect("merges.txt");
        }
        folder
    }

    /// Writes the tensors that `keep` wants, under the names that it gives.
    fn write(&self, file: &str, keep: impl Fn(&str) -> Option<String>) -> PathBuf {
        let mut tensors = Tensors::new();
        for (name, recipe) in &self.single {
            let Some(kept) = keep(name) else { continue };
            let (shape, values) = self.single_tensor(name, recipe);
            tensors.insert(kept, (self.dtype, shape, stored(&values, self.dtype)));
        }
        let path = self.path(file);
        write_safetensors(&path, &tensors);
        path
    }

    /// As people download it: averaged weights beside the others in float32.
    fn single(&self) -> PathBuf {
        let mut tensors = Tensors::new();
        for (name, recipe) in &self.single {
            let (shape, values) = self.single_tensor(name, recipe);
            if self.dtype == Dtype::F32 && name.starts_with("model.diffusion_model.") {
                let flat = name.replacen("model.", "", 1).replace('.', "");
                let zeros = stored(&vec![0.0; values.len()], self.dtype);
                tensors.insert(format!("model_ema.{flat}"), (self.dtype, shape.clone(), zeros));
            }
            tensors.insert(name.clone(), (self.dtype, shape, stored(&values, self.dtype)));
        }
        for clip in ["cond_stage_model", "conditioner.embedders.0"] {
            let ids = format!("{clip}.transformer.text_model.embeddings.position_ids");
            let numbers = (0..77i64).flat_map(i64::to_le_bytes).collect();
            if tensors.keys().any(|name| name.starts_with(&format!("{clip}.transformer."))) {
                tensors.insert(ids, (Dtype::I64, vec![1, 77], numbers));
            }
        }
        let path = self.path("model.safetensors");
        write_safetensors(&path, &tensors);
        path
    }
}

fn open(path: &Path, vae: Option<PathBuf>) -> Result<Pipeline, String> {
    let options =
        LoadOptions { dtype: DTypeChoice::Float32, threads: Some(2), vae, ..LoadOptions::default() };
    load(path.to_str(), &options, &mut |_| {}).map_err(|e| e.message)
}

/// Latents `[c, h, w]` and picture.
fn draw(model: &mut Pipeline, prompt: &str) -> (Vec<f32>, Vec<u8>) {
    let request = Request {
        negative_prompt: Some("hello!".into()),
        size: Size::new(56, 40).expect("a size"),
        steps: 3,
        seed: 90,
        ..Request::new(prompt)
    };
    let latents = model.latents(&[request], &mut Silent).expect("latents").remove(0);
    let picture = model.decode(&latents).expect("a picture");
    (to_nchw(&latents.values, [1, latents.height, latents.width, 4]), picture)
}

fn check(name: &str, half: bool, prompt: &str) {
    let model = Model::new(name, half);
    let case = if half { "float16" } else { "float32" };
    let mut single = open(&model.single(), None).expect("a single file that loads");
    let drawn = draw(&mut single, prompt);
    let mut folder = open(&model.folder(), None).expect("a folder that loads");
    assert!(drawn == draw(&mut folder, prompt), "{name}, {case}: the file and the folder draw two pictures");
    let (single, folder) = (single.info(), folder.info());
    assert_eq!((&single.family, &single.sampler), (&folder.family, &folder.sampler));
    assert_eq!(single.name, "model.safetensors");

    let numbers = Numbers::open("single_file.safetensors");
    let latents = worst(&drawn.0, &numbers.f32(&format!("{name}/{case}/latents")));
    let picture = psnr(&drawn.1, &numbers.bytes(&format!("{name}/{case}/picture")));
    println!("{name}, {case}: latents {latents:.1e} of their scale, picture {picture:.1} dB");
    assert!(
        latents <= 2e-4 && picture >= 70.0,
        "{name}, {case}: latents {latents:.1e}, picture {picture:.1} dB"
    );
}

#[test]
fn a_single_file_of_stable_diffusion_1_equals_its_folder() {
    check("single_sd1", false, FOX);
    check("single_sd1", true, CAFE);
}

#[test]
fn a_single_file_of_stable_diffusion_2_equals_its_folder() {
    check("single_sd2", false, FOX);
    check("single_sd2", true, CAFE);
}

#[test]
fn a_single_file_of_sdxl_equals_its_folder() {
    check("single_sdxl", false, FOX);
    check("single_sdxl", true, CAFE);
}

/// SDXL's scaling holds for an autoencoder whose file names none.
#[test]
fn an_autoencoder_given_apart_is_used_in_every_form() {
    let model = Model::new("single_sdxl", false);
    let folder = model.folder();
    let expected = draw(&mut open(&folder, None).expect("the folder"), FOX);

    let bare =
        model.write("model.safetensors", |n| (!n.starts_with("first_stage_model.")).then(|| n.to_owned()));
    let error = open(&bare, None).err().expect("an error");
    assert!(error.contains("model.safetensors holds no vae; give one with --vae"), "{error}");

    let apart = model.path("vae");
    fs::create_dir(&apart).expect("a folder");
    let diffusers = folder.join("vae/diffusion_pytorch_model.safetensors");
    fs::copy(&diffusers, apart.join("mine.safetensors")).expect("a copy");
    let prefixed = model
        .write("vae/prefixed.safetensors", |n| n.starts_with("first_stage_model.").then(|| n.to_owned()));
    let original =
        model.write("vae/original.safetensors", |n| n.strip_prefix("first_stage_model.").map(str::to_owned));
    for vae in
        [prefixed, original, apart.join("mine.safetensors"), diffusers, folder.join("vae"), folder.clone()]
    {
        let mut mixed = open(&bare, Some(vae.clone())).unwrap_or_else(|e| panic!("{}: {e}", vae.display()));
        assert!(draw(&mut mixed, FOX) == expected, "{}", vae.display());
    }
    // It also takes the place of a model's own.
    let doubled = apart.join("doubled");
    fs::create_dir(&doubled).expect("a folder");
    fs::copy(apart.join("mine.safetensors"), doubled.join("diffusion_pytorch_model.safetensors"))
        .expect("a copy");
    let mut config = model.checkpoint.files["vae/config.json"].clone();
    config["scaling_factor"] = json!(0.26);
    write_json(&doubled.join("config.json"), &config);
    let other = draw(&mut open(&folder, Some(doubled.clone())).expect("the other VAE"), FOX);
    assert_eq!(other.0, expected.0, "the latents do not depend on it");
    assert_ne!(other.1, expected.1);

    fs::remove_file(doubled.join("config.json")).expect("removed");
    fs::write(apart.join("old.pt"), b"PK").expect("written");
    for (vae, words) in [
        (doubled, "holds no config.json"),
        (apart.join("old.pt"), "can run code"),
        (apart.join("none.safetensors"), "cannot read the VAE"),
        (folder.join("unet/diffusion_pytorch_model.safetensors"), "holds no VAE"),
    ] {
        let error = open(&folder, Some(vae)).err().expect("an error");
        assert!(error.contains(words), "{error}");
    }
}

/// Sets one tap of a kernel `[out, in, h, w]`, the middle one.
fn set_tap(values: &mut [f32], shape: &[usize], out: usize, input: usize, value: f32) {
    let taps: usize = shape[2..].iter().product();
    values[(out * shape[1] + input) * taps + taps / 2] = value;
}

/// A file of Stable Diffusion 2.x does not say whether its UNet predicts
/// epsilon, so the UNet is asked. This one answers with its input: two
/// channels hold a latent and its negative, the last residual block hands both
/// on, and `silu(x) - silu(-x)` is `x`.
#[test]
fn a_unet_that_predicts_noise_is_found_out() {
    let model = Model::new("single_sd2", false);
    let mut tensors = Tensors::new();
    let last = model.single.keys().filter_map(|n| {
        n.strip_prefix("model.diffusion_model.output_blocks.")?.split('.').next()?.parse::<usize>().ok()
    });
    let shortcut = format!(
        "model.diffusion_model.output_blocks.{}.0.skip_connection.weight",
        last.max().expect("blocks")
    );
    for (name, recipe) in &model.single {
        let (shape, mut values) = model.single_tensor(name, recipe);
        if name.starts_with("model.diffusion_model.") {
            values.fill(0.0);
        }
        match name.strip_prefix("model.diffusion_model.") {
            Some("input_blocks.0.0.weight") => {
                (0..8).for_each(|i| set_tap(&mut values, &shape, i, i / 2, [1.0, -1.0][i % 2]));
            }
            Some("out.0.weight") => values.fill(1.0),
            Some("out.2.weight") => {
                (0..8).for_each(|i| set_tap(&mut values, &shape, i / 2, i, [1.0, -1.0][i % 2]));
            }
            _ if *name == shortcut => {
                let skipped = shape[1] - shape[0];
                (0..shape[0]).for_each(|i| set_tap(&mut values, &shape, i, skipped + i, 1.0));
            }
            _ => {}
        }
        tensors.insert(name.clone(), (model.dtype, shape, stored(&values, model.dtype)));
    }
    let path = model.path("model.safetensors");
    write_safetensors(&path, &tensors);
    // The base model's file names PNDM, that of the v model DDIM.
    assert_eq!(open(&path, None).expect("a file that loads").info().sampler, "pndm");
    assert_eq!(open(&model.single(), None).expect("a file that loads").info().sampler, "ddim");
}

/// Fine-tunes of SDXL say by empty tensors what their UNet predicts. Beside v
/// prediction `ztsnr` asks for zero terminal SNR, from the very last timestep; alone it
/// says nothing, as in ComfyUI. A named family does not overrule either.
#[test]
fn marks_of_v_prediction_are_honoured() {
    let model = Model::new("single_sdxl", false);
    let folder = model.folder();
    let path = folder.join("scheduler/scheduler_config.json");
    let own: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    let zero = json!({"prediction_type": "v_prediction", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing"});
    for (marks, fields) in [
        (&["v_pred", "ztsnr"][..], zero),
        (&["v_pred"], json!({"prediction_type": "v_prediction"})),
        (&["ztsnr"], json!({})),
        (&[], json!({})),
    ] {
        let mut tensors = Tensors::new();
        for (name, recipe) in &model.single {
            let (shape, values) = model.single_tensor(name, recipe);
            tensors.insert(name.clone(), (model.dtype, shape, stored(&values, model.dtype)));
        }
        tensors.extend(marks.iter().map(|mark| ((*mark).to_owned(), (Dtype::F32, vec![0], vec![]))));
        let file = model.path("marked.safetensors");
        write_safetensors(&file, &tensors);
        let mut scheduler = own.clone();
        scheduler.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        write_json(&path, &scheduler);
        let expected = draw(&mut open(&folder, None).expect("the folder"), FOX);
        let mut single = open(&file, None).expect("a single file");
        assert_eq!(single.info().family, "Stable Diffusion XL", "{marks:?}");
        assert!(draw(&mut single, FOX) == expected, "{marks:?}: another picture than with {fields}");
        let options = LoadOptions {
            dtype: DTypeChoice::Float32,
            threads: Some(2),
            family: Some("sdxl".parse().expect("a family")),
            ..LoadOptions::default()
        };
        let mut named = load(file.to_str(), &options, &mut |_| {}).expect("a single file");
        assert!(draw(&mut named, FOX) == expected, "{marks:?}: another picture with the family's name");
    }
}

/// The names under which distilled models are published tell them; any other
/// name needs the family.
#[test]
fn a_distilled_single_file_is_told_by_its_name_or_its_family() {
    let model = Model::new("single_sdxl", false);
    let plain = model.single();
    let turbo = model.path("sd_xl_turbo_1.0_fp16.safetensors");
    fs::copy(&plain, &turbo).expect("a copy");
    let by_name = open(&turbo, None).expect("a single file").info();
    assert_eq!(open(&plain, None).expect("a single file").info().family, "Stable Diffusion XL");
    let options =
        LoadOptions { family: Some("sdxl-turbo".parse().expect("a family")), ..LoadOptions::default() };
    let by_family = load(plain.to_str(), &options, &mut |_| {}).expect("a single file").info();
    for info in [by_name, by_family] {
        assert_eq!(
            (info.family.as_str(), info.min_guidance, info.native_size.width),
            ("SDXL Turbo", 0.0, 512)
        );
    }
}
