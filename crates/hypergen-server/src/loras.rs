//! Which LoRA files a request means: those that it names, those that its
//! prompt names, or the server's own. It looks files up and reads none.
//!
//! Answers do not tell why a file cannot be had, so that nobody learns from
//! them what is on the disk; the log does.

use std::path::{Path, PathBuf};

use hypergen_diffusion::lora::{Lora, LoraEntry, LoraLibrary};
use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{Error, Request};

use crate::api::LoraChoice;
use crate::config::ServeConfig;

/// The server's LoRAs.
pub(crate) struct Loras {
    library: LoraLibrary,
    /// The folder as the operator named it, for the log.
    folder: Option<PathBuf>,
    /// Of requests that name none.
    default: Option<(PathBuf, f64)>,
}

impl Loras {
    pub(crate) fn new(config: &ServeConfig) -> Result<Self, Error> {
        let library = LoraLibrary::new(config.lora_dir.as_deref())?;
        let folder = config.lora_dir.clone();
        Ok(Self { library, folder, default: config.lora.clone().map(|path| (path, config.lora_scale)) })
    }

    /// The server's own. The operator's word is not confined to the folder,
    /// but a name in it will do as well.
    pub(crate) fn default_loras(&self, scale: Option<f64>) -> Result<Vec<Lora>, Error> {
        let Some((path, default)) = &self.default else { return Ok(vec![]) };
        let (name, scale) = (path.to_string_lossy(), scale.unwrap_or(*default));
        let anywhere = LoraLibrary::new(None)?;
        let found =
            anywhere.find(&name, scale).or_else(|e| self.library.find(&name, scale).map_err(|_| e))?;
        let name =
            path.file_stem().map_or_else(|| name.to_string(), |stem| stem.to_string_lossy().into_owned());
        Ok(vec![Lora { name, ..found }])
    }

    /// Whether there is anything to look up.
    pub(crate) fn concerns(&self, choice: &LoraChoice, request: &Request) -> bool {
        choice.named.is_some() || self.default.is_some() || request.prompt_syntax != PromptSyntax::Plain
    }

    /// What a request is drawn with.
    pub(crate) fn resolve(&self, choice: &LoraChoice, request: &Request) -> Result<Vec<Lora>, Error> {
        let tags = request.lora_tags()?;
        let mut loras = match &choice.named {
            Some(named) => {
                // What is switched off need not exist.
                let on = named.iter().filter(|(_, scale)| *scale != 0.0);
                on.map(|(name, scale)| self.noted(name, self.library.find(name, *scale)))
                    .collect::<Result<Vec<_>, _>>()?
            }
            None if tags.is_empty() => self.servers_own(choice.scale)?,
            None => vec![],
        };
        for tag in &tags {
            loras.push(self.noted(&tag.name, self.library.find_tag(tag))?);
        }
        Ok(loras)
    }

    /// The server's own for a request, which does not learn where they lie.
    fn servers_own(&self, scale: Option<f64>) -> Result<Vec<Lora>, Error> {
        self.default_loras(scale).map_err(|e| {
            tracing::warn!(reason = e.message, "the server's own LoRA cannot be had");
            Error { message: "the server's own LoRA cannot be had; its log says why".to_owned(), ..e }
        })
    }

    /// Writes into the log why a LoRA could not be had.
    fn noted(&self, name: &str, found: Result<Lora, Error>) -> Result<Lora, Error> {
        if found.is_err() {
            let reason = reason(self.folder.as_deref(), name);
            tracing::warn!(lora = name, folder = ?self.folder, reason, "a LoRA cannot be had");
        }
        found
    }

    /// The folder's files.
    pub(crate) fn list(&self) -> Vec<LoraEntry> {
        self.library.list()
    }
}

/// Why a name leads to no LoRA, for the operator.
fn reason(folder: Option<&Path>, name: &str) -> String {
    let plain = folder.map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
    let mut named = plain.clone().into_os_string();
    named.push(".safetensors");
    let named = PathBuf::from(named);
    // With a folder a name may leave the extension out.
    let path = if folder.is_some() && !plain.exists() && named.exists() { named } else { plain };
    let found = match std::fs::canonicalize(&path) {
        Ok(found) => found,
        Err(e) => return e.to_string(),
    };
    if folder.and_then(|folder| folder.canonicalize().ok()).is_some_and(|folder| !found.starts_with(folder)) {
        return "it lies outside the folder".to_owned();
    }
    if found.is_dir() {
        return "it is a folder".to_owned();
    }
    match std::fs::File::open(&found) {
        Err(e) => e.to_string(),
        Ok(_) => "it is no .safetensors file".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_learns_why_a_lora_cannot_be_had() {
        let root = tempfile::tempdir().expect("a folder");
        let folder = root.path().join("loras");
        std::fs::create_dir_all(folder.join("style")).expect("made");
        std::fs::write(root.path().join("secret.safetensors"), "x").expect("written");
        std::fs::write(folder.join("note.txt"), "x").expect("written");
        for (name, words) in [
            ("gone", "No such file"),
            ("../secret", "outside the folder"),
            ("../secret.safetensors", "outside the folder"),
            ("style", "it is a folder"),
            ("note.txt", "no .safetensors file"),
        ] {
            let why = reason(Some(&folder), name);
            assert!(why.contains(words), "{name}: {why}");
        }
        assert!(reason(None, "/no/such.safetensors").contains("No such file"));
    }
}
