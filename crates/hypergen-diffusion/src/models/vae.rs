//! The variational autoencoder between pictures and latents (diffusers'
//! `AutoencoderKL`).

use hypergen_tensor::ops::{self, Columns, Epilogue, Window};
use hypergen_tensor::{Activation, CheckpointError, Conv, Linear, Norm, Tensor, Weights};
use serde::Deserialize;
use serde_json::Value;

use super::config::{self, Fixed, bad, divides, factor, sane};
use super::resnet::{ResnetBlock, ResnetConfig};
use crate::Error;

/// Epsilon of every normalisation in a VAE.
const EPS: f64 = 1e-6;

/// A VAE's `config.json`; defaults are those of diffusers 0.42.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// From the finest level to the coarsest.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// The encoder's blocks, from the finest level to the coarsest, if the file lists them.
    pub down_block_types: Option<Vec<String>>,
    /// The decoder's blocks, from the coarsest level to the finest, if the file lists them.
    pub up_block_types: Option<Vec<String>>,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Groups of every group normalisation.
    pub norm_num_groups: usize,
    /// Latents are multiplied by this on their way to the UNet.
    pub scaling_factor: f64,
    /// Mean of latents by channel, where the checkpoint normalises by it. Only
    /// SDXL's pipeline looks at it, and only where both lists are there.
    pub latents_mean: Option<Vec<f32>>,
    /// Deviation of latents by channel.
    pub latents_std: Option<Vec<f32>>,
    /// Whether a 1x1 convolution follows the encoder.
    #[serde(deserialize_with = "config::truth")]
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    #[serde(deserialize_with = "config::truth")]
    pub use_post_quant_conv: bool,
    /// Whether the middle has an attention.
    #[serde(deserialize_with = "config::truth")]
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            layers_per_block: 1,
            down_block_types: None,
            up_block_types: None,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            latents_mean: None,
            latents_std: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

/// `force_upcast` is for float16, which is not computed here, and `sample_size` for tiling.
const FIXED: &[Fixed] = &[
    Fixed { field: "_class_name", allowed: &["\"AutoencoderKL\"", "null"] },
    Fixed { field: "act_fn", allowed: &["\"silu\"", "\"swish\""] },
    Fixed { field: "shift_factor", allowed: &["null", "0"] },
];

impl VaeConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// When a field has a value that we do not honour, by its name.
    pub fn from_json(json: &Value) -> Result<Self, Error> {
        let c: Self = config::parse(json, FIXED)?;
        let count = c.block_out_channels.len();
        if count == 0 || count > 8 {
            return Err(bad(format!("'block_out_channels' lists {count} levels; 1 to 8 are supported")));
        }
        for (field, block, listed) in [
            ("down_block_types", "DownEncoderBlock2D", &c.down_block_types),
            ("up_block_types", "UpDecoderBlock2D", &c.up_block_types),
        ] {
            let Some(listed) = listed else { continue };
            if let Some(other) = listed.iter().find(|b| *b != block) {
                return Err(bad(format!("'{field}' has {other}; only {block} is supported")));
            }
            if listed.len() != count {
                return Err(bad(format!("'{field}' lists {} blocks for {count} levels", listed.len())));
            }
        }
        for &channels in &c.block_out_channels {
            divides("norm_num_groups", c.norm_num_groups, sane("block_out_channels", channels)?)?;
        }
        let sizes = [
            ("in_channels", c.in_channels),
            ("latent_channels", c.latent_channels),
            ("layers_per_block", c.layers_per_block),
        ];
        for (field, value) in sizes {
            sane(field, value)?;
        }
        if c.out_channels != 3 {
            return Err(bad(format!("'out_channels' is {}, but a picture has 3", c.out_channels)));
        }
        factor("scaling_factor", c.scaling_factor)?;
        for (field, list) in [("latents_mean", &c.latents_mean), ("latents_std", &c.latents_std)] {
            if let Some(list) = list
                && list.len() != c.latent_channels
            {
                let (found, wanted) = (list.len(), c.latent_channels);
                return Err(bad(format!("'{field}' holds {found} numbers for {wanted} latent channels")));
            }
        }
        Ok(c)
    }

    /// Pixels along a side for one latent.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    fn resnet(&self, w: &Weights<'_>, inputs: usize, outputs: usize) -> Result<ResnetBlock, CheckpointError> {
        let groups = self.norm_num_groups;
        ResnetBlock::load(
            w,
            ResnetConfig { inputs, outputs, time: None, groups, eps: EPS, out_scale_factor: 1.0 },
        )
    }
}

/// Attention over all pixels, with one head as wide as the picture has channels.
struct Attention {
    group_norm: Norm,
    qkv: Linear,
    to_out: Linear,
    groups: usize,
}

impl Attention {
    fn load(w: &Weights<'_>, c: usize, groups: usize) -> Result<Self, CheckpointError> {
        // Checkpoints of before diffusers 0.12 have the older names.
        let old = w.contains("query.weight");
        let qkv = if old { ["query", "key", "value"] } else { ["to_q", "to_k", "to_v"] };
        let to_out = if old { w.pp("proj_attn") } else { w.pp("to_out").pp(0) };
        Ok(Self {
            group_norm: w.pp("group_norm").norm(c, EPS)?,
            qkv: Weights::linear_stacked(&qkv.map(|p| w.pp(p)), c, c, true)?,
            to_out: to_out.linear(c, c, true)?,
            groups,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let [n, h, w, c] = x.nhwc();
        let tokens =
            ops::group_norm(x, &self.group_norm, self.groups, Activation::None).reshape([n, h * w, c]);
        let qkv = ops::linear(&tokens, &self.qkv, Epilogue::default()); // [n, h * w, 3 c]
        let part = |i| Columns { tensor: &qkv, offset: i * c };
        let tokens = ops::attention(part(0), part(1), part(2), 1, c, false);
        ops::linear(&tokens, &self.to_out, Epilogue::residual(x)).reshape([n, h, w, c])
    }
}

/// Residual block, attention, residual block at the coarsest level.
struct Mid {
    resnets: [ResnetBlock; 2],
    attention: Option<Attention>,
}

impl Mid {
    fn load(w: &Weights<'_>, config: &VaeConfig, channels: usize) -> Result<Self, CheckpointError> {
        let resnet = |i: usize| config.resnet(&w.pp("resnets").pp(i), channels, channels);
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: match config.mid_block_add_attention {
                true => Some(Attention::load(&w.pp("attentions").pp(0), channels, config.norm_num_groups)?),
                false => None,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = self.resnets[0].forward(x, None);
        if let Some(attention) = &self.attention {
            x = attention.forward(&x);
        }
        self.resnets[1].forward(&x, None)
    }
}

/// One level: residual blocks, then a convolution that changes the size.
struct Block {
    resnets: Vec<ResnetBlock>,
    resize: Option<Conv>,
}

impl Block {
    fn load(
        w: &Weights<'_>,
        config: &VaeConfig,
        layers: usize,
        [inputs, outputs]: [usize; 2],
        resize: Option<&str>,
    ) -> Result<Self, CheckpointError> {
        let resnets = (0..layers)
            .map(|j| config.resnet(&w.pp("resnets").pp(j), if j == 0 { inputs } else { outputs }, outputs))
            .collect::<Result<_, _>>()?;
        let resize =
            resize.map(|name| w.pp(name).pp(0).pp("conv").conv2d(outputs, outputs, 3)).transpose()?;
        Ok(Self { resnets, resize })
    }

    fn forward(&self, mut x: Tensor, window: impl Fn(&Tensor) -> Window) -> Tensor {
        for resnet in &self.resnets {
            x = resnet.forward(&x, None);
        }
        match &self.resize {
            Some(conv) => ops::conv2d(&x, conv, window(&x), Epilogue::default()),
            None => x,
        }
    }
}

/// Latents to pictures.
pub struct Decoder {
    config: VaeConfig,
    post_quant_conv: Option<Linear>,
    conv_in: Conv,
    mid_block: Mid,
    up_blocks: Vec<Block>,
    conv_norm_out: Norm,
    conv_out: Conv,
}

impl Decoder {
    /// Packs the weights; `w` is the root of the VAE's checkpoint.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit the configuration.
    pub fn load(w: &Weights<'_>, config: VaeConfig) -> Result<Self, CheckpointError> {
        let (c, d) = (&config, w.pp("decoder"));
        let latent = c.latent_channels;
        let mut channels: Vec<usize> = c.block_out_channels.iter().rev().copied().collect();
        let coarsest = channels[0];
        channels.insert(0, coarsest);
        let up_blocks = (0..c.block_out_channels.len())
            .map(|i| {
                let resize = (i + 1 < c.block_out_channels.len()).then_some("upsamplers");
                let widths = [channels[i], channels[i + 1]];
                Block::load(&d.pp("up_blocks").pp(i), c, c.layers_per_block + 1, widths, resize)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            post_quant_conv: match c.use_post_quant_conv {
                true => Some(w.pp("post_quant_conv").linear(latent, latent, true)?),
                false => None,
            },
            conv_in: d.pp("conv_in").conv2d(latent, coarsest, 3)?,
            mid_block: Mid::load(&d.pp("mid_block"), c, coarsest)?,
            up_blocks,
            conv_norm_out: d.pp("conv_norm_out").norm(c.block_out_channels[0], EPS)?,
            conv_out: d.pp("conv_out").conv2d(c.block_out_channels[0], c.out_channels, 3)?,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Takes the UNet's scaling off latents `[.., latent_channels]`, in place.
    pub fn unscale(&self, latents: &mut [f32]) {
        let c = &self.config;
        match (&c.latents_mean, &c.latents_std) {
            (Some(mean), Some(std)) => {
                for pixel in latents.chunks_exact_mut(c.latent_channels) {
                    for ((x, mean), std) in pixel.iter_mut().zip(mean).zip(std) {
                        *x = *x * std / c.scaling_factor as f32 + mean;
                    }
                }
            }
            _ => latents.iter_mut().for_each(|x| *x /= c.scaling_factor as f32),
        }
    }

    /// Unscaled latents `[n, h, w, latent_channels]` to pictures
    /// `[n, factor * h, factor * w, 3]`, in -1 to 1.
    pub fn forward(&self, latents: &Tensor) -> Tensor {
        let projected = self.post_quant_conv.as_ref().map(|l| ops::linear(latents, l, Epilogue::default()));
        let x = ops::conv2d(
            projected.as_ref().unwrap_or(latents),
            &self.conv_in,
            Window::Same,
            Epilogue::default(),
        );
        let mut x = self.mid_block.forward(&x);
        for block in &self.up_blocks {
            x = block.forward(x, |x| {
                let [_, h, w, _] = x.nhwc();
                Window::Enlarge(2 * h, 2 * w)
            });
        }
        let x = ops::group_norm(&x, &self.conv_norm_out, self.config.norm_num_groups, Activation::Silu);
        ops::conv2d(&x, &self.conv_out, Window::Same, Epilogue::default())
    }
}

/// Pictures to the distribution of their latents.
pub struct Encoder {
    conv_in: Conv,
    down_blocks: Vec<Block>,
    mid_block: Mid,
    conv_norm_out: Norm,
    conv_out: Conv,
    quant_conv: Option<Linear>,
    groups: usize,
}

impl Encoder {
    /// Packs the weights; `w` is the root of the VAE's checkpoint.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit the configuration.
    pub fn load(w: &Weights<'_>, c: &VaeConfig) -> Result<Self, CheckpointError> {
        let e = w.pp("encoder");
        let levels = &c.block_out_channels;
        let (finest, coarsest) = (levels[0], levels[levels.len() - 1]);
        let down_blocks = (0..levels.len())
            .map(|i| {
                let resize = (i + 1 < levels.len()).then_some("downsamplers");
                let widths = [levels[i.saturating_sub(1)], levels[i]];
                Block::load(&e.pp("down_blocks").pp(i), c, c.layers_per_block, widths, resize)
            })
            .collect::<Result<_, _>>()?;
        let moments = 2 * c.latent_channels;
        Ok(Self {
            conv_in: e.pp("conv_in").conv2d(c.in_channels, finest, 3)?,
            down_blocks,
            mid_block: Mid::load(&e.pp("mid_block"), c, coarsest)?,
            conv_norm_out: e.pp("conv_norm_out").norm(coarsest, EPS)?,
            conv_out: e.pp("conv_out").conv2d(coarsest, moments, 3)?,
            quant_conv: match c.use_quant_conv {
                true => Some(w.pp("quant_conv").linear(moments, moments, true)?),
                false => None,
            },
            groups: c.norm_num_groups,
        })
    }

    /// Pictures `[n, h, w, 3]` in -1 to 1 to means and log variances, side by
    /// side: `[n, h / factor, w / factor, 2 * latent_channels]`.
    pub fn forward(&self, pictures: &Tensor) -> Tensor {
        let mut x = ops::conv2d(pictures, &self.conv_in, Window::Same, Epilogue::default());
        for block in &self.down_blocks {
            x = block.forward(x, |_| Window::HalvePadAfter);
        }
        let x = self.mid_block.forward(&x);
        let x = ops::group_norm(&x, &self.conv_norm_out, self.groups, Activation::Silu);
        let x = ops::conv2d(&x, &self.conv_out, Window::Same, Epilogue::default());
        match &self.quant_conv {
            Some(layer) => ops::linear(&x, layer, Epilogue::default()),
            None => x,
        }
    }
}
