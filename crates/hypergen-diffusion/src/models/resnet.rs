//! The residual block that UNet and VAE are built from
//! (diffusers' `ResnetBlock2D`).

use hypergen_tensor::ops::{self, Epilogue, Window};
use hypergen_tensor::{Activation, CheckpointError, Conv, Linear, Norm, Tensor, Weights};

/// Sizes of a [`ResnetBlock`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResnetConfig {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Width of the time embedding; `None` in a VAE.
    pub(crate) time: Option<usize>,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// Divides the sum of both branches; other than 1 only in a UNet's middle.
    pub(crate) out_scale_factor: f64,
}

/// `x + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`.
pub(crate) struct ResnetBlock {
    norm1: Norm,
    conv1: Conv,
    time_emb_proj: Option<Linear>,
    norm2: Norm,
    conv2: Conv,
    conv_shortcut: Option<Linear>,
    groups: usize,
    scale: f32,
}

impl ResnetBlock {
    pub(crate) fn load(w: &Weights<'_>, c: ResnetConfig) -> Result<Self, CheckpointError> {
        Ok(Self {
            norm1: w.pp("norm1").norm(c.inputs, c.eps)?,
            conv1: w.pp("conv1").conv2d(c.inputs, c.outputs, 3)?,
            time_emb_proj: match c.time {
                Some(time) => Some(w.pp("time_emb_proj").linear(time, c.outputs, true)?),
                None => None,
            },
            norm2: w.pp("norm2").norm(c.outputs, c.eps)?,
            conv2: w.pp("conv2").conv2d(c.outputs, c.outputs, 3)?,
            conv_shortcut: match c.inputs == c.outputs {
                true => None,
                false => Some(w.pp("conv_shortcut").linear(c.inputs, c.outputs, true)?),
            },
            groups: c.groups,
            scale: (1.0 / c.out_scale_factor) as f32,
        })
    }

    /// `x` is `[n, h, w, inputs]`; `time` is `silu` of the time embedding, `[n, time]`.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Tensor {
        let time = match (&self.time_emb_proj, time) {
            (Some(layer), Some(time)) => Some(ops::linear(time, layer, Epilogue::default())),
            _ => None,
        };
        // At full size these are the largest buffers of all, so each goes as
        // soon as it has been read.
        let h = {
            let normalised = ops::group_norm(x, &self.norm1, self.groups, Activation::Silu);
            let epilogue = Epilogue { add_per_picture: time.as_ref(), ..Epilogue::default() };
            ops::conv2d(&normalised, &self.conv1, Window::Same, epilogue) // [n, h, w, outputs]
        };
        let normalised = ops::group_norm(&h, &self.norm2, self.groups, Activation::Silu);
        drop(h);
        let shortcut = self.conv_shortcut.as_ref().map(|layer| ops::linear(x, layer, Epilogue::default()));
        let residual = Some(shortcut.as_ref().unwrap_or(x));
        ops::conv2d(
            &normalised,
            &self.conv2,
            Window::Same,
            Epilogue { residual, scale: self.scale, ..Epilogue::default() },
        )
    }
}
