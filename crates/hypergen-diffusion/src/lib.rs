//! Diffusion models: from a prompt to a picture.
//!
//! Tokenizer, text encoders, UNet, VAE, samplers and the pipeline that joins
//! them. Everything here is synchronous and deterministic: the same
//! [`Request`] gives the same bytes, whatever batch it rode in and however
//! many threads drew it. There is no network server, no command line and no
//! instruction set in this crate.

#![forbid(unsafe_code)]

pub mod bench;
mod conditioning;
mod denoising;
mod embedded;
mod enlarge;
pub mod families;
pub mod files;
mod finite;
mod generator;
#[cfg(feature = "hub")]
pub mod hub;
mod load;
pub mod lora;
mod memory;
pub mod models;
mod pipeline;
pub mod presets;
pub mod prompt;
mod recognise;
mod request;
pub mod samplers;
mod session;
mod single_file;
mod size_conditioning;
pub mod tokenizer;

pub use families::FamilyName;
pub use generator::{
    Check, Error, ErrorKind, Generator, ModelInfo, Observer, Picture, Silent, Stage, clipped,
};
pub use load::{DTypeChoice, LoadOptions, LoadProgress, load};
pub use pipeline::{Latents, Pipeline};
pub use request::{
    CLIP_SKIP, GUIDANCE_RESCALE, GUIDANCE_SCALE, IMAGES, LORA_SCALE, MAX_PROMPT, ParameterError, Range,
    Request, STEPS, Size,
};
pub use session::{Progress, RequestId, Session, one_at_a_time};
pub use size_conditioning::{Corner, Extent, SizeConditioning};
