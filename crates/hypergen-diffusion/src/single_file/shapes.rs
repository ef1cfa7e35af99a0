//! Configurations that a single file lacks, read off its tensors' names and
//! shapes, and what no shape tells: how wide a head is, how many groups.

use hypergen_tensor::Checkpoint;
use serde_json::{Value, json};

use crate::{Error, ErrorKind};

/// A head's width in every network of the family but the first UNet.
const HEAD: usize = 64;
/// The first UNet has so many heads at every level.
const HEADS_OF_SD1: usize = 8;
/// Groups of every group normalisation of the original code.
const GROUPS: usize = 32;
/// More levels or blocks than this is no UNet of the family.
const MAX_BLOCKS: usize = 64;

/// The tensors below a prefix.
pub(super) struct Shapes<'a> {
    pub(super) file: &'a Checkpoint,
    pub(super) prefix: &'a str,
}

impl Shapes<'_> {
    fn find(&self, name: &str) -> Option<&[usize]> {
        Some(self.file.get(&format!("{}{name}", self.prefix))?.shape.as_slice())
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// One dimension of a tensor that has to be there.
    fn dim(&self, name: &str, axis: usize) -> Result<usize, Error> {
        let (file, prefix) = (self.file.label(), self.prefix);
        let shape = self.find(name).ok_or_else(|| {
            Error::new(
                ErrorKind::Model,
                format!("tensor '{prefix}{name}' is missing in {file}; is the file whole?"),
            )
        })?;
        shape.get(axis).copied().ok_or_else(|| {
            Error::new(
                ErrorKind::Model,
                format!(
                    "tensor '{prefix}{name}' in {file} has shape {shape:?}, which has too few dimensions"
                ),
            )
        })
    }

    /// How many blocks there are, counted by a tensor that each of them has.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..MAX_BLOCKS).take_while(|&i| self.has(&name(i))).count()
    }

    fn error(&self, message: &str) -> Error {
        Error::new(ErrorKind::Model, format!("{} {message}", self.file.label()))
    }
}

/// How the blocks of a UNet lie: residual blocks of a level, and levels.
pub(super) fn unet_blocks(unet: &Shapes<'_>) -> Result<(usize, usize), Error> {
    let halving: Vec<usize> =
        (1..MAX_BLOCKS).filter(|i| unet.has(&format!("input_blocks.{i}.0.op.weight"))).collect();
    let Some(&first) = halving.first() else {
        return Err(unet.error("has a UNet of a single level, which is none of this family"));
    };
    let regular = halving.iter().enumerate().all(|(i, &at)| at == (i + 1) * first);
    if first < 2 || !regular || halving.len() > 7 {
        return Err(unet.error(&format!(
            "has a UNet whose blocks {halving:?} halve the picture, which is none of this family"
        )));
    }
    Ok((first - 1, halving.len() + 1))
}

/// The UNet's configuration. `pooled` is the width of the pooled text of the
/// two encoders of SDXL. The native size is the family's.
pub(super) fn unet(unet: &Shapes<'_>, pooled: Option<usize>) -> Result<Value, Error> {
    let (layers, levels) = unet_blocks(unet)?;
    let mut channels = vec![];
    let mut depths = vec![];
    let (mut down, mut up) = (vec![], vec![]);
    for level in 0..levels {
        let input = format!("input_blocks.{}", 1 + level * (layers + 1));
        let output = format!("output_blocks.{}", (levels - 1 - level) * (layers + 1));
        let depth = |block: &str| unet.count(|i| format!("{block}.1.transformer_blocks.{i}.norm1.weight"));
        let (in_down, in_up) = (depth(&input), depth(&output));
        channels.push(unet.dim(&format!("{input}.0.out_layers.3.weight"), 0)?);
        down.push(if in_down > 0 { "CrossAttnDownBlock2D" } else { "DownBlock2D" });
        up.insert(0, if in_up > 0 { "CrossAttnUpBlock2D" } else { "UpBlock2D" });
        depths.push(in_down.max(in_up));
    }
    let middle = unet.count(|i| format!("middle_block.1.transformer_blocks.{i}.norm1.weight"));
    if let Some(last) = depths.last_mut().filter(|last| **last == 0) {
        *last = middle;
    }
    if middle == 0 || depths.last() != Some(&middle) {
        return Err(unet.error(&format!(
            "has {middle} transformer blocks in the middle of its UNet and {depths:?} at its levels, which is none \
             of this family"
        )));
    }
    // A level without transformers counts as having one.
    depths.iter_mut().for_each(|d| *d = (*d).max(1));
    let linear = unet.find("middle_block.1.proj_in.weight").is_some_and(|shape| shape.len() == 2);
    let heads: Vec<usize> =
        channels.iter().map(|&c| if linear { (c / HEAD).max(1) } else { HEADS_OF_SD1 }).collect();
    let mut config = json!({
        "in_channels": unet.dim("input_blocks.0.0.weight", 1)?,
        "out_channels": unet.dim("out.2.weight", 0)?,
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "attention_head_dim": heads,
        "use_linear_projection": linear,
        "cross_attention_dim": unet.dim("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1)?,
        "norm_num_groups": GROUPS,
    });
    if unet.has("label_emb.0.0.weight") {
        let inputs = unet.dim("label_emb.0.0.weight", 1)?;
        config["addition_embed_type"] = "text_time".into();
        config["projection_class_embeddings_input_dim"] = inputs.into();
        // Beside the pooled text stand six numbers.
        config["addition_time_embed_dim"] = (inputs.saturating_sub(pooled.unwrap_or(0)) / 6).into();
    }
    Ok(config)
}

/// Levels of an original autoencoder.
pub(super) fn vae_levels(vae: &Shapes<'_>) -> usize {
    vae.count(|i| format!("decoder.up.{i}.block.0.conv1.weight"))
}

/// An autoencoder's configuration, of tensors under diffusers' names.
pub(super) fn vae(vae: &Shapes<'_>, scaling_factor: f64) -> Result<Value, Error> {
    let levels = vae.count(|i| format!("decoder.up_blocks.{i}.resnets.0.conv1.weight"));
    let channels = (0..levels)
        .rev()
        .map(|i| vae.dim(&format!("decoder.up_blocks.{i}.resnets.0.conv1.weight"), 0))
        .collect::<Result<Vec<_>, _>>()?;
    let layers = vae.count(|j| format!("decoder.up_blocks.0.resnets.{j}.conv1.weight"));
    Ok(json!({
        "block_out_channels": channels,
        "layers_per_block": layers.saturating_sub(1),
        "latent_channels": vae.dim("decoder.conv_in.weight", 1)?,
        "out_channels": vae.dim("decoder.conv_out.weight", 0)?,
        "norm_num_groups": GROUPS,
        "use_post_quant_conv": vae.has("post_quant_conv.weight"),
        "scaling_factor": scaling_factor,
    }))
}

/// A text encoder's configuration, of tensors under transformers' names
/// without `text_model.`.
pub(super) fn text(text: &Shapes<'_>, hidden_act: &str, projects: bool) -> Result<Value, Error> {
    let width = text.dim("embeddings.token_embedding.weight", 1)?;
    let mut config = json!({
        "vocab_size": text.dim("embeddings.token_embedding.weight", 0)?,
        "hidden_size": width,
        "intermediate_size": text.dim("encoder.layers.0.mlp.fc1.weight", 0)?,
        "num_hidden_layers": text.count(|i| format!("encoder.layers.{i}.layer_norm1.weight")),
        "num_attention_heads": (width / HEAD).max(1),
        "max_position_embeddings": text.dim("embeddings.position_embedding.weight", 0)?,
        "hidden_act": hidden_act,
        // The old way to say "the highest id".
        "eos_token_id": 2,
    });
    if projects {
        config["architectures"] = json!(["CLIPTextModelWithProjection"]);
        config["projection_dim"] = text.dim("text_projection.weight", 0)?.into();
    }
    Ok(config)
}
