//! The `hypergen` binary: reads the command line, calls the crates that do
//! the work, and turns what went wrong into one line and an exit code.
//!
//! It deliberately knows nothing of models or routes. Exit codes: 0 when all
//! is well, 1 for a failure, 2 for a command line that makes no sense, and 130
//! or 143 when a signal stopped it.

#![forbid(unsafe_code)]

mod arguments;
mod bench;
mod cli;
mod console;
mod generate;
mod interrupt;
mod loras;
mod model;
mod output;
mod progress;
mod prompting;
mod serve;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;
use hypergen_diffusion::samplers::SamplerKind;

use cli::{Cli, Command};
use console::Console;
use interrupt::Stopped;

fn main() -> ExitCode {
    interrupt::survive_file_limits();
    let (cli, origins) = arguments::parse();
    let result = Console::real(|console| match cli.command {
        Command::Generate(args) => generate::run(&args, console),
        Command::Serve(config) => serve::run(*config, origins),
        Command::Bench(args) => bench::run(&args, console),
        Command::Pull(args) => model::pull(&args, console),
        Command::Samplers => console.print(&samplers()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "hypergen", &mut script);
            console.print(&String::from_utf8_lossy(&script))
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// The table of samplers, for people who choose.
fn samplers() -> String {
    let width = SamplerKind::ALL.iter().map(|s| s.name().len()).max().unwrap_or(0);
    SamplerKind::ALL.iter().map(|s| format!("{:width$}  {}\n", s.name(), s.about())).collect()
}

/// Tells the user, in one line, and chooses the exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    // Nobody is left to tell when standard error is closed.
    if let Some(stopped) = error.downcast_ref::<Stopped>() {
        let _ = writeln!(io::stderr(), "{stopped}");
        return ExitCode::from(stopped.exit_code);
    }
    let text = format!("{error:#}");
    let line: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let _ = writeln!(io::stderr(), "error: {}", line.join(" "));
    ExitCode::FAILURE
}
