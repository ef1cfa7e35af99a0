//! Prompts as people write them: which syntax a prompt is in, and what the
//! text of it means, down to the tokens. Nothing here knows a network.

mod chunks;
mod parse;
#[cfg(test)]
mod properties;

use std::fmt;
use std::str::FromStr;

pub use chunks::{Chunk, chunks};
pub use parse::{Parsed, Part, parse};

use crate::ParameterError;

/// How a prompt's text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PromptSyntax {
    /// Every character is text, as in diffusers; what does not fit into the
    /// text encoder is cut.
    #[default]
    Plain,
    /// Weights, escapes, `BREAK`, LoRA tags and any length, as in AUTOMATIC1111's
    /// stable-diffusion-webui.
    A1111,
}

impl PromptSyntax {
    /// The parameter's name in the API.
    pub const NAME: &'static str = "prompt_syntax";
    /// All, the default first.
    pub const ALL: [PromptSyntax; 2] = [Self::Plain, Self::A1111];

    /// The name that users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::A1111 => "a1111",
        }
    }
}

impl fmt::Display for PromptSyntax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PromptSyntax {
    type Err = ParameterError;

    fn from_str(text: &str) -> Result<Self, ParameterError> {
        Self::ALL.into_iter().find(|s| s.name() == text).ok_or_else(|| ParameterError {
            param: Self::NAME,
            message: format!("unknown prompt syntax '{text}': use plain or a1111"),
        })
    }
}

/// A LoRA that a prompt asks for: `<lora:NAME:SCALE>`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTag {
    /// As it was written; never empty.
    pub name: String,
    /// Finite; 1 where the tag names none.
    pub scale: f64,
}
