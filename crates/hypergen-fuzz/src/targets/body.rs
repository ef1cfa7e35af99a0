//! The body of a request for pictures: bytes to JSON to parameters. What is
//! read, written down again, is read as the same.

use std::sync::LazyLock;

use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{
    CLIP_SKIP, Corner, Extent, GUIDANCE_RESCALE, GUIDANCE_SCALE, IMAGES, LORA_SCALE, ModelInfo, STEPS, Size,
    SizeConditioning,
};
use hypergen_server::api::{ApiError, Defaults, Fields, ImageRequest, Parameters, ResponseForm, Takes};
use serde_json::{Map, Value, json};

use crate::check_message;
use crate::targets::itself;

/// A model that takes all there is.
pub(crate) fn model() -> ModelInfo {
    ModelInfo {
        name: "fake".to_owned(),
        family: "Fake Diffusion".to_owned(),
        native_size: Size { width: 64, height: 64 },
        sampler: "ddim".to_owned(),
        device: "cpu".to_owned(),
        isa: "portable".to_owned(),
        dtype: "float32".to_owned(),
        threads: 1,
        weight_bytes: 1 << 20,
        default_steps: None,
        default_guidance: None,
        min_guidance: 1.0,
    }
}

static PARAMETERS: LazyLock<Parameters> = LazyLock::new(|| {
    let takes = Takes { samplers: SamplerKind::ALL.to_vec(), sizes: true, clip_skip: CLIP_SKIP.max };
    Parameters::new(&model(), &takes, &Defaults::default())
});

/// Declares the parameters.
pub(crate) fn prepare() {
    LazyLock::force(&PARAMETERS);
}

/// The input is the body.
pub(crate) fn read(data: &[u8]) -> u64 {
    let asked = |body: &[u8]| PARAMETERS.read(&Fields::parse(body)?, || 7);
    match asked(data) {
        Err(error) => check(&error),
        Ok(request) => {
            in_range(&request);
            let written = json(&request).to_string();
            let again = asked(written.as_bytes()).unwrap_or_else(|e| panic!("{written}: {}", e.message));
            assert_eq!(again, request, "{written}");
        }
    }
    itself(data)
}

fn check(error: &ApiError) {
    assert!(error.status.is_client_error(), "{error:?}");
    let named = error.param.as_deref().unwrap_or("body");
    check_message(&error.message, &[named, "Invalid size"]);
}

fn in_range(request: &ImageRequest) {
    let first = &request.first;
    assert!(!first.prompt.is_empty());
    assert!((IMAGES.min..=IMAGES.max).contains(&request.n) && request.requests().len() == request.n);
    assert!(Size::new(first.size.width, first.size.height).is_ok(), "{}", first.size);
    assert!(STEPS.check(first.steps).is_ok() && GUIDANCE_SCALE.check(first.guidance_scale).is_ok());
    assert!(CLIP_SKIP.check(first.clip_skip).is_ok());
    assert!(GUIDANCE_RESCALE.check(first.guidance_rescale).is_ok());
    let scales = request.loras.named.iter().flatten().map(|(_, scale)| *scale);
    assert!(scales.chain(request.loras.scale).all(|scale| LORA_SCALE.check(scale).is_ok()));
    assert!(request.quality <= 100);
}

/// A request as JSON, every parameter said.
fn json(request: &ImageRequest) -> Value {
    let first = &request.first;
    let mut body = json!({
        "prompt": first.prompt, "negative_prompt": first.negative_prompt, "n": request.n,
        "size": first.size.to_string(), "num_inference_steps": first.steps,
        "guidance_scale": first.guidance_scale, "seed": first.seed,
        "sampler": first.sampler.map(SamplerKind::name), "prompt_syntax": first.prompt_syntax.name(),
        "clip_skip": first.clip_skip, "guidance_rescale": first.guidance_rescale,
        "output_format": request.format.name(), "output_compression": request.quality,
    });
    let fields = body.as_object_mut().expect("an object");
    match request.form {
        ResponseForm::Url => fields.insert("response_format".to_owned(), "url".into()),
        ResponseForm::Base64 => fields.insert("response_format".to_owned(), "b64_json".into()),
        ResponseForm::Both => None,
    };
    if let Some(loras) = &request.loras.named {
        let list = loras.iter().map(|(path, scale)| json!({"path": path, "scale": scale}));
        fields.insert("loras".to_owned(), list.collect());
    }
    fields.insert("lora_scale".to_owned(), request.loras.scale.into());
    sizes(fields, "", first.sizes);
    if let Some(negative) = first.negative_sizes {
        sizes(fields, "negative_", negative);
    }
    body
}

fn sizes(fields: &mut Map<String, Value>, prefix: &str, sizes: SizeConditioning) {
    let extent = |size: Option<Extent>| size.map(|Extent { width, height }| format!("{width}x{height}"));
    let Corner { top, left } = sizes.crop;
    for (name, value) in [
        ("original_size", extent(sizes.original_size)),
        ("target_size", extent(sizes.target_size)),
        ("crop", Some(format!("{top},{left}"))),
    ] {
        fields.insert(format!("{prefix}{name}"), value.into());
    }
}
