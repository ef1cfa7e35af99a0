//! Tokens beside a tokenizer's vocabulary: begin, end and padding, and what was
//! added later, such as the words of textual inversions. They lie in four
//! files, and which of them count is what transformers says:
//!
//! * with `added_tokens_decoder` in `tokenizer_config.json`, that alone;
//! * else `special_tokens_map.json` before the configuration, and
//!   `added_tokens.json` before the list in `tokenizer.json`.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{BOS, EOS};
use crate::Error;
use crate::files::ModelFiles;

/// Tokens with a part to play, in the order in which they are added.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Lists of further special tokens, under the newer and the older name.
const EXTRA: [&str; 2] = ["extra_special_tokens", "additional_special_tokens"];
const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const LATER: &str = "added_tokens.json";
/// More are no words that someone taught a model.
const MOST: usize = 10_000;
/// No real token is longer, in bytes.
const LENGTH: usize = 1_000;

/// What is added to a vocabulary.
#[derive(Default)]
pub(super) struct Added {
    /// The file that says most of it.
    pub(super) file: &'static str,
    /// In their order, each text once.
    pub(super) tokens: Vec<AddedToken>,
    /// Ids that the files give to some of them.
    pub(super) ids: BTreeMap<u32, String>,
    named: Vec<(&'static str, AddedToken)>,
}

/// A file of the folder, and what is wrong with it.
type Fault = (&'static str, String);

impl Added {
    /// Reads the files of a tokenizer's folder; `listed` is what its
    /// `tokenizer.json` says, if it has one, and `known` whether its vocabulary
    /// has a text.
    ///
    /// # Errors
    /// When a file cannot be read; inside, when what it says makes no sense.
    pub(super) fn read(
        files: &ModelFiles,
        folder: &str,
        config: &Value,
        listed: Option<Vec<(u32, AddedToken)>>,
        known: impl Fn(&str) -> bool,
    ) -> Result<Result<Self, Fault>, Error> {
        let json = |file: &str| files.optional_json(&format!("{folder}/{file}"));
        if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
            let sources = Sources { config, map: &Value::Null, known: &known };
            let tokens = decoded(decoder).map_err(|why| (CONFIG, why));
            return Ok(tokens.and_then(|tokens| sources.join(CONFIG, tokens)));
        }
        let (map, later) = (json(MAP)?.unwrap_or_default(), json(LATER)?.unwrap_or_default());
        let sources = Sources { config, map: &map, known: &known };
        let named = sources.named();
        let special = |text: &str| {
            named.iter().any(|(_, t)| t.content == text) || extra(config).any(|t| t.content == text)
        };
        let file = if listed.is_some() { "tokenizer.json" } else { LATER };
        Ok(numbered(later.as_object(), special).map_err(|why| (LATER, why)).and_then(|mut tokens| {
            tokens.extend(listed.into_iter().flatten());
            sources.join(file, tokens)
        }))
    }

    /// The text of a named token, if there is one.
    pub(super) fn named(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(n, _)| *n == name).map(|(_, token)| token.content.as_str())
    }

    /// Tokens of several vectors, each with all of them as diffusers writes
    /// them out: `<cat-toy>` is `<cat-toy> <cat-toy>_1`, as far as they go.
    pub(super) fn vectors(&self) -> Vec<(String, String)> {
        let known: HashSet<&str> = self.tokens.iter().map(|t| t.content.as_str()).collect();
        let written_out = |token: &AddedToken| {
            let text = &token.content;
            let mut all = text.clone();
            let further = (1..).map(|i| format!("{text}_{i}")).take_while(|t| known.contains(t.as_str()));
            further.for_each(|t| all.extend([" ", &t]));
            (all.len() > text.len()).then(|| (text.clone(), all))
        };
        self.tokens.iter().filter_map(written_out).collect()
    }
}

/// The tokens of `tokenizer.json`'s own list.
pub(super) fn listed(json: &Value) -> Result<Vec<(u32, AddedToken)>, String> {
    let all = json.as_array().map(Vec::as_slice).unwrap_or_default();
    let one = |value: &Value| {
        let id = value.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        Some((id?, token(value, false)?))
    };
    all.iter()
        .map(|value| {
            one(value).ok_or_else(|| format!("its added token {} has no id or no text", clip(value)))
        })
        .collect()
}

/// Where tokens are named.
struct Sources<'a> {
    config: &'a Value,
    map: &'a Value,
    known: &'a dyn Fn(&str) -> bool,
}

impl Sources<'_> {
    /// The named tokens that there are: the map comes before the configuration,
    /// and that before CLIP's own.
    fn named(&self) -> Vec<(&'static str, AddedToken)> {
        let find = |name: &'static str| {
            let from_map = self.map.get(name).and_then(|value| token(value, true));
            let from_config = || self.config.get(name).and_then(|value| token(value, value.is_string()));
            let default = || match name {
                "bos_token" => Some(AddedToken::from(BOS, true)),
                "eos_token" => Some(AddedToken::from(EOS, true)),
                _ => None,
            };
            let found = from_map.or_else(from_config).or_else(default)?;
            // No part of ours is played by the others, so they need not exist.
            let needed = matches!(name, "bos_token" | "eos_token" | "pad_token");
            (needed || (self.known)(&found.content)).then(|| (name, found.special(true)))
        };
        NAMED.into_iter().filter_map(find).collect()
    }

    /// All tokens in the order in which they get their ids: by the ids that the
    /// files give, then the named ones and the further ones.
    fn join(&self, file: &'static str, mut listed: BTreeMap<u32, AddedToken>) -> Result<Added, Fault> {
        let named = self.named();
        for token in listed.values_mut() {
            token.special |= named.iter().any(|(_, t)| t.content == token.content);
        }
        let known: HashSet<String> = listed.values().map(|t| t.content.clone()).collect();
        let ids = listed.iter().map(|(id, token)| (*id, token.content.clone())).collect();
        let further = named.iter().map(|(_, token)| token.clone());
        let further = further.chain(extra(self.config)).chain(extra(self.map));
        let mut tokens: Vec<AddedToken> = vec![];
        let mut places: HashMap<String, usize> = HashMap::new();
        for token in listed.into_values().chain(further.filter(|t| !known.contains(&t.content))) {
            if token.content.len() > LENGTH {
                return Err((
                    file,
                    format!("its token '{}…' has more than {LENGTH} bytes", clip(&token.content)),
                ));
            }
            match places.get(&token.content) {
                // Of two definitions of one token, transformers keeps the last.
                Some(&place) => tokens[place] = token,
                None => {
                    places.insert(token.content.clone(), tokens.len());
                    tokens.push(token);
                }
            }
        }
        match tokens.len() {
            ..=MOST => Ok(Added { file, tokens, ids, named }),
            count => Err((file, format!("it adds {count} tokens; at most {MOST} are read"))),
        }
    }
}

fn extra(json: &Value) -> impl Iterator<Item = AddedToken> + '_ {
    let lists = EXTRA.iter().filter_map(|name| json.get(name)?.as_array()).flatten();
    lists.filter_map(|value| token(value, true))
}

/// `added_tokens_decoder`: tokens with all their flags, by id.
fn decoded(decoder: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>, String> {
    let one = |(id, value): (&String, &Value)| match (id.parse(), value.is_object(), token(value, false)) {
        (Ok(id), true, Some(token)) => Ok((id, token)),
        _ => Err(format!("'added_tokens_decoder' maps '{}' to {}", clip(id), clip(value))),
    };
    decoder.iter().map(one).collect()
}

/// `added_tokens.json`: texts with their ids.
fn numbered(
    later: Option<&Map<String, Value>>,
    special: impl Fn(&str) -> bool,
) -> Result<BTreeMap<u32, AddedToken>, String> {
    let one = |(text, id): (&String, &Value)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let number = number.ok_or_else(|| format!("it maps '{}' to {}", clip(text), clip(id)))?;
        Ok((number, AddedToken::from(text.as_str(), special(text))))
    };
    let tokens: Vec<(u32, AddedToken)> =
        later.into_iter().flatten().map(one).collect::<Result<_, String>>()?;
    let count = tokens.len();
    let by_id: BTreeMap<u32, AddedToken> = tokens.into_iter().collect();
    match by_id.len() == count {
        true => Ok(by_id),
        false => Err("it gives one id to several tokens".to_owned()),
    }
}

/// A token is a text, or an object that holds one. One that is `normalized` is
/// found in a prompt after lower-casing, so in capitals as well.
fn token(value: &Value, special: bool) -> Option<AddedToken> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let token = AddedToken::from(text, special || flag("special").unwrap_or(false));
    Some(AddedToken {
        normalized: flag("normalized").unwrap_or(token.normalized),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        single_word: flag("single_word").unwrap_or(false),
        ..token
    })
}

/// A value in a message.
fn clip(value: impl ToString) -> String {
    value.to_string().chars().take(60).collect()
}
