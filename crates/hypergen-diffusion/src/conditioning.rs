//! From prompts to what a UNet is told: one text encoder, or SDXL's two.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::finite::finite;
use crate::lora::{Component, Embedding};
use crate::models::text_encoder::{HiddenState, TextEncoder};
use crate::models::unet::UNetConfig;
use crate::prompt::{self, Chunk, PromptSyntax};
use crate::tokenizer::Tokenizer;
use crate::{CLIP_SKIP, Error, ErrorKind, ParameterError, Request};

/// A tokenizer with its encoder.
pub(crate) struct TextPart {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) encoder: TextEncoder,
}

/// One prompt, encoded.
#[derive(Clone)]
pub(crate) struct Encoded {
    /// `[tokens, width]`.
    pub(crate) hidden: Vec<f32>,
    /// `[pooled width]`; empty where the family takes none.
    pub(crate) pooled: Vec<f32>,
}

/// What decides how a text is encoded, beside the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    syntax: PromptSyntax,
    skip: usize,
    /// Tells the encoders' present weights from those that other LoRAs make of them.
    weights: u64,
}

/// Both sides of guidance, equally long.
pub(crate) struct Sides {
    /// Absent where guidance is off.
    pub(crate) negative: Option<Arc<Encoded>>,
    pub(crate) positive: Arc<Encoded>,
}

/// Reads prompts and encodes nothing, so that they can be checked while the
/// encoders are at work.
#[derive(Clone)]
pub(crate) struct PromptReader {
    /// One for each text encoder.
    tokenizers: Vec<Tokenizer>,
    /// The most layers that the encoders can do without.
    max_clip_skip: usize,
}

/// Encodes prompts, and remembers the latest of them.
pub(crate) struct TextConditioner {
    parts: Vec<TextPart>,
    reader: PromptReader,
    /// Which hidden state the family conditions on.
    state: HiddenState,
    /// An absent negative prompt is zeros, not the encoding of "".
    zeros_for_absent: bool,
    /// The number of the encoders' present weights.
    weights: u64,
    cache: VecDeque<(String, Reading, Arc<Encoded>)>,
}

/// Prompts remembered; an SDXL prompt takes 0.6 MB for each chunk.
const CACHE: usize = 64;

const PROMPT: &str = "prompt";
const NEGATIVE_PROMPT: &str = "negative_prompt";

impl PromptReader {
    /// Checks both prompts of a request, and how many layers it leaves out,
    /// without encoding anything.
    pub(crate) fn check(&self, request: &Request) -> Result<(), Error> {
        request.check_prompts()?;
        crate::Range { max: self.max_clip_skip, ..CLIP_SKIP }.check(request.clip_skip)?;
        if request.prompt_syntax == PromptSyntax::A1111 {
            self.read(PROMPT, &request.prompt)?;
            self.read(NEGATIVE_PROMPT, request.negative_prompt.as_deref().unwrap_or_default())?;
        }
        Ok(())
    }

    /// The chunks of a prompt in the A1111 syntax, by text encoder.
    fn read(&self, param: &'static str, prompt: &str) -> Result<Vec<Vec<Chunk>>, Error> {
        let parsed = prompt::parse(param, prompt)?;
        if let (NEGATIVE_PROMPT, Some(tag)) = (param, parsed.loras.first()) {
            return Err(Error::from(ParameterError {
                param,
                message: format!(
                    "{param}: <lora:{}:...> belongs into the prompt, for a LoRA is for both",
                    tag.name
                ),
            }));
        }
        let chunks = self.tokenizers.iter().map(|tokenizer| prompt::chunks(param, &parsed.parts, tokenizer));
        let chunks = chunks.collect::<Result<Vec<_>, _>>()?;
        match chunks.iter().any(|c| c.len() != chunks[0].len()) {
            // It takes two tokenizers of different vocabularies.
            true => Err(Error::new(
                ErrorKind::Model,
                "the model's two tokenizers cut the prompt into different numbers of chunks: the files of both tokenizers have to be those of one model",
            )),
            false => Ok(chunks),
        }
    }
}

impl TextConditioner {
    pub(crate) fn new(parts: Vec<TextPart>, state: HiddenState, zeros_for_absent: bool) -> Self {
        let layers = parts.iter().map(|p| p.encoder.config().num_hidden_layers).min().unwrap_or(0);
        let reader = PromptReader {
            tokenizers: parts.iter().map(|part| part.tokenizer.clone()).collect(),
            max_clip_skip: layers.saturating_sub(state.skip).min(CLIP_SKIP.max),
        };
        Self { parts, reader, state, zeros_for_absent, weights: 0, cache: VecDeque::new() }
    }

    /// Says that the encoders' weights are now those of this number, with words
    /// of their own: what was encoded with others is not what they give.
    pub(crate) fn set_weights(&mut self, weights: u64, embeddings: &[Embedding]) {
        if std::mem::replace(&mut self.weights, weights) == weights {
            return;
        }
        for (i, part) in self.parts.iter_mut().enumerate() {
            let component = if i == 0 { Component::Text } else { Component::Text2 };
            let own: Vec<&Embedding> = embeddings.iter().filter(|e| e.component == component).collect();
            part.tokenizer.set_words(own.iter().map(|e| (e.word.as_str(), e.count)));
            part.encoder.set_words(&own.iter().flat_map(|e| &e.values).copied().collect::<Vec<f32>>());
            self.reader.tokenizers[i] = part.tokenizer.clone();
        }
    }

    /// Checks that encoders and UNet belong together.
    pub(crate) fn check_against(&self, unet: &UNetConfig) -> Result<(), Error> {
        let wrong = |message: String| Err(Error::new(ErrorKind::Model, message));
        let lengths: Vec<usize> = self.parts.iter().map(|p| p.tokenizer.length()).collect();
        if lengths.iter().any(|&l| l != lengths[0]) {
            return wrong(format!(
                "the tokenizers have 'model_max_length' {lengths:?}, which has to be the same: their files have to be those of one model"
            ));
        }
        if let Some(level) = unet.levels.iter().find(|l| l.context != self.width()) {
            return wrong(format!(
                "the text encoder's hidden states are {} wide, but the UNet's 'cross_attention_dim' is {}",
                self.width(),
                level.context
            ));
        }
        let pooled = self.parts.last().and_then(|p| p.encoder.pooled_width());
        let wanted = unet.text_time.map(|t| t.inputs - 6 * t.time_embed_dim);
        if wanted.is_some() && wanted != pooled {
            return wrong(format!(
                "the UNet takes {} pooled text values beside six sizes, but the last text encoder gives {}",
                wanted.unwrap_or(0),
                pooled.unwrap_or(0)
            ));
        }
        Ok(())
    }

    /// What reads and checks prompts.
    pub(crate) fn reader(&self) -> &PromptReader {
        &self.reader
    }

    /// Tokens of one chunk.
    pub(crate) fn tokens(&self) -> usize {
        self.parts[0].tokenizer.length()
    }

    /// Width of the hidden states.
    pub(crate) fn width(&self) -> usize {
        self.parts.iter().map(|p| p.encoder.config().hidden_size).sum()
    }

    /// Encodes what a request says; `guided` asks for its negative side too.
    ///
    /// # Errors
    /// When a prompt cannot be read, or an encoder's numbers are not finite.
    pub(crate) fn encode(&mut self, request: &Request, guided: bool) -> Result<Sides, Error> {
        let reading =
            Reading { syntax: request.prompt_syntax, skip: request.clip_skip, weights: self.weights };
        // diffusers leaves layers out for the prompt alone; A1111 for both.
        let negative_skip = if reading.syntax == PromptSyntax::Plain { 0 } else { reading.skip };
        let negative = Reading { skip: negative_skip, ..reading };
        let mut sides = Sides {
            positive: self.remember(PROMPT, &request.prompt, reading)?,
            negative: match (guided, request.negative_prompt.as_deref()) {
                (false, _) => None,
                (true, None) if self.zeros_for_absent => Some(self.zeros(negative)?),
                (true, prompt) => {
                    Some(self.remember(NEGATIVE_PROMPT, prompt.unwrap_or_default(), negative)?)
                }
            },
        };
        if let Some(side) = &mut sides.negative {
            let length = side.hidden.len().max(sides.positive.hidden.len());
            let zeros = request.negative_prompt.is_none() && self.zeros_for_absent;
            self.lengthen(side, length, negative, zeros)?;
            self.lengthen(&mut sides.positive, length, reading, false)?;
        }
        Ok(sides)
    }

    /// What does not fit of a text in plain syntax.
    pub(crate) fn truncated(&self, text: &str) -> Result<Option<String>, Error> {
        for part in &self.parts {
            if let Some(rest) = part.tokenizer.encode(text)?.truncated {
                return Ok(Some(rest));
            }
        }
        Ok(None)
    }

    /// An absent negative prompt, where that is zeros.
    fn zeros(&mut self, reading: Reading) -> Result<Arc<Encoded>, Error> {
        let empty = self.remember(NEGATIVE_PROMPT, "", reading)?;
        Ok(Arc::new(Encoded { hidden: vec![0.0; empty.hidden.len()], pooled: vec![0.0; empty.pooled.len()] }))
    }

    /// Appends empty chunks (or zeros) up to `length` numbers.
    fn lengthen(
        &mut self,
        side: &mut Arc<Encoded>,
        length: usize,
        reading: Reading,
        zeros: bool,
    ) -> Result<(), Error> {
        if side.hidden.len() == length {
            return Ok(());
        }
        let chunk = match zeros {
            true => vec![0.0; self.tokens() * self.width()],
            false => self.remember(PROMPT, "", reading)?.hidden.clone(),
        };
        let mut longer = Encoded::clone(side);
        while longer.hidden.len() < length {
            longer.hidden.extend_from_slice(&chunk);
        }
        *side = Arc::new(longer);
        Ok(())
    }

    /// Encodes a prompt, or remembers it.
    fn remember(
        &mut self,
        param: &'static str,
        prompt: &str,
        reading: Reading,
    ) -> Result<Arc<Encoded>, Error> {
        if let Some(at) = self.cache.iter().position(|(p, r, _)| p == prompt && *r == reading) {
            let hit = self.cache.remove(at).expect("position is in range");
            self.cache.push_front(hit);
        } else {
            let encoded = Arc::new(self.encode_anew(param, prompt, reading)?);
            self.cache.truncate(CACHE - 1);
            self.cache.push_front((prompt.to_owned(), reading, encoded));
        }
        Ok(self.cache[0].2.clone())
    }

    fn encode_anew(&self, param: &'static str, prompt: &str, reading: Reading) -> Result<Encoded, Error> {
        let chunks = match reading.syntax {
            PromptSyntax::A1111 => self.reader.read(param, prompt)?,
            PromptSyntax::Plain => {
                let mut all = vec![];
                for part in &self.parts {
                    let ids = part.tokenizer.encode(prompt)?.ids;
                    all.push(vec![Chunk { weights: vec![1.0; ids.len()], ids }]);
                }
                all
            }
        };
        let (tokens, width) = (self.tokens(), self.width());
        let state = HiddenState { skip: self.state.skip + reading.skip, ..self.state };
        let mut hidden = vec![0.0; chunks[0].len() * tokens * width];
        let mut pooled = vec![];
        let mut column = 0;
        for (part, chunks) in self.parts.iter().zip(&chunks) {
            // Chunk by chunk, so that the numbers of one do not depend on how many there are.
            let w = part.encoder.config().hidden_size;
            for (i, (chunk, out)) in chunks.iter().zip(hidden.chunks_exact_mut(tokens * width)).enumerate() {
                let output = part.encoder.forward(&chunk.ids, tokens, state);
                let mut states = output.hidden.to_f32();
                weigh(&mut states, &chunk.weights);
                // The encoders' states lie side by side: [tokens, 768 + 1280] in SDXL.
                for (to, from) in out.chunks_exact_mut(width).zip(states.chunks_exact(w)) {
                    to[column..column + w].copy_from_slice(from);
                }
                // The pooled text is the first chunk's, and knows no weights.
                if let (0, Some(p)) = (i, output.pooled) {
                    pooled = p;
                }
            }
            column += w;
        }
        finite(&hidden, "text encoder")?;
        finite(&pooled, "text encoder")?;
        Ok(Encoded { hidden, pooled })
    }
}

/// Multiplies each token's state by its weight, and the whole chunk by what
/// brings its mean back: A1111's emphasis, in the variant that it calls
/// "Original". Without a weight no number changes.
fn weigh(states: &mut [f32], weights: &[f32]) {
    if weights.iter().all(|&w| w == 1.0) {
        return;
    }
    let mean = |states: &[f32]| states.iter().map(|&s| f64::from(s)).sum::<f64>() / states.len() as f64;
    let before = mean(states);
    let width = states.len() / weights.len();
    for (token, weight) in states.chunks_exact_mut(width).zip(weights) {
        token.iter_mut().for_each(|s| *s *= weight);
    }
    let back = (before / mean(states)) as f32;
    states.iter_mut().for_each(|s| *s *= back);
}
