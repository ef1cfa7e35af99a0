//! `hypergen serve`: takes the address, loads the model with a bar for whoever
//! looks on, and hands both to the server. What is served is that crate's
//! business.

use anyhow::{anyhow, bail};
use hypergen_diffusion::load;
use hypergen_server::{Exit, ServeConfig, Server, init_logging};

use crate::arguments::{self, Origins};
use crate::cli::Command;
use crate::interrupt::Stopped;
use crate::model::locate;
use crate::progress::Loading;

/// Runs the command. `origins` tells where its settings stand.
pub(crate) fn run(config: ServeConfig, origins: Origins) -> anyhow::Result<()> {
    let (config, origins) = match &config.config {
        None => (config, origins),
        Some(path) => {
            let (cli, origins) = arguments::parse_with_file(path)?;
            // The same arguments cannot name another command the second time.
            let Command::Serve(config) = cli.command else {
                bail!("the command line changed while it was read")
            };
            (*config, origins)
        }
    };
    serve(config).map_err(|e| match e.is::<Stopped>() {
        true => e,
        false => anyhow!(origins.apply(&format!("{e:#}"))),
    })
}

fn serve(config: ServeConfig) -> anyhow::Result<()> {
    init_logging(&config);
    // What can be known to be wrong is found out before the weights load.
    let server = Server::bind(config.clone())?;
    let mut options = config.load_options();
    let model = locate(config.model.as_deref(), &mut options)?;
    let pipeline = {
        let loading = Loading::start();
        load(model.as_deref(), &options, &mut |progress| loading.update(progress))?
    };
    match server.run(Box::new(pipeline))? {
        Exit::Graceful => Ok(()),
        Exit::Forced => bail!(Stopped {
            exit_code: 130,
            message: "stopped before everybody was answered: a second signal came".to_owned(),
        }),
    }
}
