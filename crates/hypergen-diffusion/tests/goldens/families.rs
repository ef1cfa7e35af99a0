//! Distilled families in float32 against diffusers: recognised by their files,
//! and drawn with their own schedulers.

use std::collections::BTreeMap;

use hypergen_diffusion::{DTypeChoice, Generator, LoadOptions, Request, Silent, Size, load};
use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, Layout, write_json};
use crate::fixture::{self, Numbers, psnr, to_nchw, worst};

/// A row of `families.json`.
#[derive(Debug, Deserialize)]
struct Case {
    family: String,
    checkpoint: String,
    scheduler: String,
    steps: usize,
    guidance_scale: f64,
    prompt: String,
    width: usize,
    height: usize,
    seed: u64,
}

#[derive(Debug, Deserialize)]
struct Goldens {
    schedulers: BTreeMap<String, Value>,
    cases: BTreeMap<String, Case>,
}

#[test]
fn distilled_families_are_recognised_and_what_diffusers_draws() {
    let goldens: Goldens = serde_json::from_value(fixture::json("families.json")).expect("a fixture");
    let numbers = Numbers::open("families.safetensors");
    for (name, case) in &goldens.cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Checkpoint::named(&case.checkpoint).write(folder.path(), &Layout::plain());
        let scheduler = folder.path().join("scheduler/scheduler_config.json");
        write_json(&scheduler, &goldens.schedulers[&case.scheduler]);
        let options = LoadOptions { dtype: DTypeChoice::Float32, threads: Some(2), ..LoadOptions::default() };
        let mut model = load(folder.path().to_str(), &options, &mut |_| {}).expect("a checkpoint that loads");

        assert_eq!(model.info().family, case.family, "{name}");
        let request = Request {
            size: Size::new(case.width, case.height).expect("a size in the fixture"),
            steps: case.steps,
            guidance_scale: case.guidance_scale,
            seed: case.seed,
            ..Request::new(&case.prompt)
        };
        let latents = model.latents(&[request], &mut Silent).expect("latents").remove(0);
        let picture =
            psnr(&model.decode(&latents).expect("a picture"), &numbers.bytes(&format!("{name}/picture")));
        let channels = latents.values.len() / (latents.height * latents.width);
        let values = to_nchw(&latents.values, [1, latents.height, latents.width, channels]);
        let latents = worst(&values, &numbers.f32(&format!("{name}/latents")));
        println!("{name}: latents {latents:.1e} of their scale, picture {picture:.1} dB");
        assert!(latents <= 2e-4 && picture >= 70.0, "{name}: latents {latents:.1e}, picture {picture:.1} dB");
    }
}
