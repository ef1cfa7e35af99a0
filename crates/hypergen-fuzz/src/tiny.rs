//! A tiny Stable Diffusion 1.x for targets that need a loaded model: the shapes
//! are a golden's, the weights one number, for nobody looks at its pictures.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use hypergen_diffusion::{DTypeChoice, Error, LoadOptions, Observer, Pipeline, Request, Size, load};
use serde_json::Value;

use crate::files;

/// JSON files and tensors' shapes of the golden.
const GOLDEN: &str = include_str!("../../hypergen-diffusion/tests/fixtures/checkpoints/sd1.json");
/// The tokenizer of all tiny checkpoints.
const TOKENIZER: &str = include_str!("../../../models/emoji/tokenizer/tokenizer.json");

/// The model's folder.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let golden: Value = serde_json::from_str(GOLDEN).expect("a golden");
    let folder = files::path("tiny");
    let map = |field: &str| golden[field].as_object().cloned().unwrap_or_default();
    for (name, json) in map("files") {
        files::write(&folder.join(name), json.to_string().as_bytes());
    }
    files::write(&folder.join("tokenizer/tokenizer.json"), TOKENIZER.as_bytes());
    for (name, tensors) in map("tensors") {
        let mut text = String::new();
        let tensors: BTreeMap<String, Vec<f64>> = serde_json::from_value(tensors).expect("shapes");
        for (tensor, row) in tensors {
            let shape: Vec<String> = row[1..].iter().map(f64::to_string).collect();
            let _ = writeln!(text, "{tensor} F32 {}", shape.join(","));
        }
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        files::write_described(&path, &text).expect("weights");
    }
    folder
});

/// The folder that holds the model.
pub(crate) fn folder() -> &'static Path {
    files::prepare();
    &FOLDER
}

/// Loads a folder, quietly and on one thread.
pub(crate) fn open(folder: &Path) -> Result<Pipeline, Error> {
    let options = LoadOptions { dtype: DTypeChoice::Float32, threads: Some(1), ..LoadOptions::default() };
    load(folder.to_str(), &options, &mut |_| {})
}

/// The model, loaded.
pub(crate) static MODEL: LazyLock<Mutex<Pipeline>> =
    LazyLock::new(|| Mutex::new(open(folder()).expect("the tiny model loads")));

/// The smallest request.
pub(crate) fn request(prompt: &str) -> Request {
    Request { size: Size { width: 64, height: 64 }, steps: 1, ..Request::new(prompt) }
}

/// Lets a generation begin (LoRAs are applied and prompts encoded) and stops it
/// before the first step.
#[derive(Default)]
pub(crate) struct OnlyTheBeginning {
    asked: bool,
}

impl Observer for OnlyTheBeginning {
    fn cancelled(&mut self, _index: usize) -> bool {
        std::mem::replace(&mut self.asked, true)
    }
}
