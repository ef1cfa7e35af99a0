//! Small LoRA files that describe huge tensors: each is refused by name, or
//! applied, within little memory. A binary of its own, so that no other test's
//! memory is measured.

// What the goldens' tests use to write models; not all of it is needed here.
#[allow(dead_code)]
#[path = "goldens/checkpoint.rs"]
mod checkpoint;
#[allow(dead_code)]
#[path = "goldens/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "goldens/formula.rs"]
mod formula;
#[allow(dead_code)]
#[path = "goldens/lora_files.rs"]
mod lora_files;

use std::fs;
use std::path::Path;

use hypergen_diffusion::lora::Lora;
use hypergen_diffusion::{ErrorKind, Generator};
use lora_files::{Goldens, Model, float32};
use serde_json::{Map, json};

/// Bytes that looking at all files may take beyond the model: the largest file
/// and some.
const MEMORY: u64 = 200 << 20;

/// The most memory that the process ever had, where the system tells.
fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

type Shapes = Vec<(String, Vec<usize>)>;

/// Writes a file of zeros, a byte for each.
fn write(path: &Path, tensors: &Shapes) {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>();
        let info = json!({"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    fs::write(path, bytes).expect("written");
}

/// 64 inputs and outputs.
const MATRIX: &str = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v";
/// 3x3, 64 channels to 64, with a bias.
const CONV: &str = "lora_unet_mid_block_resnets_0_conv1";
/// 64 channels.
const NORM: &str = "lora_unet_mid_block_resnets_0_norm1";

/// Files that fit, of every kind and role.
fn fitting() -> Vec<(&'static str, Shapes)> {
    let of = |module: &str, tensors: &[(&str, &[usize])]| {
        tensors.iter().map(|(role, shape)| (format!("{module}.{role}"), shape.to_vec())).collect::<Shapes>()
    };
    let lora: [(&str, &[usize]); 3] =
        [("lora_down.weight", &[2, 64]), ("lora_up.weight", &[64, 2]), ("alpha", &[1])];
    let with = |more: (&'static str, &'static [usize])| of(MATRIX, &[&lora[..], &[more]].concat());
    let conv = |tensors: &[(&str, &[usize])]| of(CONV, &[tensors, &[("alpha", &[1])]].concat());
    let mut bundled = of(MATRIX, &lora);
    bundled.push(("bundle_emb.fox.emb_params".into(), vec![2, 32]));
    vec![
        ("LoRA", of(MATRIX, &lora)),
        ("DoRA by outputs", with(("dora_scale", &[64, 1]))),
        ("DoRA by inputs", with(("dora_scale", &[1, 64]))),
        ("PEFT's DoRA", with(("lora_magnitude_vector", &[64]))),
        ("an embedding", bundled),
        (
            "LoCon with biases",
            conv(&[
                ("lora_A.weight", &[2, 64, 3, 3]),
                ("lora_B.weight", &[64, 2, 1, 1]),
                ("lora_B.bias", &[64]),
                ("diff_b", &[64]),
                ("dora_scale", &[1, 64, 1, 1]),
            ]),
        ),
        (
            "LoCon with taps apart",
            conv(&[
                ("lora_down.weight", &[3, 64, 1, 1]),
                ("lora_mid.weight", &[2, 3, 3, 3]),
                ("lora_up.weight", &[64, 2, 1, 1]),
            ]),
        ),
        (
            "LoHa",
            conv(&[
                ("hada_w1_a", &[64, 2]),
                ("hada_w1_b", &[2, 576]),
                ("hada_w2_a", &[64, 2]),
                ("hada_w2_b", &[2, 576]),
            ]),
        ),
        (
            "LoHa with taps apart",
            conv(&[
                ("hada_t1", &[2, 3, 3, 3]),
                ("hada_w1_a", &[2, 64]),
                ("hada_w1_b", &[3, 64]),
                ("hada_t2", &[2, 3, 3, 3]),
                ("hada_w2_a", &[2, 64]),
                ("hada_w2_b", &[3, 64]),
            ]),
        ),
        ("LoKr", conv(&[("lokr_w1", &[4, 8]), ("lokr_w2", &[16, 8, 3, 3])])),
        (
            "LoKr in factors",
            conv(&[
                ("lokr_w1_a", &[4, 2]),
                ("lokr_w1_b", &[2, 8]),
                ("lokr_w2_a", &[16, 2]),
                ("lokr_w2_b", &[2, 72]),
            ]),
        ),
        (
            "LoKr with taps apart",
            conv(&[
                ("lokr_w1", &[4, 8]),
                ("lokr_t2", &[2, 3, 3, 3]),
                ("lokr_w2_a", &[2, 16]),
                ("lokr_w2_b", &[3, 8]),
            ]),
        ),
        (
            "GLoRA",
            conv(&[
                ("a1.weight", &[64, 2, 1, 1]),
                ("a2.weight", &[2, 64, 1, 1]),
                ("b1.weight", &[64, 2, 1, 1]),
                ("b2.weight", &[2, 64, 3, 3]),
            ]),
        ),
        (
            "GLoRA's first form",
            of(
                MATRIX,
                &[
                    ("a1.weight", &[2, 64]),
                    ("a2.weight", &[64, 2]),
                    ("b1.weight", &[2, 64]),
                    ("b2.weight", &[64, 2]),
                    ("alpha", &[]),
                ],
            ),
        ),
        ("a difference", conv(&[("diff", &[64, 64, 3, 3]), ("diff_b", &[64])])),
        ("a normalisation", of(NORM, &[("w_norm", &[64]), ("b_norm", &[64])])),
        ("a difference of a normalisation", of(NORM, &[("diff", &[64]), ("diff_b", &[64])])),
    ]
}

/// What `check_loras` says of a file.
fn verdict(model: &Model, path: &Path) -> Result<(), String> {
    let lora = Lora { name: "given".to_owned(), path: path.to_owned(), scale: 1.0 };
    model.pipeline.check_loras(&[lora]).map_err(|e| {
        assert_eq!(e.kind, ErrorKind::Model, "{e}");
        e.message
    })
}

#[test]
fn absurd_sizes_are_refused_by_name_within_little_memory() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let plain = model.draw(&goldens.request(vec![]));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("lora.safetensors");
    let before = peak();
    let mut refused = 0;
    for (kind, shapes) in fitting() {
        write(&path, &shapes);
        assert_eq!(verdict(&model, &path), Ok(()), "{kind} fits as it is");
        for (i, (name, shape)) in shapes.iter().enumerate() {
            // Every dimension in turn, one more dimension, and none of any size.
            let longer = |more: usize| [&shape[..], &[more]].concat();
            // As large as a file of a few megabytes allows.
            let large = |others: usize| 7 + 4_000_000 / others;
            let all = shape.iter().product();
            let mut absurd = vec![longer(large(all)), longer(0), vec![0, usize::MAX >> 8]];
            absurd.extend((0..shape.len()).flat_map(|d| {
                [0, large(all / shape[d])].map(|size| {
                    let mut changed = shape.clone();
                    changed[d] = size;
                    changed
                })
            }));
            for changed in absurd {
                let mut bad = shapes.clone();
                bad[i].1 = changed.clone();
                write(&path, &bad);
                let message = verdict(&model, &path).expect_err("refused");
                let named = bad.iter().any(|(tensor, _)| message.contains(tensor.as_str()));
                assert!(named, "{kind}, {name} {changed:?}: {message}");
                refused += 1;
            }
        }
    }
    assert!(refused > 300, "{refused}");
    // Products whose outer sizes do not fit, whatever the inner ones.
    let n = 100_000;
    let lokr = |side: &str, other: &str| {
        let name = |role: &str| format!("{CONV}.{role}");
        vec![
            (name(&format!("lokr_{side}_a")), vec![n, 1]),
            (name(&format!("lokr_{side}_b")), vec![1, n]),
            (name(&format!("lokr_{other}")), vec![1, 1]),
        ]
    };
    let tucker = |down: Vec<usize>, mid: Vec<usize>, up: Vec<usize>| {
        let tensors = [("lora_down.weight", down), ("lora_mid.weight", mid), ("lora_up.weight", up)];
        tensors.map(|(role, shape)| (format!("{CONV}.{role}"), shape)).to_vec()
    };
    for bad in [
        lokr("w1", "w2"),
        lokr("w2", "w1"),
        tucker(vec![1, n, 1, 1], vec![1, 1, 1000, 1000], vec![64, 1, 1, 1]),
    ] {
        write(&path, &bad);
        let message = verdict(&model, &path).expect_err("refused");
        assert!(message.contains(CONV), "{message}");
    }
    // Ranks that fit, but would make a factor a hundred times larger than the file.
    let rank = 60_000;
    for good in [
        tucker(vec![1, 64, 1, 1], vec![rank, 1, 3, 3], vec![64, rank, 1, 1]),
        ["1", "2"]
            .iter()
            .flat_map(|side| {
                let name = |role: String| format!("{CONV}.hada_{role}");
                [
                    (name(format!("t{side}")), vec![rank, 1, 3, 3]),
                    (name(format!("w{side}_a")), vec![rank, 64]),
                    (name(format!("w{side}_b")), vec![1, 64]),
                ]
            })
            .collect(),
        vec![
            (format!("{CONV}.lokr_w1"), vec![1, 1]),
            (format!("{CONV}.lokr_t2"), vec![rank, 1, 3, 3]),
            (format!("{CONV}.lokr_w2_a"), vec![rank, 64]),
            (format!("{CONV}.lokr_w2_b"), vec![1, 64]),
        ],
    ] {
        write(&path, &good);
        assert_eq!(verdict(&model, &path), Ok(()));
    }
    if let (Some(before), Some(after)) = (before, peak()) {
        println!("{before} bytes at most before, {after} after");
        assert!(after < before + MEMORY, "memory grew from {before} to {after} bytes");
    }
    assert!(model.draw(&goldens.request(vec![])) == plain, "the model is itself");
}
