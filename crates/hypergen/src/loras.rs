//! Flags of `hypergen generate` that name LoRAs, and the files that they and
//! the prompt's own tags mean.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueHint};
use hypergen_diffusion::lora::{Lora, LoraLibrary};
use hypergen_diffusion::{LORA_SCALE, Range, Request};

/// The flags.
#[derive(Debug, Args)]
pub(crate) struct LoraArgs {
    /// LoRA weights to draw with, with their strength, 0 to 2, after a colon [default: 1]; may be given several times.
    #[arg(long = "lora", value_name = "FILE[:SCALE]", value_hint = ValueHint::FilePath)]
    loras: Vec<Named>,

    /// Folder in which --lora and the prompt's <lora:NAME:SCALE> (with --prompt-syntax a1111) look names up.
    #[arg(long, env = "HYPERGEN_LORA_DIR", hide_env_values = true, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    lora_dir: Option<PathBuf>,
}

/// `FILE[:SCALE]`.
#[derive(Debug, Clone, PartialEq)]
struct Named {
    file: String,
    scale: f64,
}

impl FromStr for Named {
    type Err = String;

    /// What stands after the last colon is a scale only if it is a number:
    /// colons are allowed in names.
    fn from_str(text: &str) -> Result<Self, String> {
        let scaled = text.rsplit_once(':').and_then(|(file, scale)| Some((file, scale.parse::<f64>().ok()?)));
        let (file, scale) = scaled.unwrap_or((text, LORA_SCALE.default));
        if file.is_empty() {
            return Err("names no file: write FILE or FILE:SCALE".to_owned());
        }
        let scale = Range { name: "its scale", ..LORA_SCALE }.check(scale).map_err(|e| e.message)?;
        Ok(Self { file: file.to_owned(), scale })
    }
}

impl LoraArgs {
    /// The LoRAs of a request: those of the flags, then those of its prompt.
    pub(crate) fn find(&self, request: &Request) -> anyhow::Result<Vec<Lora>> {
        let folder = LoraLibrary::new(self.lora_dir.as_deref())?;
        let anywhere = LoraLibrary::new(None)?;
        let mut found = vec![];
        for Named { file, scale } in self.loras.iter().filter(|named| named.scale != 0.0) {
            // The user's own disk: the folder is a place to look, not a fence.
            let lora = folder.find(file, *scale).or_else(|e| anywhere.find(file, *scale).map_err(|_| e));
            found.push(lora.map_err(|_| {
                anyhow::anyhow!("there is no readable LoRA '{file}': give the path of a .safetensors file")
            })?);
        }
        for tag in request.lora_tags()? {
            found.push(folder.find_tag(&tag)?);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_stands_after_the_last_colon() {
        for (text, file, scale) in [
            ("ink.safetensors", "ink.safetensors", 1.0),
            ("ink.safetensors:0.8", "ink.safetensors", 0.8),
            ("./a:b.safetensors", "./a:b.safetensors", 1.0),
            ("a:b:2", "a:b", 2.0),
            ("C:\\ink.safetensors", "C:\\ink.safetensors", 1.0),
        ] {
            assert_eq!(text.parse(), Ok(Named { file: file.to_owned(), scale }), "{text}");
        }
        for wrong in ["", ":1", "ink:3", "ink:-1", "ink:nan"] {
            assert!(wrong.parse::<Named>().is_err(), "{wrong}");
        }
    }
}
