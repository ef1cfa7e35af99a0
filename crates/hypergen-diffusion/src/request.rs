//! What to draw, and the one declaration of every parameter's name, range and
//! default that command line, HTTP API and documentation share.

use std::fmt::{self, Display};
use std::str::FromStr;

use thiserror::Error;

use crate::lora::Lora;
use crate::prompt::{self, LoraTag, PromptSyntax};
use crate::samplers::SamplerKind;
use crate::size_conditioning::SizeConditioning;

/// A parameter's name, range and default, declared once.
#[derive(Debug, Clone, Copy)]
pub struct Range<T> {
    /// As in the API.
    pub name: &'static str,
    /// Smallest value allowed.
    pub min: T,
    /// Largest value allowed.
    pub max: T,
    /// Used where the request gives none.
    pub default: T,
}

impl<T: PartialOrd + Display + Copy> Range<T> {
    /// Returns `value`, or the error that names the parameter, what was found
    /// and what is allowed.
    ///
    /// # Errors
    /// When the value lies outside (or is not a number).
    pub fn check(&self, value: T) -> Result<T, ParameterError> {
        if value >= self.min && value <= self.max {
            return Ok(value);
        }
        Err(ParameterError {
            param: self.name,
            message: format!("{} must be between {} and {}, but is {value}", self.name, self.min, self.max),
        })
    }
}

/// Denoising steps.
pub const STEPS: Range<usize> = Range { name: "num_inference_steps", min: 1, max: 150, default: 50 };
/// Classifier-free guidance; 1 turns it off. (Distilled models also take 0.)
pub const GUIDANCE_SCALE: Range<f64> = Range { name: "guidance_scale", min: 1.0, max: 20.0, default: 7.5 };
/// Pictures of one request.
pub const IMAGES: Range<usize> = Range { name: "n", min: 1, max: 10, default: 1 };
/// Layers of the text encoder left out at its end, as diffusers counts them: 1
/// is the penultimate layer (what A1111 calls 2). A model has fewer layers than
/// the largest value; see [`crate::Generator::check`].
pub const CLIP_SKIP: Range<usize> = Range { name: "clip_skip", min: 0, max: 32, default: 0 };
/// How far guided predictions are brought back to the spread of unguided ones
/// (Lin et al. 2023, <https://arxiv.org/abs/2305.08891>, section 3.4).
pub const GUIDANCE_RESCALE: Range<f64> = Range { name: "guidance_rescale", min: 0.0, max: 1.0, default: 0.0 };
/// Strength of a LoRA.
pub const LORA_SCALE: Range<f64> = Range { name: "lora_scale", min: 0.0, max: 2.0, default: 1.0 };

/// Longest prompt, and longest negative one, in characters: what OpenAI's own
/// API takes, and several times what any syntax here can draw.
pub const MAX_PROMPT: usize = 32_000;

/// Checks the length of a prompt, which is the value of `param`.
///
/// # Errors
/// When it is longer than [`MAX_PROMPT`].
pub(crate) fn check_prompt(param: &'static str, text: &str) -> Result<(), ParameterError> {
    // Counting is only for texts that may be too long.
    if text.len() <= MAX_PROMPT {
        return Ok(());
    }
    match text.chars().count() {
        ..=MAX_PROMPT => Ok(()),
        count => Err(ParameterError {
            param,
            message: format!("{param} must have at most {MAX_PROMPT} characters, but has {count}"),
        }),
    }
}

/// A parameter that cannot be used, with a message for the user.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct ParameterError {
    /// The parameter's name in the API.
    pub param: &'static str,
    /// What was found and what is allowed.
    pub message: String,
}

/// Width and height of a picture in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Size {
    /// Pixels from left to right, a multiple of 8.
    pub width: usize,
    /// Pixels from top to bottom, a multiple of 8.
    pub height: usize,
}

impl Size {
    /// The API's default where the request names none.
    pub const DEFAULT: Size = Size { width: 1024, height: 1024 };
    /// Sides are multiples of this.
    pub const MULTIPLE: usize = 8;
    /// Largest side; a larger one is taken for a mistake.
    pub const MAX_SIDE: usize = 4096;

    /// Checks both sides.
    ///
    /// # Errors
    /// When a side is 0, not a multiple of 8, or longer than [`Size::MAX_SIDE`].
    pub fn new(width: usize, height: usize) -> Result<Self, ParameterError> {
        let size = Size { width, height };
        for side in [width, height] {
            if side == 0 {
                return Err(ParameterError {
                    param: "size",
                    message: format!(
                        "Invalid size: {size}. Width and height must be at least {0}, and divisible by {0}",
                        Self::MULTIPLE
                    ),
                });
            }
            if side % Self::MULTIPLE != 0 {
                let near = |v: usize| {
                    (v.min(Self::MAX_SIDE).div_ceil(Self::MULTIPLE) * Self::MULTIPLE)
                        .clamp(Self::MULTIPLE, Self::MAX_SIDE)
                };
                return Err(ParameterError {
                    param: "size",
                    message: format!(
                        "Invalid size: {size}. Width and height must be divisible by {}, for example {}x{}",
                        Self::MULTIPLE,
                        near(width),
                        near(height)
                    ),
                });
            }
            if side > Self::MAX_SIDE {
                return Err(ParameterError {
                    param: "size",
                    message: format!(
                        "Invalid size: {size}. Width and height must be at most {}",
                        Self::MAX_SIDE
                    ),
                });
            }
        }
        Ok(size)
    }
}

impl FromStr for Size {
    type Err = ParameterError;

    /// Reads `WIDTHxHEIGHT`.
    fn from_str(text: &str) -> Result<Self, ParameterError> {
        let number = |s: &str| s.bytes().all(|b| b.is_ascii_digit()).then(|| s.parse().ok()).flatten();
        let sides = text.split_once('x').and_then(|(w, h)| Some((number(w)?, number(h)?)));
        let Some((width, height)) = sides else {
            return Err(ParameterError {
                param: "size",
                message: format!("Invalid size format: {text}. Use format like '1024x1024'"),
            });
        };
        Size::new(width, height)
    }
}

impl Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// One picture to draw. A request for `n` pictures is `n` of these, picture
/// `i` with `seed + i` (wrapping), so that each equals its single run.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What to draw.
    pub prompt: String,
    /// What to avoid; `None` is an absent one, which some models treat
    /// otherwise than an empty one.
    pub negative_prompt: Option<String>,
    /// Size of the picture.
    pub size: Size,
    /// Denoising steps, in [`STEPS`].
    pub steps: usize,
    /// In [`GUIDANCE_SCALE`]; at most 1 turns guidance off and halves the work.
    pub guidance_scale: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// `None`: the checkpoint's own.
    pub sampler: Option<SamplerKind>,
    /// How both prompts are read.
    pub prompt_syntax: PromptSyntax,
    /// In [`CLIP_SKIP`]. As in diffusers it is for the prompt alone, but in
    /// the A1111 syntax, where it is for both prompts, as in that program.
    pub clip_skip: usize,
    /// In [`GUIDANCE_RESCALE`]; without effect where guidance is off.
    pub guidance_rescale: f64,
    /// What SDXL is told of sizes; other families take the default alone.
    pub sizes: SizeConditioning,
    /// The same for the negative side of guidance; `None`: as the positive one.
    pub negative_sizes: Option<SizeConditioning>,
    /// Added up; those of scale 0 are left out.
    pub loras: Vec<Lora>,
}

impl Request {
    /// A request for this prompt with the API's default for everything else.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            prompt: prompt.into(),
            negative_prompt: None,
            size: Size::DEFAULT,
            steps: STEPS.default,
            guidance_scale: GUIDANCE_SCALE.default,
            seed: 0,
            sampler: None,
            prompt_syntax: PromptSyntax::default(),
            clip_skip: CLIP_SKIP.default,
            guidance_rescale: GUIDANCE_RESCALE.default,
            sizes: SizeConditioning::default(),
            negative_sizes: None,
            loras: vec![],
        }
    }

    /// Whether both can share forward passes: latents of one size through one set of
    /// weights. All else may differ: each request has its own steps, sampler, guidance and
    /// tokens, and is as far as it is.
    pub fn can_batch_with(&self, other: &Request) -> bool {
        self.size == other.size && self.loras == other.loras
    }

    /// Checks the lengths of both prompts.
    ///
    /// # Errors
    /// When one is longer than [`MAX_PROMPT`].
    pub fn check_prompts(&self) -> Result<(), ParameterError> {
        check_prompt("prompt", &self.prompt)?;
        check_prompt("negative_prompt", self.negative_prompt.as_deref().unwrap_or_default())
    }

    /// The LoRAs that the prompt names, in their order. In plain syntax there
    /// are none: a tag is text like all others.
    ///
    /// # Errors
    /// When the prompt cannot be read.
    pub fn lora_tags(&self) -> Result<Vec<LoraTag>, ParameterError> {
        match self.prompt_syntax {
            PromptSyntax::Plain => Ok(vec![]),
            PromptSyntax::A1111 => Ok(prompt::parse("prompt", &self.prompt)?.loras),
        }
    }
}
