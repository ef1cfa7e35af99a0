//! LoRAs: which files a request means, what it is told where there is none,
//! and that a server with the real model serves on whatever a file holds.

use std::fs;
use std::path::{Path, PathBuf};

use hypergen_diffusion::{DTypeChoice, LoadOptions, load};
use hypergen_server::{App, ServeConfig};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::support::{TestApp, generation, send};

/// A safetensors file of float32 tensors, all values alike.
fn write(path: &Path, tensors: &[(&str, &[usize], f32)]) {
    let (mut header, mut data) = (Map::new(), vec![]);
    for (name, shape, value) in tensors {
        let start = data.len();
        (0..shape.iter().product()).for_each(|_| data.extend(value.to_le_bytes()));
        header.insert(
            (*name).to_owned(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.extend(data);
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    fs::write(path, bytes).expect("written");
}

/// A folder with LoRAs whose tensors no model has to fit.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let down: (&str, &[usize], f32) = ("lora_unet_x_attn2_to_k.lora_down.weight", &[4, 768], 0.1);
    let up: (&str, &[usize], f32) = ("lora_unet_x_attn2_to_k.lora_up.weight", &[320, 4], 0.1);
    for name in ["ink", "style/paint", "unfit"] {
        write(&folder.path().join(format!("{name}.safetensors")), &[down, up]);
    }
    fs::write(folder.path().join("broken.safetensors"), "x").expect("written");
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn pairs(app: &TestApp) -> Vec<(String, f64)> {
    app.control.state().loras.last().cloned().unwrap_or_default()
}

async fn drawn_with(app: &TestApp, extra: Value) -> Vec<(String, f64)> {
    let mut body = json!({"prompt": "x", "size": "8x8", "num_inference_steps": 1});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    app.post(body).await.ok();
    pairs(app)
}

#[tokio::test]
async fn a_request_names_its_loras_in_three_ways() {
    let folder = folder();
    let app = TestApp::new(&["--lora-dir", text(folder.path())]);
    let named = |list: &[(&str, f64)]| list.iter().map(|(n, s)| ((*n).to_owned(), *s)).collect::<Vec<_>>();
    for (extra, expected) in [
        (json!({}), named(&[])),
        (json!({"lora_path": "ink"}), named(&[("ink", 1.0)])),
        (json!({"lora_path": "ink.safetensors", "lora_scale": 0.3}), named(&[("ink.safetensors", 0.3)])),
        (json!({"lora_path": "ink", "lora_scale": 0}), named(&[])),
        (json!({"lora_path": "gone", "lora_scale": 0}), named(&[])),
        (
            json!({"loras": [{"path": "ink", "scale": 0.5}, {"path": "style/paint"}]}),
            named(&[("ink", 0.5), ("style/paint", 1.0)]),
        ),
        (
            json!({"lora_path": "ink", "loras": [{"path": "style/paint", "scale": 2}]}),
            named(&[("ink", 1.0), ("style/paint", 2.0)]),
        ),
        (json!({"prompt": "a <lora:ink:0.8> b", "prompt_syntax": "a1111"}), named(&[("ink", 0.8)])),
        (json!({"prompt": "a <lora:ink:-1>", "prompt_syntax": "a1111"}), named(&[("ink", -1.0)])),
        (json!({"prompt": "a <lora:ink:0.8> b"}), named(&[])),
    ] {
        assert_eq!(drawn_with(&app, extra.clone()).await, expected, "{extra}");
    }
}

#[tokio::test]
async fn a_request_overrides_the_servers_own() {
    let folder = folder();
    let ink = folder.path().join("ink.safetensors");
    let args = ["--lora", text(&ink), "--lora-scale", "0.6", "--lora-dir", text(folder.path())];
    let app = TestApp::new(&args);
    let named = |list: &[(&str, f64)]| list.iter().map(|(n, s)| ((*n).to_owned(), *s)).collect::<Vec<_>>();
    for (extra, expected) in [
        (json!({}), named(&[("ink", 0.6)])),
        (json!({"lora_scale": 1.5}), named(&[("ink", 1.5)])),
        (json!({"lora_path": "style/paint"}), named(&[("style/paint", 1.0)])),
        (json!({"loras": []}), named(&[])),
        (json!({"prompt": "<lora:style/paint>", "prompt_syntax": "a1111"}), named(&[("style/paint", 1.0)])),
    ] {
        assert_eq!(drawn_with(&app, extra.clone()).await, expected, "{extra}");
    }
}

#[tokio::test]
async fn what_cannot_be_had_is_a_500_that_tells_nothing() {
    let folder = folder();
    let outside = tempfile::tempdir().expect("a folder");
    let secret = outside.path().join("secret.safetensors");
    fs::copy(folder.path().join("ink.safetensors"), &secret).expect("copied");
    let app = TestApp::new(&["--lora-dir", text(folder.path())]);
    let mut words = vec![];
    for path in ["gone", "../gone", text(&secret), "/etc/passwd", "/no/such.safetensors"] {
        let (message, kind, param, _) =
            app.post(json!({"prompt": "x", "size": "8x8", "lora_path": path})).await.error(500);
        assert_eq!((kind.as_str(), param), ("internal_error", json!("lora_path")));
        words.push(message.replacen(path, "", 1));
    }
    words.dedup();
    assert_eq!(words.len(), 1, "{words:?}");
    // Without a folder the specification's "any readable file".
    let app = TestApp::new(&[]);
    assert_eq!(drawn_with(&app, json!({"lora_path": text(&secret)})).await.len(), 1);
    let (message, ..) =
        app.post(json!({"prompt": "x", "size": "8x8", "lora_path": "/no/such.safetensors"})).await.error(500);
    assert!(message.contains("/no/such.safetensors"), "{message}");
    let tag = json!({"prompt": "<lora:ink>", "prompt_syntax": "a1111", "size": "8x8"});
    assert!(app.post(tag).await.error(500).0.contains("--lora-dir"));
    assert_eq!(app.control.state().batches.len(), 1);
}

#[tokio::test]
async fn a_lora_of_the_servers_own_that_vanishes_tells_no_path() {
    let folder = folder();
    let ink = folder.path().join("ink.safetensors");
    let app = TestApp::new(&["--lora", text(&ink)]);
    fs::remove_file(&ink).expect("removed");
    let answer = app.post(json!({"prompt": "x", "size": "8x8"})).await;
    let (message, ..) = answer.error(500);
    assert!(message.contains("the server's own LoRA") && !message.contains(text(folder.path())), "{message}");
    assert_eq!(answer.header("x-should-retry"), "false");
}

#[tokio::test]
async fn the_folder_is_listed() {
    let folder = folder();
    let app = TestApp::new(&["--lora-dir", text(folder.path())]);
    let list = app.get("/v1/loras").await.ok();
    let ids: Vec<&str> =
        list["data"].as_array().expect("a list").iter().map(|l| l["id"].as_str().expect("a name")).collect();
    assert_eq!(ids, ["ink", "style/paint", "unfit"], "what is broken is left out");
    let ink = &list["data"][0];
    assert_eq!(
        (&ink["rank"], &ink["family"], &ink["modules"]),
        (&json!(4), &json!("Stable Diffusion 1.x"), &json!(1))
    );
    assert_eq!(ink["bytes"], fs::metadata(folder.path().join("ink.safetensors")).expect("a file").len());
    assert_eq!(TestApp::new(&[]).get("/v1/loras").await.ok()["data"], json!([]));
}

#[test]
fn what_the_operator_named_wrong_is_said_at_the_start() {
    let folder = folder();
    let unfit = folder.path().join("unfit.safetensors");
    for (args, words) in [
        (vec!["--lora", "/no/such.safetensors"], "--lora: there is no readable LoRA"),
        (vec!["--lora", text(&unfit)], "--lora: it fits another family"),
        (vec!["--lora-dir", "/no/such"], "--lora-dir: the folder"),
    ] {
        let config = ServeConfig::parse_from(args).expect("good arguments");
        let fake = Box::new(crate::fake::Fake::new());
        let error =
            App::new(&config, fake, "127.0.0.1:8000".parse().expect("an address")).err().expect("refused");
        assert!(error.to_string().contains(words), "{error}");
    }
}

/// Requests with different LoRAs never share a forward pass; equal ones do.
#[tokio::test]
async fn batches_agree_in_their_loras() {
    let folder = folder();
    let app = TestApp::new(&["--lora-dir", text(folder.path()), "--max-batch-size", "4"]);
    app.control.hold();
    let body = |seed: u64, lora: &str| json!({"prompt": "x", "size": "8x8", "num_inference_steps": 1, "seed": seed, "lora_path": lora});
    let first = app.spawn(json!({"prompt": "x", "size": "8x8", "num_inference_steps": 1, "seed": 1}));
    app.control.until("the first one waits", |s| s.waiting).await;
    let mut others = vec![];
    for (seed, lora) in [(2, "ink"), (3, "ink"), (4, "style/paint"), (5, "ink")] {
        others.push(app.spawn(body(seed, lora)));
        let waiting = others.len();
        app.until_queue(waiting, 1).await;
    }
    app.control.release();
    first.answer().await.ok();
    for other in others {
        other.answer().await.ok();
    }
    assert_eq!(app.control.state().batches, [vec![1], vec![2, 3], vec![4], vec![5]]);
}

/// The model inside the program behind the routes: broken files are told of,
/// and the next picture is the one from before.
#[tokio::test]
async fn a_server_with_a_real_model_serves_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| -> PathBuf { folder.path().join(name) };
    fs::write(file("text.safetensors"), "hello").expect("written");
    fs::write(file("empty.safetensors"), "").expect("written");
    write(&file("model.safetensors"), &[("model.diffusion_model.input_blocks.0.0.weight", &[4, 4], 0.0)]);
    write(
        &file("nan.safetensors"),
        &[
            ("unet.conv_in.lora_A.weight", &[1, 4, 3, 3], f32::NAN),
            ("unet.conv_in.lora_B.weight", &[64, 1, 1, 1], 1.0),
        ],
    );
    write(&file("half.safetensors"), &[("unet.conv_in.lora_A.weight", &[1, 4, 3, 3], 0.5)]);
    write(
        &file("sdxl.safetensors"),
        &[
            ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", &[1, 2048], 0.5),
            ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight", &[640, 1], 0.5),
        ],
    );
    let options = LoadOptions { dtype: DTypeChoice::Float32, ..LoadOptions::default() };
    let model = load(None, &options, &mut |_| {}).expect("the model inside");
    let config = ServeConfig::parse_from(["--lora-dir", text(folder.path())]).expect("good arguments");
    let app = App::new(&config, Box::new(model), "127.0.0.1:8000".parse().expect("an address"))
        .expect("an application");
    let body = |lora: Option<&str>| json!({"prompt": "red apple", "size": "64x64", "num_inference_steps": 1, "seed": 1, "lora_path": lora, "response_format": "b64_json"});
    let draw = async |lora: Option<&str>| send(app.router(), generation(body(lora).to_string())).await;
    let before = draw(None).await.file(0);
    for (name, words) in [
        ("text", "safetensors"),
        ("empty", "it is empty"),
        ("model", "whole model"),
        ("nan", "not finite"),
        ("half", "without their partners"),
        ("sdxl", "fits Stable Diffusion XL"),
    ] {
        let (message, kind, param, _) = draw(Some(name)).await.error(500);
        assert!(message.contains(words) && message.contains(name), "{name}: {message}");
        assert!(!message.contains(text(folder.path())), "{name}: {message}");
        assert_eq!((kind.as_str(), param), ("internal_error", json!("lora_path")));
    }
    assert!(draw(None).await.file(0) == before, "the picture is the one from before");
}

/// Every listed name can be asked for, as a parameter and in a prompt.
#[tokio::test]
async fn what_is_listed_can_be_used() {
    let folder = folder();
    for file in ["UPPER.SAFETENSORS", "a, b: c.safetensors", "dots.v1.5.safetensors", "日本 é.safetensors"]
    {
        fs::copy(folder.path().join("ink.safetensors"), folder.path().join(file)).expect("copied");
    }
    let app = TestApp::new(&["--lora-dir", text(folder.path())]);
    let list = app.get("/v1/loras").await.ok();
    let names: Vec<&str> =
        list["data"].as_array().expect("a list").iter().map(|l| l["id"].as_str().expect("a name")).collect();
    assert_eq!(names.len(), 7, "{names:?}");
    for name in names {
        let drawn = [((*name).to_owned(), 0.5)];
        assert_eq!(drawn_with(&app, json!({"lora_path": name, "lora_scale": 0.5})).await, drawn);
        let tag = json!({"prompt": format!("a <lora:{name}:0.5>"), "prompt_syntax": "a1111"});
        assert_eq!(drawn_with(&app, tag).await, drawn);
    }
    for tag in ["<lora:ink:1:0.5>", "<lora:ink:strong>", "<lora:ink:nan>", "<lora::1>"] {
        let body = json!({"prompt": tag, "prompt_syntax": "a1111", "size": "8x8"});
        let (message, kind, param, _) = app.post(body).await.error(400);
        assert_eq!((kind.as_str(), param), ("invalid_request_error", json!("prompt")));
        assert!(message.contains("<lora:NAME:SCALE>"), "{message}");
    }
}
