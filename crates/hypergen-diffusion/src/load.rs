//! From what a user names (or nothing) to a model that is ready to draw.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind, Generator, ModelInfo, Observer, Picture, Request};

/// The number type that a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DTypeChoice {
    /// bfloat16 where the machine multiplies it in hardware, else float32.
    #[default]
    Auto,
    /// Single precision: what diffusers draws by default.
    Float32,
    /// Half the memory, several times the speed where the hardware has it.
    Bfloat16,
    /// A GPU's type: on the CPU it is computed as bfloat16, with a warning.
    Float16,
}

impl DTypeChoice {
    /// All, as users type them.
    pub const ALL: [DTypeChoice; 4] = [Self::Auto, Self::Float32, Self::Bfloat16, Self::Float16];

    /// The name that users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

impl fmt::Display for DTypeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DTypeChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|d| d.name() == text).ok_or_else(|| {
            Error::new(
                ErrorKind::Request,
                format!("unknown dtype '{text}': use auto, float32, bfloat16 or float16"),
            )
        })
    }
}

/// How to load a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Number type of weights and activations.
    pub dtype: DTypeChoice,
    /// Threads that share the work; `None`: all that the process may use.
    pub threads: Option<usize>,
}

/// How far loading has come, in bytes of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes read and packed.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// A loaded model.
pub struct Pipeline {}

/// Loads a model: a folder in the diffusers layout, or the embedded model
/// where none is named. `progress` is called as the weights are packed.
///
/// # Errors
/// With [`ErrorKind::Model`]: the message names the file or tensor, what was
/// found and what was expected.
pub fn load(
    model: Option<&str>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Pipeline, Error> {
    let _ = (model, options, progress);
    Err(Error::new(ErrorKind::Model, "loading is not there yet"))
}

impl Generator for Pipeline {
    fn info(&self) -> ModelInfo {
        unreachable!("no pipeline can be loaded yet")
    }

    fn check(&self, _request: &Request) -> Result<(), Error> {
        Ok(())
    }

    fn generate(&mut self, _: &[Request], _: &mut dyn Observer) -> Result<Vec<Picture>, Error> {
        Err(Error::new(ErrorKind::Internal, "nothing to draw with yet"))
    }
}
