//! The conditional UNet of the Stable Diffusion family (diffusers'
//! `UNet2DConditionModel`): predicts the noise in latents, given a timestep
//! and a text.

use hypergen_tensor::ops::{self, Epilogue, Window};
use hypergen_tensor::{Activation, CheckpointError, Conv, DType, Device, Linear, Norm, Tensor, Weights};

use super::transformer::TextKeysValues;
use super::unet_blocks::{DownBlock, Mid, UpBlock, top};
pub use super::unet_config::UNetConfig;

/// A loaded UNet.
pub struct UNet {
    config: UNetConfig,
    device: Device,
    dtype: DType,
    conv_in: Conv,
    time_embedding: Embedding,
    add_embedding: Option<Embedding>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<Mid>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: Norm,
    conv_out: Conv,
}

/// Linear, SiLU, linear.
struct Embedding {
    linear_1: Linear,
    cond_proj: Option<Linear>,
    linear_2: Linear,
}

impl Embedding {
    fn load(
        w: &Weights<'_>,
        inputs: usize,
        width: usize,
        condition: Option<usize>,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            linear_1: w.pp("linear_1").linear(inputs, width, true)?,
            cond_proj: match condition {
                Some(condition) => Some(w.pp("cond_proj").linear(condition, inputs, false)?),
                None => None,
            },
            linear_2: w.pp("linear_2").linear(width, width, true)?,
        })
    }

    fn forward(&self, x: &Tensor, condition: Option<&Tensor>) -> Tensor {
        let conditioned = match (&self.cond_proj, condition) {
            (Some(layer), Some(condition)) => Some(ops::linear(condition, layer, Epilogue::residual(x))),
            _ => None,
        };
        let x = conditioned.as_ref().unwrap_or(x);
        let h = ops::linear(x, &self.linear_1, Epilogue::activation(Activation::Silu));
        ops::linear(&h, &self.linear_2, Epilogue::default())
    }
}

/// What a request says to the UNet, computed once for all its steps: for each
/// of its rows of a pass, two with guidance and else one.
pub struct Conditioning {
    text: TextKeysValues,
    /// `[rows, time_dim]`; empty where the family takes none.
    added: Vec<f32>,
    /// `[rows, time_cond_proj_dim]`; empty where the model is not told the scale.
    guidance: Vec<f32>,
    rows: usize,
}

impl Conditioning {
    /// Rows of a pass that are this request's.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// SDXL's conditioning of one request.
pub struct Added<'a> {
    /// Pooled text, `[rows, p]` row by row.
    pub pooled: &'a [f32],
    /// `[original height, original width, crop top, crop left, target height, target width]` of each row.
    pub time_ids: &'a [[f32; 6]],
}

impl UNet {
    /// Packs the weights.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit the configuration.
    pub fn load(w: &Weights<'_>, config: UNetConfig) -> Result<Self, CheckpointError> {
        let c = &config;
        let first = c.levels[0].channels;
        let mut cross = 0;
        let mut inputs = first;
        let mut skips = vec![first];
        let mut down_blocks = vec![];
        for (i, level) in c.levels.iter().enumerate() {
            down_blocks.push(DownBlock::load(&w.pp("down_blocks").pp(i), c, i, inputs, &mut cross)?);
            inputs = level.channels;
            let halved = usize::from(i + 1 < c.levels.len());
            skips.extend(vec![level.channels; level.layers + halved]);
        }
        let mid_block = Mid::load(&w.pp("mid_block"), c, &mut cross)?;
        let count = c.levels.len();
        let up_blocks = (0..count)
            .map(|i| UpBlock::load(&w.pp("up_blocks").pp(i), c, count - 1 - i, &mut skips, &mut cross))
            .collect::<Result<_, _>>()?;
        let add = |t: super::unet_config::TextTime| {
            Embedding::load(&w.pp("add_embedding"), t.inputs, c.time_dim, None)
        };
        Ok(Self {
            device: w.device().clone(),
            dtype: w.dtype(),
            conv_in: w.pp("conv_in").conv2d(c.in_channels, first, c.conv_in_kernel)?,
            time_embedding: Embedding::load(
                &w.pp("time_embedding"),
                first,
                c.time_dim,
                c.time_cond_proj_dim,
            )?,
            add_embedding: c.text_time.map(add).transpose()?,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: w.pp("conv_norm_out").norm(first, c.eps)?,
            conv_out: w.pp("conv_out").conv2d(first, c.out_channels, c.conv_out_kernel)?,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Computes what depends only on the text: `text` is `[rows, tokens, context]`.
    /// `guidance` is the scale that an LCM model is told.
    ///
    /// # Panics
    /// When `added` is not given exactly to a model that takes it.
    pub fn condition(&self, text: &Tensor, added: Option<&Added<'_>>, guidance: Option<f64>) -> Conditioning {
        let mut keys_values = TextKeysValues::default();
        self.down_blocks.iter().for_each(|b| b.text_keys_values(text, &mut keys_values));
        self.mid_block.iter().for_each(|b| b.text_keys_values(text, &mut keys_values));
        self.up_blocks.iter().for_each(|b| b.text_keys_values(text, &mut keys_values));
        let rows = text.dims()[0];
        let added = self.config.text_time.zip(self.add_embedding.as_ref()).map(|(t, embedding)| {
            let added = added.expect("a model of this family is told sizes and pooled text");
            let pooled = added.pooled.len() / rows;
            let mut inputs = Vec::with_capacity(rows * t.inputs);
            for (pooled, ids) in added.pooled.chunks_exact(pooled).zip(added.time_ids) {
                inputs.extend_from_slice(pooled);
                let (flip, shift) = (self.config.flip_sin_to_cos, self.config.freq_shift);
                ids.iter()
                    .for_each(|&id| inputs.extend(timestep_embedding(id, t.time_embed_dim, flip, shift)));
            }
            embedding.forward(&self.tensor([rows, t.inputs], &inputs), None).to_f32() // [rows, time_dim]
        });
        let guidance = self
            .config
            .time_cond_proj_dim
            .zip(guidance)
            .map(|(dim, scale)| guidance_embedding(scale, dim).repeat(rows));
        Conditioning {
            text: keys_values,
            added: added.unwrap_or_default(),
            guidance: guidance.unwrap_or_default(),
            rows,
        }
    }

    /// Predicts epsilon, v or the sample, as the checkpoint was trained, for
    /// latents `[n, h, w, in_channels]`: `[n, h, w, out_channels]`. The rows are those
    /// of `requests`, one request after the other, each at a timestep of its own.
    ///
    /// # Panics
    /// When the requests have more or fewer rows than the latents.
    pub fn forward(&self, latents: &Tensor, requests: &[(&Conditioning, f32)]) -> Tensor {
        let rows: usize = requests.iter().map(|(request, _)| request.rows).sum();
        assert_eq!(rows, latents.dims()[0], "latents {:?} for {rows} rows", latents.shape());
        let time = self.time(requests);
        let text: Vec<_> = requests.iter().map(|(request, _)| &request.text).collect();
        let text = text.as_slice();
        let mut skips = vec![ops::conv2d(latents, &self.conv_in, Window::Same, Epilogue::default())];
        for block in &self.down_blocks {
            block.forward(&mut skips, &time, text);
        }
        let mut x = self.mid_block.as_ref().map(|mid| mid.forward(top(&skips), &time, text));
        for block in &self.up_blocks {
            // Without a middle, the way up begins with the picture where the way down ended.
            let from = x.take().unwrap_or_else(|| ops::activate(top(&skips), Activation::None));
            x = Some(block.forward(from, &mut skips, &time, text));
        }
        let x = x.expect("a UNet has at least one level");
        let x = ops::group_norm(&x, &self.conv_norm_out, self.config.groups, Activation::Silu);
        ops::conv2d(&x, &self.conv_out, Window::Same, Epilogue::default())
    }

    /// `silu` of the time embedding, `[rows, time_dim]`: every residual block
    /// takes it so.
    fn time(&self, requests: &[(&Conditioning, f32)]) -> Tensor {
        let c = &self.config;
        let dim = c.levels[0].channels;
        let rows = |of: &dyn Fn(&Conditioning, f32) -> Vec<f32>| -> Vec<f32> {
            requests.iter().flat_map(|&(request, timestep)| of(request, timestep)).collect()
        };
        let sinusoid = rows(&|request, timestep| {
            timestep_embedding(timestep, dim, c.flip_sin_to_cos, c.freq_shift).repeat(request.rows)
        });
        let sinusoid = self.tensor([sinusoid.len() / dim, dim], &sinusoid);
        let guidance = c.time_cond_proj_dim.map(|dim| {
            let scales = rows(&|request, _| request.guidance.clone());
            self.tensor([scales.len() / dim, dim], &scales)
        });
        let time = self.time_embedding.forward(&sinusoid, guidance.as_ref());
        if self.add_embedding.is_none() {
            return ops::activate(&time, Activation::Silu);
        }
        let added = rows(&|request, _| request.added.clone());
        let added = self.tensor([added.len() / c.time_dim, c.time_dim], &added);
        ops::activate(&ops::add(&time, &added), Activation::Silu)
    }

    fn tensor(&self, shape: [usize; 2], values: &[f32]) -> Tensor {
        Tensor::from_f32(&self.device, shape, self.dtype, values)
    }
}

/// Sinusoidal embedding of a number: sines and cosines of it at frequencies
/// from 1 down to 1/10000 (diffusers' `get_timestep_embedding`).
pub fn timestep_embedding(timestep: f32, dim: usize, flip_sin_to_cos: bool, freq_shift: f64) -> Vec<f32> {
    let half = dim / 2;
    // In float32 throughout, as the reference does: for timesteps near 1000
    // the rounding of the frequency shows in the angle.
    let exponent = |i: usize| -(10_000f32.ln()) * i as f32 / (half as f64 - freq_shift) as f32;
    let angles: Vec<f32> = (0..half).map(|i| timestep * exponent(i).exp()).collect();
    let (sin, cos) = (angles.iter().map(|a| a.sin()), angles.iter().map(|a| a.cos()));
    let mut out: Vec<f32> = if flip_sin_to_cos { cos.chain(sin).collect() } else { sin.chain(cos).collect() };
    out.resize(dim, 0.0);
    out
}

/// How LCM models are told the guidance scale (Meng et al. 2023, arXiv
/// 2210.03142; diffusers' `get_guidance_scale_embedding`).
fn guidance_embedding(scale: f64, dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let step = 10_000f32.ln() / (half as f32 - 1.0);
    let angles: Vec<f32> =
        (0..half).map(|i| (scale as f32 - 1.0) * 1000.0 * (i as f32 * -step).exp()).collect();
    let mut out: Vec<f32> = angles.iter().map(|a| a.sin()).chain(angles.iter().map(|a| a.cos())).collect();
    out.resize(dim, 0.0);
    out
}
