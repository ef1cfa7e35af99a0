//! What is given as a model and is none: by the names of tensors, files and
//! classes it is told what it is, and what to do with it. Nothing here decides
//! what can be loaded; it finds the words for what cannot.

use std::fs;
use std::path::Path;

use hypergen_tensor::Checkpoint;
use serde_json::Value;

/// How a tensor is known.
#[derive(Debug, Clone, Copy)]
enum Mark {
    /// Its name begins so, perhaps below a UNet's prefix.
    Begins(&'static str),
    /// Its name holds this.
    Holds(&'static str),
}

use Mark::{Begins, Holds};

impl Mark {
    fn is_on(self, name: &str) -> bool {
        match self {
            Begins(text) => {
                name.starts_with(text)
                    || name.strip_prefix("model.diffusion_model.").is_some_and(|rest| rest.starts_with(text))
            }
            Holds(text) => name.contains(text),
        }
    }
}

/// Tensors beside or inside a UNet of our families that change what it is: it
/// would be drawn, and wrong.
const CHANGED: &[(Mark, &str)] = &[
    (Begins("edm_vpred."), "a CosXL model (its tensors 'edm_vpred.' ask for EDM's continuous noise levels)"),
    (Begins("edm_mean"), "a Playground 2.5 model (its tensor 'edm_mean' asks for EDM's noise levels)"),
    (Begins("edm_std"), "a Playground 2.5 model (its tensor 'edm_std' asks for EDM's noise levels)"),
    (Begins("conditioner.embedders.0.model."), "an SDXL refiner, which goes on from another model's latents"),
    (Begins("conditioner.embedders.0.open_clip."), "a Stable Video Diffusion model"),
    (Holds(".time_stack."), "a Stable Video Diffusion model"),
    (Begins("embedder.model.visual."), "an unCLIP model, which varies a picture"),
    (Begins("noise_augmentor."), "an unCLIP model, which varies a picture"),
    (Begins("depth_model."), "a depth-to-image model"),
    (Begins("low_scale_model."), "the x4 upscaler"),
    (Begins("control_model."), "a ControlNet"),
    (Begins("position_net."), "a GLIGEN model, which takes boxes"),
    (Holds("motion_modules."), "an AnimateDiff motion module"),
    (Begins("encoder_hid_proj."), "a Kolors or DeepFloyd IF model, which takes another text encoder's words"),
    (Begins("encoder_pooling."), "a DeepFloyd IF model"),
];

/// Tensors by which files of other kinds are known, the most particular first.
const ELSE: &[(Mark, &str)] = &[
    (Holds(".lora_A."), LORA),
    (Holds(".lora_B."), LORA),
    (Holds(".lora_down."), LORA),
    (Holds(".lora_up."), LORA),
    (Holds(".lora.down."), LORA),
    (Holds(".lora.up."), LORA),
    (Holds(".hada_w1_"), LORA),
    (Holds(".lokr_w1"), LORA),
    (Holds(".oft_"), LORA),
    (Begins("lora_controlnet"), "a control LoRA, which is not supported"),
    (Begins("lora_"), LORA),
    (Holds("motion_modules."), "an AnimateDiff motion module, which is not supported"),
    (Begins("image_proj."), "an IP-Adapter, which is not supported"),
    (Begins("ip_adapter."), "an IP-Adapter, which is not supported"),
    (Begins("control_model."), CONTROLNET),
    (Begins("controlnet_"), CONTROLNET),
    (Begins("input_hint_block."), CONTROLNET),
    (Begins("adapter."), "a T2I-Adapter, which is not supported"),
    (Begins("body.0.block1."), "a T2I-Adapter, which is not supported"),
    (Begins("body.0.resnets."), "a T2I-Adapter, which is not supported"),
    (Begins("body.0.rdb1."), UPSCALER),
    (Begins("RRDB_trunk."), UPSCALER),
    (Begins("model.1.sub."), UPSCALER),
    (Begins("emb_params"), INVERSION),
    (Begins("string_to_param"), INVERSION),
    (Begins("decoder.layers."), TAESD),
    (Begins("taesd"), TAESD),
    (Begins("3.conv.0."), TAESD),
    (Begins("4.conv.0."), TAESD),
    (Begins("clip_txt_mapper."), "a Stable Cascade model, which is not supported"),
    (Begins("clip_txt_pooled_mapper."), "a Stable Cascade model, which is not supported"),
    (Begins("effnet_mapper."), "a Stable Cascade model, which is not supported"),
    (Begins("joint_transformer_blocks."), "an AuraFlow model, which is not supported"),
    (Begins("double_layers."), "an AuraFlow model, which is not supported"),
    (Begins("cond_seq_linear."), "an AuraFlow model, which is not supported"),
    (Begins("joint_blocks."), "a Stable Diffusion 3 model, which is not supported"),
    (Begins("double_blocks."), "a Flux model, which is not supported"),
    (Begins("single_transformer_blocks."), "a Flux model, which is not supported"),
    (
        Holds(".attn.add_q_proj."),
        "the transformer of Stable Diffusion 3 or a model like it, which is not supported",
    ),
    (Begins("t_block."), "a PixArt model, which is not supported"),
    (Begins("y_embedder."), "a PixArt model or another diffusion transformer, which is not supported"),
    (Begins("adaln_single."), "a PixArt model or another diffusion transformer, which is not supported"),
    (Begins("x_embedder."), "a diffusion transformer, which is not supported"),
    (Begins("encoder_hid_proj."), "the UNet of a DeepFloyd IF or Kolors model, which is not supported"),
    (Begins("add_embedding.pool."), "the UNet of a DeepFloyd IF model, which is not supported"),
    (Begins("encoder_pooling."), "the UNet of a DeepFloyd IF model, which is not supported"),
    (Begins("encoder.block."), "a T5 text encoder, which no supported family has"),
    (Begins("vision_model."), "CLIP's image encoder, which no supported family has"),
    (Begins("visual."), "CLIP's image encoder, which no supported family has"),
    // Not Begins, which sees through the prefix.
    (
        Holds("model.diffusion_model.input_blocks."),
        "a UNet without its text encoder: use the whole checkpoint",
    ),
    (Begins("input_blocks."), "a UNet alone: use the whole checkpoint"),
    (
        Begins("down_blocks."),
        "the UNet of a folder in the diffusers layout: give the folder that holds model_index.json",
    ),
    (Begins("text_model."), TEXT),
    (Begins("encoder.layers."), TEXT),
    (Begins("cond_stage_model."), "a text encoder alone: use the whole checkpoint"),
    (Begins("conditioner.embedders."), "text encoders alone: use the whole checkpoint"),
    (Begins("first_stage_model."), VAE),
    (Begins("decoder."), VAE),
];

const LORA: &str = "a LoRA, which is no model: load one beside a model (--lora)";
const CONTROLNET: &str = "a ControlNet, which is not supported";
const UPSCALER: &str = "an upscaler (ESRGAN), which is no diffusion model";
const INVERSION: &str = "a textual inversion (an embedding for a new word), which is no model";
const TAESD: &str =
    "TAESD, a tiny autoencoder of another architecture, which is not supported: use the model's own VAE";
const TEXT: &str =
    "the text encoder of a folder in the diffusers layout: give the folder that holds model_index.json";
const VAE: &str = "a VAE alone: give it with --vae beside a model";

fn first(file: &Checkpoint, table: &'static [(Mark, &'static str)]) -> Option<&'static str> {
    table.iter().find(|(mark, _)| file.names().any(|name| mark.is_on(name))).map(|(_, what)| *what)
}

/// What a file is that has a UNet of our families, and more than that.
pub(crate) fn changed(file: &Checkpoint) -> Option<String> {
    if let Some(what) = first(file, CHANGED) {
        return Some(format!("{what}, which is not supported"));
    }
    let kernel = file.get("model.diffusion_model.input_blocks.0.0.weight")?;
    channels(*kernel.shape.get(1)?).map(|what| format!("{what}, which is not supported"))
}

/// What a UNet is that takes so many channels, if not latents alone.
pub(crate) fn channels(count: usize) -> Option<&'static str> {
    match count {
        5 => Some("a depth-to-image model (5 channels)"),
        7 => Some("the x4 upscaler (7 channels)"),
        8 => Some("an InstructPix2Pix model (8 channels), which edits a picture"),
        9 => Some("an inpainting model (9 channels)"),
        _ => None,
    }
}

/// What a file of tensors is, if it is none of our models.
pub(crate) fn tensors(file: &Checkpoint) -> Option<&'static str> {
    first(file, ELSE).or_else(|| embeddings(file).then_some(INVERSION))
}

/// Textual inversions without the usual names: a few rows as wide as a text encoder.
fn embeddings(file: &Checkpoint) -> bool {
    let mut count = 0;
    file.names().all(|name| {
        count += 1;
        let width = file.get(name).filter(|t| t.shape.len() <= 2).and_then(|t| t.shape.last().copied());
        count <= 8 && matches!(width, Some(768 | 1024 | 1280))
    }) && count > 0
}

/// Classes of pipelines and of their parts, by a piece of their names.
const CLASSES: &[(&str, &str)] = &[
    ("Onnx", "a model for ONNX Runtime"),
    ("Flax", "a model for JAX"),
    ("OVStable", "a model for OpenVINO"),
    ("ControlNet", "a ControlNet"),
    ("Inpaint", "an inpainting model"),
    ("InstructPix2Pix", "an InstructPix2Pix model, which edits a picture"),
    ("StableDiffusionXLImg2Img", "an image-to-image pipeline of SDXL, as its refiner has"),
    ("Depth2Img", "a depth-to-image model"),
    ("Img2Img", "an image-to-image pipeline"),
    ("Upscale", "an upscaler"),
    ("ImageVariation", "a model that varies a picture"),
    ("UnCLIP", "an unCLIP model, which varies a picture"),
    ("StableVideoDiffusion", "a Stable Video Diffusion model"),
    ("SpatioTemporal", "a Stable Video Diffusion model"),
    ("TemporalDecoder", "the VAE of a Stable Video Diffusion model"),
    ("AnimateDiff", "an AnimateDiff model"),
    ("Motion", "an AnimateDiff motion module"),
    ("StableDiffusion3", "a Stable Diffusion 3 model"),
    ("SD3", "the transformer of Stable Diffusion 3"),
    ("Flux", "a Flux model"),
    ("Cascade", "a Stable Cascade model"),
    ("Wuerstchen", "a Würstchen model"),
    ("PixArt", "a PixArt model"),
    ("AuraFlow", "an AuraFlow model"),
    ("IFPipeline", "a DeepFloyd IF model"),
    ("IFSuperResolution", "a DeepFloyd IF model"),
    ("Kandinsky", "a Kandinsky model"),
    ("Kolors", "a Kolors model"),
    ("HunyuanDiT", "a Hunyuan-DiT model"),
    ("GLIGEN", "a GLIGEN model, which takes boxes"),
    ("AltDiffusion", "an AltDiffusion model"),
    ("T2IAdapter", "a T2I-Adapter"),
    ("AutoencoderTiny", "TAESD, a tiny autoencoder of another architecture"),
    ("ConsistencyDecoderVAE", "OpenAI's consistency decoder"),
    ("VQModel", "a VQ autoencoder"),
    ("Transformer2D", "a diffusion transformer"),
    ("UNet2DConditionModel", "a model's UNet"),
    ("AutoencoderKL", "a VAE"),
    ("CLIPTextModel", "a text encoder"),
    ("CLIPModel", "a whole CLIP model"),
    ("T5", "a T5 text encoder"),
];

/// What a class of diffusers or transformers is, in words.
pub(crate) fn class(name: &str) -> Option<&'static str> {
    CLASSES.iter().find(|(piece, _)| name.contains(piece)).map(|(_, what)| *what)
}

/// Extensions of formats that are not read.
const EXTENSIONS: &[(&str, &str)] = &[
    ("onnx", "an ONNX model, for ONNX Runtime; use the same model as safetensors"),
    ("gguf", "a GGUF file, which holds quantized weights; use the same model as safetensors"),
    ("ggml", "a GGML file, which holds quantized weights; use the same model as safetensors"),
    ("msgpack", "a model for JAX (Flax); use the same model as safetensors"),
    ("h5", "a model for Keras; use the same model as safetensors"),
    ("tflite", "a model for TensorFlow Lite; use the same model as safetensors"),
    ("mlmodel", "a model for Core ML; use the same model as safetensors"),
    ("engine", "a model for TensorRT; use the same model as safetensors"),
    ("plan", "a model for TensorRT; use the same model as safetensors"),
    ("trt", "a model for TensorRT; use the same model as safetensors"),
    ("zip", "an archive: unpack it, and give what was in it"),
    ("7z", "an archive: unpack it, and give what was in it"),
    ("rar", "an archive: unpack it, and give what was in it"),
    ("tar", "an archive: unpack it, and give what was in it"),
    ("gz", "an archive: unpack it, and give what was in it"),
    ("incomplete", UNFINISHED),
    ("part", UNFINISHED),
    ("crdownload", UNFINISHED),
    ("aria2", UNFINISHED),
    ("json", "a text with settings: give the folder that it lies in, or the weights"),
    ("yaml", "a text with settings: give the .safetensors file beside it"),
];

const UNFINISHED: &str = "an unfinished download: let it go on to its end, or start it again";

/// What a file is, by its name alone.
pub(crate) fn extension(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_string_lossy().to_lowercase();
    EXTENSIONS.iter().find(|(known, _)| *known == extension).map(|(_, what)| *what)
}

/// Why a folder is no model, given the names of the files in it (those of its
/// folders as `folder/file`).
pub(crate) fn listing(files: &[String]) -> Option<String> {
    let any = |wanted: &dyn Fn(&str) -> bool| files.iter().any(|f| wanted(f));
    let top = |f: &&String| !f.contains('/');
    if any(&|f| {
        matches!(f, "adapter_config.json" | "adapter_model.safetensors" | "pytorch_lora_weights.safetensors")
    }) {
        return Some(format!("it is {LORA}"));
    }
    if any(&|f| f.starts_with("learned_embeds.")) {
        return Some(format!("it is {INVERSION}"));
    }
    let single: Vec<&str> =
        files.iter().filter(top).map(String::as_str).filter(|f| f.ends_with(".safetensors")).collect();
    let Some(example) = single.first() else {
        let kinds = [
            (".onnx", "a model for ONNX Runtime"),
            (".gguf", "a model in GGUF files"),
            (".msgpack", "a model for JAX (Flax)"),
            (".ckpt", "a model in a pickle, which can run code when it is read, and is never read here"),
            (".bin", "a model in a pickle, which can run code when it is read, and is never read here"),
        ];
        let kind = kinds.iter().find(|(end, _)| any(&|f| f.ends_with(end)));
        return kind.map(|(_, what)| format!("it is {what}; look for the same model as safetensors"));
    };
    let more = if single.len() > 5 { format!(" and {} more", single.len() - 5) } else { String::new() };
    let named = single.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    Some(format!("its single files are {named}{more}: name one of them, as in FOLDER/{example}"))
}

/// Why a folder without a `model_index.json` is no model, and what to give instead.
pub(crate) fn folder(path: &Path) -> String {
    let names = |folder: &Path| -> Vec<(String, bool)> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let named = entries.filter_map(|e| Some((e.file_name().into_string().ok()?, e.path().is_dir())));
        let mut named: Vec<_> = named.collect();
        named.sort();
        named
    };
    let entries = names(path);
    if entries.is_empty() {
        return "it is empty".into();
    }
    if let Some(what) = part(path) {
        return what;
    }
    let has = |name: &str| entries.iter().any(|(entry, _)| entry == name);
    if has("snapshots") && (has("refs") || has("blobs")) {
        let name =
            path.file_name().map(|n| n.to_string_lossy().replacen("models--", "", 1).replacen("--", "/", 1));
        return format!(
            "it is a model's folder in the hub's cache: give its name, {}, or a folder below snapshots",
            name.unwrap_or_default()
        );
    }
    let deeper = entries
        .iter()
        .find(|(name, is_folder)| *is_folder && path.join(name).join("model_index.json").exists());
    if let Some((name, _)) = deeper {
        return format!("it is one folder too high: give {}", path.join(name).display());
    }
    if path.parent().is_some_and(|above| above.join("model_index.json").exists()) {
        return "it is one folder too deep: give the folder above it".into();
    }
    let mut files = vec![];
    for (name, is_folder) in &entries {
        match is_folder {
            true => {
                files.extend(names(&path.join(name)).into_iter().map(|(inner, _)| format!("{name}/{inner}")));
            }
            false => files.push(name.clone()),
        }
    }
    if ["unet", "vae", "text_encoder"].iter().all(|part| has(part)) {
        return "its parts are there: is the download complete?".into();
    }
    let hint = listing(&files).map(|hint| hint.replace("FOLDER", &path.display().to_string()));
    hint.unwrap_or_else(|| "is it one folder too high or too deep?".into())
}

/// What a folder with a `config.json` at its top is a part of.
fn part(path: &Path) -> Option<String> {
    let config = path.join("config.json");
    let metadata = fs::metadata(&config).ok().filter(|m| m.is_file() && m.len() < 1 << 20);
    let json: Value = serde_json::from_slice(&fs::read(metadata.map(|_| config)?).ok()?).ok()?;
    let named = json.get("_class_name").or_else(|| json.get("architectures")?.get(0))?.as_str()?;
    let shown: String = named.chars().take(60).collect();
    let what = class(named).map_or_else(|| format!("a {shown}"), |what| format!("{what} ({shown})"));
    Some(match named {
        "AutoencoderKL" => format!("it is {what}: give it with --vae beside a model"),
        "UNet2DConditionModel" | "CLIPTextModel" | "CLIPTextModelWithProjection" => {
            format!("it is {what}, one part of a model: give the folder that holds model_index.json")
        }
        _ => format!("it is {what}, which is not supported"),
    })
}
