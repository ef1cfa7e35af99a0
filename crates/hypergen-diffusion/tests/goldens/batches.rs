//! A batch is nothing but its requests, through the product's own pipeline:
//! whatever the sampler and the scheduler's file, a picture keeps every bit
//! when others are drawn beside it.

use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{DTypeChoice, Generator, Latents, Request, Silent, Size};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Layout, write_json};
use crate::pipelines::Loaded;

/// The tiny SD 1.x checkpoint with some fields of its scheduler's file replaced.
fn with_scheduler(fields: &Value) -> Loaded {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = Checkpoint::named("sd1");
    checkpoint.write(folder.path(), &Layout::plain());
    let file = "scheduler/scheduler_config.json";
    let mut scheduler = checkpoint.files[file].clone();
    for (field, value) in fields.as_object().expect("fields") {
        scheduler[field] = value.clone();
    }
    write_json(&folder.path().join(file), &scheduler);
    let path = folder.path().to_owned();
    Loaded::new(&path, folder, DTypeChoice::Float32, 2)
}

/// Two requests that share a batch and little else.
fn pair(sampler: SamplerKind) -> [Request; 2] {
    let request = |prompt: &str, seed| Request {
        size: Size { width: 32, height: 24 },
        steps: 3,
        seed,
        guidance_scale: 5.0,
        sampler: Some(sampler),
        ..Request::new(prompt)
    };
    [request("a red fox", 3), Request { negative_prompt: Some("fog".into()), ..request("cat face", 8) }]
}

fn latents(model: &mut Loaded, requests: &[Request]) -> Vec<Latents> {
    model.pipeline.latents(requests, &mut Silent).expect("latents")
}

/// With thresholding a sampler looks at a quantile of the whole picture, and so
/// could look at its neighbours' too.
#[test]
fn every_sampler_draws_a_batch_as_single_requests() {
    let mut plain = with_scheduler(&json!({}));
    let mut bounded = with_scheduler(
        &json!({ "thresholding": true, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 100.0 }),
    );
    let mut wrong = vec![];
    for &kind in SamplerKind::ALL {
        let requests = pair(kind);
        let both = latents(&mut bounded, &requests);
        for (request, batched) in requests.iter().zip(&both) {
            let alone = latents(&mut bounded, std::slice::from_ref(request)).remove(0);
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            if !alone.values.iter().zip(&batched.values).all(same) {
                wrong.push(format!("{kind}: {}", request.prompt));
            }
        }
        assert_ne!(both[0], both[1], "{kind}: two requests, one picture");
        // Else the thresholds bound nothing, and prove nothing.
        if ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2s", "deis", "unipc", "lcm"].contains(&kind.name()) {
            assert_ne!(latents(&mut plain, &requests[..1])[0], both[0], "{kind} looks at no threshold");
        }
    }
    assert!(wrong.is_empty(), "a batch changes\n{}", wrong.join("\n"));
}

/// The pictures too, as the server asks for them.
#[test]
fn thresholded_pictures_of_a_batch_are_those_of_single_requests() {
    let mut model = with_scheduler(&json!({ "thresholding": true, "sample_max_value": 50.0 }));
    let requests = pair("ddim".parse().expect("a sampler"));
    let batch = model.pipeline.generate(&requests, &mut Silent).expect("a batch");
    for (request, picture) in requests.iter().zip(&batch) {
        assert_eq!(model.draw(request).1, picture.rgb, "{}", request.prompt);
    }
}
