//! CLIP's tokenizer, which single files leave out: the merges of OpenAI's
//! `simple_tokenizer.py` (MIT), from which the vocabulary follows by rule, and
//! the settings of the published folders.

use std::borrow::Cow;
use std::io::Read;

use flate2::read::GzDecoder;
use serde_json::{Map, Value, json};

static MERGES: &[u8] = include_bytes!("../../assets/clip_merges.txt.gz");

const BEGIN: &str = "<|startoftext|>";
/// What CLIP itself pads with.
pub(super) const END: &str = "<|endoftext|>";
/// What Stable Diffusion 2.x and SDXL's second encoder pad with: id 0.
pub(super) const EXCLAMATION: &str = "!";

/// A file of a tokenizer's folder.
pub(super) fn file(name: &str, pad: &str) -> Option<Cow<'static, [u8]>> {
    match name {
        "merges.txt" => Some(merges().into_bytes().into()),
        "vocab.json" => Some(Value::Object(vocabulary(&merges())).to_string().into_bytes().into()),
        "tokenizer_config.json" => Some(settings(pad).to_string().into_bytes().into()),
        _ => None,
    }
}

fn merges() -> String {
    let mut text = String::new();
    // The asset is part of the program; were it damaged, the tokenizer would
    // miss its tokens and say so.
    let _ = GzDecoder::new(MERGES).read_to_string(&mut text);
    text
}

/// 256 bytes, the same at a word's end, the merged pairs, begin and end.
fn vocabulary(merges: &str) -> Map<String, Value> {
    // GPT-2's printable letters for all bytes: Latin-1 without its gaps, then from U+0100 on.
    let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144);
    let letters: Vec<String> = printable.filter_map(char::from_u32).map(String::from).collect();
    let ending = letters.iter().map(|letter| format!("{letter}</w>"));
    let merged = merges.lines().map(|pair| pair.replace(' ', ""));
    let special = [BEGIN, END].map(str::to_owned);
    let words = letters.iter().cloned().chain(ending).chain(merged).chain(special);
    words.enumerate().map(|(id, word)| (word, id.into())).collect()
}

/// Begin and end are found in capitals as well, as the published files say.
fn settings(pad: &str) -> Value {
    let token = |content: &str| json!({"content": content, "normalized": true});
    json!({
        "bos_token": token(BEGIN), "eos_token": token(END), "pad_token": pad, "model_max_length": 77,
        "added_tokens_decoder": {"49406": token(BEGIN), "49407": token(END)},
    })
}
