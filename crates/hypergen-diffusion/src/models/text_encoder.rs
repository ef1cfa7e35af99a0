//! CLIP's text encoder (transformers' `CLIPTextModel` and
//! `CLIPTextModelWithProjection`).

use hypergen_tensor::ops::{self, Columns, Epilogue};
use hypergen_tensor::{Activation, CheckpointError, Linear, Norm, Tensor, Weights};
use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Fixed, bad, divides, sane};
use crate::Error;

/// A text encoder's `config.json`; defaults are those of transformers 5.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextEncoderConfig {
    /// Tokens that have an embedding.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Width of the projected pooled output; no matter where nothing is projected.
    pub projection_dim: Option<usize>,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Tokens that have a position.
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// Epsilon of the normalisations.
    pub layer_norm_eps: f64,
    /// The token at which the pooled output is taken.
    pub eos_token_id: Option<u32>,
    /// Class that wrote the file.
    pub architectures: Option<Vec<String>>,
}

impl Default for TextEncoderConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: Some(512),
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            eos_token_id: Some(49407),
            architectures: None,
        }
    }
}

const WITH_PROJECTION: &str = "CLIPTextModelWithProjection";

const FIXED: &[Fixed] = &[
    Fixed { field: "model_type", allowed: &["\"clip_text_model\"", "\"clip\"", "null"] },
    Fixed { field: "use_attention_mask", allowed: &["false", "null"] },
];

impl TextEncoderConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// When a field has a value that we do not honour, by its name.
    pub fn from_json(json: &Value) -> Result<Self, Error> {
        // The file of a whole CLIP model has its text encoder's fields one level
        // deeper, as transformers knows too.
        let inner = json.get("text_config").filter(|inner| json["model_type"] == "clip" && inner.is_object());
        let c: Self = config::parse(inner.unwrap_or(json), FIXED)?;
        let sizes = [
            ("vocab_size", c.vocab_size),
            ("hidden_size", c.hidden_size),
            ("intermediate_size", c.intermediate_size),
            ("num_hidden_layers", c.num_hidden_layers),
            ("max_position_embeddings", c.max_position_embeddings),
        ];
        for (field, value) in sizes {
            sane(field, value)?;
        }
        c.projection_dim.map(|width| sane("projection_dim", width)).transpose()?;
        divides("num_attention_heads", c.num_attention_heads, c.hidden_size)?;
        c.activation()?;
        Ok(c)
    }

    fn activation(&self) -> Result<Activation, Error> {
        match self.hidden_act.as_str() {
            "quick_gelu" => Ok(Activation::QuickGelu),
            "gelu" => Ok(Activation::Gelu),
            other => Err(bad(format!("'hidden_act' {other} is not supported; quick_gelu and gelu are"))),
        }
    }

    /// The same as of the class that projects its pooled output, or of the one
    /// that does not: a model's pipeline decides that, whatever wrote this file.
    pub fn projecting(self, projects: bool) -> Self {
        let class = if projects { WITH_PROJECTION } else { "CLIPTextModel" };
        Self { architectures: Some(vec![class.to_owned()]), ..self }
    }

    /// Whether the class projects its pooled output.
    fn projects(&self) -> bool {
        self.architectures.iter().flatten().any(|a| a == WITH_PROJECTION)
    }
}

struct Layer {
    layer_norm1: Norm,
    qkv: Linear,
    out_proj: Linear,
    layer_norm2: Norm,
    fc1: Linear,
    fc2: Linear,
}

impl Layer {
    fn load(w: &Weights<'_>, c: &TextEncoderConfig) -> Result<Self, CheckpointError> {
        let (d, inner, attn) = (c.hidden_size, c.intermediate_size, w.pp("self_attn"));
        Ok(Self {
            layer_norm1: w.pp("layer_norm1").norm(d, c.layer_norm_eps)?,
            qkv: Weights::linear_stacked(&["q_proj", "k_proj", "v_proj"].map(|p| attn.pp(p)), d, d, true)?,
            out_proj: attn.pp("out_proj").linear(d, d, true)?,
            layer_norm2: w.pp("layer_norm2").norm(d, c.layer_norm_eps)?,
            fc1: w.pp("mlp").pp("fc1").linear(d, inner, true)?,
            fc2: w.pp("mlp").pp("fc2").linear(inner, d, true)?,
        })
    }

    fn forward(&self, x: &Tensor, heads: usize, activation: Activation) -> Tensor {
        let d = x.shape().last();
        let h = ops::layer_norm(x, &self.layer_norm1);
        let qkv = ops::linear(&h, &self.qkv, Epilogue::default()); // [n, tokens, 3 d]
        let part = |i| Columns { tensor: &qkv, offset: i * d };
        let h = ops::attention(part(0), part(1), part(2), heads, d / heads, true);
        let x = ops::linear(&h, &self.out_proj, Epilogue::residual(x));
        let h = ops::layer_norm(&x, &self.layer_norm2);
        let h = ops::linear(&h, &self.fc1, Epilogue::activation(activation));
        ops::linear(&h, &self.fc2, Epilogue::residual(&x))
    }
}

/// A loaded text encoder.
pub struct TextEncoder {
    config: TextEncoderConfig,
    activation: Activation,
    token_embedding: Tensor,
    /// Embeddings that follow the vocabulary's, for now.
    words: Option<Tensor>,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: Norm,
    text_projection: Option<Linear>,
}

/// Which hidden state a family conditions on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HiddenState {
    /// Layers left out at the end: 0 is the last layer's output, 1 the
    /// penultimate one.
    pub skip: usize,
    /// Whether the final normalisation is applied.
    pub normed: bool,
}

/// What a text encoder says of a text.
pub struct TextOutput {
    /// `[n, tokens, hidden_size]`.
    pub hidden: Tensor,
    /// `[n, projection_dim]`, row by row, if the encoder projects.
    pub pooled: Option<Vec<f32>>,
}

impl TextEncoder {
    /// Packs the weights. Keys may lie under `text_model.` or not.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit, or by [`TextEncoderConfig::from_json`]'s rules.
    pub fn load(root: &Weights<'_>, config: TextEncoderConfig) -> Result<Self, Error> {
        let prefixed = root.contains("text_model.embeddings.token_embedding.weight");
        let w = if prefixed { root.pp("text_model") } else { root.clone() };
        let c = &config;
        let (d, embeddings) = (c.hidden_size, w.pp("embeddings"));
        let layers = (0..c.num_hidden_layers)
            .map(|i| Layer::load(&w.pp("encoder").pp("layers").pp(i), c))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            activation: c.activation()?,
            words: None,
            token_embedding: embeddings.table("token_embedding.weight", c.vocab_size, d)?,
            position_embedding: embeddings.table(
                "position_embedding.weight",
                c.max_position_embeddings,
                d,
            )?,
            layers,
            final_layer_norm: w.pp("final_layer_norm").norm(d, c.layer_norm_eps)?,
            text_projection: match c.projection_dim {
                _ if !c.projects() => None,
                Some(width) => Some(root.pp("text_projection").linear(d, width, false)?),
                None => return Err(bad("'projection_dim' is null, but the pooled text is projected")),
            },
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &TextEncoderConfig {
        &self.config
    }

    /// Width of the pooled output, if there is one.
    pub fn pooled_width(&self) -> Option<usize> {
        self.text_projection.as_ref().map(Linear::outputs)
    }

    /// Embeddings for the ids that follow the vocabulary's, in the place of all
    /// earlier ones: as many as there are whole rows in `values`.
    pub fn set_words(&mut self, values: &[f32]) {
        let (d, table) = (self.config.hidden_size, &self.token_embedding);
        let rows = values.len() / d;
        self.words = (rows > 0)
            .then(|| Tensor::from_f32(table.device(), [rows, d], table.dtype(), &values[..rows * d]));
    }

    /// Encodes texts of `tokens` ids each.
    ///
    /// # Panics
    /// When an id has no embedding or the text is longer than the
    /// encoder has positions; the tokenizer is checked against both at load.
    pub fn forward(&self, ids: &[u32], tokens: usize, state: HiddenState) -> TextOutput {
        let mut x =
            ops::embed(&self.token_embedding, self.words.as_ref(), &self.position_embedding, ids, tokens);
        let wanted = self.layers.len().saturating_sub(state.skip);
        let mut hidden = None;
        let all = if self.text_projection.is_some() { self.layers.len() } else { wanted };
        for (i, layer) in self.layers[..all].iter().enumerate() {
            if i == wanted {
                hidden = Some(self.finish(&x, state.normed));
            }
            x = layer.forward(&x, self.config.num_attention_heads, self.activation);
        }
        TextOutput {
            pooled: self.text_projection.as_ref().map(|layer| self.pool(&x, ids, tokens, layer)),
            hidden: hidden.unwrap_or_else(|| self.finish(&x, state.normed)),
        }
    }

    fn finish(&self, x: &Tensor, normed: bool) -> Tensor {
        match normed {
            true => ops::layer_norm(x, &self.final_layer_norm),
            false => ops::activate(x, Activation::None),
        }
    }

    /// The projected state of each text's end token.
    fn pool(&self, x: &Tensor, ids: &[u32], tokens: usize, layer: &Linear) -> Vec<f32> {
        let d = self.config.hidden_size;
        let normed = ops::layer_norm(x, &self.final_layer_norm).to_f32();
        let rows: Vec<f32> = ids
            .chunks_exact(tokens)
            .enumerate()
            .flat_map(|(i, ids)| &normed[(i * tokens + self.end_of_text(ids)) * d..][..d])
            .copied()
            .collect();
        let rows = Tensor::from_f32(x.device(), [ids.len() / tokens, d], x.dtype(), &rows);
        ops::linear(&rows, layer, Epilogue::default()).to_f32()
    }

    /// Configurations of before 2023 say `eos_token_id: 2`, which is wrong;
    /// the reference takes that as "the highest id".
    fn end_of_text(&self, ids: &[u32]) -> usize {
        let end = match self.config.eos_token_id {
            // Added words have ids beyond all that could be meant.
            Some(2) | None => {
                let own = ids.iter().copied().filter(|&id| (id as usize) < self.config.vocab_size);
                own.max().unwrap_or(0)
            }
            Some(id) => id,
        };
        ids.iter().position(|&id| id == end).unwrap_or(0)
    }
}
