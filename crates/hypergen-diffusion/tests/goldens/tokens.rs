//! Token ids against transformers' `CLIPTokenizer`, with CLIP's true
//! vocabulary from `assets/` and with the embedded model's.

use std::fs;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use hypergen_diffusion::files::ModelFiles;
use hypergen_diffusion::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use crate::checkpoint::{repository, write_json};
use crate::fixture;

/// CLIP's merges, as the asset keeps them.
pub(crate) fn merges() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/clip_merges.txt.gz");
    let mut text = String::new();
    GzDecoder::new(fs::File::open(path).expect("the asset"))
        .read_to_string(&mut text)
        .expect("gzip of UTF-8");
    text
}

/// The vocabulary that follows from the merges: 256 bytes, the same at a
/// word's end, the merged pairs, begin and end.
pub(crate) fn vocabulary(merges: &str) -> Map<String, Value> {
    let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff);
    let letters: Vec<char> = printable.chain(0x100..0x100 + 68).filter_map(char::from_u32).collect();
    assert_eq!(letters.len(), 256);
    let plain = letters.iter().map(char::to_string);
    let ending = letters.iter().map(|c| format!("{c}</w>"));
    let merged = merges.lines().map(|line| line.replace(' ', ""));
    let special = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    let words = plain.chain(ending).chain(merged).chain(special);
    words.enumerate().map(|(id, word)| (word, id.into())).collect()
}

fn check(tokenizer: &Tokenizer, name: &str, golden: &Value, prompts: &[Value]) {
    let length = golden["length"].as_u64().unwrap() as usize;
    assert_eq!(tokenizer.length(), length);
    let pad = golden["pad"].as_u64().unwrap() as u32;
    let mut wrong = vec![];
    for (prompt, ids) in prompts.iter().zip(golden["ids"].as_array().unwrap()) {
        let mut expected: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
        expected.resize(length, pad);
        let tokens = tokenizer.encode(prompt.as_str().unwrap()).expect("ids");
        if tokens.ids != expected {
            wrong.push(format!("{prompt}\n  ours     {:?}\n  expected {expected:?}", tokens.ids));
        }
    }
    assert!(
        wrong.is_empty(),
        "{name}: {} of {} prompts differ:\n{}",
        wrong.len(),
        prompts.len(),
        wrong.join("\n")
    );
}

#[test]
fn the_asset_is_clips_vocabulary() {
    let vocabulary = vocabulary(&merges());
    assert_eq!(vocabulary.len(), 49408);
    // Ids that every published tokenizer has.
    for (word, id) in
        [("!", 0), ("a</w>", 320), ("photo</w>", 1125), ("cat</w>", 2368), ("<|endoftext|>", 49407)]
    {
        assert_eq!(vocabulary[word], id, "{word}");
    }
}

/// Padding with the end token and with "!", named in the configuration or, as
/// Stable Diffusion 2 has it, in the older `special_tokens_map.json` only.
#[test]
fn ids_are_those_of_transformers() {
    let goldens = fixture::json("tokens.json");
    let merges = merges();
    let vocabulary = Value::Object(vocabulary(&merges));
    for (name, files) in goldens["files"].as_object().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        write_json(&folder.path().join("model_index.json"), &json!({}));
        let part = folder.path().join("tokenizer");
        write_json(&part.join("vocab.json"), &vocabulary);
        fs::write(part.join("merges.txt"), format!("#version: 0.2\n{merges}")).unwrap();
        for (file, content) in files.as_object().unwrap() {
            write_json(&part.join(file), content);
        }
        let model = ModelFiles::at(folder.path()).expect("a model's folder");
        let tokenizer = Tokenizer::load(&model, "tokenizer", 77, 49408).expect("a tokenizer");
        check(&tokenizer, name, &goldens["ids"][name], goldens["prompts"].as_array().unwrap());
    }
}

#[test]
fn ids_of_the_embedded_model_are_those_of_transformers() {
    let goldens = fixture::json("tokens.json");
    let model = ModelFiles::at(&repository().join("models/emoji")).expect("the embedded model's folder");
    let tokenizer = Tokenizer::load(&model, "tokenizer", 32, 4316).expect("a tokenizer");
    check(&tokenizer, "emoji", &goldens["ids"]["emoji"], goldens["prompts"].as_array().unwrap());
}

/// What a user is told of a prompt that was cut begins where the cut is.
#[test]
fn a_cut_prompt_says_what_was_lost() {
    let model = ModelFiles::at(&repository().join("models/emoji")).expect("the embedded model's folder");
    let tokenizer = Tokenizer::load(&model, "tokenizer", 32, 4316).expect("a tokenizer");
    let words = ["red apple"; 20].join(" ");
    let lost = tokenizer.encode(&words).expect("ids").truncated.expect("a cut prompt");
    assert!(words.ends_with(&lost) && !lost.is_empty(), "{lost}");
    assert_eq!(tokenizer.encode("red apple").expect("ids").truncated, None);
}
