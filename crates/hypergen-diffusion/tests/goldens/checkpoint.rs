//! Writes the tiny checkpoints into folders, in every layout in which
//! checkpoints are published. The names and shapes are the fixtures', the
//! weights a formula; nothing of our own loader is used.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fixture;
use super::formula::{canonical, weight};

/// How a checkpoint is laid out; the rows of `layouts` in `pipelines.json`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Layout {
    /// Files as transformers 4 wrote them, and a VAE as diffusers did before 0.12.
    pub(crate) transformers4: bool,
    /// What stands before `.safetensors`.
    pub(crate) variant: Option<String>,
    /// Number type of the stored weights.
    pub(crate) dtype: String,
    /// Files for each component's weights.
    pub(crate) shards: usize,
}

impl Layout {
    /// As diffusers 0.42 saves by default.
    pub(crate) fn plain() -> Self {
        Self { transformers4: false, variant: None, dtype: "float32".into(), shards: 1 }
    }
}

/// Gain and dimensions of each tensor, by name.
pub(crate) type Shapes = BTreeMap<String, Vec<f64>>;

/// A fixture of `checkpoints/`.
#[derive(Debug, Deserialize)]
pub(crate) struct Checkpoint {
    /// Contents of JSON files by path.
    pub(crate) files: BTreeMap<String, Value>,
    /// What sets a tokenizer.json apart from the one in `models/emoji`.
    #[serde(default)]
    tokenizers: BTreeMap<String, Map<String, Value>>,
    /// JSON files of an older tokenizer folder, by path.
    #[serde(default)]
    transformers4: BTreeMap<String, Value>,
    /// Weight files by path.
    pub(crate) tensors: BTreeMap<String, Shapes>,
}

impl Checkpoint {
    /// Reads the fixture.
    pub(crate) fn named(name: &str) -> Self {
        serde_json::from_value(fixture::json(&format!("checkpoints/{name}.json")))
            .expect("a checkpoint's fixture")
    }

    /// Writes the whole folder.
    pub(crate) fn write(&self, folder: &Path, layout: &Layout) {
        for (name, content) in &self.files {
            write_json(&folder.join(name), content);
        }
        for (part, patch) in &self.tokenizers {
            self.write_tokenizer(&folder.join(part), part, patch, layout);
        }
        for (file, shapes) in &self.tensors {
            write_weights(&folder.join(file), shapes, layout);
        }
    }

    fn write_tokenizer(&self, folder: &Path, part: &str, patch: &Map<String, Value>, layout: &Layout) {
        let mut tokenizer = emoji_tokenizer();
        for (field, value) in patch {
            tokenizer[field] = value.clone();
        }
        if !layout.transformers4 {
            return write_json(&folder.join("tokenizer.json"), &tokenizer);
        }
        write_json(&folder.join("vocab.json"), &tokenizer["model"]["vocab"]);
        let pairs = tokenizer["model"]["merges"].as_array().expect("merges");
        let line = |pair: &Value| format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
        let merges: String = pairs.iter().map(line).collect();
        fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{merges}")).expect("merges.txt");
        for (name, content) in &self.transformers4 {
            if name.split('/').next() == Some(part) {
                write_json(&folder.join("..").join(name), content);
            }
        }
    }
}

/// The repository's own tokenizer, which all tiny checkpoints share.
pub(crate) fn emoji_tokenizer() -> Value {
    let path = repository().join("models/emoji/tokenizer/tokenizer.json");
    serde_json::from_slice(&fs::read(path).expect("the embedded model's tokenizer")).expect("JSON")
}

/// The repository's root.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Writes JSON, making the folder.
pub(crate) fn write_json(path: &Path, content: &Value) {
    fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder for the checkpoint");
    fs::write(path, content.to_string()).expect("a file of the checkpoint");
}

/// Writes the tensors of one component, `path` being the plain layout's name.
pub(crate) fn write_weights(path: &Path, shapes: &Shapes, layout: &Layout) {
    let folder = path.parent().expect("a file in a folder");
    fs::create_dir_all(folder).expect("a folder for the weights");
    let part = folder.file_name().unwrap().to_str().unwrap();
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let dtype = match layout.dtype.as_str() {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        other => panic!("the fixture has number type {other}"),
    };
    let mut tensors = BTreeMap::new();
    for (key, row) in shapes {
        let shape: Vec<usize> = row[1..].iter().map(|&d| d as usize).collect();
        let values = weight(&canonical(part, key), &shape, row[0]);
        let key = if layout.transformers4 { older_name(part, key) } else { key.clone() };
        tensors.insert(key, (dtype, shape, stored(&values, dtype)));
    }
    if layout.transformers4 && part.starts_with("text_encoder") {
        let ids = (0..77i64).flat_map(i64::to_le_bytes).collect();
        tensors.insert("text_model.embeddings.position_ids".into(), (Dtype::I64, vec![1, 77], ids));
    }
    let dotted = layout.variant.as_ref().map_or(String::new(), |v| format!(".{v}"));
    if layout.shards == 1 {
        return write_safetensors(&folder.join(format!("{stem}{dotted}.safetensors")), &tensors);
    }
    let per_file = tensors.len().div_ceil(layout.shards);
    let mut map = Map::new();
    for (i, keys) in tensors.keys().collect::<Vec<_>>().chunks(per_file).enumerate() {
        let file = format!("{stem}{dotted}-{:05}-of-{:05}.safetensors", i + 1, layout.shards);
        let shard = keys.iter().map(|&k| (k.clone(), tensors[k].clone())).collect();
        write_safetensors(&folder.join(&file), &shard);
        map.extend(keys.iter().map(|&k| (k.clone(), Value::from(file.clone()))));
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    write_json(&folder.join(format!("{stem}.safetensors.index{dotted}.json")), &index);
}

/// Tensors of one file: type, shape and bytes.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub(crate) fn write_safetensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(key, (dtype, shape, bytes))| {
        (key, TensorView::new(*dtype, shape.clone(), bytes).expect("a shape that fits its bytes"))
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).expect("a weight file");
}

pub(crate) fn stored(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// What a tensor was called in the older generation of files.
fn older_name(part: &str, key: &str) -> String {
    match part {
        "vae" if key.contains(".attentions.") => key
            .replace(".to_q.", ".query.")
            .replace(".to_k.", ".key.")
            .replace(".to_v.", ".value.")
            .replace(".to_out.0.", ".proj_attn."),
        "text_encoder" => format!("text_model.{}", key.strip_prefix("text_model.").unwrap_or(key)),
        _ => key.to_owned(),
    }
}
