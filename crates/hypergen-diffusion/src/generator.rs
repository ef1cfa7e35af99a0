//! The whole contract between whoever asks for pictures and whatever draws
//! them, on one page.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::lora::Lora;
use crate::request::{GUIDANCE_SCALE, ParameterError, Range, Request, Size};
use crate::session::{Fixed, Session};

/// A finished picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Width and height.
    pub size: Size,
    /// 8-bit RGB, rows from top to bottom, `3 * width * height` bytes.
    pub rgb: Vec<u8>,
    /// What the user should know, a sentence each (a truncated prompt, say).
    pub warnings: Vec<String>,
}

/// What a loaded model is, for people and programs that look.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// Name as the user gave it, or the embedded model's.
    pub name: String,
    /// Family in words: `Stable Diffusion 1.x`, `SDXL`.
    pub family: String,
    /// Size that the model was trained for.
    pub native_size: Size,
    /// The sampler that the checkpoint names, with a remark where it cannot be used.
    pub sampler: String,
    /// `cpu`.
    pub device: String,
    /// Instruction set in use: `amx-bf16`, `avx512`, `avx2`, `portable`.
    pub isa: String,
    /// `float32` or `bfloat16`.
    pub dtype: String,
    /// Threads that share the work.
    pub threads: usize,
    /// Memory that the weights take, in bytes.
    pub weight_bytes: usize,
    /// Steps where a request gives none, if the model has its own (distilled ones).
    pub default_steps: Option<usize>,
    /// Guidance where a request gives none, if the model has its own.
    pub default_guidance: Option<f64>,
    /// Smallest guidance scale that the model takes: 1, or 0 for distilled ones.
    pub min_guidance: f64,
}

impl ModelInfo {
    /// Checks a guidance scale that a user gave as `name`.
    ///
    /// # Errors
    /// When the model does not take it. For 0, which distilled models alone take,
    /// the message says as what this one was recognised, and what changes that.
    pub fn check_guidance(&self, name: &'static str, scale: f64) -> Result<f64, ParameterError> {
        let range = Range { name, min: self.min_guidance, ..GUIDANCE_SCALE };
        range.check(scale).map_err(|e| match scale >= 0.0 && scale < self.min_guidance {
            true => ParameterError { message: format!("{}; {}", e.message, self.guidance_hint()), ..e },
            false => e,
        })
    }

    /// What to do where a distilled model was taken for another.
    pub fn guidance_hint(&self) -> String {
        format!(
            "this model was recognised as {}. A distilled one (Turbo, Lightning, LCM), which draws without guidance, is \
             recognised by its file's name (xl_turbo, xl_lightning, sd_turbo), by its scheduler_config.json, or by \
             --family (HYPERGEN_FAMILY), such as --family sdxl-turbo",
            self.family
        )
    }
}

/// Parts of a generation that take time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Tokenizing and encoding the prompts.
    Text,
    /// One evaluation of the network, both halves of guidance included.
    Step,
    /// Latents to pixels.
    Decode,
}

/// Watches a generation, and may stop it. All methods have harmless defaults.
pub trait Observer {
    /// A stage has ended. For [`Stage::Step`], `index` of `count` evaluations of the network
    /// are done, and for [`Stage::Decode`] of the pictures; for the text both are 1.
    fn stage(&mut self, stage: Stage, index: usize, count: usize, elapsed: Duration) {
        let _ = (stage, index, count, elapsed);
    }

    /// Asked before the text, before each step and before decoding: is
    /// request `index` of the batch no longer wanted? When none is, the
    /// generation stops there.
    fn cancelled(&mut self, index: usize) -> bool {
        let _ = index;
        false
    }
}

/// An observer that does nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Observer for Silent {}

/// What a model can do, apart from the model itself: any thread may ask it
/// while the model draws.
pub trait Check: Send + Sync {
    /// Checks a request against what the model can do (sampler, size,
    /// guidance) without drawing it.
    ///
    /// # Errors
    /// With [`ErrorKind::Request`], or with [`ErrorKind::OutOfMemory`] for a
    /// picture that this machine can never hold.
    fn check(&self, request: &Request) -> Result<(), Error>;
}

/// Something that draws pictures: a loaded model, a fake in a test, or one
/// day a remote worker.
pub trait Generator: Send {
    /// What it is.
    fn info(&self) -> ModelInfo;

    /// What checks requests for this model. It stays right for the model's whole life.
    fn checker(&self) -> Arc<dyn Check>;

    /// Checks a request: see [`Check::check`].
    ///
    /// # Errors
    /// As [`Check::check`].
    fn check(&self, request: &Request) -> Result<(), Error> {
        self.checker().check(request)
    }

    /// Checks whether these LoRAs can be applied to this model, without
    /// drawing: what a server asks when it starts.
    ///
    /// # Errors
    /// By default for all: a generator need not know LoRAs.
    fn check_loras(&self, loras: &[Lora]) -> Result<(), Error> {
        match loras {
            [] => Ok(()),
            _ => Err(Error::new(ErrorKind::Model, "this model takes no LoRA")),
        }
    }

    /// Draws what the session asks for, until it asks for nothing more. Requests share
    /// forward passes as far as the session lets them, and each picture equals that of a
    /// single run bit for bit. An error of one request is that request's alone.
    ///
    /// A panic may leave the generator half changed; the next call starts from its
    /// session's requests alone.
    fn draw(&mut self, session: &mut dyn Session);

    /// Draws these requests, which can share a batch ([`Request::can_batch_with`]). The
    /// pictures come in the requests' order.
    ///
    /// # Errors
    /// The first of any request; with [`ErrorKind::Cancelled`] when the
    /// observer wants none of the pictures any more.
    fn generate(&mut self, requests: &[Request], observer: &mut dyn Observer) -> Result<Vec<Picture>, Error> {
        let mut session = Fixed::new(requests, observer)?;
        self.draw(&mut session);
        session.into_pictures()
    }
}

/// Whose fault an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request asks for what the model cannot do.
    Request,
    /// The observer said stop.
    Cancelled,
    /// A checkpoint or other file cannot be used.
    Model,
    /// Memory ran out.
    OutOfMemory,
    /// The generation failed: a defect, or values that are not finite.
    Internal,
}

impl ErrorKind {
    /// Every kind, for tests that walk them all.
    pub const ALL: [ErrorKind; 5] =
        [Self::Request, Self::Cancelled, Self::Model, Self::OutOfMemory, Self::Internal];
}

/// Why there is no picture: one line with the cause and, where there is one, the fix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Whose fault it is.
    pub kind: ErrorKind,
    /// The request's parameter that is to blame, if one is.
    pub param: Option<&'static str>,
    /// For the user.
    pub message: String,
}

impl Error {
    /// An error of a kind, with its message, [`clipped`].
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, param: None, message: clipped(message) }
    }
}

/// Longest message, in characters: more than anyone reads.
const LONGEST: usize = 1200;

/// A message without its middle where it is absurdly long. Messages repeat what
/// they are about, and a name in a file or a field of a request may be as long as
/// the file or the request; the cause stands at the beginning and the fix at the end.
pub fn clipped(message: impl Into<String>) -> String {
    let message = message.into();
    let characters = if message.len() > LONGEST { message.chars().count() } else { 0 };
    if characters <= LONGEST {
        return message;
    }
    let begin = message.chars().take(LONGEST * 2 / 3);
    let end = message.chars().skip(characters - LONGEST / 4);
    begin.chain(" … ".chars()).chain(end).collect()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<crate::request::ParameterError> for Error {
    fn from(e: crate::request::ParameterError) -> Self {
        Self { param: Some(e.param), ..Self::new(ErrorKind::Request, e.message) }
    }
}

impl From<hypergen_tensor::CheckpointError> for Error {
    fn from(e: hypergen_tensor::CheckpointError) -> Self {
        Self::new(ErrorKind::Model, e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_repeats_a_whole_file_keeps_its_cause_and_its_mend() {
        let message = format!("'{}' is no name: give another", "日".repeat(100_000));
        let error = Error::new(ErrorKind::Model, message.clone());
        assert!(error.message.chars().count() <= LONGEST, "{}", error.message.len());
        assert!(
            error.message.starts_with("'日日") && error.message.ends_with("日' is no name: give another")
        );
        let of_a_parameter = Error::from(crate::ParameterError { param: "size", message });
        assert_eq!(of_a_parameter.message, error.message);
        let short = "é".repeat(LONGEST);
        assert_eq!(Error::new(ErrorKind::Model, short.clone()).message, short);
    }
}
