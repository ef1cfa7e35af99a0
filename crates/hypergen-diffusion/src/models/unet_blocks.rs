//! The levels of a UNet: residual blocks, transformers and the convolutions
//! that halve or enlarge the picture between levels.

use hypergen_tensor::ops::{self, Epilogue, Window};
use hypergen_tensor::{CheckpointError, Conv, Tensor, Weights};

use super::resnet::{ResnetBlock, ResnetConfig};
use super::transformer::{TextKeysValues, Texts, Transformer, TransformerConfig};
use super::unet_config::{Level, MidBlock, UNetConfig};

/// Runs `block` where the picture goes through residual block and, if the
/// level has any, transformer.
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Transformer>,
}

impl Layer {
    fn forward(&self, x: &Tensor, time: &Tensor, text: &Texts<'_>) -> Tensor {
        let x = self.resnet.forward(x, Some(time));
        match &self.attention {
            Some(attention) => attention.forward(&x, text),
            None => x,
        }
    }
}

fn transformer(
    w: &Weights<'_>,
    level: &Level,
    layers: usize,
    groups: usize,
    cross: &mut usize,
) -> Result<Transformer, CheckpointError> {
    let config = TransformerConfig {
        channels: level.channels,
        heads: level.heads,
        layers,
        context: level.context,
        groups,
    };
    Transformer::load(w, config, cross)
}

fn resnet_config(c: &UNetConfig, inputs: usize, outputs: usize) -> ResnetConfig {
    ResnetConfig {
        inputs,
        outputs,
        time: Some(c.time_dim),
        groups: c.groups,
        eps: c.eps,
        // diffusers hands 'resnet_out_scale_factor' to blocks of other kinds alone.
        out_scale_factor: 1.0,
    }
}

/// `CrossAttnDownBlock2D` and `DownBlock2D`.
pub(super) struct DownBlock {
    layers: Vec<Layer>,
    downsampler: Option<Conv>,
}

impl DownBlock {
    /// Level `i`, which gets `inputs` channels from the one before.
    pub(super) fn load(
        w: &Weights<'_>,
        c: &UNetConfig,
        i: usize,
        inputs: usize,
        cross: &mut usize,
    ) -> Result<Self, CheckpointError> {
        let level = &c.levels[i];
        let layers = (0..level.layers).map(|j| {
            let inputs = if j == 0 { inputs } else { level.channels };
            Ok(Layer {
                resnet: ResnetBlock::load(&w.pp("resnets").pp(j), resnet_config(c, inputs, level.channels))?,
                attention: match level.attention_down {
                    true => Some(transformer(
                        &w.pp("attentions").pp(j),
                        level,
                        level.transformer_layers,
                        c.groups,
                        cross,
                    )?),
                    false => None,
                },
            })
        });
        let layers = layers.collect::<Result<_, CheckpointError>>()?;
        let last = i + 1 == c.levels.len();
        let downsampler = match last {
            true => None,
            false => Some(w.pp("downsamplers").pp(0).pp("conv").conv2d(level.channels, level.channels, 3)?),
        };
        Ok(Self { layers, downsampler })
    }

    pub(super) fn text_keys_values(&self, text: &Tensor, into: &mut TextKeysValues) {
        self.layers.iter().filter_map(|l| l.attention.as_ref()).for_each(|a| a.text_keys_values(text, into));
    }

    /// Pushes every intermediate picture onto `skips` and leaves the last there.
    pub(super) fn forward(&self, skips: &mut Vec<Tensor>, time: &Tensor, text: &Texts<'_>) {
        for layer in &self.layers {
            let x = layer.forward(top(skips), time, text);
            skips.push(x);
        }
        if let Some(conv) = &self.downsampler {
            let x = ops::conv2d(top(skips), conv, Window::Halve, Epilogue::default());
            skips.push(x); // [n, ceil(h / 2), ceil(w / 2), c]
        }
    }
}

/// The picture that the previous layer left; the first convolution leaves one
/// before any block runs.
pub(super) fn top(skips: &[Tensor]) -> &Tensor {
    skips.last().expect("the first convolution pushes its output")
}

/// `UNetMidBlock2DCrossAttn` and `UNetMidBlock2D`.
pub(super) struct Mid {
    first: ResnetBlock,
    rest: Option<(Transformer, ResnetBlock)>,
}

impl Mid {
    pub(super) fn load(
        w: &Weights<'_>,
        c: &UNetConfig,
        cross: &mut usize,
    ) -> Result<Option<Self>, CheckpointError> {
        let level = &c.levels[c.levels.len() - 1];
        let config = ResnetConfig {
            out_scale_factor: c.mid_scale_factor,
            ..resnet_config(c, level.channels, level.channels)
        };
        let resnet = |i: usize| ResnetBlock::load(&w.pp("resnets").pp(i), config);
        Ok(match c.mid {
            MidBlock::None => None,
            MidBlock::Plain => Some(Self { first: resnet(0)?, rest: None }),
            MidBlock::CrossAttention => {
                let attention =
                    transformer(&w.pp("attentions").pp(0), level, level.transformer_layers, c.groups, cross)?;
                Some(Self { first: resnet(0)?, rest: Some((attention, resnet(1)?)) })
            }
        })
    }

    pub(super) fn text_keys_values(&self, text: &Tensor, into: &mut TextKeysValues) {
        self.rest.iter().for_each(|(a, _)| a.text_keys_values(text, into));
    }

    pub(super) fn forward(&self, x: &Tensor, time: &Tensor, text: &Texts<'_>) -> Tensor {
        let x = self.first.forward(x, Some(time));
        match &self.rest {
            Some((attention, resnet)) => resnet.forward(&attention.forward(&x, text), Some(time)),
            None => x,
        }
    }
}

/// `CrossAttnUpBlock2D` and `UpBlock2D`.
pub(super) struct UpBlock {
    layers: Vec<Layer>,
    upsampler: Option<Conv>,
}

impl UpBlock {
    /// Level `i` counted from the finest; `skips` are the channels of the
    /// pictures that the way down left, the last of which it takes first.
    pub(super) fn load(
        w: &Weights<'_>,
        c: &UNetConfig,
        i: usize,
        skips: &mut Vec<usize>,
        cross: &mut usize,
    ) -> Result<Self, CheckpointError> {
        let level = &c.levels[i];
        let mut inputs = c.levels.get(i + 1).map_or(level.channels, |coarser| coarser.channels);
        let mut layers = vec![];
        for j in 0..=level.layers {
            let skip = skips.pop().expect("every layer of the way up has its picture of the way down");
            layers.push(Layer {
                resnet: ResnetBlock::load(
                    &w.pp("resnets").pp(j),
                    resnet_config(c, inputs + skip, level.channels),
                )?,
                attention: match level.attention_up {
                    true => Some(transformer(
                        &w.pp("attentions").pp(j),
                        level,
                        level.transformer_layers_up,
                        c.groups,
                        cross,
                    )?),
                    false => None,
                },
            });
            inputs = level.channels;
        }
        let upsampler = match i {
            0 => None,
            _ => Some(w.pp("upsamplers").pp(0).pp("conv").conv2d(level.channels, level.channels, 3)?),
        };
        Ok(Self { layers, upsampler })
    }

    pub(super) fn text_keys_values(&self, text: &Tensor, into: &mut TextKeysValues) {
        self.layers.iter().filter_map(|l| l.attention.as_ref()).for_each(|a| a.text_keys_values(text, into));
    }

    pub(super) fn forward(
        &self,
        mut x: Tensor,
        skips: &mut Vec<Tensor>,
        time: &Tensor,
        text: &Texts<'_>,
    ) -> Tensor {
        for layer in &self.layers {
            let skip = skips.pop().expect("load has counted the pictures of the way down");
            x = layer.forward(&ops::concat_channels(&x, &skip), time, text);
        }
        match &self.upsampler {
            None => x,
            Some(conv) => {
                // Twice the size, or what the way down had before it halved an odd side.
                let [_, h, w, _] = top(skips).nhwc();
                ops::conv2d(&x, conv, Window::Enlarge(h, w), Epilogue::default())
            }
        }
    }
}
