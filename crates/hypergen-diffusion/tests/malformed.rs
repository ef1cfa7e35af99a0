//! A table of damaged, hostile and mistaken checkpoints. Each gets an error of
//! its own that names the file or tensor, and never a panic or an allocation
//! that a number in a file asked for.

#[allow(dead_code, reason = "the goldens use the rest")]
#[path = "goldens/checkpoint.rs"]
mod checkpoint;
#[allow(dead_code, reason = "the goldens use the rest")]
#[path = "goldens/fixture.rs"]
mod fixture;
#[allow(dead_code, reason = "the goldens use the rest")]
#[path = "goldens/formula.rs"]
mod formula;

use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Layout, Tensors, stored, write_json, write_safetensors};
use hypergen_diffusion::{
    DTypeChoice, ErrorKind, Generator, LoadOptions, Pipeline, Request, Silent, Size, load,
};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const INDEX: &str = "unet/diffusion_pytorch_model.safetensors.index.json";

/// One row: what it is, how a whole folder becomes it, and words of its error.
struct Row {
    name: &'static str,
    damage: Box<dyn Fn(&Path)>,
    words: &'static [&'static str],
}

fn row(name: &'static str, words: &'static [&'static str], damage: impl Fn(&Path) + 'static) -> Row {
    Row { name, damage: Box::new(damage), words }
}

/// A row that writes bytes over the UNet's weights.
fn bytes(name: &'static str, content: Vec<u8>, words: &'static [&'static str]) -> Row {
    row(name, words, move |folder| fs::write(folder.join(UNET), &content).expect("written"))
}

/// The same with a header of JSON and so many bytes of data.
fn header(name: &'static str, header: &str, data: usize, words: &'static [&'static str]) -> Row {
    let mut content = (header.len() as u64).to_le_bytes().to_vec();
    content.extend_from_slice(header.as_bytes());
    content.resize(content.len() + data, 0);
    bytes(name, content, words)
}

/// A row that changes the UNet's whole file.
fn edit(name: &'static str, words: &'static [&'static str], change: impl Fn(&mut Vec<u8>) + 'static) -> Row {
    row(name, words, move |folder| {
        let path = folder.join(UNET);
        let mut content = fs::read(&path).expect("the weights");
        change(&mut content);
        fs::write(path, content).expect("written");
    })
}

/// A row that changes the header of the UNet's file, not its data.
fn entry(name: &'static str, words: &'static [&'static str], change: impl Fn(&mut Value) + 'static) -> Row {
    edit(name, words, move |content| {
        let len = u64::from_le_bytes(content[..8].try_into().expect("8 bytes")) as usize;
        let mut json: Value = serde_json::from_slice(&content[8..8 + len]).expect("a header");
        change(&mut json);
        let text = json.to_string().into_bytes();
        let data = content.split_off(8 + len);
        *content = [(text.len() as u64).to_le_bytes().to_vec(), text, data].concat();
    })
}

/// A row that sets a field of a JSON file.
fn field(
    name: &'static str,
    file: &'static str,
    key: &'static str,
    value: Value,
    words: &'static [&'static str],
) -> Row {
    row(name, words, move |folder| {
        let path = folder.join(file);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        json[key] = value.clone();
        write_json(&path, &json);
    })
}

/// A row that replaces the text of a file.
fn text(
    name: &'static str,
    file: &'static str,
    content: &'static str,
    words: &'static [&'static str],
) -> Row {
    row(name, words, move |folder| fs::write(folder.join(file), content).expect("written"))
}

/// A row that takes a file away.
fn gone(name: &'static str, file: &'static str, words: &'static [&'static str]) -> Row {
    row(name, words, move |folder| fs::remove_file(folder.join(file)).expect("removed"))
}

/// A row that puts an index in the place of the UNet's file.
fn index(name: &'static str, content: &'static str, words: &'static [&'static str]) -> Row {
    row(name, words, move |folder| {
        fs::rename(folder.join(UNET), folder.join("unet/whole.safetensors")).expect("moved");
        fs::write(folder.join(INDEX), content).expect("written");
    })
}

fn safetensors_rows() -> Vec<Row> {
    let one = |dtype: &str, shape: &str, begin: &str, end: &str| {
        format!(
            r#"{{"conv_in.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#
        )
    };
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    vec![
        bytes("an empty file", vec![], &[UNET, "it is empty"]),
        bytes("five bytes", b"hello".to_vec(), &[UNET, "has only 5 bytes"]),
        bytes(
            "a header longer than the file",
            [900u64.to_le_bytes().to_vec(), b"{}".to_vec()].concat(),
            &[UNET, "10 bytes are not as many as its header says"],
        ),
        bytes(
            "a header of 16 exabytes",
            [u64::MAX.to_le_bytes().to_vec(), b"{}".to_vec()].concat(),
            &[UNET, "of another format"],
        ),
        bytes(
            "a header that is no text",
            [4u64.to_le_bytes().to_vec(), vec![0xff; 4]].concat(),
            &[UNET, "of another format"],
        ),
        header("a header that is no JSON", "{'a': 1}", 0, &[UNET, "header does not parse"]),
        header("a header that is a list", "[1, 2]", 0, &[UNET, "header does not parse"]),
        header("a header nested without end", &"[".repeat(100_000), 0, &[UNET, "header does not parse"]),
        edit("data cut in the middle", &[UNET, "not as many as its header says", "download it again"], |c| {
            c.truncate(c.len() / 2);
        }),
        edit("bytes after the end", &[UNET, "not as many as its header says"], |c| c.push(0)),
        header("overlapping tensors", &two("[0,8]", "[4,12]"), 12, &[UNET, "'b' makes no sense"]),
        header("a hole between tensors", &two("[0,8]", "[16,24]"), 24, &[UNET, "'b' makes no sense"]),
        header(
            "a tensor beyond the end",
            &one("F32", "[4]", "0", "16"),
            8,
            &[UNET, "not as many as its header says"],
        ),
        header(
            "a tensor that ends before it begins",
            &one("F32", "[4]", "16", "0"),
            16,
            &[UNET, "'conv_in.weight' makes no sense"],
        ),
        header(
            "an offset beyond 64 bits",
            &one("F32", "[4]", "0", "99999999999999999999"),
            16,
            &[UNET, "header does not parse"],
        ),
        header(
            "a shape that does not fit its bytes",
            &one("F32", "[5]", "0", "16"),
            16,
            &[UNET, "do not fit the bytes"],
        ),
        header(
            "a shape beyond 64 bits",
            &one("F32", "[4611686018427387904,4]", "0", "16"),
            16,
            &[UNET, "absurdly large"],
        ),
        header("a negative dimension", &one("F32", "[-4]", "0", "16"), 16, &[UNET, "header does not parse"]),
        header(
            "an unknown number type",
            &one("F12", "[4]", "0", "16"),
            16,
            &[UNET, "header does not parse", "F12"],
        ),
        header("no tensors at all", "{}", 0, &[UNET, "is missing"]),
        entry(
            "a weight of whole numbers",
            &[UNET, "'conv_in.weight'", "stored as I32", "F32, F16 or BF16"],
            |h| h["conv_in.weight"]["dtype"] = "I32".into(),
        ),
        entry("a missing tensor", &[UNET, "'mid_block.resnets.0.conv1.weight' is missing"], |h| {
            rename(h, "mid_block.resnets.0.conv1.weight", "x");
        }),
        entry("a tensor of another shape", &[UNET, "'conv_out.bias'", "[2, 2]", "[4]"], |h| {
            h["conv_out.bias"]["shape"] = json!([2, 2]);
        }),
        entry("a tensor of no elements", &[UNET, "'conv_norm_out.bias'", "[0]", "[32]"], |h| {
            let end = h["conv_norm_out.bias"]["data_offsets"][0].clone();
            let moved = h["conv_norm_out.bias"]["data_offsets"].clone();
            h["extra"] = json!({"dtype": "F32", "shape": [32], "data_offsets": moved});
            h["conv_norm_out.bias"] = json!({"dtype": "F32", "shape": [0], "data_offsets": [end, end]});
        }),
        row("a tensor too many", &[UNET, "1 tensors", "no place", "'extra.weight'"], |folder| {
            let checkpoint = Checkpoint::named("sd1");
            let mut shapes = checkpoint.tensors[UNET].clone();
            shapes.insert("extra.weight".into(), vec![1.0, 3.0]);
            checkpoint::write_weights(&folder.join(UNET), &shapes, &Layout::plain());
        }),
        bytes(
            "a pickle under a false name",
            b"PK\x03\x04 archive/data.pkl and so on".to_vec(),
            &[UNET, "is a pickle", "run code"],
        ),
        bytes(
            "an old pickle under a false name",
            b"\x80\x02ctorch and so on".to_vec(),
            &[UNET, "is a pickle", "run code"],
        ),
        bytes(
            "a Git LFS pointer",
            b"version https://git-lfs/spec/v1\noid sha256:4d7a\nsize 12345\n".to_vec(),
            &[UNET, "Git LFS pointer", "git lfs pull"],
        ),
        bytes("a web page", b"<!DOCTYPE html><html>Sign in</html>".to_vec(), &[UNET, "is a web page"]),
        bytes("a GGUF file", b"GGUF\x03\x00\x00\x00 and so on".to_vec(), &[UNET, "GGUF"]),
        row("a folder in a file's place", &[UNET, "it is a folder"], |folder| {
            fs::remove_file(folder.join(UNET)).expect("removed");
            fs::create_dir(folder.join(UNET)).expect("a folder");
        }),
        gone("no weights", UNET, &["unet has no diffusion_pytorch_model.safetensors", "complete"]),
        row(
            "weights only as a pickle",
            &["unet has its weights only as a pickle", "save the model as safetensors"],
            |folder| {
                fs::rename(folder.join(UNET), folder.join("unet/diffusion_pytorch_model.bin"))
                    .expect("moved");
            },
        ),
    ]
}

fn rename(header: &mut Value, from: &str, to: &str) {
    let taken = header[from].take();
    let map = header.as_object_mut().expect("an object");
    map.remove(from);
    map.insert(to.to_owned(), taken);
}

fn index_rows() -> Vec<Row> {
    let mut rows = vec![
        index("an index that is no JSON", "{", &[INDEX, "EOF"]),
        index("an index that is a list", "[]", &[INDEX, "no object 'weight_map'"]),
        index("an index of nothing", r#"{"weight_map":{}}"#, &[INDEX, "'weight_map' is empty"]),
        index(
            "an index that maps to a number",
            r#"{"weight_map":{"a":7}}"#,
            &[INDEX, "'a' is not mapped to a file name"],
        ),
        index(
            "an index that climbs",
            r#"{"weight_map":{"a":"../vae/diffusion_pytorch_model.safetensors"}}"#,
            &[INDEX, "'../vae/", "beside the index"],
        ),
        index(
            "an index that names a root",
            r#"{"weight_map":{"a":"/etc/shadow.safetensors"}}"#,
            &[INDEX, "'/etc/shadow.safetensors'", "beside the index"],
        ),
        index(
            "an index that names a subfolder",
            r#"{"weight_map":{"a":"x/y.safetensors"}}"#,
            &[INDEX, "'x/y.safetensors'", "beside the index"],
        ),
        index(
            "an index that names itself",
            r#"{"weight_map":{"a":"diffusion_pytorch_model.safetensors.index.json"}}"#,
            &[INDEX, "beside the index"],
        ),
        index(
            "an index that names a missing file",
            r#"{"weight_map":{"a":"gone.safetensors"}}"#,
            &[INDEX, "names gone.safetensors", "not there"],
        ),
        index(
            "an index that promises too much",
            r#"{"weight_map":{"a":"whole.safetensors"}}"#,
            &[INDEX, "holds 'a', which is not so"],
        ),
        row("one tensor in two files", &["'conv_in.bias' is also in", "b.safetensors"], |folder| {
            let path = folder.join(UNET);
            let weights = fs::read(&path).expect("the weights");
            fs::remove_file(path).expect("removed");
            fs::write(folder.join("unet/b.safetensors"), &weights).expect("written");
            let mut tensors = Tensors::new();
            tensors.insert("conv_in.bias".into(), (Dtype::F32, vec![1], stored(&[1.0], Dtype::F32)));
            write_safetensors(&folder.join("unet/c.safetensors"), &tensors);
            let map =
                json!({"weight_map": {"conv_in.weight": "b.safetensors", "conv_in.bias": "c.safetensors"}});
            write_json(&folder.join(INDEX), &map);
        }),
    ];
    #[cfg(unix)]
    rows.push(row("a circle of links", &["unet has no diffusion_pytorch_model.safetensors"], |folder| {
        fs::remove_file(folder.join(UNET)).expect("removed");
        std::os::unix::fs::symlink("diffusion_pytorch_model.safetensors", folder.join(UNET)).expect("a link");
    }));
    rows
}

const UNET_CONFIG: &str = "unet/config.json";
const VAE_CONFIG: &str = "vae/config.json";
const TEXT_CONFIG: &str = "text_encoder/config.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const TOKENIZER: &str = "tokenizer/tokenizer.json";

fn config_rows() -> Vec<Row> {
    vec![
        gone("no model_index.json", "model_index.json", &["holds no model_index.json"]),
        text("an empty model_index.json", "model_index.json", "", &["model_index.json", "not valid JSON"]),
        field(
            "a pipeline of another kind",
            "model_index.json",
            "_class_name",
            json!("FluxPipeline"),
            &["model_index.json", "FluxPipeline", "StableDiffusionXLPipeline"],
        ),
        gone("no configuration", UNET_CONFIG, &[UNET_CONFIG, "is missing"]),
        text(
            "a configuration that is no JSON",
            UNET_CONFIG,
            "{\"in_channels\": 4,",
            &[UNET_CONFIG, "not valid JSON"],
        ),
        text("a configuration that is a number", UNET_CONFIG, "7", &[UNET_CONFIG, "JSON object"]),
        field(
            "no heads",
            UNET_CONFIG,
            "attention_head_dim",
            json!(0),
            &[UNET_CONFIG, "'attention_head_dim' = 0"],
        ),
        field(
            "a negative number of heads",
            UNET_CONFIG,
            "attention_head_dim",
            json!(-8),
            &[UNET_CONFIG, "attention_head_dim"],
        ),
        field(
            "heads that do not divide",
            UNET_CONFIG,
            "attention_head_dim",
            json!(7),
            &[UNET_CONFIG, "'attention_head_dim' = 7"],
        ),
        field(
            "heads for too few levels",
            UNET_CONFIG,
            "attention_head_dim",
            json!([2, 4]),
            &[UNET_CONFIG, "2 numbers for 3 levels"],
        ),
        field(
            "groups that do not divide",
            UNET_CONFIG,
            "norm_num_groups",
            json!(7),
            &[UNET_CONFIG, "'norm_num_groups' = 7"],
        ),
        field("no groups", UNET_CONFIG, "norm_num_groups", json!(0), &[UNET_CONFIG, "'norm_num_groups' = 0"]),
        field("no levels", UNET_CONFIG, "block_out_channels", json!([]), &[UNET_CONFIG, "lists 0 levels"]),
        field(
            "a thousand levels",
            UNET_CONFIG,
            "block_out_channels",
            json!(vec![8; 1000]),
            &[UNET_CONFIG, "lists 1000 levels"],
        ),
        field(
            "channels beyond reason",
            UNET_CONFIG,
            "block_out_channels",
            json!([32, 64, 1_u64 << 60]),
            &[UNET_CONFIG, "'block_out_channels' is 1152921504606846976"],
        ),
        field(
            "no blocks",
            UNET_CONFIG,
            "layers_per_block",
            json!(0),
            &[UNET_CONFIG, "'layers_per_block' is 0"],
        ),
        field(
            "a billion blocks",
            UNET_CONFIG,
            "layers_per_block",
            json!(1_000_000_000),
            &[UNET_CONFIG, "'layers_per_block' is 1000000000"],
        ),
        field(
            "a billion transformers",
            UNET_CONFIG,
            "transformer_layers_per_block",
            json!(1_000_000_000),
            &[UNET_CONFIG, "'transformer_layers_per_block' is 1000000000"],
        ),
        field(
            "an unknown block",
            UNET_CONFIG,
            "down_block_types",
            json!(["A", "B", "C"]),
            &[UNET_CONFIG, "has A, which is not supported"],
        ),
        field("another activation", UNET_CONFIG, "act_fn", json!("relu"), &[UNET_CONFIG, "'act_fn'", "relu"]),
        field(
            "another text",
            UNET_CONFIG,
            "cross_attention_dim",
            json!(48),
            &[UNET, "attn2.to_k.weight", "48"],
        ),
        field(
            "latents beyond reason",
            UNET_CONFIG,
            "sample_size",
            json!(u64::MAX),
            &[UNET_CONFIG, "'sample_size'"],
        ),
        field("latents of no size", UNET_CONFIG, "sample_size", json!(0), &[UNET_CONFIG, "'sample_size'"]),
        field("an inpainting model", UNET_CONFIG, "in_channels", json!(9), &[UNET, "'conv_in.weight'", "9"]),
        field(
            "a VAE without a scale",
            VAE_CONFIG,
            "scaling_factor",
            json!(0),
            &[VAE_CONFIG, "'scaling_factor' is 0"],
        ),
        field(
            "a VAE of other groups",
            VAE_CONFIG,
            "norm_num_groups",
            json!(5),
            &[VAE_CONFIG, "'norm_num_groups' = 5"],
        ),
        field(
            "a VAE of other pictures",
            VAE_CONFIG,
            "out_channels",
            json!(1),
            &[VAE_CONFIG, "a picture has 3"],
        ),
        field(
            "a VAE of a billion layers",
            VAE_CONFIG,
            "layers_per_block",
            json!(1_000_000_000),
            &[VAE_CONFIG, "'layers_per_block' is 1000000000"],
        ),
        field(
            "a text encoder without heads",
            TEXT_CONFIG,
            "num_attention_heads",
            json!(0),
            &[TEXT_CONFIG, "'num_attention_heads' = 0"],
        ),
        field(
            "a text encoder of a billion layers",
            TEXT_CONFIG,
            "num_hidden_layers",
            json!(1_000_000_000),
            &[TEXT_CONFIG, "'num_hidden_layers' is 1000000000"],
        ),
        field(
            "a vocabulary of a million",
            TEXT_CONFIG,
            "vocab_size",
            json!(1_000_000),
            &["text_encoder", "token_embedding.weight", "1000000"],
        ),
        field(
            "another activation in the text encoder",
            TEXT_CONFIG,
            "hidden_act",
            json!("relu6"),
            &[TEXT_CONFIG, "'hidden_act' relu6"],
        ),
        gone("no scheduler", SCHEDULER, &[SCHEDULER, "is missing"]),
        field("betas beyond 1", SCHEDULER, "beta_end", json!(12), &[SCHEDULER, "beta_end"]),
        field(
            "a schedule of 10^15 steps",
            SCHEDULER,
            "num_train_timesteps",
            json!(1_000_000_000_000_000_u64),
            &[SCHEDULER, "num_train_timesteps"],
        ),
        gone("no tokenizer", TOKENIZER, &["tokenizer/vocab.json", "is missing"]),
        text("a tokenizer that is no JSON", TOKENIZER, "{\"version\": ", &[TOKENIZER, "EOF"]),
        text("a tokenizer without a model", TOKENIZER, "{\"version\": \"1.0\"}", &[TOKENIZER]),
        row("a tokenizer of another model", &["tokenizer/vocab.json", "'a' has id 5000"], |folder| {
            fs::remove_file(folder.join(TOKENIZER)).expect("removed");
            write_json(&folder.join("tokenizer/vocab.json"), &json!({"a": 5000, "b": 1, "<|endoftext|>": 2}));
            fs::write(folder.join("tokenizer/merges.txt"), "").expect("written");
        }),
        row("merges that are no pairs", &["tokenizer/merges.txt", "line 2 is not a pair"], |folder| {
            fs::remove_file(folder.join(TOKENIZER)).expect("removed");
            write_json(&folder.join("tokenizer/vocab.json"), &json!({"a": 0}));
            fs::write(folder.join("tokenizer/merges.txt"), "#version: 0.2\nnonsense\n").expect("written");
        }),
        row(
            "a tokenizer longer than the encoder",
            &["tokenizer_config.json", "5000", "77 positions"],
            |folder| {
                write_json(
                    &folder.join("tokenizer/tokenizer_config.json"),
                    &json!({"model_max_length": 5000}),
                );
            },
        ),
    ]
}

fn options() -> LoadOptions {
    LoadOptions { dtype: DTypeChoice::Float32, threads: Some(1), ..LoadOptions::default() }
}

fn open(path: &Path) -> Result<Pipeline, hypergen_diffusion::Error> {
    load(path.to_str(), &options(), &mut |_| {})
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("a copy")),
        }
    }
}

/// Whether the error says what it should; the complaint if not.
fn complaint(name: &str, words: &[&str], error: Option<hypergen_diffusion::Error>) -> Option<String> {
    let Some(error) = error else { return Some(format!("{name}: it was loaded")) };
    println!("{name}: {}", error.message);
    let lacking = words.iter().find(|word| !error.message.contains(**word));
    if let Some(word) = lacking {
        return Some(format!("{name}: no '{word}' in: {}", error.message));
    }
    (error.kind != ErrorKind::Model).then(|| format!("{name}: {:?}: {}", error.kind, error.message))
}

fn check_message(name: &str, words: &[&str], error: &hypergen_diffusion::Error) {
    assert_eq!(complaint(name, words, Some(error.clone())), None);
}

/// The most memory that this process has held, in bytes.
#[cfg(target_os = "linux")]
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("the process's status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

#[test]
fn every_damaged_folder_has_its_own_error() {
    let whole = tempfile::tempdir().expect("a temporary folder");
    Checkpoint::named("sd1").write(whole.path(), &Layout::plain());
    assert!(open(whole.path()).is_ok(), "the folder is whole before it is damaged");
    let rows = [safetensors_rows(), index_rows(), config_rows()];
    let mut wrong = vec![];
    for Row { name, damage, words } in rows.iter().flatten() {
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let folder = scratch.path().join("model");
        copy(whole.path(), &folder);
        damage(&folder);
        wrong.extend(complaint(name, words, open(&folder).err()));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(rows.iter().flatten().count() >= 25);
    // What the numbers in these files ask for is gigabytes and more.
    #[cfg(target_os = "linux")]
    assert!(peak() < 1 << 30, "{} bytes were held", peak());
}

/// Weights that are not finite cannot be told before they are multiplied.
#[test]
fn a_weight_that_is_no_number_makes_no_picture() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Checkpoint::named("sd1").write(folder.path(), &Layout::plain());
    let path = folder.path().join(UNET);
    let mut content = fs::read(&path).expect("the weights");
    let end = content.len();
    content[end - 64..].fill(0xff);
    fs::write(path, content).expect("written");
    let mut model = open(folder.path()).expect("it loads");
    let request = Request { size: Size::new(16, 16).expect("a size"), steps: 1, ..Request::new("a fox") };
    let error = model.generate(&[request], &mut Silent).expect_err("no picture");
    assert!(error.message.contains("finite"), "{}", error.message);
}

/// Files that are given as a model and are none.
#[test]
fn every_mistaken_file_has_its_own_error() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let missing = open(&scratch.path().join("none.safetensors")).err().expect("an error");
    check_message("nothing", &["there is no model at", "none.safetensors"], &missing);
    const BLOCK: &str = "model.diffusion_model.input_blocks.0.0.weight";
    const CLIP: &str = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
    let tensors: &[(&str, &[&str], &[&str])] = &[
        ("a LoRA", &["lora_unet_mid.lora_down.weight"], &["is a LoRA"]),
        ("another LoRA", &["unet.mid.lora_A.weight"], &["is a LoRA"]),
        ("Stable Diffusion 3", &["model.diffusion_model.joint_blocks.0.x"], &["Stable Diffusion 3"]),
        ("Flux", &["double_blocks.0.img_attn.proj.weight"], &["Flux"]),
        ("a refiner", &["conditioner.embedders.0.model.ln_final.bias", BLOCK], &["SDXL refiner"]),
        ("Playground", &["edm_mean", BLOCK, CLIP], &["Playground"]),
        ("a ControlNet", &["control_model.input_blocks.0.0.weight"], &["ControlNet"]),
        ("a UNet alone", &[BLOCK], &["UNet without its text encoder"]),
        ("a folder's UNet", &["down_blocks.0.resnets.0.conv1.weight"], &["the UNet of a folder"]),
        ("a folder's text encoder", &["text_model.final_layer_norm.bias"], &["the text encoder of a folder"]),
        ("a VAE", &["first_stage_model.decoder.conv_in.weight"], &["VAE alone", "--vae"]),
        ("who knows", &["weight"], &["not a checkpoint of Stable Diffusion"]),
        (
            "a model without most of it",
            &[BLOCK, CLIP],
            &["embeddings.token_embedding.weight", "too few dimensions"],
        ),
    ];
    for (name, keys, words) in tensors {
        let path = scratch.path().join("model.safetensors");
        let one = (Dtype::F32, vec![1], stored(&[1.0], Dtype::F32));
        write_safetensors(&path, &keys.iter().map(|k| ((*k).to_owned(), one.clone())).collect());
        let error = open(&path).err().unwrap_or_else(|| panic!("{name}: it was loaded"));
        check_message(name, words, &error);
    }
    let files: &[(&str, &str, &[u8], &[&str])] = &[
        ("a checkpoint of old", "model.ckpt", b"PK\x03\x04", &["model.ckpt", "run code", "convert it"]),
        ("a pickle", "model.PT", b"\x80\x02", &["model.PT", "run code"]),
        ("a text", "model.txt", b"a red fox in the snow", &["model.txt", "of another format"]),
        ("an empty file", "model.safetensors", b"", &["it is empty"]),
    ];
    for (name, file, content, words) in files {
        let path = scratch.path().join(file);
        fs::write(&path, content).expect("written");
        let error = open(&path).err().unwrap_or_else(|| panic!("{name}: it was loaded"));
        check_message(name, words, &error);
    }
}

/// A single file whose networks are damaged.
#[test]
fn every_damaged_single_file_has_its_own_error() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    type Shapes = &'static [(&'static str, &'static [usize])];
    let unet: Shapes = &[
        ("model.diffusion_model.input_blocks.0.0.weight", &[32, 4, 3, 3]),
        ("model.diffusion_model.input_blocks.3.0.op.weight", &[32, 32, 3, 3]),
    ];
    let open_clip: Shapes = &[
        ("cond_stage_model.model.token_embedding.weight", &[10, 64]),
        ("cond_stage_model.model.positional_embedding", &[77, 64]),
        ("cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight", &[64, 64]),
        ("cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.weight", &[64, 64]),
    ];
    let cases: &[(&str, Shapes, &[&str])] = &[
        (
            "a joint matrix of four parts",
            &[("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", &[4, 1])],
            &["in_proj_weight", "[4, 1]", "3 blocks of rows"],
        ),
        (
            "blocks out of step",
            &[("model.diffusion_model.input_blocks.5.0.op.weight", &[1])],
            &["blocks [3, 5]", "none of this family"],
        ),
        (
            "no middle",
            &[
                ("model.diffusion_model.input_blocks.1.0.out_layers.3.weight", &[32, 32, 3, 3]),
                ("model.diffusion_model.input_blocks.4.0.out_layers.3.weight", &[32, 32, 3, 3]),
            ],
            &["0 transformer blocks in the middle"],
        ),
        ("no channels", &[], &["'model.diffusion_model.input_blocks.1.0.out_layers.3.weight' is missing"]),
    ];
    for (name, more, words) in cases {
        let path: PathBuf = scratch.path().join("model.safetensors");
        let all = unet.iter().chain(open_clip).chain(*more);
        let tensors = all.map(|(key, shape)| {
            let values = vec![0.0; shape.iter().product()];
            ((*key).to_owned(), (Dtype::F32, shape.to_vec(), stored(&values, Dtype::F32)))
        });
        write_safetensors(&path, &tensors.collect());
        let error = open(&path).err().unwrap_or_else(|| panic!("{name}: it was loaded"));
        check_message(name, words, &error);
    }
    drop::<TempDir>(scratch);
}
