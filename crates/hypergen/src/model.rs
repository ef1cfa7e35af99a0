//! From what a user names as a model to where it lies: something on this
//! machine, or a model on the hub, downloaded with a bar if it has to be.
//! `hypergen pull` is this and nothing more.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use hypergen_diffusion::LoadOptions;
use hypergen_diffusion::hub::{Hub, ModelId, Named};

use crate::cli::PullArgs;
use crate::console::Console;
use crate::progress::Download;

/// A model's path, for `load`. What it is called and where its VAE lies are
/// written into the options.
pub(crate) fn locate(model: Option<&str>, options: &mut LoadOptions) -> anyhow::Result<Option<String>> {
    if let Some(vae) = options.vae.take() {
        options.vae = Some(find(&vae.to_string_lossy(), &vae)?.0);
    }
    let Some(model) = model else { return Ok(None) };
    let (path, name) = find(model, Path::new(model))?;
    options.name = name;
    let path = path.into_os_string().into_string();
    Ok(Some(path.map_err(|p| anyhow!("{} is not UTF-8: use another name", p.display()))?))
}

/// Where something lies, and its name on the hub if it is from there.
fn find(text: &str, path: &Path) -> anyhow::Result<(PathBuf, Option<String>)> {
    if path.exists() {
        return Ok((path.to_owned(), None));
    }
    match Named::find(text)? {
        Named::Path(path) => Ok((path, None)),
        Named::Id(id) => {
            let hub = Hub::from_env()?;
            let found = match hub.cached(&id) {
                Some(path) => path,
                None => download(&hub, &id).with_context(|| format!("there is no {text} here"))?,
            };
            Ok((found, Some(id.name())))
        }
    }
}

fn download(hub: &Hub, id: &ModelId) -> anyhow::Result<PathBuf> {
    if !hub.offline {
        // When standard error is closed nobody is there to be told.
        let _ = writeln!(io::stderr(), "downloading {} into {}", id.name(), hub.cache.display());
    }
    let bar = Download::start();
    Ok(hub.pull(id, &mut |progress| bar.update(progress))?)
}

/// Runs `hypergen pull`.
pub(crate) fn pull(args: &PullArgs, console: &mut Console<'_>) -> anyhow::Result<()> {
    if Path::new(&args.model).exists() {
        bail!("{} is on this machine already: give its path as the model", args.model);
    }
    let id: ModelId = args.model.parse()?;
    let path = download(&Hub::from_env()?, &id)?;
    console.print(&format!("{}\n", path.display()))
}
