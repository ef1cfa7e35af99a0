//! Every field of a UNet's, a VAE's and a text encoder's configuration at
//! another value than its default (`goldens/fields.py`): the picture is diffusers',
//! or an error names the field. None is passed over in silence.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use hypergen_diffusion::{DTypeChoice, LoadOptions, Pipeline, Request, Silent, Size, load};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, Layout, write_json, write_weights};
use crate::fixture::{self, Numbers, psnr};

const FOX: &str = "a red fox in the snow, oil painting";

/// A row of `fields.json`.
#[derive(Debug, Deserialize)]
struct Case {
    checkpoint: String,
    part: String,
    fields: Map<String, Value>,
    expected: Expected,
    /// What the error has to name.
    #[serde(default)]
    word: String,
    /// Tensors that the fields change, add or take away.
    #[serde(default)]
    tensors: BTreeMap<String, Option<Vec<f64>>>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expected {
    Changes,
    Same,
    Refused,
}

impl Case {
    /// Writes the checkpoint with the fields in it.
    fn write(&self, folder: &Path) {
        let mut checkpoint = Checkpoint::named(&self.checkpoint);
        checkpoint.write(folder, &Layout::plain());
        let config = format!("{}/config.json", self.part);
        let mut json = checkpoint.files[&config].clone();
        json.as_object_mut().expect("an object").extend(self.fields.clone());
        write_json(&folder.join(&config), &json);
        let part = |file: &String| file.split('/').next() == Some(&self.part);
        let (file, shapes) = checkpoint.tensors.iter_mut().find(|(file, _)| part(file)).expect("weights");
        for (name, row) in &self.tensors {
            match row {
                Some(row) => drop(shapes.insert(name.clone(), row.clone())),
                None => drop(shapes.remove(name)),
            }
        }
        write_weights(&folder.join(file), shapes, &Layout::plain());
    }
}

fn open(folder: &Path) -> Result<Pipeline, String> {
    let options = LoadOptions { dtype: DTypeChoice::Float32, threads: Some(2), ..LoadOptions::default() };
    load(folder.to_str(), &options, &mut |_| {}).map_err(|e| e.message)
}

fn draw(model: &mut Pipeline) -> Vec<u8> {
    let request = Request {
        size: Size::new(24, 24).expect("a size"),
        steps: 2,
        guidance_scale: 5.0,
        seed: 90,
        ..Request::new(FOX)
    };
    let latents = model.latents(&[request], &mut Silent).expect("latents").remove(0);
    model.decode(&latents).expect("a picture")
}

#[test]
fn every_field_of_the_networks_is_honoured_or_refused() {
    let cases: BTreeMap<String, Case> =
        serde_json::from_value(fixture::json("fields.json")).expect("a fixture");
    let numbers = Numbers::open("fields.safetensors");
    let mut wrong = vec![];
    for (name, case) in &cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        case.write(folder.path());
        match (open(folder.path()), &case.expected) {
            (Err(error), Expected::Refused) if error.contains(&case.word) => println!("{error}"),
            (Err(error), _) => wrong.push(format!("{name}: {error}")),
            (Ok(_), Expected::Refused) => wrong.push(format!("{name}: it was loaded")),
            (Ok(mut model), expected) => {
                let plain = format!("plain/{}", case.checkpoint);
                let golden = if *expected == Expected::Changes { name } else { &plain };
                let picture = psnr(&draw(&mut model), &numbers.bytes(golden));
                println!("{name}: {picture:.1} dB");
                if picture < 65.0 {
                    wrong.push(format!("{name}: {picture:.1} dB"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cases.len() > 90, "{} cases", cases.len());
}

/// Other ways to write the same: nothing of the picture changes.
#[test]
fn values_that_mean_the_default_are_read() {
    let base = tempfile::tempdir().expect("a temporary folder");
    Checkpoint::named("sd1").write(base.path(), &Layout::plain());
    let expected = draw(&mut open(base.path()).expect("the checkpoint"));
    let rows: &[(&str, Value)] = &[
        (
            "unet",
            json!({"sample_size": 8.0, "in_channels": 4.0, "layers_per_block": 2.0, "norm_num_groups": 8.0}),
        ),
        ("unet", json!({"attention_head_dim": [8.0, 8, 8], "block_out_channels": [32.0, 64.0, 64.0]})),
        ("unet", json!({"layers_per_block": [2, 2, 2], "transformer_layers_per_block": [1, 1, 1]})),
        (
            "unet",
            json!({"freq_shift": 0.0, "mid_block_scale_factor": 1, "downsample_padding": 1.0, "dropout": null}),
        ),
        (
            "unet",
            json!({"only_cross_attention": null, "dual_cross_attention": null, "center_input_sample": null}),
        ),
        ("unet", json!({"class_embeddings_concat": null, "attention_type": null, "upcast_attention": null})),
        ("unet", json!({"sample_size": null, "time_embedding_dim": 0, "use_linear_projection": null})),
        ("unet", json!({"only_cross_attention": [false, false, false], "num_class_embeds": null})),
        ("unet", json!({"reverse_transformer_layers_per_block": [1, 1, 1]})),
        (
            "unet",
            json!({"down_block_types": ["UNetResCrossAttnDownBlock2D", "CrossAttnDownBlock2D", "UNetResDownBlock2D"]}),
        ),
        (
            "unet",
            json!({"act_fn": "swish", "_class_name": null, "_diffusers_version": null, "_anything": {"x": 1}}),
        ),
        ("unet", json!({"num_attention_heads": 3, "_use_default_values": ["num_attention_heads"]})),
        ("unet", json!({"a_field_of_the_future": [1, null, {"deep": true}]})),
        ("vae", json!({"shift_factor": 0.0, "latents_mean": null, "latents_std": null})),
        (
            "vae",
            json!({"shift_factor": 0, "latent_channels": 4.0, "sample_size": null, "force_upcast": null}),
        ),
        ("vae", json!({"latents_mean": [1.0], "latents_std": "many"})),
        ("text_encoder", json!({"projection_dim": null, "eos_token_id": null, "use_attention_mask": null})),
        ("text_encoder", json!({"hidden_size": 32.0, "num_hidden_layers": 3.0, "attention_dropout": 0.1})),
        ("text_encoder", json!({"architectures": null, "model_type": null, "torch_dtype": "float16"})),
        ("text_encoder", json!({"architectures": ["CLIPTextModelWithProjection"]})),
    ];
    for (part, fields) in rows {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let case = Case {
            checkpoint: "sd1".into(),
            part: (*part).into(),
            fields: fields.as_object().expect("an object").clone(),
            expected: Expected::Same,
            word: String::new(),
            tensors: BTreeMap::new(),
        };
        case.write(folder.path());
        let mut model = open(folder.path()).unwrap_or_else(|e| panic!("{fields}: {e}"));
        assert!(draw(&mut model) == expected, "{fields}: another picture");
    }
}

/// The configuration of a whole CLIP model has its text encoder's one level deeper.
#[test]
fn a_text_encoder_is_found_in_a_whole_clip_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Checkpoint::named("sd1").write(folder.path(), &Layout::plain());
    let expected = draw(&mut open(folder.path()).expect("the checkpoint"));
    let path = folder.path().join("text_encoder/config.json");
    let inner: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    write_json(
        &path,
        &json!({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 5, "text_config": inner}),
    );
    assert!(draw(&mut open(folder.path()).expect("the same")) == expected);
}

/// Height and width of the latents that a UNet was trained on.
#[test]
fn a_native_size_need_not_be_square() {
    use hypergen_diffusion::Generator;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = Checkpoint::named("sd1");
    checkpoint.write(folder.path(), &Layout::plain());
    for (listed, words) in
        [(json!([8, 16]), "128x64"), (json!([8.0, 8.0]), "64x64"), (json!([8]), "'sample_size'")]
    {
        let mut json = checkpoint.files["unet/config.json"].clone();
        json["sample_size"] = listed;
        write_json(&folder.path().join("unet/config.json"), &json);
        let said = open(folder.path()).map_or_else(|e| e, |model| model.info().native_size.to_string());
        assert!(said.contains(words), "{said}");
    }
}
