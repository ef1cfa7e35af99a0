//! What a trainer wrote of a LoRA's strength beside its tensors: PEFT's
//! `LoraConfig`, in the file's header as diffusers saves it, or in the
//! `adapter_config.json` beside a file of PEFT's own.
//!
//! Of its fields alpha, rank, their patterns and `use_rslora` say how strong a
//! module's change is, and `init_lora_weights` whether the file is all of the
//! change. `target_modules`, `exclude_modules` and `layers_to_transform` choose
//! modules before the training; afterwards the tensors themselves tell.

use std::fmt;
use std::path::{Path, PathBuf};

use hypergen_tensor::Checkpoint;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::names::Component;
use super::patterns::Patterns;
use super::{lora_error, some_of};
use crate::Error;

/// Larger ones are no settings: those of every layer of SDXL take half of it.
const MAX_SETTINGS: usize = 1 << 20;
/// The settings beside PEFT's own files.
const CONFIG: &str = "adapter_config.json";
/// PEFT's own files.
const PEFT_FILE: &str = "adapter_model.safetensors";
/// Beginnings of module names that PEFT's wrappers add.
const WRAPPERS: &[&str] = &["base_model.model.", "base_model."];
/// Beginnings of a pipeline's module names and of its settings, by part.
const PARTS: &[(Component, &str)] =
    &[(Component::UNet, "unet."), (Component::Text, "text_encoder."), (Component::Text2, "text_encoder_2.")];
/// What `LoraConfig`, `LoHaConfig` and `LoKrConfig` take for a missing alpha or rank.
const DEFAULT: f64 = 8.0;
/// Ways to initialise a LoRA that take what it starts with out of the base.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// The settings of a file, by the part of the model that they are for; those
/// without a part are for all others.
#[derive(Debug, Default)]
pub(super) struct Settings(Vec<(Option<Component>, Config)>);

impl Settings {
    /// Reads what belongs to a LoRA file at `path` (as the user named it) with
    /// modules of these names.
    ///
    /// # Errors
    /// When there are settings that cannot be read.
    pub(super) fn of<'a>(
        checkpoint: &Checkpoint,
        path: &Path,
        mut modules: impl Iterator<Item = &'a str>,
    ) -> Result<Self, Error> {
        let label = checkpoint.label();
        if let Some(text) = checkpoint.metadata("lora_adapter_metadata") {
            return Self::read(text.as_bytes(), &format!("{label}: its 'lora_adapter_metadata'"));
        }
        // A file of another kind may lie in the same folder as PEFT's.
        let is_peft = path.file_name().is_some_and(|name| name == PEFT_FILE);
        if !is_peft && !modules.any(|name| name.starts_with("base_model.")) {
            return Ok(Self::default());
        }
        let shown = format!("the {CONFIG} beside {label}");
        for file in beside(path) {
            let Some(metadata) = std::fs::metadata(&file).ok().filter(|m| m.is_file()) else { continue };
            if metadata.len() > MAX_SETTINGS as u64 {
                return Err(too_large(&shown, metadata.len()));
            }
            let text =
                std::fs::read(&file).map_err(|e| lora_error(format!("{shown} cannot be read: {e}")))?;
            return Self::read(&text, &shown);
        }
        Ok(Self::default())
    }

    /// Reads settings that messages call `shown`.
    fn read(text: &[u8], shown: &str) -> Result<Self, Error> {
        if text.len() > MAX_SETTINGS {
            return Err(too_large(shown, text.len() as u64));
        }
        let Ok(Json::Object(fields)) = serde_json::from_slice(text) else {
            return Err(lora_error(format!("{shown} is not a JSON object")));
        };
        let fields = Fields { fields: &fields, shown };
        let mut all = vec![];
        for (component, prefix) in PARTS {
            if fields.fields.iter().any(|(name, _)| name.starts_with(prefix)) {
                all.push((Some(*component), Config::read(&fields, prefix)?));
            }
        }
        // A network saved by itself writes no prefix.
        if fields.fields.iter().any(|(name, _)| !name.contains('.')) {
            all.push((None, Config::read(&fields, "")?));
        }
        Ok(Self(all))
    }

    /// Alpha over rank of a module, called so by the file; 1 where nothing says
    /// alpha. `rank` is what its tensors show.
    pub(super) fn scale(&self, module: &str, component: Option<Component>, rank: Option<usize>) -> f64 {
        let of = |component| self.0.iter().find(|(c, _)| *c == component);
        // A name without a part is one of a network saved by itself.
        let found = of(component).or_else(|| of(None)).or_else(|| match component {
            None => of(Some(Component::UNet)),
            Some(_) => None,
        });
        let Some((part, config)) = found else { return 1.0 };
        config.scale(plain(module, *part), rank)
    }
}

/// A module's name as its network has it.
fn plain(module: &str, part: Option<Component>) -> &str {
    let unwrapped = |name| WRAPPERS.iter().fold(name, |name: &str, w| name.strip_prefix(w).unwrap_or(name));
    let module = unwrapped(module);
    let prefix = PARTS.iter().find(|(component, _)| Some(*component) == part).map(|(_, prefix)| *prefix);
    match prefix.and_then(|prefix| module.strip_prefix(prefix)) {
        Some(inner) => unwrapped(inner),
        None => module,
    }
}

/// Where the settings beside a file may lie: next to the name that the user
/// gave, and, if that is a link, next to what it leads to.
pub(super) fn beside(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.with_file_name(CONFIG)];
    found.extend(path.canonicalize().ok().map(|real| real.with_file_name(CONFIG)).filter(|p| *p != found[0]));
    found
}

fn too_large(shown: &str, length: u64) -> Error {
    lora_error(format!("{shown} has {length} bytes; settings have at most {MAX_SETTINGS}"))
}

/// PEFT's configuration of one network's adapter.
#[derive(Debug)]
struct Config {
    alpha: f64,
    rank: f64,
    alphas: Patterns,
    ranks: Patterns,
    by_root: bool,
}

impl Config {
    fn read(fields: &Fields<'_>, prefix: &str) -> Result<Self, Error> {
        let start = match fields.get(prefix, "init_lora_weights") {
            Some(Json::Text(start)) => start.as_str(),
            _ => "",
        };
        if CHANGES_BASE.iter().any(|s| start.starts_with(s)) {
            return Err(lora_error(format!(
                "{}: the LoRA was initialised by {}, which changes the base weights too, and those changes are not in \
                 the file; save it as a plain LoRA (PEFT: save_pretrained with \
                 path_initial_model_for_weight_conversion)",
                fields.shown,
                some_of(&[start])
            )));
        }
        let alpha = fields.number(prefix, "lora_alpha")?;
        Ok(Self {
            alpha: alpha.map_or_else(|| fields.number(prefix, "alpha"), |a| Ok(Some(a)))?.unwrap_or(DEFAULT),
            rank: fields.number(prefix, "r")?.unwrap_or(DEFAULT),
            alphas: fields.patterns(prefix, "alpha_pattern")?,
            ranks: fields.patterns(prefix, "rank_pattern")?,
            by_root: matches!(fields.get(prefix, "use_rslora"), Some(Json::Bool(true))),
        })
    }

    fn scale(&self, module: &str, rank: Option<usize>) -> f64 {
        // Whether CLIP's layers lie in a `text_model` depends on the version of
        // transformers that named them.
        let names = [module, module.strip_prefix("text_model.").unwrap_or(module)];
        let alpha = self.alphas.find(&names).unwrap_or(self.alpha);
        let rank = rank.map_or_else(|| self.ranks.find(&names).unwrap_or(self.rank), |rank| rank as f64);
        match rank > 0.0 {
            true => alpha / if self.by_root { rank.sqrt() } else { rank },
            false => 1.0,
        }
    }
}

/// The fields of a JSON object, with what messages call it.
struct Fields<'a> {
    fields: &'a [(String, Json)],
    shown: &'a str,
}

impl Fields<'_> {
    /// The last of equal names counts, as everywhere in JSON; `null` is no value.
    fn get(&self, prefix: &str, name: &str) -> Option<&Json> {
        let found = self.fields.iter().rfind(|(field, _)| field.strip_prefix(prefix) == Some(name));
        found.map(|(_, value)| value).filter(|value| !matches!(value, Json::Null))
    }

    fn number(&self, prefix: &str, name: &str) -> Result<Option<f64>, Error> {
        match self.get(prefix, name) {
            None => Ok(None),
            Some(Json::Number(number)) => Ok(Some(*number)),
            Some(_) => Err(lora_error(format!("{}: '{prefix}{name}' must be a number", self.shown))),
        }
    }

    fn patterns(&self, prefix: &str, name: &str) -> Result<Patterns, Error> {
        let wrong = |why: String| lora_error(format!("{}: '{prefix}{name}' {why}", self.shown));
        let mut pairs: Vec<(&str, f64)> = vec![];
        match self.get(prefix, name) {
            None => {}
            Some(Json::Object(fields)) => {
                for (pattern, value) in fields {
                    let Json::Number(number) = value else {
                        return Err(wrong(format!("must give a number for {}", some_of(&[pattern]))));
                    };
                    pairs.push((pattern, *number));
                }
            }
            Some(_) => return Err(wrong("must be an object of patterns and numbers".to_owned())),
        }
        Patterns::new(&pairs).map_err(wrong)
    }
}

/// A JSON value whose objects keep the order of the file: of several patterns
/// that match, PEFT takes the first.
#[derive(Debug, Clone, PartialEq)]
enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    /// No setting that is read here is one.
    List,
    Object(Vec<(String, Json)>),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Ordered)
    }
}

struct Ordered;

impl<'de> Visitor<'de> for Ordered {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value as f64))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Json::List)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields = vec![];
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Json::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(json: &str) -> Settings {
        Settings::read(json.as_bytes(), "x").expect(json)
    }

    fn refused(json: &str) -> String {
        Settings::read(json.as_bytes(), "x").expect_err(json).message
    }

    const UNET: Option<Component> = Some(Component::UNet);

    #[test]
    fn settings_give_alpha_over_rank() {
        let plain = settings(
            r#"{"r": 8, "lora_alpha": 16, "alpha_pattern": {"to_k": 4}, "rank_pattern": {"to_v": 2}, "bias": "none"}"#,
        );
        assert_eq!(plain.scale("a.to_q", None, Some(8)), 2.0);
        assert_eq!(plain.scale("a.to_k", None, Some(8)), 0.5);
        assert_eq!(plain.scale("a.to_v", None, None), 8.0);
        let root = settings(r#"{"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": true}"#);
        assert_eq!(root.scale("unet.a.to_q", UNET, Some(4)), 2.0);
        assert_eq!(root.scale("text_encoder.a", Some(Component::Text), Some(4)), 1.0);
        assert_eq!(Settings::default().scale("a.to_q", None, Some(4)), 1.0);
        assert_eq!(settings(r#"{"r": 4, "alpha": 2}"#).scale("unet.a", UNET, Some(4)), 0.5, "LoHa and LoKr");
        assert_eq!(settings(r#"{"r": 4}"#).scale("a", None, Some(4)), 2.0, "PEFT's default alpha is 8");
    }

    /// Patterns see a module's name as its network has it: without the part's
    /// prefix, without PEFT's wrapper, with and without `text_model`.
    #[test]
    fn names_are_those_of_the_network() {
        let json = r#"{"unet.r": 2, "unet.alpha_pattern": {"^down_blocks.0.to_k": 8}, "unet.lora_alpha": 2,
            "text_encoder.r": 2, "text_encoder.alpha_pattern": {"^encoder.layers.0.q_proj": 4},
            "text_encoder_2.alpha_pattern": {"^text_model.encoder.q_proj": 6}}"#;
        let all = settings(json);
        let text = Some(Component::Text);
        for (module, component, scale) in [
            ("unet.down_blocks.0.to_k", UNET, 4.0),
            ("unet.base_model.model.down_blocks.0.to_k", UNET, 4.0),
            ("unet.mid.down_blocks.0.to_k", UNET, 1.0),
            ("down_blocks.0.to_k", None, 4.0),
            ("text_encoder.encoder.layers.0.q_proj", text, 2.0),
            ("text_encoder.text_model.encoder.layers.0.q_proj", text, 2.0),
            ("text_encoder_2.text_model.encoder.q_proj", Some(Component::Text2), 3.0),
        ] {
            assert_eq!(all.scale(module, component, Some(2)), scale, "{module}");
        }
        let peft = settings(r#"{"r": 2, "lora_alpha": 2, "alpha_pattern": {"^unet.to_k": 8}}"#);
        assert_eq!(peft.scale("base_model.model.unet.to_k", UNET, Some(2)), 4.0);
    }

    #[test]
    fn the_first_pattern_in_the_files_order_counts() {
        let first = settings(r#"{"r": 1, "alpha_pattern": {"to_k": 5, "attn2.to_k": 3}}"#);
        assert_eq!(first.scale("attn2.to_k", None, Some(1)), 5.0);
        let second = settings(r#"{"r": 1, "alpha_pattern": {"z.*": 1, "attn2.to_k": 3, "to_k": 5}}"#);
        assert_eq!(second.scale("attn2.to_k", None, Some(1)), 3.0);
        let twice = settings(r#"{"r": 1, "alpha_pattern": {"to_k": 5, "attn2.to_k": 3, "to_k": 7}}"#);
        assert_eq!(twice.scale("attn2.to_k", None, Some(1)), 7.0, "a repeated field keeps its place");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (json, words) in [
            ("[]", "x is not a JSON object"),
            ("{", "x is not a JSON object"),
            (r#"{"init_lora_weights": "pissa_niter_4"}"#, "'pissa_niter_4'"),
            (r#"{"unet.init_lora_weights": "loftq"}"#, "'loftq'"),
            (r#"{"lora_alpha": "16"}"#, "'lora_alpha' must be a number"),
            (r#"{"unet.r": []}"#, "'unet.r' must be a number"),
            (r#"{"alpha_pattern": 3}"#, "'alpha_pattern' must be an object"),
            (r#"{"rank_pattern": {"to_k": null}}"#, "must give a number for 'to_k'"),
            (r#"{"unet.alpha_pattern": {"a(?=b)": 1}}"#, "'unet.alpha_pattern' has the pattern 'a(?=b)'"),
        ] {
            let message = refused(json);
            assert!(message.contains(words) && !message.contains('\n'), "{message}");
        }
        let large = format!(r#"{{"x": "{}"}}"#, "x".repeat(MAX_SETTINGS));
        assert!(refused(&large).contains("settings have at most"));
        // Values that say nothing.
        let json = r#"{"r": 4, "lora_alpha": 4, "alpha_pattern": null, "rank_pattern": {}, "target_modules": ["x", ["y"]],
            "loftq_config": {"a": {"b": 1.5}}, "init_lora_weights": true, "use_rslora": null}"#;
        assert_eq!(settings(json).scale("a", None, Some(4)), 1.0);
    }
}
