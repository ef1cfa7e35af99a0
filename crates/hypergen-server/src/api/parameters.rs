//! The parameters of `POST /v1/images/generations`, each declared once: its
//! name, type, range, default and description. Reading a request and the
//! OpenAPI document both come from here; ranges and defaults come from
//! `hypergen_diffusion`, so that the command line has the same ones.
//!
//! It knows no model beyond its [`ModelInfo`]; what else a model cannot do is
//! for [`hypergen_diffusion::Generator::check`] to say.

use std::ops::RangeInclusive;

use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{
    GUIDANCE_SCALE, IMAGES, MAX_PROMPT, ModelInfo, ParameterError, Range, Request, STEPS, Size,
};
use serde_json::json;
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};

use super::error::ApiError;
use super::extensions::{Defaults, Extensions};
use super::fields::{EXACT, Fields, Whole, clip, wrong_type};
use super::loras::{LoraChoice, Loras};
use crate::encode::{ImageFormat, OUTPUT_COMPRESSION};

/// How pictures are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseForm {
    /// Only a link.
    Url,
    /// Only the file itself, in base64.
    Base64,
    /// Both: the request did not say.
    Both,
}

impl ResponseForm {
    /// Whether the answer holds links.
    pub fn wants_url(self) -> bool {
        matches!(self, Self::Url | Self::Both)
    }

    /// Whether the answer holds the files.
    pub fn wants_base64(self) -> bool {
        matches!(self, Self::Base64 | Self::Both)
    }
}

/// A request that has been checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRequest {
    /// The first picture; the others differ by their seeds alone.
    pub first: Request,
    /// Pictures to draw.
    pub n: usize,
    /// How to send them.
    pub form: ResponseForm,
    /// Form of the files.
    pub format: ImageFormat,
    /// Quality of JPEG and WebP files, in percent.
    pub quality: u8,
    /// What it says of LoRAs; [`Request::loras`] are found by it.
    pub loras: LoraChoice,
}

impl ImageRequest {
    /// One request for each picture: picture `i` has `seed + i`, wrapping.
    pub fn requests(&self) -> Vec<Request> {
        (0..self.n as u64)
            .map(|i| Request { seed: self.first.seed.wrapping_add(i), ..self.first.clone() })
            .collect()
    }
}

/// The API's word for the size that the model was trained for.
const AUTO: &str = "auto";
/// Both generations of OpenAI's words for quality.
const QUALITIES: [&str; 6] = ["standard", "hd", "auto", "low", "medium", "high"];
const RESPONSE_FORMATS: [&str; 2] = ["url", "b64_json"];
/// Models whose clients expect base64 where they do not ask for a form.
const BASE64_MODELS: [&str; 2] = ["gpt-image", "chatgpt-image"];

/// A text that is not checked any further.
pub(super) struct Text {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
}

impl Text {
    pub(super) fn schema(&self) -> ObjectBuilder {
        property(Type::String, self.about)
    }
}

/// One of a few words.
pub(super) struct Choice {
    pub(super) name: &'static str,
    pub(super) about: String,
    pub(super) words: Vec<&'static str>,
    pub(super) default: Option<&'static str>,
}

impl Choice {
    pub(super) fn read(&self, fields: &Fields) -> Result<Option<&'static str>, ApiError> {
        let Some(found) = fields.string(self.name)? else { return Ok(self.default) };
        match self.words.iter().find(|word| **word == found) {
            Some(word) => Ok(Some(word)),
            None => Err(ApiError::parameter(
                self.name,
                format!("{} must be one of {}, but is '{}'", self.name, self.words.join(", "), clip(&found)),
            )),
        }
    }

    pub(super) fn schema(&self) -> ObjectBuilder {
        let mut words: Vec<_> = self.words.iter().map(|word| json!(word)).collect();
        words.push(json!(null));
        property(Type::String, &self.about)
            .enum_values(Some(words))
            .default(self.default.map(|word| json!(word)))
    }
}

/// A whole number in a range.
pub(super) struct Integer {
    pub(super) name: &'static str,
    about: &'static str,
    range: RangeInclusive<u64>,
    default: Option<u64>,
}

impl Integer {
    pub(super) fn new(range: &Range<usize>, default: usize, about: &'static str) -> Self {
        let (min, max) = (range.min as u64, range.max as u64);
        Self { name: range.name, about, range: min..=max, default: Some(default as u64) }
    }

    pub(super) fn read(&self, fields: &Fields) -> Result<Option<u64>, ApiError> {
        let range = format!("between {} and {}", self.range.start(), self.range.end());
        let Some((whole, raw)) = fields.integer(self.name, &range)? else { return Ok(self.default) };
        let value = match whole {
            Whole::Integer(value) => u64::try_from(value).ok(),
            Whole::Huge => None,
            Whole::Fraction => return Err(wrong_type(self.name, &format!("an integer {range}"), raw)),
            Whole::Inexact if *self.range.end() < EXACT => None,
            Whole::Inexact => {
                let wanted = format!("an integer {range}, without fraction or exponent beyond 2^53");
                return Err(wrong_type(self.name, &wanted, raw));
            }
        };
        match value.filter(|value| self.range.contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(wrong_type(self.name, &range, raw)),
        }
    }

    pub(super) fn schema(&self) -> ObjectBuilder {
        property(Type::Integer, self.about)
            .minimum(Some(*self.range.start()))
            .maximum(Some(*self.range.end()))
            .default(self.default.map(|value| json!(value)))
    }
}

/// A number in a range.
pub(super) struct Number {
    pub(super) about: &'static str,
    pub(super) range: Range<f64>,
    /// What to do where a value is too small for the model.
    pub(super) below: Option<String>,
}

impl Number {
    pub(super) fn read(&self, fields: &Fields) -> Result<f64, ApiError> {
        let range = format!("between {} and {}", self.range.min, self.range.max);
        match fields.number(self.range.name, &range)? {
            Some(value) => Ok(self.range.check(value).map_err(|e| match &self.below {
                Some(hint) if value >= 0.0 && value < self.range.min => {
                    ParameterError { message: format!("{}; {hint}", e.message), ..e }
                }
                _ => e,
            })?),
            None => Ok(self.range.default),
        }
    }

    pub(super) fn schema(&self) -> ObjectBuilder {
        property(Type::Number, self.about)
            .minimum(Some(self.range.min))
            .maximum(Some(self.range.max))
            .default(Some(json!(self.range.default)))
    }
}

/// A property's schema; all but the prompt may also be `null`.
fn property(kind: Type, about: &str) -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([kind, Type::Null]))
        .description(Some(about.split_whitespace().collect::<Vec<_>>().join(" ")))
}

/// What one model can be asked for, beyond what every model can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Takes {
    /// Its schedule may not suit every sampler.
    pub samplers: Vec<SamplerKind>,
    /// SDXL's sizes.
    pub sizes: bool,
    /// Layers of the text encoder that may be left out.
    pub clip_skip: usize,
}

/// Every parameter, for one model and one server's defaults.
pub struct Parameters {
    native_size: Size,
    prompt: Text,
    model: Text,
    n: Integer,
    size: Text,
    quality: Choice,
    response_format: Choice,
    output_format: Choice,
    output_compression: Integer,
    negative_prompt: Text,
    steps: Integer,
    guidance_scale: Number,
    seed: Integer,
    loras: Loras,
    sampler: Choice,
    extensions: Extensions,
}

impl Parameters {
    /// The parameters for a model that takes what `takes` says. The defaults
    /// for steps and guidance are the operator's, else the model's own, else
    /// the API's.
    pub fn new(model: &ModelInfo, takes: &Takes, defaults: &Defaults) -> Self {
        let steps = defaults.steps.or(model.default_steps).unwrap_or(STEPS.default);
        let guidance = Range {
            min: GUIDANCE_SCALE.min.min(model.min_guidance),
            default: defaults.guidance.or(model.default_guidance).unwrap_or(GUIDANCE_SCALE.default),
            ..GUIDANCE_SCALE
        };
        Self {
            native_size: model.native_size,
            prompt: Text { name: "prompt", about: "What to draw." },
            model: Text {
                name: "model",
                about: "Accepted and ignored: the server draws with the model that it was started with. Any name works.",
            },
            n: Integer::new(
                &IMAGES,
                IMAGES.default,
                "Pictures to draw. Picture i has seed + i, and is the same as if it were drawn alone with that seed.",
            ),
            size: Text {
                name: "size",
                about: "WIDTHxHEIGHT in pixels, each divisible by 8, or auto for the model's native size.",
            },
            quality: Choice {
                name: "quality",
                about: "Accepted, without effect: use num_inference_steps.".to_owned(),
                words: QUALITIES.to_vec(),
                default: Some(QUALITIES[0]),
            },
            response_format: Choice {
                name: "response_format",
                about: "url for a link that works for a while, b64_json for the file itself. \
                    Without it the answer holds both, or, for a model named gpt-image or chatgpt-image, the file alone."
                    .to_owned(),
                words: RESPONSE_FORMATS.to_vec(),
                default: None,
            },
            output_format: Choice {
                name: "output_format",
                about: "Form of the files.".to_owned(),
                words: ImageFormat::ALL.iter().map(|format| format.name()).collect(),
                default: Some(ImageFormat::default().name()),
            },
            output_compression: Integer {
                name: OUTPUT_COMPRESSION.name,
                about: "Quality of jpeg and webp files in percent; png is always exact.",
                range: OUTPUT_COMPRESSION.min.into()..=OUTPUT_COMPRESSION.max.into(),
                default: Some(OUTPUT_COMPRESSION.default.into()),
            },
            negative_prompt: Text { name: "negative_prompt", about: "What to avoid." },
            steps: Integer::new(&STEPS, steps, "Denoising steps: more are slower and finer."),
            guidance_scale: Number {
                about: "How closely to follow the prompt. 1 turns guidance off and halves the work.",
                range: guidance,
                below: Some(model.guidance_hint()),
            },
            seed: Integer {
                name: "seed",
                about: "The same seed and parameters draw the same picture. Random where it is absent; always returned.",
                range: 0..=u64::MAX,
                default: None,
            },
            loras: Loras::new(),
            sampler: Choice {
                name: "sampler",
                about: format!("The sampling method. Where it is absent: the checkpoint's own, {}.", model.sampler),
                words: takes.samplers.iter().map(|sampler| sampler.name()).collect(),
                default: None,
            },
            extensions: Extensions::new(defaults, takes),
        }
    }

    /// Steps of a request that names none.
    pub fn default_steps(&self) -> u64 {
        self.steps.default.unwrap_or(STEPS.default as u64)
    }

    /// Guidance of a request that names none.
    pub fn default_guidance(&self) -> f64 {
        self.guidance_scale.range.default
    }

    /// The smallest guidance that the model takes.
    pub fn min_guidance(&self) -> f64 {
        self.guidance_scale.range.min
    }

    /// Checks a request. `random_seed` is asked where it names no seed.
    ///
    /// # Errors
    /// 400 that names the parameter, what was found and what is allowed.
    pub fn read(&self, fields: &Fields, random_seed: impl FnOnce() -> u64) -> Result<ImageRequest, ApiError> {
        let mut first = Request {
            negative_prompt: fields.string(self.negative_prompt.name)?,
            size: self.read_size(fields)?,
            steps: self.steps.read(fields)?.map_or(STEPS.default, index),
            guidance_scale: self.guidance_scale.read(fields)?,
            seed: self.seed.read(fields)?.unwrap_or_else(random_seed),
            sampler: self.sampler.read(fields)?.and_then(|name| name.parse().ok()),
            ..Request::new(self.read_prompt(fields)?)
        };
        first.check_prompts()?;
        self.extensions.read(fields, &mut first)?;
        self.quality.read(fields)?;
        let request = ImageRequest {
            first,
            n: self.n.read(fields)?.map_or(IMAGES.default, index),
            form: self.read_form(fields)?,
            format: self.output_format.read(fields)?.and_then(|name| name.parse().ok()).unwrap_or_default(),
            quality: self
                .output_compression
                .read(fields)?
                .and_then(|value| u8::try_from(value).ok())
                .unwrap_or(OUTPUT_COMPRESSION.default),
            loras: self.loras.read(fields)?,
        };
        Ok(request)
    }

    fn read_prompt(&self, fields: &Fields) -> Result<String, ApiError> {
        let name = self.prompt.name;
        match fields.string(name)? {
            Some(prompt) if !prompt.is_empty() => Ok(prompt),
            Some(_) => Err(ApiError::parameter(name, "prompt must not be empty")),
            None => Err(ApiError::parameter(name, "prompt is required: a string that says what to draw")),
        }
    }

    fn read_size(&self, fields: &Fields) -> Result<Size, ApiError> {
        match fields.string(self.size.name)? {
            None => Ok(Size::DEFAULT),
            Some(size) if size == AUTO => Ok(self.native_size),
            Some(size) => Ok(clip(&size).parse()?),
        }
    }

    fn read_form(&self, fields: &Fields) -> Result<ResponseForm, ApiError> {
        let model = fields.string(self.model.name)?.unwrap_or_default();
        let base64_model = BASE64_MODELS.iter().any(|prefix| model.starts_with(prefix));
        Ok(match self.response_format.read(fields)? {
            Some("url") => ResponseForm::Url,
            Some(_) => ResponseForm::Base64,
            None if base64_model => ResponseForm::Base64,
            None => ResponseForm::Both,
        })
    }

    /// The schema of a request, from the same declarations. Fields that it
    /// does not know are allowed, as clients of OpenAI's API send several.
    pub fn schema(&self) -> Object {
        let prompt = self.prompt.schema().schema_type(Type::String).min_length(Some(1));
        let prompt = prompt.max_length(Some(MAX_PROMPT));
        let size = self
            .size
            .schema()
            .pattern(Some(r"^([0-9]+x[0-9]+|auto)$"))
            .default(Some(json!(Size::DEFAULT.to_string())));
        let schema = ObjectBuilder::new()
            .description(Some("What to draw. Fields that are not listed are accepted and ignored."))
            .property(
                self.prompt.name,
                prompt.examples([json!("A cat holding a sign that says Hello World")]),
            )
            .required(self.prompt.name)
            .property(self.model.name, self.model.schema())
            .property(self.n.name, self.n.schema())
            .property(self.size.name, size)
            .property(self.quality.name, self.quality.schema())
            .property(self.response_format.name, self.response_format.schema())
            .property(self.output_format.name, self.output_format.schema())
            .property(self.output_compression.name, self.output_compression.schema())
            .property(self.negative_prompt.name, self.negative_prompt.schema().max_length(Some(MAX_PROMPT)))
            .property(self.steps.name, self.steps.schema())
            .property(self.guidance_scale.range.name, self.guidance_scale.schema())
            .property(self.seed.name, self.seed.schema())
            .property(self.sampler.name, self.sampler.schema());
        self.extensions.describe(self.loras.describe(schema)).build()
    }
}

/// A value that its range keeps far below where this could saturate.
pub(super) fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
