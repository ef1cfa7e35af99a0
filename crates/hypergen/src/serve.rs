//! `hypergen serve`: takes the address, loads the model with a bar for whoever
//! looks on, and hands both to the server. What is served is that crate's
//! business.

use anyhow::bail;
use clap::{CommandFactory, FromArgMatches};
use hypergen_diffusion::load;
use hypergen_server::{Exit, ServeConfig, Server, init_logging, with_file};

use crate::cli::{Cli, Command};
use crate::interrupt::Stopped;
use crate::model::locate;
use crate::progress::Loading;

/// Runs the command.
pub(crate) fn run(config: ServeConfig) -> anyhow::Result<()> {
    let config = with_settings_file(config)?;
    init_logging(&config)?;
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

/// Reads the command line once more, with the settings file beneath it.
fn with_settings_file(config: ServeConfig) -> anyhow::Result<ServeConfig> {
    let Some(path) = &config.config else { return Ok(config) };
    let mut command = Cli::command();
    if let Some(serve) = command.find_subcommand_mut("serve") {
        *serve = with_file(serve.clone(), path)?;
    }
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|e| e.exit());
    match cli.command {
        Command::Serve(config) => Ok(*config),
        // The same arguments cannot name another command the second time.
        _ => Ok(config),
    }
}
