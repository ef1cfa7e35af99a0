//! Embeddings that a LoRA file brings along (`bundle_emb.NAME...`): vectors
//! that stand for a word of the prompt while the LoRA is applied, as in
//! AUTOMATIC1111's stable-diffusion-webui. A request's scale is not for them.

use super::adapter::Fault;
use super::bind::Targets;
use super::clipped;
use super::file::LoraFile;
use super::names::Component;

/// Vectors that stand for a word, for one text encoder.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Embedding {
    /// The word, as a prompt has it.
    pub(crate) word: String,
    /// The text encoder.
    pub(crate) component: Component,
    /// How many vectors there are, each taking the place of a token.
    pub(crate) count: usize,
    /// `[count, width]`.
    pub(crate) values: Vec<f32>,
}

/// No embedding has more vectors than a prompt has tokens.
const MAX_VECTORS: usize = 75;
/// More words than these are no embeddings of one LoRA.
const MAX_WORDS: usize = 256;

/// The embeddings of a file, for a model's text encoders.
pub(super) fn embeddings(file: &LoraFile, targets: &Targets) -> Result<Vec<Embedding>, Fault> {
    if file.embeddings.len() > MAX_WORDS {
        let message =
            format!("it brings {} embeddings, and at most {MAX_WORDS} are read", file.embeddings.len());
        return Err(Fault::Other(message));
    }
    let widths = [Component::Text, Component::Text2].map(|c| targets.text_width(c));
    // Shapes first, then values.
    let mut found = vec![];
    for (word, vectors) in &file.embeddings {
        let names: Vec<&str> = vectors.keys().map(String::as_str).collect();
        let keys: Vec<&String> = vectors.values().collect();
        let both = match (widths, names.as_slice()) {
            ([Some(first), Some(second)], ["clip_g", "clip_l"]) => {
                vec![(Component::Text2, keys[0], second), (Component::Text, keys[1], first)]
            }
            ([Some(width), None], [_]) => vec![(Component::Text, keys[0], width)],
            ([_, second], _) => {
                let wanted = match second {
                    Some(_) => "one tensor 'clip_l' and one 'clip_g'",
                    None => "one tensor",
                };
                return Err(Fault::Shape(format!(
                    "its embedding '{}' has the tensors {}, and for this model it has to have {wanted}",
                    clipped(word),
                    super::some_of(&names)
                )));
            }
        };
        let mut counts = vec![];
        for (component, key, width) in both {
            let count = count(file, key, width)?;
            counts.push(count);
            found.push((word, component, key, count));
        }
        if counts.iter().any(|c| *c != counts[0]) {
            return Err(Fault::Other(format!(
                "its embedding '{}' has {} vectors for one text encoder and {} for the other",
                clipped(word),
                counts[1],
                counts[0]
            )));
        }
    }
    found
        .into_iter()
        .map(|(word, component, key, count)| {
            Ok(Embedding { word: word.clone(), component, count, values: file.floats(key)? })
        })
        .collect()
}

/// The number of vectors of a tensor, `[count, width]` or `[width]`.
fn count(file: &LoraFile, key: &str, width: usize) -> Result<usize, Fault> {
    let shape = file.checkpoint.get(key).map(|t| t.shape.as_slice()).unwrap_or_default();
    match *shape {
        [w] if w == width => Ok(1),
        [count @ 1..=MAX_VECTORS, w] if w == width => Ok(count),
        _ => Err(Fault::Shape(format!(
            "'{}' has shape {:?}, which is not 1 to {MAX_VECTORS} vectors of the text encoder's {width} values",
            clipped(key),
            &shape[..shape.len().min(8)]
        ))),
    }
}
