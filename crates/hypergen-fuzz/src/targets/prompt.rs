//! A prompt, in every syntax, down to its tokens.

use std::sync::LazyLock;

use hypergen_diffusion::files::ModelFiles;
use hypergen_diffusion::prompt::{Parsed, Part, chunks, parse};
use hypergen_diffusion::tokenizer::Tokenizer;
use hypergen_diffusion::{Error, ErrorKind};

use crate::check_message;

/// The embedded model's tokenizer, and how many ids it may give.
static TOKENIZER: LazyLock<(Tokenizer, usize)> = LazyLock::new(|| {
    let config = ModelFiles::Embedded.json("text_encoder/config.json").expect("embedded");
    let number = |field: &str| config[field].as_u64().expect("a number") as usize;
    let vocab = number("vocab_size");
    let positions = number("max_position_embeddings");
    (Tokenizer::load(&ModelFiles::Embedded, "tokenizer", positions, vocab).expect("embedded"), vocab)
});

/// The name that errors have to name.
const PARAM: &str = "negative_prompt";

/// Reads the tokenizer.
pub(crate) fn prepare() {
    LazyLock::force(&TOKENIZER);
}

/// The input is the prompt; what is no UTF-8 in it is replaced, as no such text
/// gets this far.
pub(crate) fn read(data: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(data);
    plain(&text);
    match parse(PARAM, &text) {
        Err(error) => {
            assert_eq!(error.param, PARAM);
            check(&Error::from(error).message);
        }
        Ok(parsed) => {
            weighted(&parsed);
            reads_back(&parsed);
        }
    }
    text.len() as u64
}

/// A prompt may hold line ends, and messages repeat some of it.
fn check(message: &str) {
    check_message(message, &[PARAM]);
}

fn is_framed(ids: &[u32]) {
    let (tokenizer, vocab) = &*TOKENIZER;
    assert_eq!(ids.len(), tokenizer.length());
    assert!(ids.iter().all(|&id| (id as usize) < *vocab));
}

fn plain(text: &str) {
    let tokenizer = &TOKENIZER.0;
    let tokens = tokenizer.encode(text).expect("any text has tokens");
    is_framed(&tokens.ids);
    let words = tokenizer.words(text).expect("any text has tokens");
    assert_eq!(tokens.truncated.is_some(), words.len() > tokenizer.room());
    assert_eq!(
        tokens.ids[1..][..words.len().min(tokenizer.room())],
        words[..words.len().min(tokenizer.room())]
    );
}

fn weighted(parsed: &Parsed) {
    for part in &parsed.parts {
        if let Part::Text { weight, .. } = part {
            assert!((*weight as f32).is_finite(), "{part:?}");
        }
    }
    for tag in &parsed.loras {
        assert!(tag.scale.is_finite() && !tag.name.trim().is_empty(), "{tag:?}");
    }
    match chunks(PARAM, &parsed.parts, &TOKENIZER.0) {
        Ok(chunks) => {
            assert!(!chunks.is_empty());
            for chunk in &chunks {
                is_framed(&chunk.ids);
                assert_eq!(chunk.weights.len(), chunk.ids.len());
                assert!(chunk.weights.iter().all(|weight| weight.is_finite()));
            }
        }
        Err(Error { kind, param, message }) => {
            assert_eq!((kind, param), (ErrorKind::Request, Some(PARAM)));
            check(&message);
        }
    }
}

/// Writes the parts down again in the syntax. Reading that gives them back.
fn reads_back(parsed: &Parsed) {
    let mut written = String::new();
    for part in &parsed.parts {
        match part {
            Part::Break => written.push_str(" BREAK "),
            Part::Text { text, .. } if text.is_empty() => {}
            Part::Text { text, weight } => {
                written.push('(');
                for c in text.chars() {
                    if matches!(c, '(' | ')' | '[' | ']' | '\\') {
                        written.push('\\');
                    }
                    written.push(c);
                }
                written.push_str(&format!(":{weight})"));
            }
        }
    }
    // Words that an escape kept apart stand for something where nothing does.
    let means_something = |text: &str| ["AND", "BREAK", "<"].iter().any(|word| text.contains(word));
    let texts = |parts: &[Part]| parts.iter().filter_map(text_of).collect::<Vec<_>>();
    if parsed.parts.iter().filter_map(text_of).any(|(text, _)| means_something(&text)) {
        return;
    }
    let again = parse(PARAM, &written).unwrap_or_else(|e| panic!("{written:?}: {e}"));
    assert_eq!(texts(&joined(&again.parts)), texts(&joined(&parsed.parts)), "{written:?}");
}

fn text_of(part: &Part) -> Option<(String, f64)> {
    match part {
        Part::Text { text, weight } => Some((text.clone(), *weight)),
        Part::Break => None,
    }
}

/// Without empty texts, and neighbours of one weight as one.
fn joined(parts: &[Part]) -> Vec<Part> {
    let mut joined: Vec<Part> = vec![];
    for part in parts {
        match (joined.last_mut(), part) {
            (_, Part::Text { text, .. }) if text.is_empty() => {}
            (Some(Part::Text { text, weight }), Part::Text { text: more, weight: same })
                if weight == same =>
            {
                text.push_str(more);
            }
            _ => joined.push(part.clone()),
        }
    }
    joined
}
