//! The published shapes of the families, for measurements without a
//! checkpoint. Configurations are cut down to the fields that matter; beside
//! each stands the repository on the hub that it is from.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use crate::families as schedulers;
use crate::{Error, ErrorKind};

/// A family's shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// `stable-diffusion-v1-5/stable-diffusion-v1-5`, 512x512.
    Sd15,
    /// `stabilityai/stable-diffusion-2-1`, 768x768, v prediction.
    Sd21,
    /// `stabilityai/stable-diffusion-xl-base-1.0`, 1024x1024.
    Sdxl,
    /// `stabilityai/sdxl-turbo`, 512x512, one to four steps without guidance.
    SdxlTurbo,
}

impl Preset {
    /// All presets.
    pub const ALL: [Preset; 4] = [Self::Sd15, Self::Sd21, Self::Sdxl, Self::SdxlTurbo];

    /// The name that users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sd15 => "sd15",
            Self::Sd21 => "sd21",
            Self::Sdxl => "sdxl",
            Self::SdxlTurbo => "sdxl-turbo",
        }
    }

    fn is_xl(self) -> bool {
        matches!(self, Self::Sdxl | Self::SdxlTurbo)
    }

    /// A JSON file of the family, in the diffusers layout.
    pub(crate) fn file(self, name: &str) -> Option<Cow<'static, [u8]>> {
        let json = match name {
            "model_index.json" if self.is_xl() => json!({"_class_name": "StableDiffusionXLPipeline"}),
            "model_index.json" => json!({"_class_name": "StableDiffusionPipeline"}),
            "unet/config.json" => self.unet(),
            "vae/config.json" => self.vae(),
            "text_encoder/config.json" => self.text_encoder(),
            "text_encoder_2/config.json" if self.is_xl() => big_g(),
            "scheduler/scheduler_config.json" => self.scheduler(),
            "tokenizer/tokenizer.json" | "tokenizer_2/tokenizer.json" => tokenizer(),
            _ => return None,
        };
        Some(json.to_string().into_bytes().into())
    }

    fn unet(self) -> Value {
        match self {
            Self::Sd15 => json!({
                "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
            }),
            Self::Sd21 => json!({
                "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": true,
            }),
            Self::Sdxl | Self::SdxlTurbo => json!({
                "sample_size": if self == Self::Sdxl { 128 } else { 64 },
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048, "use_linear_projection": true,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            }),
        }
    }

    fn vae(self) -> Value {
        let scaling = if self.is_xl() { 0.13025 } else { 0.18215 };
        json!({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "scaling_factor": scaling})
    }

    fn text_encoder(self) -> Value {
        match self {
            // OpenAI's CLIP ViT-L/14.
            Self::Sd15 | Self::Sdxl | Self::SdxlTurbo => json!({
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                "num_attention_heads": 12, "projection_dim": 768, "eos_token_id": 2,
            }),
            // OpenCLIP's ViT-H/14 without its last layer.
            Self::Sd21 => json!({
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                "num_attention_heads": 16, "projection_dim": 512, "eos_token_id": 2, "hidden_act": "gelu",
            }),
        }
    }

    fn scheduler(self) -> Value {
        match self {
            Self::Sd15 => schedulers::sd1(),
            Self::Sd21 => schedulers::sd2_v(),
            Self::Sdxl => schedulers::sdxl(),
            Self::SdxlTurbo => schedulers::sdxl_turbo(),
        }
    }
}

/// OpenCLIP's ViT-bigG/14.
fn big_g() -> Value {
    json!({
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 20, "projection_dim": 1280, "eos_token_id": 2, "hidden_act": "gelu",
    })
}

/// A vocabulary of letters: random weights do not care which words they read.
fn tokenizer() -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        (b'!'..=b'~').enumerate().map(|(i, c)| ((c as char).to_string(), json!(i))).collect();
    vocab.insert("<|startoftext|>".into(), json!(49406));
    vocab.insert("<|endoftext|>".into(), json!(49407));
    json!({
        "version": "1.0",
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<|endoftext|>"},
    })
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|p| p.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|p| p.name()).collect();
            Error::new(ErrorKind::Request, format!("unknown preset '{text}': use {}", names.join(", ")))
        })
    }
}
