//! Values that are not finite: the stage that made them is named. And numbers
//! that are large, but fine: a VAE that float16 could not compute.

use std::fs;
use std::ops::Range;
use std::path::Path;

use hypergen_diffusion::{DTypeChoice, ErrorKind, Generator, Latents, Request, Silent, Size};
use safetensors::SafeTensors;

use crate::checkpoint::{Checkpoint, Layout};
use crate::fixture::{self, psnr};
use crate::pipelines::{Goldens, Loaded};

/// Changes every value of the tensors whose names begin with `which`, in a
/// file of float32.
fn change(path: &Path, which: &str, by: impl Fn(f32) -> f32) {
    let mut bytes = fs::read(path).expect("a weight file");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let offset = |data: &[u8]| data.as_ptr() as usize - bytes.as_ptr() as usize;
    let ranges: Vec<Range<usize>> = file
        .tensors()
        .iter()
        .filter(|(name, _)| name.starts_with(which))
        .map(|(_, tensor)| offset(tensor.data())..offset(tensor.data()) + tensor.data().len())
        .collect();
    assert!(!ranges.is_empty(), "no tensor begins with {which}");
    for range in ranges {
        for value in bytes[range].chunks_exact_mut(4) {
            let changed = by(f32::from_le_bytes([value[0], value[1], value[2], value[3]]));
            value.copy_from_slice(&changed.to_le_bytes());
        }
    }
    fs::write(path, bytes).expect("the changed file");
}

/// A tiny checkpoint with some of its weights changed.
fn broken(checkpoint: &str, file: &str, which: &str, dtype: DTypeChoice, by: impl Fn(f32) -> f32) -> Loaded {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Checkpoint::named(checkpoint).write(folder.path(), &Layout::plain());
    change(&folder.path().join(file), which, by);
    let path = folder.path().to_owned();
    Loaded::new(&path, folder, dtype, 2)
}

const TEXT: &str = "text_encoder/model.safetensors";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

#[test]
fn numbers_that_are_none_name_their_stage() {
    let request = Request { size: Size { width: 40, height: 32 }, steps: 3, ..Request::new("a red fox") };
    let nothing = |_| f32::NAN;
    // What is predicted is finite, but the sums of squares over the next latents are not.
    let huge = |x: f32| x * 1e25;
    for (file, which, by, stage) in [
        (TEXT, "final_layer_norm.bias", &nothing as &dyn Fn(f32) -> f32, "text encoder: "),
        (UNET, "conv_out.bias", &nothing, "unet at step 1: "),
        (UNET, "conv_out.weight", &huge, "unet at step 2: "),
        (VAE, "decoder.conv_out.bias", &nothing, "vae: "),
    ] {
        for dtype in [DTypeChoice::Float32, DTypeChoice::Bfloat16] {
            let mut model = broken("sd1", file, which, dtype, by);
            let error =
                model.pipeline.generate(std::slice::from_ref(&request), &mut Silent).expect_err(stage);
            assert_eq!(error.kind, ErrorKind::Internal, "{error}");
            assert!(error.message.starts_with(stage), "{dtype}: {error}");
            assert!(error.message.contains("not finite"), "{error}");
        }
    }
}

/// The activations of this VAE pass float16's largest number, 65504, as those
/// of SDXL's own do; diffusers' float16 decodes it to nothing. Here neither
/// number type has so narrow a range.
#[test]
fn a_vae_beyond_float16_is_decoded() {
    let golden = fixture::json("prompts.json")["loud_vae"].clone();
    let number = |field: &str| golden[field].as_f64().expect("a number");
    assert!(number("largest") > 65504.0 && golden["float16_finite"] == false, "the golden proves nothing");
    let goldens = Goldens::named("prompts");
    // [4, 6, 5] as the reference has it.
    let values = fixture::to_nhwc(&goldens.tensor("loud_vae/latents"), [1, 4, 6, 5]);
    let latents = Latents { height: 6, width: 5, values };
    for (dtype, least) in
        [(DTypeChoice::Float32, 70.0), (DTypeChoice::Bfloat16, 40.0), (DTypeChoice::Float16, 40.0)]
    {
        let model = broken("sdxl", VAE, "decoder.conv_in.", dtype, |x| x * number("factor") as f32);
        let picture = model.pipeline.decode(&latents).expect("a picture");
        let db = psnr(&picture, &goldens.picture("loud_vae"));
        println!("{dtype}: {db:.1} dB");
        assert!(db >= least, "{dtype}: {db:.1} dB");
    }
}
