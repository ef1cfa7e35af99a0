//! From prompts to what a UNet is told: one text encoder, or SDXL's two.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::models::text_encoder::{HiddenState, TextEncoder};
use crate::models::unet::UNetConfig;
use crate::tokenizer::Tokenizer;
use crate::{Error, ErrorKind};

/// A tokenizer with its encoder.
pub(crate) struct TextPart {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) encoder: TextEncoder,
}

/// One prompt, encoded.
pub(crate) struct Encoded {
    /// `[tokens, width]`.
    pub(crate) hidden: Vec<f32>,
    /// `[pooled width]`; empty where the family takes none.
    pub(crate) pooled: Vec<f32>,
    /// What did not fit into the text encoder.
    pub(crate) truncated: Option<String>,
}

/// Encodes prompts, and remembers the latest of them.
pub(crate) struct TextConditioner {
    parts: Vec<TextPart>,
    /// Which hidden state the family conditions on.
    state: HiddenState,
    /// An absent negative prompt is zeros, not the encoding of "".
    zeros_for_absent: bool,
    cache: VecDeque<(String, Arc<Encoded>)>,
}

/// Prompts remembered; an SDXL prompt takes 0.6 MB.
const CACHE: usize = 64;

impl TextConditioner {
    pub(crate) fn new(parts: Vec<TextPart>, state: HiddenState, zeros_for_absent: bool) -> Self {
        Self { parts, state, zeros_for_absent, cache: VecDeque::new() }
    }

    /// Checks that encoders and UNet belong together.
    pub(crate) fn check_against(&self, unet: &UNetConfig) -> Result<(), Error> {
        let wrong = |message: String| Err(Error::new(ErrorKind::Model, message));
        let lengths: Vec<usize> = self.parts.iter().map(|p| p.tokenizer.length()).collect();
        if lengths.iter().any(|&l| l != lengths[0]) {
            return wrong(format!(
                "the tokenizers disagree about the length of a prompt: {lengths:?} tokens"
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

    /// Tokens of every encoded prompt.
    pub(crate) fn tokens(&self) -> usize {
        self.parts[0].tokenizer.length()
    }

    /// Width of the hidden states.
    pub(crate) fn width(&self) -> usize {
        self.parts.iter().map(|p| p.encoder.config().hidden_size).sum()
    }

    /// Encodes a prompt, or remembers it.
    pub(crate) fn encode(&mut self, prompt: &str) -> Result<Arc<Encoded>, Error> {
        if let Some(at) = self.cache.iter().position(|(p, _)| p == prompt) {
            let hit = self.cache.remove(at).expect("position is in range");
            self.cache.push_front(hit);
        } else {
            let encoded = Arc::new(self.encode_anew(prompt)?);
            self.cache.truncate(CACHE - 1);
            self.cache.push_front((prompt.to_owned(), encoded));
        }
        Ok(self.cache[0].1.clone())
    }

    /// The negative side of guidance.
    pub(crate) fn encode_negative(&mut self, prompt: Option<&str>) -> Result<Arc<Encoded>, Error> {
        match prompt {
            None if self.zeros_for_absent => {
                let empty = self.encode("")?;
                Ok(Arc::new(Encoded {
                    hidden: vec![0.0; empty.hidden.len()],
                    pooled: vec![0.0; empty.pooled.len()],
                    truncated: None,
                }))
            }
            prompt => self.encode(prompt.unwrap_or_default()),
        }
    }

    fn encode_anew(&self, prompt: &str) -> Result<Encoded, Error> {
        let (tokens, width) = (self.tokens(), self.width());
        let mut hidden = vec![0.0; tokens * width];
        let mut pooled = vec![];
        let mut truncated = None;
        let mut column = 0;
        for part in &self.parts {
            let encoded = part.tokenizer.encode(prompt)?;
            let output = part.encoder.forward(&encoded.ids, tokens, self.state);
            // The encoders' states lie side by side: [tokens, 768 + 1280] in SDXL.
            let w = part.encoder.config().hidden_size;
            for (to, from) in hidden.chunks_exact_mut(width).zip(output.hidden.to_f32().chunks_exact(w)) {
                to[column..column + w].copy_from_slice(from);
            }
            column += w;
            if let Some(p) = output.pooled {
                pooled = p;
            }
            truncated = truncated.or(encoded.truncated);
        }
        Ok(Encoded { hidden, pooled, truncated })
    }
}
