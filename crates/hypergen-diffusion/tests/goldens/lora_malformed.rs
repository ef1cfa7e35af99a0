//! LoRA files that are broken in every way that comes to mind: each gets an
//! error of its own, and the model draws on as if nothing had been.

use std::fs;
use std::path::{Path, PathBuf};

use hypergen_diffusion::lora::{Lora, PARAM};
use hypergen_diffusion::{ErrorKind, Generator, Silent};
use serde_json::{Map, Value, json};

use crate::lora_files::{Goldens, float32};

/// A matrix of the tiny model, 64 inputs and outputs, as two trainers call it.
const TO_V: &str = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v";
const KOHYA_TO_V: &str = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v";
/// A convolution of 3x3, 64 channels to 64.
const CONV: &str = "unet.mid_block.resnets.0.conv1";

/// A normalisation of 64 channels.
const NORM: &str = "unet.mid_block.resnets.0.norm1";

/// A tensor: its name, type, dimensions and the value of all its elements.
struct Tensor(String, &'static str, Vec<usize>, f32);

fn f32s(name: impl Into<String>, shape: &[usize]) -> Tensor {
    Tensor(name.into(), "F32", shape.to_vec(), 0.5)
}

fn file(tensors: &[Tensor], metadata: Option<Value>) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), vec![]);
    for Tensor(name, dtype, shape, value) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            match *dtype {
                "I64" => data.extend(7_i64.to_le_bytes()),
                _ => data.extend(value.to_le_bytes()),
            }
        }
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    if let Some(metadata) = metadata {
        header.insert("__metadata__".to_owned(), metadata);
    }
    raw(&Value::Object(header).to_string(), &data)
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn pair(module: &str, rank: usize, inputs: usize, outputs: usize) -> [Tensor; 2] {
    [
        f32s(format!("{module}.lora_A.weight"), &[rank, inputs]),
        f32s(format!("{module}.lora_B.weight"), &[outputs, rank]),
    ]
}

/// Files that are no safetensors files, or damaged ones, and what is said of them.
fn damaged() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = file(&pair(TO_V, 2, 64, 64), None);
    let longer = [&good[..], b"more"].concat();
    let one = |info: &str| raw(&format!("{{\"x.alpha\":{info}}}"), &[0; 8]);
    let overlap = r#"{"a.alpha":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b.alpha":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    vec![
        ("empty", vec![], "it is empty"),
        ("five bytes", b"hello".to_vec(), "only 5 bytes"),
        ("pickle", b"\x80\x02}q\x00X\x05\xff\xff\xff and so on".to_vec(), "it is a pickle"),
        ("web page", b"<!DOCTYPE html><html>not found</html>".to_vec(), "it is a web page"),
        ("cut in its header", good[..40].to_vec(), "not as many as its header says"),
        ("cut in its data", good[..good.len() - 4].to_vec(), "not as many as its header says"),
        ("with more at its end", longer, "not as many as its header says"),
        ("header of no JSON", raw("{", &[]), "does not parse"),
        ("header that is a list", raw("[]", &[]), "does not parse"),
        ("overlapping tensors", raw(overlap, &[0; 12]), "makes no sense"),
        (
            "shape beyond its bytes",
            one(r#"{"dtype":"F32","shape":[9],"data_offsets":[0,8]}"#),
            "do not fit the bytes",
        ),
        (
            "absurd shape",
            one(r#"{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}"#),
            "absurdly large",
        ),
        ("type that is none", one(r#"{"dtype":"X9","shape":[2],"data_offsets":[0,8]}"#), "does not parse"),
        ("negative shape", one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), "does not parse"),
        ("no tensors", raw("{}", &[]), "holds no tensors"),
    ]
}

/// Whole files of the wrong things.
fn unfit() -> Vec<(&'static str, Vec<Tensor>, &'static str)> {
    let with = |mut more: Vec<Tensor>| {
        more.extend(pair(TO_V, 2, 64, 64));
        more
    };
    let sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k";
    let sd2 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v";
    let kohya = |module: &str, inputs: usize| {
        vec![
            f32s(format!("{module}.lora_down.weight"), &[2, inputs]),
            f32s(format!("{module}.lora_up.weight"), &[64, 2]),
        ]
    };
    let loha = |b: usize| {
        let names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"];
        let shapes = [[64, 2], [2, b], [64, 2], [2, 64]];
        names.iter().zip(shapes).map(|(n, s)| f32s(format!("{KOHYA_TO_V}.{n}"), &s)).collect::<Vec<_>>()
    };
    let lokr = |name: &str, shape: &[usize]| f32s(format!("{KOHYA_TO_V}.{name}"), shape);
    vec![
        (
            "a whole model",
            vec![f32s("model.diffusion_model.input_blocks.0.0.weight", &[4, 4])],
            "whole model",
        ),
        ("a textual inversion", vec![f32s("emb_params", &[2, 32])], "textual inversion"),
        ("an orthogonal adapter", vec![f32s(format!("{KOHYA_TO_V}.oft_blocks"), &[2, 2])], "OFT"),
        ("something else", vec![f32s("w", &[2])], "no adapter of a kind that is known"),
        (
            "a bias where there is none",
            with(vec![f32s(format!("{TO_V}.lora_B.bias"), &[64])]),
            "changes a bias",
        ),
        ("a difference of such", with(vec![f32s(format!("{TO_V}.diff_b"), &[64])]), "to_v has none"),
        ("a bias of a right factor", with(vec![f32s(format!("{TO_V}.lora_A.bias"), &[2])]), "not understood"),
        (
            "a full difference beside",
            with(vec![f32s(format!("{TO_V}.diff"), &[64, 64])]),
            "no adapter of one kind",
        ),
        (
            "a difference of another layer",
            vec![f32s(format!("{TO_V}.diff"), &[64, 65])],
            "[64, 65], which is not what fits a layer",
        ),
        (
            "a normalisation that is none",
            vec![f32s(format!("{TO_V}.w_norm"), &[64])],
            "is for a normalisation, and",
        ),
        (
            "a product for a normalisation",
            pair(NORM, 2, 64, 64).into(),
            "a normalisation changes by one difference",
        ),
        (
            "a normalisation's scale twice",
            vec![f32s(format!("{NORM}.w_norm"), &[64]), f32s(format!("{NORM}.diff"), &[64])],
            "a normalisation changes by one difference",
        ),
        ("alpha of a normalisation", vec![f32s(format!("{NORM}.alpha"), &[])], "no adapter of one kind"),
        (
            "another normalisation",
            vec![f32s(format!("{NORM}.b_norm"), &[63])],
            "[63], which is not the 64 values of",
        ),
        ("half of GLoRA", vec![f32s(format!("{TO_V}.a1.weight"), &[64, 2])], "without their partners"),
        (
            "two kinds of lengths",
            with(vec![
                f32s(format!("{TO_V}.dora_scale"), &[64, 1]),
                f32s(format!("{TO_V}.lora_magnitude_vector"), &[64]),
            ]),
            "without their partners",
        ),
        (
            "an embedding of another width",
            with(vec![f32s("bundle_emb.x.string_to_param.*", &[1, 33])]),
            "is not 1 to 75 vectors",
        ),
        (
            "an embedding longer than a prompt",
            with(vec![f32s("bundle_emb.x.emb_params", &[76, 32])]),
            "is not 1 to 75 vectors",
        ),
        (
            "an embedding for SDXL",
            with(vec![f32s("bundle_emb.x.clip_l", &[1, 32]), f32s("bundle_emb.x.clip_g", &[1, 64])]),
            "has the tensors 'clip_g', 'clip_l'",
        ),
        ("half a pair", vec![f32s(format!("{TO_V}.lora_A.weight"), &[2, 64])], "without their partners"),
        ("the other half", vec![f32s(format!("{TO_V}.lora_B.weight"), &[64, 2])], "lora_B.weight'"),
        ("alpha alone", vec![f32s(format!("{TO_V}.alpha"), &[])], "no adapter of one kind"),
        (
            "two kinds at once",
            [kohya(KOHYA_TO_V, 64), loha(64)].into_iter().flatten().collect(),
            "no adapter of one kind",
        ),
        ("a module of no model", pair("unet.mid_block.attentions.7.to_q", 2, 64, 64).into(), "does not have"),
        (
            "a text encoder that is not there",
            kohya("lora_te1_text_model_encoder_layers_77_self_attn_q_proj", 32),
            "layers_77",
        ),
        ("for SDXL", kohya(sdxl, 2048), "fits Stable Diffusion XL"),
        ("for SD 2", kohya(sd2, 1024), "fits Stable Diffusion 2.x"),
        ("for SD 1.5", kohya(sd2, 768), "fits Stable Diffusion 1.x"),
        ("for Flux", kohya("lora_unet_double_blocks_0_img_attn_qkv", 3072), "diffusion transformer"),
        (
            "too many inputs",
            pair(TO_V, 2, 65, 64).into(),
            "[2, 65], which is not what fits a layer of 64 inputs",
        ),
        ("too few outputs", pair(TO_V, 2, 64, 63).into(), "[63, 2], which is not"),
        (
            "two ranks",
            vec![
                f32s(format!("{TO_V}.lora_A.weight"), &[2, 64]),
                f32s(format!("{TO_V}.lora_B.weight"), &[64, 3]),
            ],
            "[64, 3], which is not",
        ),
        ("rank 0", pair(TO_V, 0, 64, 64).into(), "not a matrix with values"),
        (
            "vectors",
            vec![f32s(format!("{TO_V}.lora_A.weight"), &[64]), f32s(format!("{TO_V}.lora_B.weight"), &[64])],
            "not a matrix or a kernel",
        ),
        ("two alphas", with(vec![f32s(format!("{TO_V}.alpha"), &[2])]), "which is not one number"),
        (
            "not a number",
            with(vec![Tensor(format!("{TO_V}.alpha"), "F32", vec![], f32::NAN)]),
            "alpha' holds values that are not finite",
        ),
        (
            "infinite weights",
            vec![
                Tensor(format!("{TO_V}.lora_A.weight"), "F32", vec![1, 64], f32::INFINITY),
                f32s(format!("{TO_V}.lora_B.weight"), &[64, 1]),
            ],
            "lora_A.weight' holds values that are not finite",
        ),
        (
            "whole numbers",
            vec![
                Tensor(format!("{TO_V}.lora_A.weight"), "I64", vec![1, 64], 0.0),
                f32s(format!("{TO_V}.lora_B.weight"), &[64, 1]),
            ],
            "stored as I64",
        ),
        ("one module by two names", with(kohya(KOHYA_TO_V, 64)), "are the same module"),
        (
            "one tensor by two names",
            with(vec![f32s(format!("{TO_V}.lora.down.weight"), &[2, 64])]),
            "are the same of one module",
        ),
        (
            "lengths of another layer",
            with(vec![f32s(format!("{TO_V}.lora_magnitude_vector"), &[63])]),
            "[63], which is not",
        ),
        ("half of LoHa", loha(64).into_iter().take(2).collect(), "hada_w1_b'"),
        ("LoHa of another layer", loha(65), "[2, 65], which is not"),
        (
            "LoKr of another layer",
            vec![lokr("lokr_w1", &[4, 4]), lokr("lokr_w2", &[16, 17])],
            "[16, 17], which is not",
        ),
        (
            "LoKr whole and in factors",
            vec![
                lokr("lokr_w1", &[4, 4]),
                lokr("lokr_w2", &[16, 16]),
                lokr("lokr_w2_a", &[16, 2]),
                lokr("lokr_w2_b", &[2, 16]),
            ],
            "both whole and in factors",
        ),
        ("a stray right side of LoKr", vec![lokr("lokr_w2", &[16, 16])], "without their partners: "),
        (
            "a kernel of the wrong size",
            pair(CONV, 2, 64, 64).into(),
            "a 3x3 convolution of 64 channels to 64",
        ),
        (
            "taps of another rank",
            vec![
                f32s("lora_unet_mid_block_resnets_0_conv1.lora_down.weight", &[2, 64, 1, 1]),
                f32s("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", &[2, 3, 3, 3]),
                f32s("lora_unet_mid_block_resnets_0_conv1.lora_up.weight", &[64, 2, 1, 1]),
            ],
            "[2, 3, 3, 3], which is not",
        ),
    ]
}

#[test]
fn every_malformed_lora_is_an_error_of_its_own_and_the_model_draws_on() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let plain = model.draw(&goldens.request(vec![]));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("lora.safetensors");
    let mut cases: Vec<(String, PathBuf, &str)> = vec![];
    let mut put = |name: &str, bytes: &[u8], words: &'static str| {
        let path = folder.path().join(format!("{}.safetensors", cases.len()));
        fs::write(&path, bytes).expect("written");
        cases.push((name.to_owned(), path, words));
    };
    damaged().iter().for_each(|(name, bytes, words)| put(name, bytes, words));
    unfit().iter().for_each(|(name, tensors, words)| put(name, &file(tensors, None), words));
    let good = pair(TO_V, 2, 64, 64);
    for (name, metadata, words) in [
        ("settings of no JSON", "{".to_owned(), "'lora_adapter_metadata' is not a JSON object"),
        (
            "cut off the base",
            json!({"unet.init_lora_weights": "pissa"}).to_string(),
            "changes the base weights",
        ),
    ] {
        put(name, &file(&good, Some(json!({"lora_adapter_metadata": metadata}))), words);
    }
    let peft = folder.path().join("peft");
    fs::create_dir(&peft).expect("a folder");
    let tensors = pair(&format!("base_model.model.{}", TO_V.trim_start_matches("unet.")), 2, 64, 64);
    fs::write(peft.join("adapter_model.safetensors"), file(&tensors, None)).expect("written");
    fs::write(peft.join("adapter_config.json"), "{").expect("written");
    cases.push((
        "broken settings beside".into(),
        peft.join("adapter_model.safetensors"),
        "adapter_config.json beside",
    ));
    let (folder_of_that_name, text) =
        (folder.path().join("folder.safetensors"), folder.path().join("lora.txt"));
    fs::create_dir(&folder_of_that_name).expect("a folder");
    fs::write(&text, file(&good, None)).expect("written");
    for (name, path) in [("a folder", &folder_of_that_name), ("another ending", &text), ("nothing", &path)] {
        cases.push((name.to_owned(), path.clone(), "no readable LoRA file"));
    }
    assert!(cases.len() >= 50, "{} cases", cases.len());
    let (mut seen, mut wrong) = (vec![], vec![]);
    for (name, path, words) in &cases {
        let message = refused(&mut model.pipeline, &goldens, path);
        if !message.contains(words) {
            wrong.push(format!("{name}: wanted '{words}', got: {message}"));
        }
        assert!(!message.contains('\n') && message.len() < 1200, "{name}: {message}");
        seen.push(message);
    }
    println!("{}", seen.join("\n"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    fs::write(&path, file(&good, None)).expect("written");
    let lora = Lora { name: "good".into(), path, scale: 1.0 };
    assert!(model.draw(&goldens.request(vec![lora])) != plain, "what the table varies is fine itself");
    assert!(model.draw(&goldens.request(vec![])) == plain, "the model is itself");
}

fn refused(model: &mut dyn Generator, goldens: &Goldens, path: &Path) -> String {
    let lora = Lora { name: "given".to_owned(), path: path.to_owned(), scale: 1.0 };
    let checked = model.check_loras(std::slice::from_ref(&lora)).expect_err("refused before drawing");
    let request = goldens.request(vec![lora]);
    let error = model.generate(&[request], &mut Silent).expect_err("refused");
    assert_eq!(error, checked);
    assert_eq!((error.kind, error.param), (ErrorKind::Model, Some(PARAM)), "{error}");
    assert!(
        error.message.contains("given") && !error.message.contains(path.to_str().expect("UTF-8")),
        "{error}"
    );
    error.message
}
