//! The generation parameters as text, in the form that the field's tools have
//! read since the first web interfaces for Stable Diffusion wrote it:
//!
//! ```text
//! a red apple
//! Negative prompt: blurry
//! Steps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: emoji, Version: hypergen 0.1.0
//! ```
//!
//! It only writes; there is no parser here. A prompt may run over several
//! lines; readers take the last line as the parameters.

use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{ModelInfo, Request, Size};

/// What a picture was drawn with.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    /// What was asked for.
    pub prompt: String,
    /// What was to be avoided.
    pub negative_prompt: Option<String>,
    /// Denoising steps.
    pub steps: usize,
    /// Name of the sampler.
    pub sampler: String,
    /// Guidance scale.
    pub guidance_scale: f64,
    /// Seed of this very picture.
    pub seed: u64,
    /// Width and height.
    pub size: Size,
    /// Name of the model, without its folder.
    pub model: String,
    /// How the prompts were read.
    pub prompt_syntax: PromptSyntax,
    /// Layers of the text encoder that were left out.
    pub clip_skip: usize,
    /// How far guidance was rescaled.
    pub guidance_rescale: f64,
    /// LoRAs by name, with their scales.
    pub loras: Vec<(String, f64)>,
}

/// The last part of a path, without its extension.
fn file_stem(path: &str) -> String {
    let last = path.rsplit(['/', '\\']).next().unwrap_or(path);
    last.strip_suffix(".safetensors").unwrap_or(last).to_owned()
}

impl Metadata {
    /// The parameters of one request to one model. Of a model that is named by
    /// its folder only the last part is kept: a picture that is passed on
    /// should not tell where its author keeps files.
    pub fn new(request: &Request, model: &ModelInfo) -> Self {
        let name = model.name.trim_end_matches(['/', '\\']);
        let name = name.rsplit(['/', '\\']).next().unwrap_or(name);
        Self {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            steps: request.steps,
            sampler: request.sampler.map_or_else(|| model.sampler.clone(), |s| s.name().to_owned()),
            guidance_scale: request.guidance_scale,
            seed: request.seed,
            size: request.size,
            model: name.to_owned(),
            prompt_syntax: request.prompt_syntax,
            clip_skip: request.clip_skip,
            guidance_rescale: request.guidance_rescale,
            loras: request.loras.iter().map(|lora| (file_stem(&lora.name), lora.scale)).collect(),
        }
    }

    /// The whole text.
    pub fn to_text(&self) -> String {
        self.join(&clean(&self.prompt), &self.negative_prompt.as_deref().map(clean).unwrap_or_default())
    }

    /// The text in at most `room` UTF-16 units, for files with little room:
    /// prompts that are too long lose their ends, never the parameters.
    pub(super) fn to_text_within(&self, room: usize) -> String {
        let text = self.to_text();
        if units(&text) <= room {
            return text;
        }
        let prompt = clean(&self.prompt);
        let negative = self.negative_prompt.as_deref().map(clean).unwrap_or_default();
        // An empty pair of prompts tells what all the rest takes; the
        // negative prompt's line adds its own words.
        let rest = units(&self.join("", if negative.is_empty() { "" } else { "…" })) + 1;
        let left = room.saturating_sub(rest);
        // Each may take half, and whatever the other leaves.
        let negative = shorten(&negative, left.saturating_sub(units(&prompt)).max(left / 2));
        let prompt = shorten(&prompt, left.saturating_sub(units(&negative)));
        self.join(&prompt, &negative)
    }

    fn join(&self, prompt: &str, negative: &str) -> String {
        let mut text = format!("{prompt}\n");
        if !negative.is_empty() {
            text.push_str("Negative prompt: ");
            text.push_str(negative);
            text.push('\n');
        }
        text.push_str(&format!(
            "Steps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}, Model: {}, {}Version: hypergen {}",
            self.steps,
            quote(&self.sampler),
            self.guidance_scale,
            self.seed,
            self.size,
            quote(&self.model),
            self.extras(),
            env!("CARGO_PKG_VERSION")
        ));
        text
    }

    /// What most pictures do without. Readers count skipped layers from 1, for
    /// the last one.
    fn extras(&self) -> String {
        let mut extras = String::new();
        if self.clip_skip > 0 {
            extras += &format!("Clip skip: {}, ", self.clip_skip + 1);
        }
        if self.guidance_rescale > 0.0 {
            extras += &format!("CFG Rescale: {}, ", self.guidance_rescale);
        }
        if !self.loras.is_empty() {
            let loras: Vec<String> =
                self.loras.iter().map(|(name, scale)| format!("{name}: {scale}")).collect();
            extras += &format!("LoRA: {}, ", quote(&loras.join(", ")));
        }
        if self.prompt_syntax != PromptSyntax::Plain {
            extras += &format!("Prompt syntax: {}, ", self.prompt_syntax);
        }
        extras
    }
}

/// Line ends become those of PNG, and control characters spaces: a NUL would
/// end the text, and the others have no place in it.
fn clean(prompt: &str) -> String {
    prompt
        .replace("\r\n", "\n")
        .chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            '\r' => '\n',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}

/// Puts a value that holds the list's own punctuation into quotes, as JSON does.
fn quote(value: &str) -> String {
    if !value.contains([',', ':', '\n', '"']) && !value.contains(char::is_control) {
        return value.to_owned();
    }
    let mut quoted = String::from('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            c if c.is_control() => quoted.push(' '),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Length in UTF-16 units.
fn units(text: &str) -> usize {
    text.encode_utf16().count()
}

/// The beginning of `text` with an ellipsis, in at most `room` UTF-16 units.
fn shorten(text: &str, room: usize) -> String {
    if units(text) <= room {
        return text.to_owned();
    }
    let mut left = room.saturating_sub(1);
    let mut short: String = text
        .chars()
        .take_while(|c| {
            let fits = c.len_utf16() <= left;
            left = left.saturating_sub(c.len_utf16());
            fits
        })
        .collect();
    short.push('…');
    short
}
