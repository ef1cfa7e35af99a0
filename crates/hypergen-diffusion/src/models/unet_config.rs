//! A UNet's `config.json` (diffusers' `UNet2DConditionModel`), resolved level
//! by level.

use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Fixed, PerLevel, bad, divides, factor, sane};
use crate::Error;

/// As the file has it; defaults are those of diffusers 0.42.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Raw {
    sample_size: Option<PerLevel>,
    in_channels: usize,
    out_channels: usize,
    #[serde(deserialize_with = "config::truth")]
    flip_sin_to_cos: bool,
    freq_shift: f64,
    down_block_types: Vec<String>,
    mid_block_type: Option<String>,
    up_block_types: Vec<String>,
    block_out_channels: Vec<usize>,
    layers_per_block: PerLevel,
    mid_block_scale_factor: f64,
    norm_num_groups: usize,
    norm_eps: f64,
    cross_attention_dim: PerLevel,
    transformer_layers_per_block: PerLevel,
    reverse_transformer_layers_per_block: Option<PerLevel>,
    attention_head_dim: PerLevel,
    addition_embed_type: Option<String>,
    addition_time_embed_dim: Option<usize>,
    projection_class_embeddings_input_dim: Option<usize>,
    time_embedding_dim: Option<usize>,
    time_cond_proj_dim: Option<usize>,
    conv_in_kernel: usize,
    conv_out_kernel: usize,
}

impl Default for Raw {
    fn default() -> Self {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let (cross_down, cross_up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: names(&[cross_down, cross_down, cross_down, "DownBlock2D"]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            up_block_types: names(&["UpBlock2D", cross_up, cross_up, cross_up]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::One(2),
            mid_block_scale_factor: 1.0,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerLevel::One(1280),
            transformer_layers_per_block: PerLevel::One(1),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerLevel::One(8),
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            time_embedding_dim: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
        }
    }
}

/// Fields whose other values belong to models of other families. What is
/// neither here nor in [`Raw`] has no say in what the supported blocks compute
/// (`goldens/fields.py` shows it): `resnet_out_scale_factor`, `resnet_skip_time_act`,
/// `cross_attention_norm` and `mid_block_only_cross_attention` are handed to blocks of
/// other kinds alone, `dropout` is for training, and `upcast_attention` for half precision.
const FIXED: &[Fixed] = &[
    Fixed { field: "_class_name", allowed: &["\"UNet2DConditionModel\"", "null"] },
    Fixed { field: "center_input_sample", allowed: &["false", "null"] },
    Fixed { field: "only_cross_attention", allowed: &["false", "null"] },
    Fixed { field: "downsample_padding", allowed: &["1"] },
    Fixed { field: "act_fn", allowed: &["\"silu\"", "\"swish\""] },
    Fixed { field: "encoder_hid_dim", allowed: &["null"] },
    Fixed { field: "encoder_hid_dim_type", allowed: &["null"] },
    Fixed { field: "num_attention_heads", allowed: &["null"] },
    Fixed { field: "dual_cross_attention", allowed: &["false", "null"] },
    Fixed { field: "class_embed_type", allowed: &["null"] },
    Fixed { field: "num_class_embeds", allowed: &["null"] },
    Fixed { field: "resnet_time_scale_shift", allowed: &["\"default\""] },
    Fixed { field: "time_embedding_type", allowed: &["\"positional\""] },
    Fixed { field: "time_embedding_act_fn", allowed: &["null"] },
    Fixed { field: "timestep_post_act", allowed: &["null"] },
    Fixed { field: "attention_type", allowed: &["\"default\"", "null"] },
    Fixed { field: "class_embeddings_concat", allowed: &["false", "null"] },
];

/// One level of resolution, going down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level {
    /// Channels of its blocks.
    pub channels: usize,
    /// Residual blocks going down; going up there is one more.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Transformer blocks after each residual block, going down and in the middle.
    pub transformer_layers: usize,
    /// Transformer blocks after each residual block, going up.
    pub transformer_layers_up: usize,
    /// Width of the text embeddings.
    pub context: usize,
    /// Whether the down block has transformers.
    pub attention_down: bool,
    /// Whether the up block at this level has transformers.
    pub attention_up: bool,
}

/// What stands in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MidBlock {
    /// Residual block, transformer, residual block.
    CrossAttention,
    /// One residual block.
    Plain,
    /// Nothing.
    None,
}

/// Size and crop conditioning of SDXL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextTime {
    /// Width of the embedding of each of the six numbers.
    pub time_embed_dim: usize,
    /// Width of pooled text and all six embeddings together.
    pub inputs: usize,
}

/// A UNet's configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Height and width of the latents that it was trained on, if the file says.
    pub sample_size: Option<[usize; 2]>,
    /// Latent channels in.
    pub in_channels: usize,
    /// Latent channels out.
    pub out_channels: usize,
    /// Cosines before sines in the timestep embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the frequencies' exponent.
    pub freq_shift: f64,
    /// From the finest to the coarsest.
    pub levels: Vec<Level>,
    /// The middle.
    pub mid: MidBlock,
    /// Divides the sums of the middle's residual blocks.
    pub mid_scale_factor: f64,
    /// Groups of every group normalisation.
    pub groups: usize,
    /// Epsilon of the residual blocks' normalisations.
    pub eps: f64,
    /// Width of the time embedding.
    pub time_dim: usize,
    /// Width of the guidance embedding of LCM models.
    pub time_cond_proj_dim: Option<usize>,
    /// SDXL's conditioning.
    pub text_time: Option<TextTime>,
    /// Kernel of the first convolution.
    pub conv_in_kernel: usize,
    /// Kernel of the last convolution.
    pub conv_out_kernel: usize,
}

impl UNetConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// When a field has a value that we do not honour, by its name.
    pub fn from_json(json: &Value) -> Result<Self, Error> {
        let raw: Raw = config::parse(json, FIXED)?;
        for kernel in [raw.conv_in_kernel, raw.conv_out_kernel] {
            if kernel.is_multiple_of(2) || kernel > 7 {
                return Err(bad(format!("a kernel of {kernel} is not supported: 1, 3, 5 or 7 are")));
            }
        }
        let levels = levels(&raw)?;
        let first = levels[0].channels;
        let sample_size = match &raw.sample_size {
            Some(PerLevel::One(side)) => Some([*side; 2]),
            Some(PerLevel::Many(sides)) => {
                let pair = <[usize; 2]>::try_from(sides.as_slice());
                let wrong =
                    |_| bad(format!("'sample_size' lists {} numbers, not height and width", sides.len()));
                Some(pair.map_err(wrong)?)
            }
            None => None,
        };
        let text_time = text_time(&raw)?;
        // From half of an embedding's width on the frequencies would rise without bounds.
        for dim in [Some(first), text_time.map(|t| t.time_embed_dim)].into_iter().flatten() {
            if raw.freq_shift >= (dim / 2) as f64 {
                return Err(bad(format!("'freq_shift' is {} for an embedding of {dim}", raw.freq_shift)));
            }
        }
        // Python's `or`: zero is as good as nothing.
        let time_dim = raw.time_embedding_dim.filter(|&dim| dim != 0).unwrap_or(4 * first);
        Ok(Self {
            sample_size,
            in_channels: sane("in_channels", raw.in_channels)?,
            out_channels: sane("out_channels", raw.out_channels)?,
            flip_sin_to_cos: raw.flip_sin_to_cos,
            freq_shift: raw.freq_shift,
            mid: match raw.mid_block_type.as_deref() {
                Some("UNetMidBlock2DCrossAttn") => MidBlock::CrossAttention,
                Some("UNetMidBlock2D") => MidBlock::Plain,
                None => MidBlock::None,
                Some(other) => {
                    return Err(bad(format!(
                        "'mid_block_type' {other} is not supported; UNetMidBlock2DCrossAttn, UNetMidBlock2D and null are"
                    )));
                }
            },
            mid_scale_factor: factor("mid_block_scale_factor", raw.mid_block_scale_factor)?,
            groups: raw.norm_num_groups,
            eps: raw.norm_eps,
            time_dim: sane("time_embedding_dim", time_dim)?,
            time_cond_proj_dim: raw.time_cond_proj_dim.map(|d| sane("time_cond_proj_dim", d)).transpose()?,
            text_time,
            conv_in_kernel: raw.conv_in_kernel,
            conv_out_kernel: raw.conv_out_kernel,
            levels,
        })
    }
}

/// More blocks in a row than this is no UNet but a mistake.
const MAX_BLOCKS: usize = 256;

fn blocks(field: &str, count: usize) -> Result<usize, Error> {
    if count > MAX_BLOCKS {
        return Err(bad(format!("'{field}' is {count}, which no network has: at most {MAX_BLOCKS} can be")));
    }
    Ok(count)
}

/// A block's name without what the first versions of diffusers put before it.
fn plain(block: &str) -> &str {
    block.strip_prefix("UNetRes").unwrap_or(block)
}

fn levels(raw: &Raw) -> Result<Vec<Level>, Error> {
    let count = raw.block_out_channels.len();
    if count == 0 || count > 8 {
        return Err(bad(format!("'block_out_channels' lists {count} levels; 1 to 8 are supported")));
    }
    for (field, list) in
        [("down_block_types", &raw.down_block_types), ("up_block_types", &raw.up_block_types)]
    {
        if list.len() != count {
            return Err(bad(format!("'{field}' lists {} blocks for {count} levels", list.len())));
        }
    }
    let layers = raw.layers_per_block.resolve("layers_per_block", count)?;
    let heads = raw.attention_head_dim.resolve("attention_head_dim", count)?;
    let depth = raw.transformer_layers_per_block.resolve("transformer_layers_per_block", count)?;
    let mut depth_up = match &raw.reverse_transformer_layers_per_block {
        Some(listed) => listed.resolve("reverse_transformer_layers_per_block", count)?,
        None => depth.iter().rev().copied().collect(),
    };
    depth_up.reverse();
    let context = raw.cross_attention_dim.resolve("cross_attention_dim", count)?;
    (0..count)
        .map(|i| {
            let channels = sane("block_out_channels", raw.block_out_channels[i])?;
            divides("norm_num_groups", raw.norm_num_groups, channels)?;
            let attention_down = match plain(&raw.down_block_types[i]) {
                "CrossAttnDownBlock2D" => true,
                "DownBlock2D" => false,
                other => return Err(bad(format!("'down_block_types' has {other}, which is not supported; CrossAttnDownBlock2D and DownBlock2D are"))),
            };
            // The up blocks are listed from the coarsest level to the finest.
            let attention_up = match plain(&raw.up_block_types[count - 1 - i]) {
                "CrossAttnUpBlock2D" => true,
                "UpBlock2D" => false,
                other => return Err(bad(format!("'up_block_types' has {other}, which is not supported; CrossAttnUpBlock2D and UpBlock2D are"))),
            };
            if attention_down || attention_up || i + 1 == count {
                divides("attention_head_dim", heads[i], channels)?;
            }
            Ok(Level {
                channels,
                layers: blocks("layers_per_block", sane("layers_per_block", layers[i])?)?,
                heads: heads[i],
                transformer_layers: blocks("transformer_layers_per_block", depth[i])?,
                transformer_layers_up: blocks("reverse_transformer_layers_per_block", depth_up[i])?,
                context: sane("cross_attention_dim", context[i])?,
                attention_down,
                attention_up,
            })
        })
        .collect()
}

fn text_time(raw: &Raw) -> Result<Option<TextTime>, Error> {
    match raw.addition_embed_type.as_deref() {
        None => Ok(None),
        Some("text_time") => {
            let dim =
                raw.addition_time_embed_dim.ok_or_else(|| bad("'addition_time_embed_dim' is missing"))?;
            let inputs = raw.projection_class_embeddings_input_dim;
            let inputs = inputs.ok_or_else(|| bad("'projection_class_embeddings_input_dim' is missing"))?;
            let (time_embed_dim, inputs) = (
                sane("addition_time_embed_dim", dim)?,
                sane("projection_class_embeddings_input_dim", inputs)?,
            );
            if inputs <= 6 * time_embed_dim {
                return Err(bad(format!(
                    "'projection_class_embeddings_input_dim' is {inputs}, which leaves no room for the pooled text \
                     beside 6 embeddings of {time_embed_dim}; SDXL refiner checkpoints are not supported"
                )));
            }
            Ok(Some(TextTime { time_embed_dim, inputs }))
        }
        Some(other) => Err(bad(format!("'addition_embed_type' {other} is not supported; text_time is"))),
    }
}
