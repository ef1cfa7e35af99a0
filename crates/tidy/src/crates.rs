//! Who may know whom: the table of crates in `docs/architecture.md`, kept.

use toml::{Table, Value};

use crate::lexer::{code_only, has_word};
use crate::{Finding, Tree};

/// What holds for one crate.
struct Rule {
    name: &'static str,
    /// Crates of ours that it may depend on.
    ours: &'static [&'static str],
    /// Crates of others that it must not depend on.
    never: &'static [&'static str],
    /// Words that its code must not hold; comments may.
    not_in_code: &'static [&'static str],
    /// Words that must not stand anywhere in it.
    not_at_all: &'static [&'static str],
}

/// Names of models, for crates that compute without knowing what for.
const MODELS: &[&str] = &["UNet", "unet", "CLIP", "VAE", "SDXL", "StableDiffusion"];

const RULES: &[Rule] = &[
    Rule {
        name: "hypergen-cpu",
        ours: &[],
        never: &["anyhow", "axum", "clap", "memmap2", "safetensors", "serde", "serde_json", "tokio"],
        not_in_code: MODELS,
        not_at_all: &[],
    },
    Rule {
        name: "hypergen-tensor",
        ours: &["hypergen-cpu", "hypergen-cuda"],
        never: &["anyhow", "axum", "clap", "tokio"],
        not_in_code: MODELS,
        not_at_all: &[],
    },
    Rule {
        name: "hypergen-diffusion",
        ours: &["hypergen-tensor"],
        never: &["anyhow", "axum", "clap", "tokio"],
        not_in_code: &["hypergen_cpu", "hypergen_cuda", "std::arch", "core::arch", "tokio", "axum", "clap"],
        not_at_all: &[],
    },
    Rule {
        name: "hypergen-server",
        ours: &["hypergen-diffusion"],
        never: &["anyhow", "indicatif", "memmap2", "safetensors", "tokenizers"],
        not_in_code: &["hypergen_tensor", "hypergen_cpu", "hypergen_cuda"],
        not_at_all: &["UNet", "CLIP"],
    },
    Rule {
        name: "hypergen",
        ours: &["hypergen-diffusion", "hypergen-server"],
        never: &["memmap2", "safetensors", "tokenizers"],
        not_in_code: &["hypergen_tensor", "hypergen_cpu", "hypergen_cuda", "std::arch"],
        not_at_all: &[],
    },
    Rule {
        name: "hypergen-fuzz",
        ours: &["hypergen-tensor", "hypergen-diffusion", "hypergen-server"],
        never: &["anyhow", "libfuzzer-sys"],
        not_in_code: &["hypergen_cpu", "hypergen_cuda"],
        not_at_all: &[],
    },
    Rule { name: "tidy", ours: &[], never: &["anyhow", "tokio"], not_in_code: &[], not_at_all: &[] },
];

/// The crates of the workspace, and the words in them.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in tree.texts(&["toml"]) {
        let Some(name) = file.path.strip_prefix("crates/").and_then(|p| p.strip_suffix("/Cargo.toml")) else {
            continue;
        };
        match RULES.iter().find(|rule| rule.name == name) {
            Some(rule) => findings.extend(edges(&file.path, text, rule)),
            None => findings
                .push(Finding::file(&file.path, "a crate that the table of crates (tidy's crates.rs) lacks")),
        }
    }
    for (file, text) in tree.texts(&["rs"]) {
        let rule = RULES.iter().find(|rule| file.path.starts_with(&format!("crates/{}/", rule.name)));
        if let Some(rule) = rule {
            findings.extend(words(&file.path, text, rule));
        }
    }
    findings
}

fn edges(path: &str, text: &str, rule: &Rule) -> Vec<Finding> {
    let manifest: Table = match text.parse() {
        Ok(manifest) => manifest,
        Err(e) => return vec![Finding::file(path, format!("not TOML: {e}"))],
    };
    let mut findings = Vec::new();
    for dependency in dependencies(&manifest) {
        let ours = dependency.starts_with("hypergen") || dependency == "tidy";
        if ours && !rule.ours.contains(&dependency.as_str()) {
            findings.push(Finding::file(path, format!("{} may not depend on {dependency}", rule.name)));
        }
        if rule.never.contains(&dependency.as_str()) {
            findings.push(Finding::file(path, format!("{} must do without {dependency}", rule.name)));
        }
    }
    findings
}

/// Names of all dependencies, those of tests, builds and single platforms
/// among them; the real name where one is renamed.
fn dependencies(manifest: &Table) -> Vec<String> {
    let platforms = manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values);
    let tables = std::iter::once(manifest).chain(platforms.filter_map(Value::as_table));
    let mut names = Vec::new();
    for table in tables {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (name, value) in table.get(kind).and_then(Value::as_table).into_iter().flatten() {
                let real = value.get("package").and_then(Value::as_str).unwrap_or(name);
                names.push(real.to_owned());
            }
        }
    }
    names
}

fn words(path: &str, text: &str, rule: &Rule) -> Vec<Finding> {
    let mut findings = Vec::new();
    let code = code_only(text);
    for (lines, words) in [(code.as_str(), rule.not_in_code), (text, rule.not_at_all)] {
        for (index, line) in lines.lines().enumerate() {
            for word in words.iter().filter(|word| has_word(line, word)) {
                findings.push(Finding::line(path, index, format!("{} must not know `{word}`", rule.name)));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    //! Each rule, broken on purpose.
    use super::*;

    fn messages(files: &[(&str, &str)]) -> Vec<String> {
        check(&Tree::sample(files)).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn a_clean_crate_has_no_findings() {
        let findings = messages(&[
            (
                "crates/hypergen-server/Cargo.toml",
                "[dependencies]\nhypergen-diffusion.workspace = true\naxum = \"1\"",
            ),
            (
                "crates/hypergen-server/src/lib.rs",
                "//! A server.\nlet clip = \"hypergen_tensor\"; // not hypergen_cpu",
            ),
            ("Cargo.toml", "[workspace]\nmembers = []"),
        ]);
        assert_eq!(findings, [] as [String; 0]);
    }

    #[test]
    fn every_way_to_depend_is_seen() {
        for manifest in [
            "[dependencies]\nhypergen-cpu.workspace = true",
            "[dev-dependencies]\nhypergen-cpu = { path = \"../hypergen-cpu\" }",
            "[build-dependencies]\nhypergen-cpu = \"1\"",
            "[target.'cfg(unix)'.dependencies]\nhypergen-cpu = \"1\"",
            "[dependencies]\nfast = { package = \"hypergen-cpu\", version = \"1\" }",
        ] {
            let findings = messages(&[("crates/hypergen-diffusion/Cargo.toml", manifest)]);
            assert_eq!(
                findings,
                ["crates/hypergen-diffusion/Cargo.toml: hypergen-diffusion may not depend on hypergen-cpu"],
                "{manifest}"
            );
        }
    }

    #[test]
    fn edges_of_every_crate_are_kept() {
        for (name, dependency) in [
            ("hypergen-cpu", "hypergen-tensor"),
            ("hypergen-cpu", "safetensors"),
            ("hypergen-tensor", "hypergen-diffusion"),
            ("hypergen-tensor", "tokio"),
            ("hypergen-diffusion", "axum"),
            ("hypergen-diffusion", "clap"),
            ("hypergen-diffusion", "anyhow"),
            ("hypergen-server", "hypergen-tensor"),
            ("hypergen-server", "anyhow"),
            ("hypergen", "hypergen-cpu"),
            ("hypergen", "hypergen-tensor"),
            ("hypergen", "tidy"),
        ] {
            let path = format!("crates/{name}/Cargo.toml");
            let manifest = format!("[dependencies]\n{dependency} = \"1\"");
            assert_eq!(messages(&[(&path, &manifest)]).len(), 1, "{name} on {dependency}");
        }
    }

    #[test]
    fn unknown_crates_and_broken_manifests_are_findings() {
        assert_eq!(messages(&[("crates/new/Cargo.toml", "")]).len(), 1);
        assert!(messages(&[("crates/hypergen/Cargo.toml", "= oops")])[0].contains("not TOML"));
    }

    #[test]
    fn words_are_found_in_their_lines() {
        for (path, line) in [
            ("crates/hypergen-diffusion/src/a.rs", "use std::arch::x86_64;"),
            ("crates/hypergen-diffusion/src/a.rs", "use hypergen_cpu::Cpu;"),
            ("crates/hypergen-diffusion/tests/a.rs", "#[tokio::test]"),
            ("crates/hypergen-server/src/a.rs", "// The UNet is slow."),
            ("crates/hypergen-server/src/a.rs", "let text = \"CLIP\";"),
            ("crates/hypergen-server/src/a.rs", "use hypergen_tensor::Tensor;"),
            ("crates/hypergen-cpu/src/a.rs", "struct UNet;"),
            ("crates/hypergen-tensor/src/a.rs", "mod unet;"),
            ("crates/hypergen/src/a.rs", "use hypergen_tensor::Tensor;"),
        ] {
            let findings = check(&Tree::sample(&[(path, &format!("//! A file.\n{line}\n"))]));
            assert_eq!(findings.len(), 1, "{path}: {line}");
            assert_eq!(findings[0].line, Some(2));
        }
        assert!(messages(&[("crates/hypergen-cpu/src/a.rs", "// As wide as a UNet's middle.")]).is_empty());
    }
}
