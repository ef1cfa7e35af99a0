//! Parsed text to chunks of what one pass of a text encoder holds: begin, 75
//! tokens, end and padding, with a weight for each token.
//!
//! A chunk that is full ends after its last comma, if that is no more than
//! [`BACKTRACK`] tokens back: what belongs together stays together. That is
//! A1111's default, and it is not a setting here.

use super::Part;
use crate::tokenizer::Tokenizer;
use crate::{Error, ParameterError};

/// How far back a chunk may end for the sake of a comma, in tokens.
const BACKTRACK: usize = 20;
/// Chunks of one prompt. 32 are 2,400 tokens; each makes every step slower.
const MAX_CHUNKS: usize = 32;

/// What a text encoder sees at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// [`Tokenizer::length`] ids.
    pub ids: Vec<u32>,
    /// One for each id; 1 for begin, end and padding.
    pub weights: Vec<f32>,
}

/// Cuts a prompt into chunks, at least one.
///
/// # Errors
/// When there are too many, naming `param`; by [`Tokenizer::words`].
pub fn chunks(param: &'static str, parts: &[Part], tokenizer: &Tokenizer) -> Result<Vec<Chunk>, Error> {
    let mut cutter = Cutter { tokenizer, done: vec![], ids: vec![], weights: vec![], comma: None };
    for part in parts {
        match part {
            Part::Break => cutter.finish(),
            Part::Text { text, weight } => {
                tokenizer.words(text)?.into_iter().for_each(|id| cutter.take(id, *weight as f32));
            }
        }
        // What no picture will be drawn of need not be tokenized.
        if cutter.done.len() > MAX_CHUNKS {
            break;
        }
    }
    if !cutter.ids.is_empty() || cutter.done.is_empty() {
        cutter.finish();
    }
    if cutter.done.len() > MAX_CHUNKS {
        return Err(Error::from(ParameterError {
            param,
            message: format!(
                "{param} needs more than {MAX_CHUNKS} chunks of {} tokens, which is all that a prompt may have",
                tokenizer.room()
            ),
        }));
    }
    Ok(cutter.done)
}

struct Cutter<'a> {
    tokenizer: &'a Tokenizer,
    done: Vec<Chunk>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Place of the last comma in `ids`.
    comma: Option<usize>,
}

impl Cutter<'_> {
    fn take(&mut self, id: u32, weight: f32) {
        let full = self.ids.len() == self.tokenizer.room();
        let is_comma = Some(id) == self.tokenizer.comma();
        if let (true, false, Some(comma)) = (full, is_comma, self.comma)
            && self.ids.len() - comma <= BACKTRACK
        {
            let (ids, weights) = (self.ids.split_off(comma + 1), self.weights.split_off(comma + 1));
            self.finish();
            (self.ids, self.weights) = (ids, weights);
        } else if full {
            self.finish();
        }
        if is_comma {
            self.comma = Some(self.ids.len());
        }
        self.ids.push(id);
        self.weights.push(weight);
    }

    fn finish(&mut self) {
        let mut weights = vec![1.0; self.tokenizer.length()];
        weights[1..=self.weights.len()].copy_from_slice(&self.weights);
        self.done.push(Chunk { ids: self.tokenizer.frame(&self.ids), weights });
        self.ids.clear();
        self.weights.clear();
        self.comma = None;
    }
}
