//! What people give as a model and is none: each file and folder is named for
//! what it is, with what to do. Damaged ones are in `tests/malformed.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use hypergen_diffusion::{DTypeChoice, ErrorKind, LoadOptions, load};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Layout, Tensors, stored, write_json, write_safetensors};

fn error(path: &Path, vae: Option<PathBuf>) -> String {
    let options =
        LoadOptions { dtype: DTypeChoice::Float32, threads: Some(1), vae, ..LoadOptions::default() };
    let error = match load(path.to_str(), &options, &mut |_| {}) {
        Ok(_) => panic!("{} was loaded", path.display()),
        Err(error) => error,
    };
    println!("{}", error.message);
    assert_eq!(error.kind, ErrorKind::Model, "{}", error.message);
    error.message
}

fn check(name: &str, message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{name}: no '{word}' in: {message}");
    }
}

/// A file with tensors of these names and shapes.
fn file(path: &Path, tensors: &[(&str, &[usize])]) {
    let tensors = tensors.iter().map(|(name, shape)| {
        let values = vec![0.0; shape.iter().product()];
        ((*name).to_owned(), (Dtype::F32, shape.to_vec(), stored(&values, Dtype::F32)))
    });
    write_safetensors(path, &tensors.collect::<Tensors>());
}

const UNET: &str = "model.diffusion_model.input_blocks.0.0.weight";
const CLIP: &str = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
const OPEN_CLIP: &str = "cond_stage_model.model.token_embedding.weight";
const XL_1: &str = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight";
const XL_2: &str = "conditioner.embedders.1.model.token_embedding.weight";

/// A table row's tensors: names and shapes.
type Shapes = &'static [(&'static str, &'static [usize])];

#[test]
fn checkpoints_that_would_be_drawn_wrong_are_refused_by_name() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let path = scratch.path().join("model.safetensors");
    const FOUR: &[usize] = &[8, 4, 3, 3];
    let rows: &[(Shapes, &[&str])] = &[
        (
            &[
                (UNET, FOUR),
                (XL_1, &[1]),
                (XL_2, &[1]),
                ("edm_vpred.sigma_max", &[]),
                ("edm_vpred.sigma_min", &[]),
            ],
            &["CosXL", "'edm_vpred.'", "not supported"],
        ),
        (&[(UNET, FOUR), (XL_1, &[1]), (XL_2, &[1]), ("edm_vpred.sigma_min", &[])], &["CosXL"]),
        (
            &[(UNET, FOUR), (XL_1, &[1]), (XL_2, &[1]), ("edm_mean", &[4]), ("edm_std", &[4])],
            &["Playground 2.5", "not supported"],
        ),
        (&[(UNET, FOUR), (XL_1, &[1]), (XL_2, &[1]), ("edm_std", &[4])], &["Playground 2.5", "'edm_std'"]),
        (&[(UNET, FOUR), ("conditioner.embedders.0.model.ln_final.bias", &[1])], &["SDXL refiner"]),
        (&[(UNET, &[8, 9, 3, 3]), (CLIP, &[1])], &["inpainting", "9 channels"]),
        (&[(UNET, &[8, 9, 3, 3]), (XL_1, &[1]), (XL_2, &[1])], &["inpainting", "9 channels"]),
        (&[(UNET, &[8, 8, 3, 3]), (CLIP, &[1])], &["InstructPix2Pix", "8 channels"]),
        (&[(UNET, &[8, 7, 3, 3]), (OPEN_CLIP, &[1])], &["x4 upscaler", "7 channels"]),
        (&[(UNET, &[8, 5, 3, 3]), (OPEN_CLIP, &[1])], &["depth-to-image", "5 channels"]),
        (
            &[(UNET, &[8, 8, 3, 3]), ("model.diffusion_model.input_blocks.1.0.time_stack.x", &[1])],
            &["Stable Video"],
        ),
        (&[(UNET, FOUR), (OPEN_CLIP, &[1]), ("embedder.model.visual.proj", &[1])], &["unCLIP"]),
        (
            &[(UNET, FOUR), (OPEN_CLIP, &[1]), ("model.diffusion_model.label_emb.0.0.weight", &[1])],
            &["a picture or a class beside the text"],
        ),
        (&[(UNET, FOUR), (CLIP, &[1]), ("control_model.input_blocks.0.0.weight", &[1])], &["ControlNet"]),
        (
            &[(UNET, FOUR), (CLIP, &[1]), ("model.diffusion_model.position_net.linears.0.bias", &[1])],
            &["GLIGEN"],
        ),
        (&[(UNET, FOUR), ("model.diffusion_model.encoder_hid_proj.weight", &[1])], &["Kolors"]),
        (&[(UNET, FOUR), (XL_1, &[1])], &["SDXL", "without its second text encoder", "whole checkpoint"]),
        (&[(UNET, FOUR), (XL_2, &[1])], &["SDXL", "without its first text encoder", "whole checkpoint"]),
        (&[(UNET, FOUR)], &["UNet without its text encoder"]),
    ];
    for (tensors, words) in rows {
        file(&path, tensors);
        check(&format!("{tensors:?}"), &error(&path, None), words);
    }
}

#[test]
fn files_of_other_kinds_are_named() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let path = scratch.path().join("model.safetensors");
    let rows: &[(&str, &str)] = &[
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora.down.weight", "LoRA"),
        ("unet.mid.lora_B.weight", "LoRA"),
        ("lycoris_mid.lokr_w1", "LoRA"),
        ("lora_te_x.hada_w1_a", "LoRA"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "motion module"),
        ("image_proj.proj.weight", "IP-Adapter"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("controlnet_down_blocks.0.weight", "ControlNet"),
        ("input_hint_block.0.weight", "ControlNet"),
        ("lora_controlnet", "control LoRA"),
        ("adapter.body.0.resnets.0.block1.weight", "T2I-Adapter"),
        ("body.0.block1.weight", "T2I-Adapter"),
        ("model.1.sub.0.RDB1.conv1.0.weight", "upscaler"),
        ("emb_params", "textual inversion"),
        ("decoder.layers.1.weight", "TAESD"),
        ("3.conv.0.weight", "TAESD"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
        ("model.diffusion_model.effnet_mapper.0.weight", "Stable Cascade"),
        ("joint_transformer_blocks.0.attn.to_q.weight", "AuraFlow"),
        ("model.diffusion_model.double_layers.0.attn.w1q.weight", "AuraFlow"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("transformer_blocks.0.attn.add_q_proj.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.proj.weight", "Flux"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "Flux"),
        ("single_transformer_blocks.0.attn.to_q.weight", "Flux"),
        ("t_block.1.weight", "PixArt"),
        ("adaln_single.linear.weight", "PixArt"),
        ("add_embedding.pool.k_proj.weight", "DeepFloyd IF"),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", "T5"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "image encoder"),
        ("conditioner.embedders.0.transformer.text_model.x", "text encoders alone"),
        ("first_stage_model.decoder.conv_in.weight", "--vae"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "--vae"),
        ("down_blocks.0.resnets.0.conv1.weight", "the UNet of a folder"),
        ("input_blocks.0.0.weight", "a UNet alone"),
        ("something.of.nobody", "not a checkpoint of Stable Diffusion"),
    ];
    for (name, word) in rows {
        file(&path, &[(name, &[4, 4])]);
        check(name, &error(&path, None), &["model.safetensors is", word]);
    }
    // An embedding by its width alone.
    file(&path, &[("<cat-toy>", &[768])]);
    check("an embedding", &error(&path, None), &["textual inversion"]);
    file(&path, &[("clip_g", &[2, 1280]), ("clip_l", &[2, 768])]);
    check("an embedding of SDXL", &error(&path, None), &["textual inversion"]);
    for (name, content, words) in [
        ("model.onnx", &b"\x08\x07\x12\x07pytorch"[..], &["ONNX", "safetensors"][..]),
        ("model.ONNX", b"x", &["ONNX"]),
        ("model.gguf", b"GGUF\x03\x00\x00\x00", &["GGUF", "safetensors"]),
        ("model.safetensors", b"GGUF\x03\x00\x00\x00\x00", &["GGUF"]),
        ("flax_model.msgpack", b"\x82", &["JAX"]),
        ("model.ckpt", b"PK\x03\x04", &["pickle", "convert it"]),
        ("model.pth", b"\x80\x02", &["pickle"]),
        ("model.bin", b"\x80\x02", &["pickle"]),
        ("model.zip", b"PK\x03\x04", &["archive", "unpack"]),
        ("model.safetensors.part", b"\x40\0\0\0\0\0\0\0{", &["unfinished download"]),
        ("model.safetensors.crdownload", b"", &["unfinished download"]),
        ("model_index.json", b"{}", &["settings", "give the folder"]),
        ("web.safetensors", b"\n<!DOCTYPE html><html><title>Sign in</title>", &["web page", "again"]),
        (
            "lfs.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            &["Git LFS pointer"],
        ),
        (
            "refused.safetensors",
            b"Access to model x/y is restricted.",
            &["a text", "Access to model", "again"],
        ),
        ("short.safetensors", b"\x40\0\0\0\0\0\0\0{\"a\":", &["truncated", "again"]),
        ("empty.safetensors", b"", &["empty"]),
    ] {
        let path = scratch.path().join(name);
        fs::write(&path, content).expect("written");
        check(name, &error(&path, None), words);
    }
}

/// A VAE that is none, or of another architecture.
#[test]
fn what_is_no_vae_is_named() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let model = scratch.path().join("model");
    Checkpoint::named("sd1").write(&model, &Layout::plain());
    for (name, tensor, words) in [
        ("taesd_decoder.safetensors", "3.conv.0.weight", &["holds no VAE", "TAESD", "own VAE"]),
        ("taesd.safetensors", "decoder.layers.3.conv.0.weight", &["holds no VAE", "TAESD", "own VAE"]),
        ("lora.safetensors", "lora_unet_x.lora_up.weight", &["holds no VAE", "LoRA", "--lora"]),
    ] {
        let path = scratch.path().join(name);
        file(&path, &[(tensor, &[4, 4])]);
        check(name, &error(&model, Some(path)), words);
    }
    // In the model's own place, and as a folder of its own.
    let taesd = scratch.path().join("taesd");
    write_json(&taesd.join("config.json"), &json!({"_class_name": "AutoencoderTiny"}));
    let weights = taesd.join("diffusion_pytorch_model.safetensors");
    file(&weights, &[("decoder.layers.0.weight", &[64, 4, 3, 3])]);
    check("a folder", &error(&model, Some(taesd.clone())), &["config.json", "AutoencoderTiny", "TAESD"]);
    check("as a model", &error(&taesd, None), &["AutoencoderTiny", "TAESD"]);
    fs::remove_dir_all(model.join("vae")).expect("removed");
    check("no folder", &error(&model, None), &["no folder", "vae", "--vae"]);
    fs::rename(taesd, model.join("vae")).expect("moved");
    check("its own", &error(&model, None), &["vae/config.json", "AutoencoderTiny", "TAESD"]);
    let onnx = scratch.path().join("vae.onnx");
    fs::write(&onnx, b"x").expect("written");
    check("ONNX", &error(&model, Some(onnx)), &["vae.onnx", "ONNX"]);
}

#[test]
fn pipelines_and_parts_of_other_kinds_are_named() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let model = scratch.path();
    let checkpoint = Checkpoint::named("sd1");
    checkpoint.write(model, &Layout::plain());
    for (class, words) in [
        (json!(null), &["model_index.json", "'_class_name' is null", "StableDiffusionPipeline"][..]),
        (json!(7), &["model_index.json", "'_class_name' is no text"]),
        (json!("StableDiffusionInpaintPipeline"), &["inpainting"]),
        (json!("StableDiffusionXLInpaintPipeline"), &["inpainting"]),
        (json!("StableDiffusionInstructPix2PixPipeline"), &["InstructPix2Pix"]),
        (json!("StableDiffusionXLImg2ImgPipeline"), &["refiner"]),
        (json!("StableDiffusionUpscalePipeline"), &["an upscaler"]),
        (json!("StableVideoDiffusionPipeline"), &["Stable Video Diffusion"]),
        (json!("StableDiffusion3Pipeline"), &["Stable Diffusion 3"]),
        (json!("FluxPipeline"), &["Flux"]),
        (json!("StableCascadeDecoderPipeline"), &["Stable Cascade"]),
        (json!("PixArtSigmaPipeline"), &["PixArt"]),
        (json!("IFPipeline"), &["DeepFloyd IF"]),
        (json!("AuraFlowPipeline"), &["AuraFlow"]),
        (json!("StableDiffusionControlNetPipeline"), &["ControlNet"]),
        (json!("StableUnCLIPImg2ImgPipeline"), &["model_index.json", "not supported"]),
        (json!("OnnxStableDiffusionPipeline"), &["ONNX"]),
        (json!("NobodysPipeline"), &["NobodysPipeline", "what can be loaded is"]),
    ] {
        write_json(&model.join("model_index.json"), &json!({"_class_name": class}));
        check(&class.to_string(), &error(model, None), words);
    }
    write_json(&model.join("model_index.json"), &json!({}));
    check("no class", &error(model, None), &["'_class_name' is absent"]);
    write_json(&model.join("model_index.json"), &checkpoint.files["model_index.json"]);
    for (file, change, words) in [
        (
            "unet/config.json",
            json!({"_class_name": "UNetMotionModel"}),
            &["unet/config.json", "motion module"][..],
        ),
        (
            "unet/config.json",
            json!({"_class_name": "ControlNetModel"}),
            &["unet/config.json", "a ControlNet"],
        ),
        ("unet/config.json", json!({"_class_name": "FluxTransformer2DModel"}), &["Flux"]),
        ("vae/config.json", json!({"_class_name": "AutoencoderKLTemporalDecoder"}), &["Stable Video"]),
        (
            "text_encoder/config.json",
            json!({"model_type": "t5"}),
            &["text_encoder/config.json", "'model_type'", "t5"],
        ),
    ] {
        let mut json = checkpoint.files[file].clone();
        json.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        write_json(&model.join(file), &json);
        check(&change.to_string(), &error(model, None), words);
        write_json(&model.join(file), &checkpoint.files[file]);
    }
}

#[test]
fn folders_that_are_no_model_are_named() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let folder = |name: &str, files: &[(&str, Value)]| {
        let folder = scratch.path().join(name);
        fs::create_dir_all(&folder).expect("a folder");
        for (file, content) in files {
            write_json(&folder.join(file), content);
        }
        folder
    };
    let class = |name: &str| json!({"_class_name": name});
    for (name, files, words) in [
        ("empty", &[][..], &["holds no model_index.json", "is empty"][..]),
        ("controlnet", &[("config.json", class("ControlNetModel"))], &["a ControlNet", "not supported"]),
        ("adapter", &[("config.json", class("T2IAdapter"))], &["T2I-Adapter"]),
        ("transformer", &[("config.json", class("SD3Transformer2DModel"))], &["Stable Diffusion 3"]),
        ("vae", &[("config.json", class("AutoencoderKL"))], &["a VAE", "--vae"]),
        ("unet", &[("config.json", class("UNet2DConditionModel"))], &["UNet", "one part of a model"]),
        (
            "clip",
            &[("config.json", json!({"architectures": ["CLIPTextModel"]}))],
            &["text encoder", "one part"],
        ),
        ("llama", &[("config.json", json!({"architectures": ["LlamaForCausalLM"]}))], &["LlamaForCausalLM"]),
        (
            "peft",
            &[("adapter_config.json", json!({})), ("adapter_model.safetensors", json!(0))],
            &["LoRA", "--lora"],
        ),
        ("lora", &[("pytorch_lora_weights.safetensors", json!(0))], &["LoRA"]),
        ("inversion", &[("learned_embeds.bin", json!(0))], &["textual inversion"]),
        (
            "singles",
            &[("a.safetensors", json!(0)), ("b.safetensors", json!(0))],
            &["a.safetensors, b.safetensors", "singles/a.safetensors"],
        ),
        ("pickles", &[("v1-5.ckpt", json!(0))], &["pickle", "safetensors"]),
        ("ggufs", &[("x-Q4.gguf", json!(0))], &["GGUF"]),
        ("onnx", &[("unet/model.onnx", json!(0))], &["ONNX"]),
        ("above", &[("inner/model_index.json", json!({}))], &["one folder too high", "above/inner"]),
        (
            "models--owner--name",
            &[("snapshots/1/model_index.json", json!({})), ("refs/main", json!(0))],
            &["owner/name", "cache"],
        ),
        ("rest", &[("README.md", json!(0))], &["too high or too deep"]),
    ] {
        let path = folder(name, files);
        check(name, &error(&path, None), words);
        check(name, &error(&path, None), &["holds no model_index.json"]);
    }
    let below =
        folder("model", &[("model_index.json", json!({})), ("scheduler/scheduler_config.json", json!({}))]);
    check("below", &error(&below.join("scheduler"), None), &["one folder too deep"]);
}
