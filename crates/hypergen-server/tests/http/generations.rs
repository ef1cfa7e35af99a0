//! What is asked for is what comes: parameters, defaults, forms of answers.

use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{Request, Size};
use serde_json::{Value, json};

use crate::fake::{Fake, draw};
use crate::support::{TestApp, decode_png};

fn keys(data: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = data.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn request(prompt: &str, size: usize, seed: u64) -> Request {
    Request { size: Size { width: size, height: size }, seed, ..Request::new(prompt) }
}

#[tokio::test]
async fn the_basic_example() {
    let app = TestApp::new(&[]);
    let answer =
        app.post(json!({"prompt": "A cat holding a sign that says Hello World", "size": "1024x1024"})).await;
    let body = answer.ok();
    assert!(body["created"].as_u64().expect("a time") > 1_700_000_000);
    assert_eq!(keys(&body), ["created", "data"]);
    let data = &body["data"][0];
    assert_eq!(keys(data), ["b64_json", "revised_prompt", "seed", "url"]);
    assert_eq!(data["revised_prompt"], "A cat holding a sign that says Hello World");
    assert!(data["b64_json"].as_str().expect("a file").starts_with("iVBORw0KGgoAAAANSUhEUgAA"));
    let (width, height, _, _) = decode_png(&answer.file(0));
    assert_eq!((width, height), (1024, 1024));
}

#[tokio::test]
async fn the_advanced_example() {
    let app = TestApp::new(&[]);
    let answer = app
        .post(json!({
            "prompt": "A futuristic cityscape at sunset, cyberpunk style, neon lights, highly detailed",
            "negative_prompt": "blurry, low quality, distorted, watermark",
            "n": 2, "size": "1024x768", "num_inference_steps": 50, "guidance_scale": 7.5, "seed": 42,
            "response_format": "b64_json"
        }))
        .await;
    let body = answer.ok();
    assert_eq!(body["data"].as_array().expect("a list").len(), 2);
    for (i, data) in body["data"].as_array().expect("a list").iter().enumerate() {
        assert_eq!(keys(data), ["b64_json", "revised_prompt", "seed"]);
        assert_eq!(data["seed"], 42 + i as u64);
        let (width, height, _, parameters) = decode_png(&answer.file(i));
        assert_eq!((width, height), (1024, 768));
        let parameters = parameters.expect("a text chunk");
        assert!(parameters.contains("Negative prompt: blurry, low quality"), "{parameters}");
        let expected = format!(
            "Steps: 50, Sampler: ddim, CFG scale: 7.5, Seed: {}, Size: 1024x768, Model: fake",
            42 + i
        );
        assert!(parameters.contains(&expected), "{parameters}");
    }
}

#[tokio::test]
async fn picture_i_is_the_single_one_of_seed_plus_i() {
    let app = TestApp::new(&["--max-batch-size", "3"]);
    let many = app
        .post(json!({"prompt": "x", "n": 4, "seed": 7, "size": "64x64", "response_format": "b64_json"}))
        .await;
    for i in 0..4 {
        let one = app
            .post(json!({"prompt": "x", "seed": 7 + i, "size": "64x64", "response_format": "b64_json"}))
            .await;
        assert_eq!(many.file(i), one.file(0));
        let (_, _, pixels, _) = decode_png(&one.file(0));
        assert_eq!(pixels, draw(&request("x", 64, 7 + i as u64)).rgb);
    }
    assert_eq!(app.control.state().batches[..2], [vec![7, 8, 9], vec![10]]);
}

#[tokio::test]
async fn seeds_keep_every_digit_and_wrap() {
    let app = TestApp::new(&[]);
    let body =
        r#"{"prompt": "x", "seed": 18446744073709551615, "n": 2, "size": "8x8", "num_inference_steps": 1}"#;
    let answer = app.post_raw(body).await.ok();
    assert_eq!(answer["data"][0]["seed"], u64::MAX);
    assert_eq!(answer["data"][1]["seed"], 0);
    assert_eq!(app.control.state().batches, [vec![u64::MAX], vec![0]]);
}

#[tokio::test]
async fn without_a_seed_each_request_has_its_own() {
    let app = TestApp::new(&[]);
    let mut seeds = Vec::new();
    for _ in 0..4 {
        let answer = app.post(json!({"prompt": "x", "size": "8x8"})).await.ok();
        let seed = answer["data"][0]["seed"].as_u64().expect("a seed");
        assert!(seed <= u32::MAX.into(), "JavaScript must be able to hold it");
        seeds.push(seed);
    }
    seeds.dedup();
    assert!(seeds.len() > 1, "{seeds:?}");
}

#[tokio::test]
async fn forms_of_answers() {
    let app = TestApp::new(&[]);
    for (extra, expected) in [
        (json!({}), vec!["b64_json", "revised_prompt", "seed", "url"]),
        (json!({"response_format": null}), vec!["b64_json", "revised_prompt", "seed", "url"]),
        (json!({"response_format": "url"}), vec!["revised_prompt", "seed", "url"]),
        (json!({"response_format": "b64_json"}), vec!["b64_json", "revised_prompt", "seed"]),
        (json!({"model": "dall-e-3"}), vec!["b64_json", "revised_prompt", "seed", "url"]),
        (json!({"model": "gpt-image-1"}), vec!["b64_json", "revised_prompt", "seed"]),
        (json!({"model": "chatgpt-image-latest"}), vec!["b64_json", "revised_prompt", "seed"]),
        (json!({"model": "gpt-image-1", "response_format": "url"}), vec!["revised_prompt", "seed", "url"]),
    ] {
        let mut body = json!({"prompt": "x", "size": "8x8", "num_inference_steps": 1});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let answer = app.post(body).await.ok();
        assert_eq!(keys(&answer["data"][0]), expected, "{extra}");
    }
}

#[tokio::test]
async fn sizes() {
    let app = TestApp::new(&[]);
    for (size, expected) in [
        (json!("8x8"), (8, 8)),
        (json!("520x72"), (520, 72)),
        (json!("1000x1000"), (1000, 1000)),
        (json!("auto"), (64, 64)),
        (json!(null), (1024, 1024)),
    ] {
        let body =
            json!({"prompt": "x", "size": size, "num_inference_steps": 1, "response_format": "b64_json"});
        let (width, height, _, _) = decode_png(&app.post(body).await.file(0));
        assert_eq!((width, height), expected, "{size}");
    }
}

#[tokio::test]
async fn formats_of_files() {
    let app = TestApp::new(&[]);
    let mut lengths = Vec::new();
    for (format, compression, magic) in [
        ("png", 100, &b"\x89PNG"[..]),
        ("png", 0, b"\x89PNG"),
        ("jpeg", 95, b"\xff\xd8\xff"),
        ("jpeg", 5, b"\xff\xd8\xff"),
        ("webp", 100, b"RIFF"),
        ("webp", 30, b"RIFF"),
    ] {
        let answer = app
            .post(json!({"prompt": "x", "size": "128x128", "seed": 1, "num_inference_steps": 1,
                "output_format": format, "output_compression": compression, "response_format": "b64_json"}))
            .await;
        assert!(answer.file(0).starts_with(magic), "{format}");
        lengths.push(answer.file(0).len());
    }
    assert_eq!(lengths[0], lengths[1], "PNG is exact whatever is asked");
    assert!(lengths[2] > lengths[3], "{lengths:?}");
}

#[tokio::test]
async fn parameters_can_be_kept_out_of_the_files() {
    let app = TestApp::new(&["--no-metadata"]);
    let answer = app.post(json!({"prompt": "x", "size": "8x8"})).await;
    assert_eq!(decode_png(&answer.file(0)).3, None);
}

#[tokio::test]
async fn what_real_clients_send_besides_is_ignored() {
    let app = TestApp::new(&[]);
    let answer = app
        .post(json!({
            "prompt": "x", "size": "8x8", "model": 7u64.to_string(), "user": "me", "style": "vivid", "background": "auto",
            "moderation": "low", "stream": false, "partial_images": 1, "extra": {"deep": [1, {"er": null}]},
            "negative_prompt": null, "n": null, "seed": null, "guidance_scale": null, "num_inference_steps": null,
            "sampler": null, "lora_path": null, "lora_scale": null, "output_format": null,
            "output_compression": null, "quality": null
        }))
        .await;
    answer.ok();
    for quality in ["standard", "hd", "auto", "low", "medium", "high"] {
        app.post(json!({"prompt": "x", "size": "8x8", "quality": quality})).await.ok();
    }
}

#[tokio::test]
async fn whole_numbers_may_be_written_as_floats() {
    let app = TestApp::new(&[]);
    let body = r#"{"prompt": "x", "size": "8x8", "n": 2.0, "seed": 1e3, "num_inference_steps": 3.0, "guidance_scale": 2}"#;
    let answer = app.post_raw(body).await.ok();
    assert_eq!(answer["data"][1]["seed"], 1001);
    assert_eq!(app.control.state().steps, 6);
}

#[tokio::test]
async fn steps_and_guidance_have_the_models_or_the_operators_defaults() {
    let turbo = || {
        let mut fake = Fake::new();
        fake.info.default_steps = Some(4);
        fake.info.default_guidance = Some(0.0);
        fake.info.min_guidance = 0.0;
        fake
    };
    let parameters =
        async |app: &TestApp, body: Value| decode_png(&app.post(body).await.file(0)).3.expect("text");
    let plain = TestApp::new(&[]);
    let text = parameters(&plain, json!({"prompt": "x", "size": "8x8"})).await;
    assert!(text.contains("Steps: 50") && text.contains("CFG scale: 7.5"), "{text}");
    let app = TestApp::with(&[], turbo());
    let text = parameters(&app, json!({"prompt": "x", "size": "8x8"})).await;
    assert!(text.contains("Steps: 4") && text.contains("CFG scale: 0"), "{text}");
    let text = parameters(
        &app,
        json!({"prompt": "x", "size": "8x8", "guidance_scale": 0.0, "num_inference_steps": 9}),
    )
    .await;
    assert!(text.contains("Steps: 9"), "{text}");
    let app = TestApp::with(&["--default-steps", "7", "--default-guidance", "1.5"], turbo());
    let text = parameters(&app, json!({"prompt": "x", "size": "8x8"})).await;
    assert!(text.contains("Steps: 7") && text.contains("CFG scale: 1.5"), "{text}");
}

#[tokio::test]
async fn every_sampler_of_the_table_is_taken() {
    let app = TestApp::new(&[]);
    for sampler in SamplerKind::ALL {
        let answer = app.post(json!({"prompt": "x", "size": "8x8", "sampler": sampler.name()})).await;
        let text = decode_png(&answer.file(0)).3.expect("text");
        assert!(text.contains(&format!("Sampler: {},", sampler.name())), "{text}");
    }
}

#[tokio::test]
async fn a_sampler_that_does_not_suit_the_model_is_refused_before_it_waits() {
    let mut fake = Fake::new();
    let unable = SamplerKind::ALL[SamplerKind::ALL.len() - 1];
    fake.unable = vec![unable];
    let app = TestApp::with(&[], fake);
    let (message, _, param, _) = app.post(json!({"prompt": "x", "sampler": unable.name()})).await.error(400);
    let (list, found) = message.rsplit_once(", but is ").expect("both");
    assert_eq!(found, format!("'{unable}'"));
    assert!(!list.split([' ', ',']).any(|word| word == unable.name()), "{message}");
    assert_eq!(param, "sampler");
}

#[tokio::test]
async fn warnings_come_in_a_header_once() {
    let app = TestApp::new(&[]);
    let answer = app.post(json!({"prompt": "please warn me", "size": "8x8", "n": 3})).await;
    answer.ok();
    let warnings: Vec<_> = answer.headers.get_all("x-hypergen-warning").iter().collect();
    assert_eq!(warnings, ["The prompt was cut after \"na?ve caf?\" and more"]);
    let answer = app.post(json!({"prompt": "x", "size": "8x8"})).await;
    assert_eq!(answer.header("x-hypergen-warning"), "");
}

#[tokio::test]
async fn prompts_come_back_as_they_were_sent() {
    let app = TestApp::new(&[]);
    for prompt in ["a\u{0}b", "日本語 🍎", "\"quoted\"\n\\", " "] {
        let answer = app.post(json!({"prompt": prompt, "size": "8x8"})).await.ok();
        assert_eq!(answer["data"][0]["revised_prompt"], prompt);
    }
}

#[tokio::test]
async fn a_lora_that_is_switched_off_is_the_base_model() {
    let app = TestApp::new(&[]);
    let base = json!({"prompt": "x", "size": "8x8", "seed": 3, "response_format": "b64_json"});
    let expected = app.post(base.clone()).await.file(0);
    for extra in [
        json!({"lora_path": "/path/to/custom_lora.safetensors", "lora_scale": 0.0}),
        json!({"lora_path": "", "lora_scale": 2.0}),
        json!({"lora_scale": 0.5}),
    ] {
        let mut body = base.clone();
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        assert_eq!(app.post(body).await.file(0), expected, "{extra}");
    }
}

/// Prompts that are too long are refused before anything is made of them.
#[tokio::test]
async fn long_prompts_are_refused_by_their_length() {
    let app = TestApp::new(&[]);
    let long = |text: &str| text.repeat(32_001);
    for (extra, param) in [
        (json!({"prompt": long("<"), "prompt_syntax": "a1111"}), "prompt"),
        (json!({"prompt": long("é")}), "prompt"),
        (json!({"prompt": "x", "negative_prompt": long("(")}), "negative_prompt"),
        (json!({"prompt": "<".repeat(300_000), "prompt_syntax": "a1111"}), "prompt"),
    ] {
        let mut body = json!({"size": "8x8"});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let (message, kind, found, _) = app.post(body).await.error(400);
        assert_eq!((kind.as_str(), found), ("invalid_request_error", json!(param)));
        assert!(message.contains("at most 32000 characters"), "{message}");
    }
    app.post(json!({"prompt": "é".repeat(32_000), "size": "8x8"})).await.ok();
}
