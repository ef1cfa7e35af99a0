//! What successful answers hold.

use serde::Serialize;
use utoipa::ToSchema;

/// The pictures of one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ImageResponse {
    /// When they were generated, in seconds since 1970.
    pub created: u64,
    /// One entry a picture.
    pub data: Vec<ImageData>,
}

/// One picture. Which of `b64_json` and `url` are there is what
/// `response_format` asks for; without it, both are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ImageData {
    /// The file, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub b64_json: Option<String>,
    /// Where the file can be fetched for a while, without a key.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub url: Option<String>,
    /// The prompt that was drawn: the request's own, word for word.
    pub revised_prompt: String,
    /// The seed that draws this very picture again, with `n` 1.
    #[schema(minimum = 0)]
    pub seed: u64,
}

/// How the server is.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Health {
    /// `ok`, or `shutting_down` (with status 503).
    pub status: &'static str,
    /// Name of the model.
    pub model: String,
    /// Its family in words.
    pub family: String,
    /// What computes.
    pub device: String,
    /// Instruction set in use.
    pub isa: String,
    /// Number type of the weights.
    pub dtype: String,
    /// Requests that wait.
    pub queue_size: usize,
    /// Requests that may wait.
    pub max_queue_size: usize,
    /// Requests that are being drawn.
    pub in_progress: usize,
    /// Seconds until all of them should be drawn, from the speed of the latest steps;
    /// null before anything was measured.
    pub queue_seconds: Option<f64>,
    /// Version of HyperGen.
    pub version: &'static str,
}

/// The models that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The one model that is loaded.
    pub data: Vec<Model>,
}

/// A model, as OpenAI's clients know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Model {
    /// Its name.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// When the server loaded it, in seconds since 1970.
    pub created: u64,
    /// Always `hypergen`.
    pub owned_by: &'static str,
}

/// The LoRAs that can be asked for by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LoraList {
    /// Always `list`.
    pub object: &'static str,
    /// By name.
    pub data: Vec<LoraInfo>,
}

/// A LoRA file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LoraInfo {
    /// The name that requests take.
    pub id: String,
    /// Always `lora`.
    pub object: &'static str,
    /// The largest rank of its modules; `null` where the file does not say.
    pub rank: Option<usize>,
    /// Size of the file.
    pub bytes: u64,
    /// The family of models that it is for; `null` where the file does not say.
    pub family: Option<&'static str>,
    /// Modules that it changes.
    pub modules: usize,
}
