//! Which LoRA files a request means: those that it names, those that its
//! prompt names, or the server's own. It looks files up and reads none.

use std::path::PathBuf;

use hypergen_diffusion::lora::{Lora, LoraEntry, LoraLibrary};
use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{Error, Request};

use crate::api::LoraChoice;
use crate::config::ServeConfig;

/// The server's LoRAs.
pub(crate) struct Loras {
    library: LoraLibrary,
    /// Of requests that name none.
    default: Option<(PathBuf, f64)>,
}

impl Loras {
    pub(crate) fn new(config: &ServeConfig) -> Result<Self, Error> {
        let library = LoraLibrary::new(config.lora_dir.as_deref())?;
        Ok(Self { library, default: config.lora.clone().map(|path| (path, config.lora_scale)) })
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
                on.map(|(name, scale)| self.library.find(name, *scale)).collect::<Result<Vec<_>, _>>()?
            }
            None if tags.is_empty() => self.default_loras(choice.scale)?,
            None => vec![],
        };
        for tag in &tags {
            loras.push(self.library.find_tag(tag)?);
        }
        Ok(loras)
    }

    /// The folder's files.
    pub(crate) fn list(&self) -> Vec<LoraEntry> {
        self.library.list()
    }
}
