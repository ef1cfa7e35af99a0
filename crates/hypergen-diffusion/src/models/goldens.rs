//! The blocks that UNet and VAE are made of, one at a time, against diffusers.
//! Whole networks and pipelines are compared in `tests/goldens/`; when those
//! differ, these say where.

use hypergen_tensor::ops::{self, Epilogue, Window};
use hypergen_tensor::{Activation, Checkpoint as File, DType, Device, DeviceConfig, Loader, Tensor, Weights};
use serde_json::Value;

use super::resnet::{ResnetBlock, ResnetConfig};
use super::transformer::{TextKeysValues, Transformer, TransformerConfig};

// What the tests outside of the crate use to write checkpoints and to read
// goldens; not all of it is needed here.
#[allow(dead_code)]
#[path = "../../tests/goldens/blocks.rs"]
mod blocks;
#[allow(dead_code)]
#[path = "../../tests/goldens/checkpoint.rs"]
pub(crate) mod checkpoint;
#[allow(dead_code)]
#[path = "../../tests/goldens/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "../../tests/goldens/formula.rs"]
mod formula;

use blocks::{Blocks, input};
use checkpoint::{Checkpoint, Layout};
use fixture::{to_nchw, to_nhwc};

/// Opens the weights of each golden block whose name starts so, hands them
/// over with the block's inputs, and compares what comes back.
fn check(prefix: &str, forward: impl Fn(&Value, &Weights<'_>, &Inputs<'_>) -> Tensor) {
    let goldens = Blocks::read();
    let device = Device::cpu(&DeviceConfig { threads: Some(2) }).expect("the CPU");
    for (name, row) in goldens.rows(prefix) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Checkpoint::named(row["checkpoint"].as_str().unwrap()).write(folder.path(), &Layout::plain());
        let (part, inner) = row["module"].as_str().unwrap().split_once('/').unwrap();
        let path = folder.path().join(part).join("diffusion_pytorch_model.safetensors");
        let file = File::open(&path).expect("weights that open");
        let loader = Loader::new(&file, &device, DType::F32, &|_| {});
        let inputs = Inputs { name: &name, row: &row, device: &device };
        let out = forward(&row, &loader.root().pp(inner), &inputs);
        goldens.check(&name, &to_nchw(&out.to_f32(), out.nhwc()));
    }
}

/// A golden block's formula inputs.
struct Inputs<'a> {
    name: &'a str,
    row: &'a Value,
    device: &'a Device,
}

impl Inputs<'_> {
    fn shape<const N: usize>(&self, name: &str) -> Option<[usize; N]> {
        let shape: Vec<usize> = serde_json::from_value(self.row["inputs"][name].clone()).ok()?;
        Some(shape.try_into().expect("as many dimensions as the block takes"))
    }

    fn values(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        input(self.name, name, shape)
    }

    /// The picture, `[n, h, w, c]`.
    fn hidden(&self) -> Tensor {
        let shape = self.shape("hidden").expect("every block takes a picture");
        let [n, c, h, w] = shape;
        let values = to_nhwc(&self.values("hidden", &shape), shape);
        Tensor::from_f32(self.device, [n, h, w, c], DType::F32, &values)
    }
}

#[test]
fn residual_blocks_agree() {
    check("resnet", |row, w, inputs| {
        let x = inputs.hidden();
        let time = inputs.shape("time").map(|shape: [usize; 2]| {
            let time = Tensor::from_f32(inputs.device, shape, DType::F32, &inputs.values("time", &shape));
            ops::activate(&time, Activation::Silu)
        });
        let config = ResnetConfig {
            inputs: x.shape().last(),
            outputs: row["shape"][1].as_u64().unwrap() as usize,
            time: time.as_ref().map(|t| t.shape().last()),
            groups: 8,
            eps: if time.is_some() { 1e-5 } else { 1e-6 },
            out_scale_factor: 1.0,
        };
        ResnetBlock::load(w, config).expect("a block").forward(&x, time.as_ref())
    });
}

#[test]
fn transformers_agree() {
    // Heads, depth and groups, as the checkpoints' configurations have them.
    for (name, heads, layers, groups) in
        [("transformer_conv", 8, 1, 8), ("transformer_linear", 4, 1, 16), ("transformer_deep", 8, 3, 8)]
    {
        check(name, |_, w, inputs| {
            let x = inputs.hidden();
            let shape: [usize; 3] = inputs.shape("text").expect("a text");
            let text = Tensor::from_f32(inputs.device, shape, DType::F32, &inputs.values("text", &shape));
            let config =
                TransformerConfig { channels: x.shape().last(), heads, layers, context: shape[2], groups };
            let block = Transformer::load(w, config, &mut 0).expect("a block");
            let mut keys_values = TextKeysValues::default();
            block.text_keys_values(&text, &mut keys_values);
            block.forward(&x, &[&keys_values])
        });
    }
}

#[test]
fn changes_of_size_agree() {
    let resize = |name: &str, window: &dyn Fn([usize; 4]) -> Window| {
        check(name, |_, w, inputs| {
            let x = inputs.hidden();
            let c = x.shape().last();
            let conv = w.pp("conv").conv2d(c, c, 3).expect("a convolution");
            ops::conv2d(&x, &conv, window(x.nhwc()), Epilogue::default())
        });
    };
    resize("downsample_unet", &|_| Window::Halve);
    resize("downsample_vae", &|_| Window::HalvePadAfter);
    resize("upsample_twice", &|[_, h, w, _]| Window::Enlarge(2 * h, 2 * w));
    resize("upsample_to_odd", &|_| Window::Enlarge(9, 7));
}
