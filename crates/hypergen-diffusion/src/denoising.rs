//! The denoising loop's inside: requests that are being drawn, and one forward
//! pass over all of them. Which requests share a pass, and when one joins or
//! leaves, is the pipeline's business; a picture does not depend on it.

use hypergen_tensor::{DType, Device, Tensor, TorchGenerator};

use crate::Error;
use crate::finite::finite;
use crate::models::unet::{Conditioning, UNet};
use crate::samplers::Trajectory;

/// Guidance of one request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guidance {
    pub(crate) scale: f32,
    pub(crate) rescale: f32,
}

/// One request on its way from noise to latents.
pub(crate) struct Drawing {
    trajectory: Trajectory,
    conditioning: Conditioning,
    guidance: Option<Guidance>,
    noise: Noise,
}

/// Unit normals in PyTorch's order of dimensions (channels first), from a
/// request's own generator.
pub(crate) struct Noise {
    generator: TorchGenerator,
    channels: usize,
    planes: Vec<f32>,
}

impl Noise {
    pub(crate) fn new(seed: u64, channels: usize) -> Self {
        Self { generator: TorchGenerator::new(seed), channels, planes: vec![] }
    }

    /// Fills latents `[h, w, channels]`.
    pub(crate) fn fill(&mut self, out: &mut [f32]) {
        self.planes.resize(out.len(), 0.0);
        self.generator.fill_normal(&mut self.planes);
        let pixels = out.len() / self.channels;
        for (channel, plane) in self.planes.chunks_exact(pixels).enumerate() {
            for (pixel, &value) in plane.iter().enumerate() {
                out[pixel * self.channels + channel] = value;
            }
        }
    }
}

impl Drawing {
    pub(crate) fn new(
        trajectory: Trajectory,
        conditioning: Conditioning,
        guidance: Option<Guidance>,
        noise: Noise,
    ) -> Self {
        Self { trajectory, conditioning, guidance, noise }
    }

    /// Calls of the network that are done.
    pub(crate) fn done(&self) -> usize {
        self.trajectory.done()
    }

    /// Calls of the network from noise to latents.
    pub(crate) fn evaluations(&self) -> usize {
        self.trajectory.evaluations()
    }

    /// Rows that it has in a pass: two with guidance, else one.
    pub(crate) fn rows(&self) -> usize {
        self.conditioning.rows()
    }

    pub(crate) fn finished(&self) -> bool {
        self.done() == self.evaluations()
    }

    pub(crate) fn into_latents(self) -> Vec<f32> {
        self.trajectory.into_latents()
    }

    /// Takes the network's answer for this request's rows.
    fn advance(&mut self, mut rows: Vec<f32>) -> Result<(), Error> {
        let call = self.done() + 1;
        finite(&rows, &format!("unet at step {call}"))?;
        if let Some(Guidance { scale, rescale }) = self.guidance {
            // The negative side comes first.
            let half = rows.len() / 2;
            let (guided, positive) = rows.split_at_mut(half);
            for (n, p) in guided.iter_mut().zip(&*positive) {
                *n += scale * (*p - *n);
            }
            if rescale > 0.0 {
                rescale_guidance(guided, positive, rescale);
            }
            rows.truncate(half);
            finite(&rows, &format!("guidance at step {call}"))?;
        }
        let noise = &mut self.noise;
        let view = self.trajectory.advance(rows, &mut |out| noise.fill(out));
        finite(view.x, &format!("sampler after step {call}"))
    }
}

/// One forward pass over all of `drawings`, whose latents are `[h, w, channels]`;
/// what came of each, in their order. All must be unfinished.
pub(crate) fn pass(
    unet: &UNet,
    device: &Device,
    dtype: DType,
    [h, w, channels]: [usize; 3],
    drawings: &mut [&mut Drawing],
) -> Vec<Result<(), Error>> {
    let mut latents = vec![];
    let mut timesteps = vec![];
    for drawing in drawings.iter_mut() {
        let Some(query) = drawing.trajectory.query() else { unreachable!("a finished drawing in a pass") };
        (0..drawing.conditioning.rows()).for_each(|_| latents.extend_from_slice(query.input));
        timesteps.push(query.timestep);
    }
    let requests: Vec<_> = drawings.iter().zip(timesteps).map(|(d, t)| (&d.conditioning, t)).collect();
    let picture = h * w * channels;
    let shape = [latents.len() / picture, h, w, channels];
    let out = unet.forward(&Tensor::from_f32(device, shape, dtype, &latents), &requests).to_f32();
    let mut rest = out.as_slice();
    let split = drawings.iter_mut().map(|drawing| {
        let (own, others) = rest.split_at(drawing.conditioning.rows() * picture);
        rest = others;
        drawing.advance(own.to_vec())
    });
    split.collect()
}

/// Mixes a guided prediction with itself at the spread of the positive one:
/// what guidance adds in contrast, this takes back (Lin et al. 2023,
/// <https://arxiv.org/abs/2305.08891>, section 3.4).
fn rescale_guidance(guided: &mut [f32], positive: &[f32], rescale: f32) {
    let factor = (deviation(positive) / deviation(guided)) as f32;
    for g in guided {
        *g = rescale * (*g * factor) + (1.0 - rescale) * *g;
    }
}

/// Standard deviation of a sample.
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    (square / (n - 1.0)).sqrt()
}
