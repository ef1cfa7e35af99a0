//! What requests may say beyond the defaults, against diffusers: prompts in
//! the A1111 syntax (by an independent implementation over transformers'
//! encoders), skipped layers, rescaled guidance, SDXL's sizes.

use std::fs;

use hypergen_diffusion::files::ModelFiles;
use hypergen_diffusion::prompt::{self, LoraTag, PromptSyntax};
use hypergen_diffusion::tokenizer::Tokenizer;
use hypergen_diffusion::{DTypeChoice, ErrorKind, Extent, Generator, Request, Silent};
use serde_json::{Value, json};

use crate::checkpoint::write_json;
use crate::fixture;
use crate::pipelines::{Goldens, check};
use crate::tokens::{merges, vocabulary};

#[test]
fn stable_diffusion_1_does_what_a_request_says() {
    check("prompts", "sd1");
}

#[test]
fn stable_diffusion_2_does_what_a_request_says() {
    check("prompts", "sd2");
}

#[test]
fn sdxl_does_what_a_request_says() {
    check("prompts", "sdxl");
}

#[test]
fn the_emoji_model_does_what_a_request_says() {
    check("prompts", "emoji");
}

fn clip(pad: &str) -> Tokenizer {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let merges = merges();
    let part = folder.path().join("tokenizer");
    write_json(&folder.path().join("model_index.json"), &json!({}));
    write_json(&part.join("vocab.json"), &Value::Object(vocabulary(&merges)));
    fs::write(part.join("merges.txt"), format!("#version: 0.2\n{merges}")).expect("merges.txt");
    write_json(&part.join("tokenizer_config.json"), &json!({"model_max_length": 77, "pad_token": pad}));
    let model = ModelFiles::at(folder.path()).expect("a model's folder");
    Tokenizer::load(&model, "tokenizer", 77, 49408).expect("a tokenizer")
}

/// Tokens and weights of every chunk, with CLIP's own vocabulary.
#[test]
fn chunks_are_those_of_the_reference() {
    let fixture = fixture::json("prompts.json");
    let tokenizers = [("eos", clip("<|endoftext|>")), ("exclamation", clip("!"))];
    let mut wrong = vec![];
    for row in fixture["read"].as_array().expect("rows") {
        let tokenizer = &tokenizers.iter().find(|(name, _)| row["padding"] == *name).expect("a padding").1;
        let pad = row["pad"].as_u64().expect("an id") as u32;
        let text = row["prompt"].as_str().expect("a prompt");
        let golden: Vec<(Vec<u32>, Vec<f32>)> =
            serde_json::from_value(row["chunks"].clone()).expect("ids and weights");
        let parts = prompt::parse("prompt", text).expect(text).parts;
        let chunks = prompt::chunks("prompt", &parts, tokenizer).expect(text);
        let same = chunks.len() == golden.len()
            && chunks.iter().zip(golden).all(|(chunk, (mut ids, mut weights))| {
                ids.resize(77, pad);
                weights.resize(77, 1.0);
                chunk.ids == ids && chunk.weights == weights
            });
        if !same {
            wrong.push(format!("{text}\n  {chunks:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} prompts are read otherwise:\n{}", wrong.len(), wrong.join("\n"));
}

/// Where no character means anything, both syntaxes are the same.
#[test]
fn plain_text_has_the_same_tokens_in_both_syntaxes() {
    let tokenizer = clip("<|endoftext|>");
    let mut same = 0;
    for text in fixture::json("tokens.json")["prompts"].as_array().expect("prompts") {
        let text = text.as_str().expect("a prompt");
        let special = text.contains(['(', ')', '[', ']', '\\']);
        if special || tokenizer.words(text).expect("ids").len() > tokenizer.room() {
            continue;
        }
        let parts = prompt::parse("prompt", text).expect(text).parts;
        let chunks = prompt::chunks("prompt", &parts, &tokenizer).expect(text);
        assert_eq!(chunks.len(), 1, "{text}");
        assert_eq!(chunks[0].ids, tokenizer.encode(text).expect("ids").ids, "{text}");
        assert!(chunks[0].weights.iter().all(|&w| w == 1.0), "{text}");
        same += 1;
    }
    assert!(same > 50, "{same} prompts say little");
}

/// Whatever cannot be drawn is refused before anything is computed, by the
/// parameter's name.
#[test]
fn what_cannot_be_drawn_is_refused_by_name() {
    let goldens = Goldens::read();
    let model = goldens.load(&goldens.cases["sd1_own"], DTypeChoice::Float32, 1);
    let a1111 = |prompt: &str| Request { prompt_syntax: PromptSyntax::A1111, ..Request::new(prompt) };
    let negative = |text: &str| Request { negative_prompt: Some(text.into()), ..a1111("x") };
    let mut sizes = Request::new("x");
    sizes.sizes.target_size = Some(Extent { width: 64, height: 64 });
    for (request, param, words) in [
        (a1111("[a:b:0.5]"), "prompt", "prompt editing"),
        (negative("a AND b"), "negative_prompt", "AND"),
        (negative("<lora:x:1>"), "negative_prompt", "belongs into the prompt"),
        (a1111(&"word BREAK ".repeat(40)), "prompt", "more than 32 chunks of 75 tokens"),
        (Request::new("é".repeat(32_001)), "prompt", "at most 32000 characters, but has 32001"),
        (negative(&"(".repeat(1 << 20)), "negative_prompt", "at most 32000 characters, but has 1048576"),
        (Request { clip_skip: 4, ..Request::new("x") }, "clip_skip", "between 0 and 3"),
        (Request { guidance_rescale: 1.5, ..Request::new("x") }, "guidance_rescale", "between 0 and 1"),
        (sizes, "original_size", "SDXL"),
    ] {
        let error = model.pipeline.check(&request).expect_err(words);
        assert_eq!((error.kind, error.param), (ErrorKind::Request, Some(param)), "{error}");
        assert!(error.message.contains(words), "{error}");
    }
    assert_eq!(model.pipeline.check(&Request { clip_skip: 3, ..a1111("(x:1.2) \\[y\\]") }), Ok(()));
}

#[test]
fn lora_tags_are_read_in_the_a1111_syntax_alone() {
    let mut request = Request::new("a fox <lora:oil:0.8>");
    assert_eq!(request.lora_tags(), Ok(vec![]));
    request.prompt_syntax = PromptSyntax::A1111;
    assert_eq!(request.lora_tags(), Ok(vec![LoraTag { name: "oil".into(), scale: 0.8 }]));
}

/// Prompts may have different numbers of chunks, and share forward passes all the same.
#[test]
fn a_batch_of_weighted_prompts_equals_single_requests_bit_for_bit() {
    let goldens = Goldens::named("prompts");
    for name in ["sd1_long", "sdxl_rescale", "sdxl_negative_sizes"] {
        let case = &goldens.cases[name];
        let first = case.request();
        let second = Request { seed: first.seed + 1, ..first.clone() };
        let third = Request { prompt: "another".into(), guidance_scale: 1.0, ..first.clone() };
        let requests = [first, second, third];
        let mut model = goldens.load(case, DTypeChoice::Bfloat16, 2);
        let batch = model.pipeline.generate(&requests, &mut Silent).expect("a batch");
        for (request, picture) in requests.iter().zip(&batch) {
            assert_eq!(model.draw(request).1, picture.rgb, "{name}");
        }
        assert_ne!(batch[0].rgb, batch[1].rgb);
    }
}
