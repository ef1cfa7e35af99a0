//! A checkpoint whose own scheduler cannot be used is loaded: what counts is
//! the sampler that a request asks for. And families that users name.

use std::path::Path;

use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{
    DTypeChoice, FamilyName, Generator, LoadOptions, Pipeline, Request, Silent, Size, load,
};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Layout, write_json};

const SCHEDULER: &str = "scheduler/scheduler_config.json";

fn open(folder: &Path, family: Option<&str>) -> Result<Pipeline, String> {
    let family = family.map(|name| name.parse::<FamilyName>().expect("a known family"));
    let options =
        LoadOptions { dtype: DTypeChoice::Float32, threads: Some(2), family, ..LoadOptions::default() };
    load(folder.to_str(), &options, &mut |_| {}).map_err(|e| e.message)
}

fn request(sampler: Option<&str>, steps: usize) -> Request {
    Request {
        size: Size::new(16, 16).expect("a size"),
        steps,
        sampler: sampler.map(|name| name.parse::<SamplerKind>().expect("a known sampler")),
        ..Request::new("a fox")
    }
}

#[test]
fn another_sampler_than_the_files_own_can_be_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = Checkpoint::named("sd1");
    checkpoint.write(folder.path(), &Layout::plain());
    let own = &checkpoint.files[SCHEDULER];
    let mut expected = open(folder.path(), None).expect("the checkpoint");
    let expected = expected.generate(&[request(Some("euler"), 3)], &mut Silent).expect("a picture");
    for (change, steps, word) in [
        // Four Runge-Kutta evaluations come first.
        (json!({"skip_prk_steps": false}), 3, "at least 4 steps"),
        (json!({"_class_name": "MagicScheduler"}), 20, "MagicScheduler"),
        (json!({"_class_name": null}), 20, "null"),
        (json!({"_class_name": "PNDMScheduler", "prediction_type": "sample", "x": 1}), 20, "prediction_type"),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true}),
            20,
            "use_flow_sigmas",
        ),
        (json!({"_class_name": "UniPCMultistepScheduler", "solver_order": 9}), 20, "solver_order"),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}),
            20,
            "algorithm_type",
        ),
    ] {
        let mut fields = own.clone();
        fields.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        write_json(&folder.path().join(SCHEDULER), &fields);
        let mut model = open(folder.path(), None).unwrap_or_else(|e| panic!("{change}: {e}"));
        let error = model.check(&request(None, steps)).expect_err("the file's own sampler");
        assert_eq!(error.param, Some("sampler"), "{change}");
        assert!(error.message.contains(word), "{change}: {}", error.message);
        // Of the families' steps the first can be drawn with; the others say so where they are listed.
        let unusable = model.info().sampler.contains("cannot be used");
        assert_eq!(unusable, steps == 20, "{change}: {}", model.info().sampler);
        if fields["prediction_type"].is_null() {
            let drawn = model.generate(&[request(Some("euler"), 3)], &mut Silent).expect("a picture");
            assert!(drawn == expected, "{change}: another picture");
        }
        assert!(model.check(&request(Some("ddim"), 20)).is_ok(), "{change}");
    }
    // With PNDM's own, enough steps are enough.
    let mut fields = own.clone();
    fields["skip_prk_steps"] = json!(false);
    write_json(&folder.path().join(SCHEDULER), &fields);
    let model = open(folder.path(), None).expect("it loads");
    assert!(model.check(&request(None, 4)).is_ok());
    assert_eq!(model.info().sampler, "pndm");
    // Where no sampler can be built, there is nothing to load.
    fields["beta_end"] = json!("large");
    write_json(&folder.path().join(SCHEDULER), &fields);
    let error = open(folder.path(), None).err().expect("an error");
    assert!(error.contains(SCHEDULER) && error.contains("beta_end"), "{error}");
}

fn set(folder: &Path, fields: &Value) {
    write_json(&folder.join(SCHEDULER), fields);
}

#[test]
fn a_named_family_brings_its_scheduler_steps_and_guidance() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = Checkpoint::named("sdxl");
    checkpoint.write(folder.path(), &Layout::plain());
    let plain = open(folder.path(), None).expect("the checkpoint");
    assert_eq!(plain.info().family, "Stable Diffusion XL");
    let unguided = Request { guidance_scale: 0.0, ..request(None, 1) };
    let message = plain.check(&unguided).expect_err("guidance").message;
    for word in ["between 1 and 20", "Stable Diffusion XL", "--family", "xl_turbo", "HYPERGEN_FAMILY"] {
        assert!(message.contains(word), "{message}");
    }
    // What is wrong for any model gets no such advice.
    let message =
        plain.check(&Request { guidance_scale: 21.0, ..request(None, 1) }).expect_err("range").message;
    assert!(!message.contains("--family"), "{message}");

    let mut named = open(folder.path(), Some("sdxl-turbo")).expect("the checkpoint");
    let info = named.info();
    assert_eq!((info.family.as_str(), info.sampler.as_str()), ("SDXL Turbo", "euler_a"));
    assert_eq!((info.default_steps, info.default_guidance, info.min_guidance), (Some(1), Some(0.0), 0.0));
    let drawn = named.generate(std::slice::from_ref(&unguided), &mut Silent).expect("a picture");
    // The same with the published scheduler's fields in the model's file.
    let mut turbo = checkpoint.files[SCHEDULER].clone();
    turbo["_class_name"] = json!("EulerAncestralDiscreteScheduler");
    turbo["timestep_spacing"] = json!("trailing");
    set(folder.path(), &turbo);
    let mut recognised = open(folder.path(), None).expect("the checkpoint");
    assert_eq!(recognised.info().family, "SDXL Turbo");
    assert!(recognised.generate(&[unguided], &mut Silent).expect("a picture") == drawn);
    // And it can be told what it is not.
    let base = open(folder.path(), Some("sdxl")).expect("the checkpoint").info();
    assert_eq!((base.family.as_str(), base.sampler.as_str()), ("Stable Diffusion XL", "euler"));
    let error = open(folder.path(), Some("sd1")).err().expect("other networks");
    assert!(error.contains("sd1") && error.contains("SDXL"), "{error}");
}
