//! Every module of the tiny checkpoints under every public name that there is
//! for it, and names that nobody would give.

use std::collections::{BTreeSet, HashSet};

use proptest::prelude::*;

use super::super::names::{bundled, place, split};
use super::*;
use crate::models::goldens::checkpoint::{Checkpoint, Layout};
use crate::{DTypeChoice, LoadOptions};

/// Hands over what can be changed in a tiny checkpoint.
fn with_targets(name: &str, check: impl FnOnce(&Targets)) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Checkpoint::named(name).write(folder.path(), &Layout::plain());
    let options = LoadOptions { dtype: DTypeChoice::Float32, threads: Some(1), ..LoadOptions::default() };
    let pipeline = crate::load(folder.path().to_str(), &options, &mut |_| {}).expect("a checkpoint");
    check(pipeline.adapters.targets());
}

/// A module's names in all public schemes. `encoders` is the number of text encoders.
fn names(target: &Target, encoders: usize, layers: usize, attends: impl Fn(usize) -> bool) -> Vec<String> {
    let name = target.name();
    let flat = |name: &str| name.replace('.', "_");
    if target.component == Component::UNet {
        let mut names = vec![
            format!("lora_unet_{}", flat(name)),
            format!("lora_unet.{name}"),
            format!("lycoris_{}", flat(name)),
            format!("unet.{name}"),
            name.to_owned(),
            format!("base_model.model.{name}"),
            format!("base_model.model.unet.{name}"),
        ];
        if let Some(original) = original_path(name, layers, attends) {
            names.push(format!("lora_unet_{original}"));
            // The original code's dots: those that stand in numbers and blocks are all that differs.
            names.push(format!("diffusion_model.{original}"));
            names.push(format!("model.diffusion_model.{original}"));
        }
        if let Some((outer, last)) = name.rsplit_once(".to_") {
            // diffusers' oldest: the processor holds the factors, `to_out` without its number.
            let last = last.trim_end_matches(".0");
            names.push(format!("unet.{outer}.processor.to_{last}_lora"));
            names.push(format!("{outer}.processor.to_{last}_lora"));
        }
        return names;
    }
    let plain = name.strip_prefix("text_model.").unwrap_or(name);
    let whole =
        if plain.starts_with("text_projection") { plain.to_owned() } else { format!("text_model.{plain}") };
    let (kohya, diffusers, comfy): (&[&str], _, &[&str]) = match (target.component, encoders) {
        (Component::Text2, _) => (&["lora_te2"], "text_encoder_2", &["clip_g"]),
        (_, 1) => (&["lora_te", "lora_te1"], "text_encoder", &["clip_l", "clip_h"]),
        _ => (&["lora_te1", "lora_te"], "text_encoder", &["clip_l"]),
    };
    let mut names = vec![
        format!("{diffusers}.{whole}"),
        format!("{diffusers}.{plain}"),
        format!("{diffusers}.base_model.model.{whole}"),
        format!("base_model.model.{diffusers}.{whole}"),
    ];
    for prefix in kohya {
        names.extend([format!("{prefix}_{}", flat(&whole)), format!("{prefix}.{whole}")]);
    }
    for prefix in comfy {
        names.extend([
            format!("text_encoders.{prefix}.transformer.{whole}"),
            format!("{prefix}.transformer.{whole}"),
            format!("{prefix}.{whole}"),
        ]);
    }
    let old = [("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")];
    if let Some((new, old)) = old.iter().find(|(new, _)| whole.ends_with(&format!("self_attn.{new}"))) {
        names.push(format!("{diffusers}.{}{old}_lora", whole.trim_end_matches(new)));
    }
    names
}

fn every_name_leads_to_its_module(checkpoint: &str) {
    with_targets(checkpoint, |targets| {
        let encoders =
            [Component::Text, Component::Text2].map(|c| targets.text_width(c)).iter().flatten().count();
        let unet: Vec<&str> =
            targets.targets.iter().filter(|t| t.component == Component::UNet).map(Target::name).collect();
        let layers = count(&unet, "down_blocks.0.resnets.");
        let attends =
            |level: usize| unet.iter().any(|n| n.starts_with(&format!("up_blocks.{level}.attentions.")));
        let mut seen: HashSet<String> = HashSet::new();
        let mut checked = 0;
        for target in &targets.targets {
            // The projection has no prefix of its own, so that some of its names are one.
            let names: BTreeSet<String> = names(target, encoders, layers, attends).into_iter().collect();
            for name in names {
                assert!(seen.insert(name.clone()), "{name} is the name of two modules");
                // The oldest form writes `..._lora.down.weight`, all others `....lora_down.weight`.
                let key = match name.ends_with("_lora") {
                    true => format!("{name}.down.weight"),
                    false => format!("{name}.lora_down.weight"),
                };
                let (module, _) = split(&key).unwrap_or_else(|| panic!("{key}"));
                let found = targets.find(&place(module)).unwrap_or_else(|| panic!("{key} leads nowhere"));
                assert_eq!((found.component, found.name()), (target.component, target.name()), "{key}");
                checked += 1;
            }
        }
        assert!(checked > 8 * targets.targets.len(), "{checked} names of {} modules", targets.targets.len());
    });
}

#[test]
fn every_name_of_an_sd1_module_leads_to_it() {
    every_name_leads_to_its_module("sd1");
}

#[test]
fn every_name_of_an_sdxl_module_leads_to_it() {
    every_name_leads_to_its_module("sdxl");
}

/// Pieces of which names consist, so that strings of them come near to names.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just(".lora_A."),
        Just(".lora_B."),
        Just(".lora_B"),
        Just(".bias"),
        Just(".weight"),
        Just(".lora_down.weight"),
        Just("_lora.up.weight"),
        Just(".diff_b"),
        Just(".lokr_w1_a"),
        Just("bundle_emb."),
        Just("lora_unet_"),
        Just("lora_te1."),
        Just("text_encoders.clip_l.transformer."),
        Just("base_model.model."),
        Just("base_model."),
        Just("unet."),
        Just("text_model."),
        Just(".processor."),
        Just("down_blocks.0.attentions.1."),
        Just("to_out"),
        Just("_to_out.0"),
        Just("18446744073709551616"),
        Just("."),
        Just("_"),
        Just("é\u{0}"),
    ];
    let pieces = prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat());
    prop_oneof![pieces, any::<String>()]
}

proptest! {
    #[test]
    fn no_name_is_too_strange(key in pieces()) {
        if let Some((module, _)) = split(&key) {
            prop_assert!(!module.is_empty() && key.starts_with(module));
            let place = place(module);
            for component in [Component::UNet, Component::Text, Component::Text2] {
                newer(component, &place.path);
            }
            let targets = Targets::new([]);
            prop_assert!(targets.find(&place).is_none());
        }
        if let Some((name, _)) = bundled(&key) {
            prop_assert!(!name.is_empty());
        }
        original_path(&key, 2, |_| true);
        prop_assert!(clipped(&key).chars().count() <= 161);
    }
}

/// What took time by the square of a name's length would not come to an end.
#[test]
fn names_of_megabytes_are_read_in_one_go() {
    for piece in [
        ".lora_A.",
        ".processor.",
        "base_model.model.",
        "text_model.",
        ".",
        "bundle_emb.",
        "_lora.down.weight",
    ] {
        let key = piece.repeat((4 << 20) / piece.len());
        for key in [format!("{key}.lora_down.weight"), key] {
            if let Some((module, _)) = split(&key) {
                assert!(Targets::new([]).find(&place(module)).is_none());
            }
            bundled(&key);
            original_path(&key, 2, |_| true);
        }
    }
}
