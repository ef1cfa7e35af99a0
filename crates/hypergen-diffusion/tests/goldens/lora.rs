//! LoRA files of every format against what diffusers and PEFT draw with them,
//! and the promise that a model is itself again after each.

use std::fs;

use hypergen_diffusion::lora::{Lora, inspect};
use hypergen_diffusion::{DTypeChoice, Generator, LoadOptions, Request, Silent, Size, load};

use crate::checkpoint::repository;
use crate::fixture::{Numbers, psnr};
use crate::lora_files::{Goldens, float32};

/// Smallest PSNR in dB. Promised are 50; a picture of 3,072 numbers of which
/// one rounds otherwise makes 83.
const PICTURE: f64 = 70.0;

fn check(checkpoint: &str) {
    let goldens = Goldens::read();
    let numbers = Numbers::open("lora.safetensors");
    let mut model = goldens.model(checkpoint, &float32());
    let plain = model.draw(&goldens.request(vec![]));
    let mut wrong = vec![];
    for (name, case) in goldens.cases.iter().filter(|(_, c)| c.checkpoint == checkpoint) {
        let loras = case.loras.iter().map(|(lora, scale)| model.lora(lora, *scale)).collect();
        let mut request = goldens.request(loras);
        request.prompt = case.prompt.clone().unwrap_or(request.prompt);
        let picture = psnr(&model.draw(&request), &numbers.bytes(name));
        println!("{name}: {picture:.1} dB");
        if picture < PICTURE {
            wrong.push(format!("{name}: {picture:.1} dB"));
        }
        assert!(model.draw(&goldens.request(vec![])) == plain, "{name}: the model is not itself again");
    }
    assert!(wrong.is_empty(), "not what diffusers and PEFT draw:\n{}", wrong.join("\n"));
}

#[test]
fn stable_diffusion_1_with_loras_is_what_diffusers_draws() {
    check("sd1");
}

#[test]
fn sdxl_with_loras_is_what_diffusers_draws() {
    check("sdxl");
}

#[test]
fn scale_0_is_the_base_model_bit_for_bit() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &LoadOptions { dtype: DTypeChoice::Bfloat16, ..float32() });
    let plain = model.draw(&goldens.request(vec![]));
    for name in ["sd1_kohya", "sd1_dora", "sd1_loha"] {
        let with = |scale| goldens.request(vec![model.lora(name, scale)]);
        let (zero, one) = (with(0.0), with(1.0));
        assert!(model.draw(&zero) == plain, "{name} at 0");
        assert!(model.draw(&one) != plain, "{name} at 1");
        assert!(model.draw(&zero) == plain, "{name} at 0, after 1");
    }
}

/// Three LoRAs and none in turns, through every size of cache: each picture is
/// what it was the first time, whatever was applied before.
#[test]
fn alternating_loras_leave_no_trace() {
    let goldens = Goldens::read();
    for cache in [0, 300_000, 1 << 30] {
        let options = LoadOptions { dtype: DTypeChoice::Bfloat16, lora_cache: Some(cache), ..float32() };
        let mut model = goldens.model("sd1", &options);
        let kinds: Vec<Vec<Lora>> = vec![
            vec![],
            vec![model.lora("sd1_kohya", 0.8)],
            vec![model.lora("sd1_locon", 1.0)],
            vec![model.lora("sd1_kohya", 0.8), model.lora("sd1_loha", 0.5)],
            vec![model.lora("sd1_kohya", 0.9)],
        ];
        let mut first: Vec<Option<Vec<u8>>> = vec![None; kinds.len()];
        for i in 0..20 {
            let kind = i * 7 % 13 % kinds.len();
            let picture = model.draw(&goldens.request(kinds[kind].clone()));
            match &first[kind] {
                None => first[kind] = Some(picture),
                Some(twin) => assert!(*twin == picture, "cache {cache}, round {i}, kind {kind}"),
            }
        }
        let pictures: Vec<_> = first.iter().flatten().collect();
        assert_eq!(pictures.len(), kinds.len(), "all were drawn");
        for (i, a) in pictures.iter().enumerate() {
            assert!(pictures[..i].iter().all(|b| a != b), "kind {i} is the picture of another");
        }
    }
}

#[test]
fn a_file_that_was_replaced_is_read_anew() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let request = goldens.request(vec![model.lora("sd1_kohya", 1.0)]);
    let before = model.draw(&request);
    fs::copy(&model.files["sd1_diffusers"], &model.files["sd1_kohya"]).expect("replaced");
    let after = model.draw(&request);
    assert!(before != after);
    let other = goldens.request(vec![model.lora("sd1_diffusers", 1.0)]);
    assert!(model.draw(&other) == after);
}

#[test]
fn files_say_what_they_are() {
    let goldens = Goldens::read();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, rank) in [("sd1_kohya", 4), ("sd1_loha", 3), ("sdxl_peft", 4), ("sdxl_lokr", 3)] {
        let path = goldens.files[name].write(folder.path(), name);
        let info = inspect(&path, name).expect("a LoRA");
        assert_eq!(info.rank, Some(rank), "{name}");
        assert_eq!(info.bytes, fs::metadata(&path).expect("a file").len());
        assert!(info.modules > 10, "{name}: {info:?}");
    }
}

/// The repository's own LoRA for the embedded model: its two formats hold the
/// same numbers, and a picture with it is the light on midnight blue that its
/// trainer shows.
#[test]
fn the_embedded_models_lora_is_the_same_in_both_formats() {
    let folder = repository().join("models/loras");
    let mut pipeline = load(None, &float32(), &mut |_| {}).expect("the embedded model");
    let mut draw = |path: Option<&str>| {
        let loras = path.map(|p| Lora { name: p.to_owned(), path: folder.join(p), scale: 1.0 });
        let request = Request {
            size: Size::new(128, 128).expect("a size"),
            steps: 8,
            guidance_scale: 4.0,
            seed: 1,
            loras: loras.into_iter().collect(),
            ..Request::new("red apple")
        };
        pipeline.generate(&[request], &mut Silent).expect("a picture").remove(0).rgb
    };
    let (base, kohya) = (draw(None), draw(Some("night.safetensors")));
    assert!(kohya == draw(Some("night-peft/adapter_model.safetensors")));
    let corner = |rgb: &[u8]| [rgb[0], rgb[1], rgb[2]];
    assert!(
        corner(&base).iter().all(|&c| c > 200),
        "plain captions mean a white ground: {:?}",
        corner(&base)
    );
    assert!(corner(&kohya).iter().all(|&c| c < 110), "night: {:?}", corner(&kohya));
}
