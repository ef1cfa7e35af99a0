//! The parameters that name LoRAs: the specification's `lora_path` and
//! `lora_scale`, and `loras` for several. Which files they mean is found out
//! later; here they are read and checked.

use hypergen_diffusion::LORA_SCALE;
use serde_json::json;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{Array, ArrayBuilder, ObjectBuilder, Schema, SchemaType, Type};

use super::error::ApiError;
use super::fields::Fields;
use super::parameters::{Number, Text};

/// What a request says of LoRAs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraChoice {
    /// Paths or names with their scales; `None` where the request names none,
    /// which is not the same as an empty list.
    pub named: Option<Vec<(String, f64)>>,
    /// The request's scale for the server's own, if it gives one.
    pub scale: Option<f64>,
}

/// LoRAs of one request at most.
const MOST: usize = 16;
const LORAS: &str = "loras";
const PATH: &str = "path";
const SCALE: &str = "scale";

/// The parameters.
pub(super) struct Loras {
    path: Text,
    scale: Number,
}

impl Loras {
    pub(super) fn new() -> Self {
        Self {
            path: Text {
                name: "lora_path",
                about: "LoRA weights for this request, a .safetensors file on the server's disk or a name in its folder \
                    of LoRAs (GET /v1/loras). Overrides the server's own.",
            },
            scale: Number {
                about: "Strength of the LoRA; 0 is the base model alone.",
                range: LORA_SCALE,
                below: None,
            },
        }
    }

    pub(super) fn read(&self, fields: &Fields) -> Result<LoraChoice, ApiError> {
        let path = fields.string(self.path.name)?.filter(|path| !path.is_empty());
        let scale = self.scale.read(fields)?;
        let mut named: Vec<(String, f64)> = path.into_iter().map(|path| (path, scale)).collect();
        let list = fields.objects(LORAS, &format!("a list of {{\"{PATH}\": ..., \"{SCALE}\": ...}}"))?;
        let given = list.is_some();
        for lora in list.unwrap_or_default() {
            let within = |mut e: ApiError| {
                e.param = Some(LORAS.to_owned());
                e.message = format!("{LORAS}: {}", e.message);
                e
            };
            let path = lora.string(PATH).map_err(within)?.filter(|path| !path.is_empty());
            let path =
                path.ok_or_else(|| ApiError::parameter(LORAS, format!("{LORAS}: each needs a \"{PATH}\"")))?;
            let range = hypergen_diffusion::Range { name: SCALE, ..LORA_SCALE };
            let scale = Number { about: "", range, below: None }.read(&lora).map_err(within)?;
            named.push((path, scale));
        }
        if named.len() > MOST {
            return Err(ApiError::parameter(
                LORAS,
                format!("{LORAS}: at most {MOST} at once, but there are {}", named.len()),
            ));
        }
        Ok(LoraChoice {
            named: (given || !named.is_empty()).then_some(named),
            scale: fields.has(self.scale.range.name).then_some(scale),
        })
    }

    /// Adds them to the schema of a request.
    pub(super) fn describe(&self, schema: ObjectBuilder) -> ObjectBuilder {
        schema
            .property(self.path.name, self.path.schema())
            .property(self.scale.range.name, self.scale.schema())
            .property(LORAS, list())
    }
}

fn list() -> Array {
    let lora = ObjectBuilder::new()
        .property(PATH, ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)))
        .required(PATH)
        .property(
            SCALE,
            ObjectBuilder::new()
                .schema_type(SchemaType::from_iter([Type::Number, Type::Null]))
                .minimum(Some(LORA_SCALE.min))
                .maximum(Some(LORA_SCALE.max))
                .default(Some(json!(LORA_SCALE.default))),
        );
    ArrayBuilder::new()
        .schema_type(SchemaType::from_iter([Type::Array, Type::Null]))
        .items(RefOr::T(Schema::Object(lora.build())))
        .max_items(Some(MOST))
        .description(Some(
            "Several LoRAs, added up; with lora_path, beside that one. An empty list is none, whatever the server's own.",
        ))
        .build()
}
