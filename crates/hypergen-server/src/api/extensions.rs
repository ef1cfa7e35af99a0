//! Parameters that the specification does not have, each declared once: how
//! prompts are read, skipped layers, rescaled guidance, and SDXL's sizes. Left
//! out, they change nothing. Streams, which OpenAI's API has, are refused here.

use std::str::FromStr;

use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{CLIP_SKIP, Corner, Extent, GUIDANCE_RESCALE, Range, Request, SizeConditioning};
use serde_json::json;
use utoipa::openapi::schema::{ObjectBuilder, SchemaType, Type};

use super::error::ApiError;
use super::fields::{Fields, clip};
use super::parameters::{Choice, Integer, Number, Takes, Text, index};

/// What requests get that name none, as the operator set it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Defaults {
    /// Steps; else the model's own, else the API's.
    pub steps: Option<usize>,
    /// Guidance; else the model's own, else the API's.
    pub guidance: Option<f64>,
    /// How prompts are read.
    pub prompt_syntax: PromptSyntax,
    /// Layers of the text encoder to leave out.
    pub clip_skip: usize,
    /// How far guidance is rescaled.
    pub guidance_rescale: f64,
}

/// The parameters.
pub(super) struct Extensions {
    prompt_syntax: Choice,
    partial_images: Integer,
    clip_skip: Integer,
    guidance_rescale: Number,
    sizes: Sizes,
    negative_sizes: Sizes,
    /// Whether the model takes sizes at all: else they are not described, and
    /// the model refuses them.
    takes_sizes: bool,
}

/// One side's sizes.
struct Sizes {
    original_size: Text,
    crop: Text,
    target_size: Text,
}

/// OpenAI's words for events while a picture is drawn. A client that asks for
/// them waits for events, and would take an answer without any for none at all.
const STREAM: &str = "stream";
/// How many pictures such events show on the way, as far as OpenAI's API goes. It says
/// nothing where there are no events; that API's own clients send it with `stream: false`.
const PARTIAL_IMAGES: Range<usize> = Range { name: "partial_images", min: 0, max: 3, default: 0 };
const EXTENT: &str = r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$";
const CORNER: &str = r"^[0-9]{1,4},[0-9]{1,4}$";

impl Extensions {
    pub(super) fn new(defaults: &Defaults, takes: &Takes) -> Self {
        Self {
            takes_sizes: takes.sizes,
            prompt_syntax: Choice {
                name: PromptSyntax::NAME,
                about:
                    "How prompt and negative_prompt are read: plain, every character as text, or a1111, with \
                    weights like (word:1.2), BREAK and prompts of any length."
                        .to_owned(),
                words: PromptSyntax::ALL.iter().map(|syntax| syntax.name()).collect(),
                default: Some(defaults.prompt_syntax.name()),
            },
            partial_images: Integer::new(
                &PARTIAL_IMAGES,
                PARTIAL_IMAGES.default,
                "Pictures in such events; without effect as there are none.",
            ),
            clip_skip: Integer::new(
                &Range { max: takes.clip_skip, ..CLIP_SKIP },
                defaults.clip_skip,
                "Layers of the text encoder to leave out at its end, as diffusers counts them: 1 is the penultimate layer.",
            ),
            guidance_rescale: Number {
                about: "How far to take back the contrast that guidance adds.",
                range: Range { default: defaults.guidance_rescale, ..GUIDANCE_RESCALE },
                below: None,
            },
            sizes: Sizes {
                original_size: Text {
                    name: "original_size",
                    about: "SDXL only: WIDTHxHEIGHT that the network is told a picture had before scaling; as drawn where absent.",
                },
                crop: Text {
                    name: "crop",
                    about: "SDXL only: TOP,LEFT of the corner where the network is told a picture was cut; 0,0 where absent.",
                },
                target_size: Text {
                    name: "target_size",
                    about: "SDXL only: WIDTHxHEIGHT that the network is told to aim at; as drawn where absent.",
                },
            },
            negative_sizes: Sizes {
                original_size: Text {
                    name: "negative_original_size",
                    about: "As original_size, for the negative prompt; only together with negative_target_size.",
                },
                crop: Text { name: "negative_crop", about: "As crop, for the negative prompt." },
                target_size: Text {
                    name: "negative_target_size",
                    about: "As target_size, for the negative prompt; only together with negative_original_size.",
                },
            },
        }
    }

    /// Reads them into a request.
    pub(super) fn read(&self, fields: &Fields, request: &mut Request) -> Result<(), ApiError> {
        refuse_streams(fields)?;
        self.partial_images.read(fields)?;
        if let Some(name) = self.prompt_syntax.read(fields)? {
            request.prompt_syntax = name.parse()?;
        }
        request.clip_skip = self.clip_skip.read(fields)?.map_or(CLIP_SKIP.default, index);
        request.guidance_rescale = self.guidance_rescale.read(fields)?;
        request.sizes = self.sizes.read(fields)?;
        let negative = self.negative_sizes.read(fields)?;
        request.negative_sizes = match (negative.original_size, negative.target_size) {
            (Some(_), Some(_)) => Some(negative),
            (None, None) if negative == SizeConditioning::default() => None,
            (original, _) => {
                let absent = if original.is_none() {
                    &self.negative_sizes.original_size
                } else {
                    &self.negative_sizes.target_size
                };
                return Err(ApiError::parameter(
                    absent.name,
                    "negative_original_size and negative_target_size belong together: give both, or neither",
                ));
            }
        };
        Ok(())
    }

    /// Adds them to the schema of a request.
    pub(super) fn describe(&self, mut schema: ObjectBuilder) -> ObjectBuilder {
        schema = schema
            .property(
                STREAM,
                only(Type::Boolean, json!(false), "Events while it draws: this server sends none yet."),
            )
            .property(self.partial_images.name, self.partial_images.schema())
            .property(self.prompt_syntax.name, self.prompt_syntax.schema())
            .property(self.clip_skip.name, self.clip_skip.schema())
            .property(self.guidance_rescale.range.name, self.guidance_rescale.schema());
        for sizes in [&self.sizes, &self.negative_sizes].into_iter().filter(|_| self.takes_sizes) {
            for (text, pattern, example) in [
                (&sizes.original_size, EXTENT, "1024x1024"),
                (&sizes.crop, CORNER, "0,0"),
                (&sizes.target_size, EXTENT, "1024x1024"),
            ] {
                schema = schema
                    .property(text.name, text.schema().pattern(Some(pattern)).examples([json!(example)]));
            }
        }
        schema
    }
}

impl Sizes {
    fn read(&self, fields: &Fields) -> Result<SizeConditioning, ApiError> {
        Ok(SizeConditioning {
            original_size: parse::<Extent>(&self.original_size, fields)?,
            crop: parse::<Corner>(&self.crop, fields)?.unwrap_or_default(),
            target_size: parse::<Extent>(&self.target_size, fields)?,
        })
    }
}

fn refuse_streams(fields: &Fields) -> Result<(), ApiError> {
    if fields.boolean(STREAM)? != Some(true) {
        return Ok(());
    }
    let message = format!(
        "{STREAM} is true, but this server does not stream yet: leave it out or send false, and the answer comes when \
         all is drawn"
    );
    Err(ApiError::parameter(STREAM, message))
}

/// A property that takes one value alone.
fn only(kind: Type, value: serde_json::Value, about: &str) -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([kind, Type::Null]))
        .enum_values(Some([value, json!(null)]))
        .description(Some(about))
}

fn parse<T: FromStr<Err = String>>(text: &Text, fields: &Fields) -> Result<Option<T>, ApiError> {
    let Some(found) = fields.string(text.name)? else { return Ok(None) };
    found.parse().map(Some).map_err(|allowed| {
        ApiError::parameter(text.name, format!("{} {allowed}, but is '{}'", text.name, clip(&found)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: Defaults = Defaults {
        steps: None,
        guidance: None,
        prompt_syntax: PromptSyntax::A1111,
        clip_skip: 2,
        guidance_rescale: 0.25,
    };

    fn takes(sizes: bool) -> Takes {
        Takes { samplers: vec![], sizes, clip_skip: 12 }
    }

    fn read(defaults: &Defaults, json: &str) -> Result<Request, ApiError> {
        let mut request = Request::new("x");
        Extensions::new(defaults, &takes(true))
            .read(&Fields::parse(json.as_bytes()).expect("JSON"), &mut request)
            .map(|()| request)
    }

    #[test]
    fn what_is_left_out_is_as_the_server_was_started() {
        assert_eq!(read(&Defaults::default(), "{}"), Ok(Request::new("x")));
        let expected = Request {
            prompt_syntax: PromptSyntax::A1111,
            clip_skip: 2,
            guidance_rescale: 0.25,
            ..Request::new("x")
        };
        assert_eq!(read(&SET, r#"{"clip_skip": null}"#), Ok(expected));
    }

    #[test]
    fn what_is_said_counts() {
        let json = r#"{"prompt_syntax": "plain", "clip_skip": 0.0, "guidance_rescale": 1, "original_size": "100x50",
            "crop": "3,4", "target_size": "8x9", "negative_original_size": "1x2", "negative_target_size": "3x4"}"#;
        let extent = |width, height| Some(Extent { width, height });
        let sizes = |original_size, crop, target_size| SizeConditioning { original_size, crop, target_size };
        let expected = Request {
            guidance_rescale: 1.0,
            sizes: sizes(extent(100, 50), Corner { top: 3, left: 4 }, extent(8, 9)),
            negative_sizes: Some(sizes(extent(1, 2), Corner::default(), extent(3, 4))),
            ..Request::new("x")
        };
        assert_eq!(read(&SET, json), Ok(expected));
    }

    #[test]
    fn streams_that_are_switched_off_are_none() {
        for json in
            [r#"{"stream": false, "partial_images": 2}"#, r#"{"stream": null, "partial_images": 0.0}"#]
        {
            assert_eq!(read(&Defaults::default(), json), Ok(Request::new("x")), "{json}");
        }
    }

    #[test]
    fn sizes_are_described_where_the_model_takes_them() {
        for sizes in [false, true] {
            let schema = Extensions::new(&SET, &takes(sizes)).describe(ObjectBuilder::new()).build();
            assert!(schema.properties.contains_key("clip_skip"));
            for name in ["original_size", "crop", "target_size", "negative_crop"] {
                assert_eq!(schema.properties.contains_key(name), sizes, "{name}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (json, param, words) in [
            (r#"{"prompt_syntax": "comfy"}"#, "prompt_syntax", "plain, a1111, but is 'comfy'"),
            (r#"{"clip_skip": 13}"#, "clip_skip", "between 0 and 12"),
            (r#"{"guidance_rescale": -0.1}"#, "guidance_rescale", "between 0 and 1"),
            (r#"{"original_size": "auto"}"#, "original_size", "WIDTHxHEIGHT"),
            (r#"{"crop": "1x1"}"#, "crop", "TOP,LEFT"),
            (r#"{"target_size": 5}"#, "target_size", "a string"),
            (r#"{"negative_original_size": "1x1"}"#, "negative_target_size", "both, or neither"),
            (r#"{"negative_crop": "1,1"}"#, "negative_original_size", "both, or neither"),
            (r#"{"stream": true}"#, "stream", "does not stream yet: leave it out or send false"),
            (r#"{"stream": "yes"}"#, "stream", "true or false"),
            (r#"{"stream": 1}"#, "stream", "true or false"),
            (r#"{"partial_images": 4}"#, "partial_images", "between 0 and 3"),
            (r#"{"partial_images": -1}"#, "partial_images", "between 0 and 3"),
            (r#"{"partial_images": true}"#, "partial_images", "an integer"),
        ] {
            let error = read(&SET, json).expect_err(json);
            assert_eq!(error.param.as_deref(), Some(param), "{json}");
            assert!(error.message.contains(words), "{}", error.message);
        }
    }
}
