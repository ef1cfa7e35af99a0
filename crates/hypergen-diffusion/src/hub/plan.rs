//! Which of a model's files are needed: configurations, tokenizers, and of the
//! weights one form, half precision where there is one. No pickles, no other
//! frameworks' files, no safety checker.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::recognise;

/// Parts of a model with their weights' name; the last two only SDXL has.
const WEIGHTS: [(&str, &str, bool); 4] = [
    ("unet", "diffusion_pytorch_model", true),
    ("vae", "diffusion_pytorch_model", true),
    ("text_encoder", "model", true),
    ("text_encoder_2", "model", false),
];

const TEXTS: [&str; 8] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// Variants in the order in which they are preferred.
const VARIANTS: [&str; 3] = [".fp16", "", ".bf16"];

/// The files to download of those that there are.
///
/// # Errors
/// When there is no model of ours among them, with what there is.
pub(super) fn needed(files: &[String]) -> Result<Vec<String>, String> {
    let has = |name: &str| files.iter().any(|f| f == name);
    if !has("model_index.json") {
        return Err(no_index(files));
    }
    let mut wanted = BTreeSet::new();
    for text in TEXTS {
        wanted.extend(files.iter().filter(|f| *f == text).cloned());
        for folder in ["tokenizer", "tokenizer_2"] {
            wanted.extend(files.iter().filter(|f| **f == format!("{folder}/{text}")).cloned());
        }
    }
    for (part, stem, required) in WEIGHTS {
        let config = format!("{part}/config.json");
        if !required && !has(&config) {
            continue;
        }
        wanted.extend(has(&config).then_some(config));
        match weights(files, part, stem) {
            Some(weights) => wanted.extend(weights),
            None => return Err(no_weights(files, part, stem)),
        }
    }
    Ok(wanted.into_iter().collect())
}

/// One file, or an index with its shards, in the first variant that there is.
fn weights(files: &[String], part: &str, stem: &str) -> Option<Vec<String>> {
    VARIANTS.iter().find_map(|variant| {
        let one = format!("{part}/{stem}{variant}.safetensors");
        let index = format!("{part}/{stem}.safetensors.index{variant}.json");
        if files.contains(&one) {
            return Some(vec![one]);
        }
        if !files.contains(&index) {
            return None;
        }
        // "model.fp16-00001-of-00002", and as older versions wrote it
        // "model-00001-of-00002.fp16".
        let (new, old) = (format!("{part}/{stem}{variant}-"), format!("{part}/{stem}-"));
        let shard = |f: &&String| {
            let middle = f.strip_suffix(".safetensors").unwrap_or_default();
            let number = |text: Option<&str>| text.is_some_and(|t| t.contains("-of-") && !t.contains('.'));
            number(middle.strip_prefix(&new))
                || number(middle.strip_suffix(variant).and_then(|m| m.strip_prefix(&old)))
        };
        Some(files.iter().filter(shard).cloned().chain([index]).collect())
    })
}

fn no_weights(files: &[String], part: &str, stem: &str) -> String {
    let pickle = [".bin", ".ckpt", ".pt"];
    if files.iter().any(|f| f.starts_with(&format!("{part}/")) && pickle.iter().any(|e| f.ends_with(e))) {
        return format!(
            "its {part} is there only as a pickle, which can run code when it is read, and is never read here; look \
             for the same model as safetensors"
        );
    }
    format!("it has no {part}/{stem}.safetensors")
}

fn no_index(files: &[String]) -> String {
    let hint = recognise::listing(files).map_or(String::new(), |hint| format!("; {hint}"));
    format!(
        "it holds no model_index.json, so it is no model in the diffusers layout{}",
        hint.replace("FOLDER", "OWNER/NAME")
    )
}

/// Files below a snapshot's folder, by their names there.
pub(super) fn files_below(snapshot: &Path) -> Vec<String> {
    let names = |folder: &Path| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        // A link whose blob is gone is no file.
        entries.filter(|e| e.path().exists()).filter_map(|e| e.file_name().into_string().ok()).collect()
    };
    let mut files = vec![];
    for name in names(snapshot) {
        let path = snapshot.join(&name);
        match path.is_dir() {
            true => files.extend(names(&path).iter().map(|inner| format!("{name}/{inner}"))),
            false => files.push(name),
        }
    }
    files
}

/// Whether a snapshot holds all that is needed. Other tools may have left
/// some of the files, or stopped half-way.
pub(super) fn is_whole(snapshot: &Path, files: &[String]) -> bool {
    let Ok(wanted) = needed(files) else { return false };
    let has = |name: &str| files.iter().any(|f| f == name);
    let json =
        |name: &str| -> Option<Value> { serde_json::from_slice(&fs::read(snapshot.join(name)).ok()?).ok() };
    let Some(index) = json("model_index.json") else { return false };
    // The index lists every part that the model has.
    let parts = WEIGHTS.iter().map(|(part, _, _)| *part).chain(["scheduler", "tokenizer", "tokenizer_2"]);
    let listed = |part: &&str| index.get(*part).is_some_and(|v| v.get(0).is_some_and(Value::is_string));
    let there = |part: &str| match part {
        "scheduler" => has("scheduler/scheduler_config.json"),
        "tokenizer" | "tokenizer_2" => {
            let file = |name: &str| has(&format!("{part}/{name}"));
            file("tokenizer.json") || (file("vocab.json") && file("merges.txt"))
        }
        _ => has(&format!("{part}/config.json")),
    };
    let shards_there = |name: &String| {
        let Some((folder, _)) = name.split_once('/').filter(|_| name.contains(".index")) else { return true };
        let map = json(name);
        let map = map.as_ref().and_then(|i| i.get("weight_map")?.as_object());
        map.is_some_and(|m| m.values().filter_map(Value::as_str).all(|f| has(&format!("{folder}/{f}"))))
    };
    parts.filter(listed).all(there) && wanted.iter().all(shards_there)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(extra: &[&str]) -> Vec<String> {
        let base = [
            "README.md",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder/pytorch_model.bin",
            "unet/config.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "safety_checker/model.safetensors",
            "v1-5-pruned.ckpt",
        ];
        base.iter().chain(extra).map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn only_what_is_needed_is_taken_and_half_precision_first() {
        let files = listing(&[
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
        ]);
        let wanted = needed(&files).expect("a model");
        assert_eq!(
            wanted,
            [
                "model_index.json",
                "scheduler/scheduler_config.json",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "tokenizer/merges.txt",
                "tokenizer/vocab.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "vae/config.json",
                "vae/diffusion_pytorch_model.safetensors",
            ]
        );
    }

    #[test]
    fn shards_come_with_their_index_and_variant() {
        let plain = [
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        ];
        let half = ["unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"];
        let indices = [
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        ];
        let wanted = needed(&listing(&[&plain[..], &half, &indices].concat())).expect("a model");
        assert!(
            wanted.contains(&half[0].to_owned()) && wanted.contains(&indices[1].to_owned()),
            "{wanted:?}"
        );
        assert!(!wanted.iter().any(|f| plain.contains(&f.as_str()) || f == indices[0]), "{wanted:?}");
        let wanted = needed(&listing(&[&plain[..], &indices[..1]].concat())).expect("a model");
        assert!(plain.iter().all(|f| wanted.contains(&(*f).to_owned())), "{wanted:?}");
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let pickle = needed(&listing(&["unet/diffusion_pytorch_model.bin"])).expect_err("a pickle");
        assert!(pickle.contains("unet is there only as a pickle"), "{pickle}");
        let nothing = needed(&listing(&[])).expect_err("no weights");
        assert!(nothing.contains("no unet/diffusion_pytorch_model.safetensors"), "{nothing}");
        let single = needed(&["x.safetensors".into(), "y.ckpt".into()]).expect_err("single files");
        assert!(single.contains("OWNER/NAME/x.safetensors"), "{single}");
        for (file, what) in [
            ("pytorch_lora_weights.safetensors", "LoRA"),
            ("learned_embeds.safetensors", "textual inversion"),
            ("model-Q4_0.gguf", "GGUF"),
            ("unet/model.onnx", "ONNX"),
        ] {
            let why = needed(&["README.md".into(), file.into()]).expect_err(file);
            assert!(why.contains("no model_index.json") && why.contains(what), "{why}");
        }
    }
}
