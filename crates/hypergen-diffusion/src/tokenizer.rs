//! CLIP's tokenizer, as transformers runs it, from either generation of its
//! files: `vocab.json` with `merges.txt`, or `tokenizer.json` alone. What was
//! added to its vocabulary is [`added`]'s business.

mod added;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{self, Lowercase, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::{self};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use self::added::Added;
use crate::files::ModelFiles;
use crate::{Error, ErrorKind};

const BOS: &str = "<|startoftext|>";
const EOS: &str = "<|endoftext|>";
/// A comma that ends a word, as CLIP's vocabulary writes it.
const COMMA: &str = ",</w>";
/// CLIP's split into words, from its `simple_tokenizer.py`.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Vocabulary files beyond this size are refused: CLIP's has 49,408 entries.
const MAX_VOCAB: usize = 1 << 20;
/// Longest text, in bytes, once tokens of several vectors are written out.
const MAX_TEXT: usize = 1 << 20;

/// A tokenizer of one text encoder. Clones share their vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos: u32,
    eos: u32,
    pad: u32,
    comma: Option<u32>,
    length: usize,
    /// Embeddings of the text encoder.
    vocab: usize,
    /// Tokens of several vectors, each with all of them written out.
    vectors: Arc<[(String, String)]>,
    /// See [`Tokenizer::set_words`]; longer ones before shorter.
    words: Vec<Word>,
}

/// A word that stands for ids of its own.
#[derive(Clone)]
struct Word {
    tokens: Vec<u32>,
    ids: Range<u32>,
}

/// A prompt in the text encoder's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Begin, words, end and padding: always [`Tokenizer::length`] ids.
    pub ids: Vec<u32>,
    /// What did not fit, decoded.
    pub truncated: Option<String>,
}

impl Tokenizer {
    /// Reads the tokenizer in `folder` of a model, for a text encoder of
    /// `positions` tokens and `vocab` embeddings.
    ///
    /// # Errors
    /// When files are missing, do not parse, or name tokens that the encoder
    /// does not have.
    pub fn load(files: &ModelFiles, folder: &str, positions: usize, vocab: usize) -> Result<Self, Error> {
        let at = |file: &str| format!("{folder}/{file}");
        let wrong = |file: &str, why: String| {
            Error::new(ErrorKind::Model, format!("{}: {why}", files.show(&at(file))))
        };
        let config = files.optional_json(&at("tokenizer_config.json"))?.unwrap_or_default();
        let (mut inner, file, listed) = match files.bytes(&at("tokenizer.json"))? {
            Some(bytes) => {
                let (inner, listed) = from_tokenizer_json(&bytes).map_err(|e| wrong("tokenizer.json", e))?;
                (inner, "tokenizer.json", Some(listed))
            }
            None => {
                let vocab = files.json(&at("vocab.json"))?;
                let merges = files.required_bytes(&at("merges.txt"))?;
                let merges = String::from_utf8_lossy(&merges);
                (from_merges(vocab, &merges).map_err(|e| wrong("merges.txt", e))?, "vocab.json", None)
            }
        };
        let known = |text: &str| inner.token_to_id(text).is_some();
        let added = Added::read(files, folder, &config, listed, known)?;
        let added = added.map_err(|(file, why)| wrong(file, why))?;
        // As transformers does, the padding token is cut out of prompts, too:
        // in SD 2.x and SDXL that is "!".
        inner.add_tokens(&added.tokens);
        let id = |token: &str| {
            let id = inner.token_to_id(token).filter(|&id| (id as usize) < vocab);
            id.ok_or_else(|| {
                wrong(file, format!("it has no token '{token}' among the text encoder's {vocab}"))
            })
        };
        let eos = added.named("eos_token").unwrap_or(EOS);
        let bos = id(added.named("bos_token").unwrap_or(BOS))?;
        let (eos, pad) = (id(eos)?, id(added.named("pad_token").unwrap_or(eos))?);
        if let Some((token, id)) = inner.get_vocab(true).into_iter().find(|(_, id)| *id as usize >= vocab) {
            let why = format!("its token '{token}' has id {id}, but the text encoder has {vocab} embeddings");
            return Err(wrong(file, why));
        }
        for (wanted, text) in &added.ids {
            let found = inner.token_to_id(text);
            if found != Some(*wanted) {
                return Err(wrong(
                    added.file,
                    format!(
                        "its token '{text}' has id {wanted}, but {} is its place: ids of added tokens follow on the \
                         vocabulary without gaps",
                        found.unwrap_or_default()
                    ),
                ));
            }
        }
        // Older files leave the length out, and transformers then says 10^30.
        let length = config.get("model_max_length").and_then(Value::as_u64).map_or(positions, |l| l as usize);
        if length > positions || length < 3 {
            return Err(wrong(
                "tokenizer_config.json",
                format!("'model_max_length' is {length}, but the text encoder has {positions} positions"),
            ));
        }
        let comma = inner.token_to_id(COMMA);
        let (inner, vectors) = (Arc::new(inner), added.vectors().into());
        Ok(Self { inner, bos, eos, pad, comma, length, vocab, vectors, words: vec![] })
    }

    /// Tokens of every encoded prompt, begin and end included.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens that a text may have, begin and end not among them.
    pub fn room(&self) -> usize {
        self.length - 2
    }

    /// The token of a comma by itself, if the vocabulary has one.
    pub fn comma(&self) -> Option<u32> {
        self.comma
    }

    /// The tokens of a text of any length, without begin, end and padding.
    ///
    /// # Errors
    /// When the tokenizer's files lead it into a token that it does not have,
    /// or the text becomes too long.
    pub fn words(&self, text: &str) -> Result<Vec<u32>, Error> {
        let text = self.written_out(text)?;
        let tokens = self.inner.encode_fast(&*text, false).map_err(failed)?.get_ids().to_vec();
        if self.words.is_empty() {
            return Ok(tokens);
        }
        let (mut ids, mut rest) = (vec![], tokens.as_slice());
        while let [first, more @ ..] = rest {
            match self.words.iter().find(|word| rest.starts_with(&word.tokens)) {
                Some(word) => {
                    ids.extend(word.ids.clone());
                    rest = &rest[word.tokens.len()..];
                }
                None => {
                    ids.push(*first);
                    rest = more;
                }
            }
        }
        Ok(ids)
    }

    /// Words, each with the number of ids that it stands for from now on, in
    /// the place of all earlier ones. The ids follow the vocabulary's, in this
    /// order. A word is known by its tokens, wherever they stand in a prompt;
    /// of two that are the same the later counts.
    pub fn set_words<'a>(&mut self, words: impl IntoIterator<Item = (&'a str, usize)>) {
        self.words.clear();
        let mut next = self.vocab as u32;
        for (word, count) in words {
            let ids = next..next + count as u32;
            next = ids.end;
            let tokens = self.inner.encode_fast(word, false).map(|e| e.get_ids().to_vec());
            // A word without tokens is in no prompt.
            if let Some(tokens) = tokens.ok().filter(|t| !t.is_empty()) {
                self.words.insert(0, Word { tokens, ids });
            }
        }
        self.words.sort_by_key(|word| std::cmp::Reverse(word.tokens.len()));
    }

    /// A text with all vectors of its tokens, as diffusers' `maybe_convert_prompt`
    /// writes them: it looks for tokens, and then replaces their text wherever
    /// it stands.
    fn written_out<'a>(&self, text: &'a str) -> Result<Cow<'a, str>, Error> {
        let mut wanted: Vec<&(String, String)> =
            self.vectors.iter().filter(|(token, _)| text.contains(token.as_str())).collect();
        if wanted.is_empty() {
            return Ok(text.into());
        }
        // The faster way to encode gives ids without their texts.
        let encoded = self.inner.encode(text, false).map_err(failed)?;
        let mut text = text.to_owned();
        for found in encoded.get_tokens() {
            let Some(at) = wanted.iter().position(|(token, _)| token == found) else { continue };
            let (token, all) = wanted.swap_remove(at);
            let count = text.matches(token.as_str()).count();
            let longer = count.checked_mul(all.len()).and_then(|more| more.checked_add(text.len()));
            if longer.is_none_or(|length| length > MAX_TEXT) {
                return Err(Error::new(
                    ErrorKind::Request,
                    format!("the prompt is too long with all vectors of '{token}' written out"),
                ));
            }
            text = text.replace(token.as_str(), all);
        }
        Ok(text.into())
    }

    /// Puts begin, end and padding around at most [`Tokenizer::room`] tokens;
    /// further ones are left out.
    pub fn frame(&self, words: &[u32]) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.bos);
        ids.extend(words.iter().take(self.room()));
        ids.push(self.eos);
        ids.resize(self.length, self.pad);
        ids
    }

    /// The vocabulary's tokens for ids, those of added words among them.
    fn tokens(&self, ids: &[u32]) -> Vec<u32> {
        let added = |id: u32| self.words.iter().find(|word| word.ids.contains(&id));
        let mut tokens = vec![];
        for (i, &id) in ids.iter().enumerate() {
            match added(id) {
                None => tokens.push(id),
                Some(word) if id == word.ids.start || i == 0 => tokens.extend(&word.tokens),
                Some(_) => {}
            }
        }
        tokens
    }

    /// Encodes a prompt, padded or truncated to [`Tokenizer::length`].
    ///
    /// # Errors
    /// As [`Tokenizer::words`].
    pub fn encode(&self, text: &str) -> Result<Tokens, Error> {
        let words = self.words(text)?;
        let truncated = match words.get(self.room()..) {
            None | Some([]) => None,
            Some(rest) => {
                let rest = &self.tokens(rest);
                Some(self.inner.decode(rest, false).map_err(failed)?.replace("</w>", " ").trim().to_owned())
            }
        };
        Ok(Tokens { ids: self.frame(&words), truncated })
    }
}

fn failed(e: tokenizers::Error) -> Error {
    Error::new(ErrorKind::Internal, format!("cannot tokenize the prompt: {e}"))
}

/// A tokenizer without the tokens that were added to it, and those.
fn from_tokenizer_json(
    bytes: &[u8],
) -> Result<(tokenizers::Tokenizer, Vec<(u32, tokenizers::AddedToken)>), String> {
    let mut json: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let fields = json.as_object_mut().ok_or_else(|| "it is not a JSON object".to_owned())?;
    let listed = fields.insert("added_tokens".to_owned(), Value::Array(vec![]));
    let listed = added::listed(&listed.unwrap_or_default())?;
    let bytes = serde_json::to_vec(&json).map_err(|e| e.to_string())?;
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
    // Begin, end, padding and truncation are ours to add.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|e| e.to_string())?;
    Ok((inner, listed))
}

fn from_merges(vocab: Value, merges: &str) -> Result<tokenizers::Tokenizer, String> {
    let vocab: HashMap<String, u32> = serde_json::from_value(vocab)
        .map_err(|e| format!("vocab.json beside it does not map tokens to ids: {e}"))?;
    if vocab.len() > MAX_VOCAB {
        return Err(format!("vocab.json beside it has {} entries", vocab.len()));
    }
    let mut pairs = vec![];
    for (number, line) in merges.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with("#version") {
            continue;
        }
        let (a, b) =
            line.split_once(' ').ok_or_else(|| format!("line {} is not a pair: '{line}'", number + 1))?;
        pairs.push((a.to_owned(), b.trim_end().to_owned()));
    }
    build(vocab, pairs).map_err(|e| e.to_string())
}

/// The pipeline of transformers' `CLIPTokenizer` around a vocabulary.
fn build(
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
) -> Result<tokenizers::Tokenizer, tokenizers::Error> {
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .unk_token(EOS.into())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .build()?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces = Replace::new(normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ")?;
    inner.with_normalizer(Some(normalizers::Sequence::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces),
        NormalizerWrapper::Lowercase(Lowercase),
    ])));
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    inner.with_pre_tokenizer(Some(pre_tokenizers::sequence::Sequence::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ])));
    inner.with_decoder(Some(ByteLevel::default()));
    Ok(inner)
}
