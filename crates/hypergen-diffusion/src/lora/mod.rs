//! LoRA and its kin: files of small changes to a loaded model's weights.
//!
//! `file` reads a file in whichever of the public formats it is, `names` knows
//! how those formats call tensors and modules, and `settings` what trainers write
//! beside them, with `patterns` of modules; `adapter` turns one module's
//! tensors into a change of it and `bind` a whole file into changes of one
//! model's weights, `embeddings` are the words that a file may bring along, and
//! `adapters` applies all that for a request and takes it off again, as long as
//! the files' `stamp`s stay; `library` finds files. What a file holds and we do
//! not apply is an error, never a weaker effect. `docs/lora.md` tells users of it.
//!
//! A change is merged: weight and change are added up in float32 and packed as
//! the weight itself was. The loaded weights stay, so that going back to them
//! is an exchange of pointers.

mod adapter;
mod adapters;
pub(crate) mod bench;
mod bind;
mod embeddings;
mod file;
mod library;
mod names;
mod patterns;
mod settings;
mod stamp;

use std::path::PathBuf;

pub(crate) use adapters::{Adapters, DEFAULT_CACHE};
pub(crate) use bind::{Part, Targets};
pub(crate) use embeddings::Embedding;
pub use file::{LoraInfo, inspect};
pub use library::{LoraEntry, LoraLibrary};
pub(crate) use names::Component;

use crate::{Error, ErrorKind};

/// A LoRA of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// What the user calls it, for messages.
    pub name: String,
    /// The file, as the user named it: its ending says what it is, and its
    /// settings may lie beside it, also where it is a link.
    pub path: PathBuf,
    /// Strength: 1 as it was trained, 0 not at all.
    pub scale: f64,
}

/// The request's parameter that every error here is about.
pub const PARAM: &str = "lora_path";

/// An error about a LoRA.
fn lora_error(message: String) -> Error {
    Error { param: Some(PARAM), ..Error::new(ErrorKind::Model, message) }
}

/// Names in a message: a few of them, and how many more there are.
fn some_of(names: &[impl AsRef<str>]) -> String {
    /// Enough to see a pattern.
    const SHOWN: usize = 4;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("'{}'", clipped(n.as_ref()))).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A name in a message. No name in a real file is longer.
fn clipped(name: &str) -> String {
    const LENGTH: usize = 160;
    match name.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}
