//! Token ids against transformers' `CLIPTokenizer`, with CLIP's true
//! vocabulary from `assets/` and with the embedded model's.

use std::fs;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use hypergen_diffusion::files::ModelFiles;
use hypergen_diffusion::prompt;
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

/// Tokens that were added to a vocabulary, in each of the files that may say
/// so, with all their flags; those of several vectors are written out.
#[test]
fn ids_of_added_tokens_are_those_of_diffusers() {
    let goldens = &fixture::json("tokens.json")["added"];
    let merges = merges();
    let vocabulary = Value::Object(vocabulary(&merges));
    for (name, row) in goldens["tokenizers"].as_object().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("tokenizer");
        write_json(&folder.path().join("model_index.json"), &json!({}));
        let (positions, embeddings) = match row["files"].get("tokenizer.json") {
            None => {
                write_json(&part.join("vocab.json"), &vocabulary);
                fs::write(part.join("merges.txt"), format!("#version: 0.2\n{merges}")).unwrap();
                write_json(&part.join("tokenizer_config.json"), &json!({"model_max_length": 77}));
                (77, 49414)
            }
            Some(_) => {
                fs::create_dir_all(&part).unwrap();
                for file in ["tokenizer.json", "tokenizer_config.json"] {
                    fs::copy(repository().join("models/emoji/tokenizer").join(file), part.join(file))
                        .unwrap();
                }
                (32, 4321)
            }
        };
        for (file, content) in row["files"].as_object().unwrap() {
            let path = part.join(file);
            let whole = fs::read(&path).map_or(json!({}), |text| serde_json::from_slice(&text).unwrap());
            write_json(&path, &merged(whole, content));
        }
        let model = ModelFiles::at(folder.path()).expect("a model's folder");
        let tokenizer = Tokenizer::load(&model, "tokenizer", positions, embeddings).expect("a tokenizer");
        check(&tokenizer, name, row, goldens["prompts"].as_array().unwrap());
        // In the other syntax, too.
        let parsed = prompt::parse("prompt", "a (photo of <cat-toy>:1.2)").expect("fine");
        let chunk = prompt::chunks("prompt", &parsed.parts, &tokenizer).expect("chunks").remove(0);
        let plain = tokenizer.encode("a photo of <cat-toy>").expect("ids").ids;
        assert_eq!(chunk.ids, plain, "{name}");
    }
}

/// A file with more in it: a list is one of further added tokens.
fn merged(mut whole: Value, content: &Value) -> Value {
    match content {
        Value::Array(tokens) => {
            whole["added_tokens"].as_array_mut().expect("a list").extend(tokens.iter().cloned());
        }
        _ => whole.as_object_mut().unwrap().extend(content.as_object().unwrap().clone()),
    }
    whole
}

/// Tokens that cannot have the ids that the files give them, or whose files
/// make no sense.
#[test]
fn added_tokens_that_make_no_sense_are_refused_by_name() {
    let token = |content: &str| json!({"content": content, "normalized": true, "special": false});
    let decoder = |id: &str, token: Value| json!({"added_tokens_decoder": {id: token}});
    let many: serde_json::Map<String, Value> =
        (0..10_001).map(|i| (format!("<t{i}>"), json!(4316 + i))).collect();
    let long = "x".repeat(2000);
    for (file, content, words) in [
        ("added_tokens.json", json!({"<a>": 4316, "<b>": 4318}), "'<b>' has id 4318, but 4317 is its place"),
        ("added_tokens.json", json!({"<a>": 4316, "<b>": 4316}), "one id to several"),
        ("added_tokens.json", json!({"<a>": "4316"}), "it maps '<a>' to \"4316\""),
        ("added_tokens.json", json!({"<a>": -1}), "it maps '<a>' to -1"),
        ("added_tokens.json", json!({"<a>": 4_294_967_296_u64}), "it maps '<a>' to 4294967296"),
        ("added_tokens.json", Value::Object(many), "at most 10000"),
        ("added_tokens.json", json!({long: 4316}), "more than 1000 bytes"),
        ("added_tokens.json", json!([]), "does not hold a JSON object"),
        ("tokenizer_config.json", decoder("5", token("<a>")), "'<a>' has id 5, but 4316 is its place"),
        ("tokenizer_config.json", decoder("x", token("<a>")), "maps 'x' to"),
        ("tokenizer_config.json", decoder("4316", json!("<a>")), "maps '4316' to \"<a>\""),
        ("tokenizer_config.json", decoder("4316", json!({"lstrip": true})), "maps '4316' to {"),
        ("tokenizer_config.json", decoder("5000", token("<a>")), "'<a>' has id 5000"),
        ("tokenizer.json", json!([{"id": 4316}]), "has no id or no text"),
        ("tokenizer.json", json!([{"id": 5000, "content": "<a>"}]), "'<a>' has id 5000, but 4316"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("tokenizer");
        write_json(&folder.path().join("model_index.json"), &json!({}));
        for name in ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"] {
            if name == "tokenizer.json" && file == "added_tokens.json" {
                continue;
            }
            fs::create_dir_all(&part).unwrap();
            fs::copy(repository().join("models/emoji/tokenizer").join(name), part.join(name)).unwrap();
        }
        let path = part.join(file);
        let whole = fs::read(&path).map_or(json!({}), |text| serde_json::from_slice(&text).unwrap());
        let plain_list = file == "added_tokens.json" && content.is_array();
        write_json(&path, &if plain_list { content } else { merged(whole, &content) });
        let model = ModelFiles::at(folder.path()).expect("a model's folder");
        let error = Tokenizer::load(&model, "tokenizer", 32, 4400).err().expect(words);
        assert!(error.message.contains(words) && error.message.contains(file), "{error}, not {words}");
        assert!(error.message.len() < 400, "{error}");
    }
    // A token without an embedding.
    let model = ModelFiles::at(&repository().join("models/emoji")).expect("the embedded model's folder");
    assert!(
        Tokenizer::load(&model, "tokenizer", 32, 4315)
            .err()
            .expect("one is missing")
            .message
            .contains("4315")
    );
}

/// The longest prompts that are let through, of one character each, and one
/// word of all of them: neither takes a time that grows with its square.
#[test]
fn long_prompts_of_one_character_are_tokenized() {
    let model = ModelFiles::at(&repository().join("models/emoji")).expect("the embedded model's folder");
    let tokenizer = Tokenizer::load(&model, "tokenizer", 32, 4316).expect("a tokenizer");
    for piece in ["a", "!", " ", "<", "日", "\u{301}", "'", "\\", "ab", "a ", "<|endoftext|>"] {
        let text = piece.repeat(hypergen_diffusion::MAX_PROMPT / piece.chars().count());
        let tokens = tokenizer.encode(&text).expect("ids");
        assert_eq!(tokens.ids.len(), 32, "{piece}");
        assert_eq!(tokens.truncated.is_some(), piece != " ", "{piece}");
    }
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
