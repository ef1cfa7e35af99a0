//! The command line: every command and flag, and nothing of what they do.
//!
//! Names, ranges and defaults of generation parameters are not written here:
//! they come from their one declaration in `hypergen_diffusion`.

use std::num::NonZeroU16;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueHint};
use hypergen_diffusion::presets::Preset;
use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{DTypeChoice, FamilyName, GUIDANCE_SCALE, IMAGES, STEPS, Size};
use hypergen_server::ServeConfig;

use crate::loras::LoraArgs;
use crate::prompting::PromptingArgs;

/// Draws pictures from text with diffusion models.
#[derive(Debug, Parser)]
#[command(name = "hypergen", version, about, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do. A new command is one variant here and one arm in `main`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Draw pictures and write them to files.
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(Box<GenerateArgs>),
    /// Serve OpenAI's image API from a model.
    #[command(after_help = SERVE_EXAMPLES, mut_args(|arg| arg.hide_env_values(true)))]
    Serve(Box<ServeConfig>),
    /// Measure a model on this machine, stage by stage.
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(BenchArgs),
    /// Download a model from the hub into the cache, or what is new of it.
    #[command(after_help = PULL_EXAMPLES)]
    Pull(PullArgs),
    /// List the samplers that --sampler takes.
    Samplers,
    /// Print a script that completes hypergen's commands in a shell.
    #[command(after_help = COMPLETIONS_EXAMPLE)]
    Completions {
        /// The shell to write it for.
        shell: clap_complete::Shell,
    },
}

/// What `hypergen generate` takes.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// What to draw, in words.
    pub(crate) prompt: String,

    /// Model: a folder in the diffusers layout, a .safetensors file, or a name on the hub [default: the small emoji model inside this program].
    #[arg(long, env = "HYPERGEN_MODEL", hide_env_values = true, value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    pub(crate) model: Option<String>,

    /// A VAE to use instead of the model's own: a .safetensors file or a folder.
    #[arg(long, env = "HYPERGEN_VAE", hide_env_values = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub(crate) vae: Option<std::path::PathBuf>,

    /// The model's family, where its files do not say it: a distilled model in a single file, see docs/models.md [default: as recognised].
    #[arg(long, env = "HYPERGEN_FAMILY", hide_env_values = true, value_name = "FAMILY", value_parser = family_parser())]
    pub(crate) family: Option<FamilyName>,

    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help = OUTPUT_HELP, long_help = OUTPUT_LONG_HELP)]
    pub(crate) output: Option<std::path::PathBuf>,

    #[arg(
        short = 'n',
        long = "n",
        value_name = "COUNT",
        default_value_t = IMAGES.default,
        value_parser = whole::<usize>,
        help = format!("Number of pictures, {} to {}; picture i has the seed SEED + i, from 0", IMAGES.min, IMAGES.max)
    )]
    pub(crate) count: usize,

    #[arg(long, value_name = "SIZE", help = SIZE_HELP, long_help = size_long_help())]
    pub(crate) size: Option<String>,

    #[arg(
        long,
        value_name = "STEPS",
        value_parser = whole::<usize>,
        help = format!("Denoising steps, {} to {} [default: {}, or the model's own]", STEPS.min, STEPS.max, STEPS.default)
    )]
    pub(crate) steps: Option<usize>,

    #[arg(
        long,
        value_name = "SCALE",
        value_parser = number,
        help = format!(
            "How closely to follow the prompt, {} to {}; 1 turns guidance off and halves the time [default: {}, or the model's own]",
            GUIDANCE_SCALE.min, GUIDANCE_SCALE.max, GUIDANCE_SCALE.default
        )
    )]
    pub(crate) guidance_scale: Option<f64>,

    /// Seed of the noise, 0 to 2^64-1: the same seed draws the same picture [default: a random one, which is printed].
    #[arg(long, value_name = "SEED", value_parser = seed)]
    pub(crate) seed: Option<u64>,

    /// What the picture should not show.
    #[arg(long, value_name = "TEXT")]
    pub(crate) negative_prompt: Option<String>,

    /// The way from noise to picture, see `hypergen samplers` [default: the checkpoint's own].
    #[arg(long, value_name = "NAME", value_parser = sampler_parser(), hide_possible_values = true)]
    pub(crate) sampler: Option<SamplerKind>,

    #[command(flatten)]
    pub(crate) prompting: PromptingArgs,

    #[command(flatten)]
    pub(crate) loras: LoraArgs,

    /// Type of the numbers: auto takes bfloat16 where the machine has it in hardware.
    #[arg(
        long,
        env = "HYPERGEN_DTYPE",
        hide_env_values = true,
        value_name = "TYPE",
        default_value_t = DTypeChoice::default(),
        value_parser = dtype_parser()
    )]
    pub(crate) dtype: DTypeChoice,

    /// Threads that share the work [default: as many as this process may use].
    #[arg(long, env = "HYPERGEN_THREADS", hide_env_values = true, value_name = "COUNT", value_parser = at_least_one)]
    pub(crate) threads: Option<NonZeroU16>,

    /// Do not write prompt, seed and settings into the file.
    #[arg(long)]
    pub(crate) no_metadata: bool,
}

/// A whole number; whether it is in range, its own check says.
pub(crate) fn whole<T: FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "must be a whole number, not below 0")
}

/// A number; whether it is in range, its own check says.
pub(crate) fn number(text: &str) -> Result<f64, &'static str> {
    text.parse().map_err(|_| "must be a number")
}

fn at_least_one(text: &str) -> Result<NonZeroU16, String> {
    text.parse().map_err(|_| format!("must be a whole number between 1 and {}", u16::MAX))
}

fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        format!("must be a whole number between 0 and {}; leave --seed out for a random one", u64::MAX)
    })
}

fn sampler_parser() -> impl TypedValueParser<Value = SamplerKind> {
    PossibleValuesParser::new(SamplerKind::ALL.iter().map(|s| PossibleValue::new(s.name()).help(s.about())))
        .try_map(|name| name.parse::<SamplerKind>())
}

fn family_parser() -> impl TypedValueParser<Value = FamilyName> {
    PossibleValuesParser::new(FamilyName::all().into_iter().map(FamilyName::name))
        .try_map(|name| name.parse::<FamilyName>())
}

fn dtype_parser() -> impl TypedValueParser<Value = DTypeChoice> {
    PossibleValuesParser::new(DTypeChoice::ALL.map(DTypeChoice::name))
        .try_map(|name| name.parse::<DTypeChoice>())
}

const EXAMPLES: &str = "\
Examples:
  hypergen generate \"red apple\"                  draw one picture with the model inside this program
  hypergen generate \"red apple\" -o apple.png     choose the file's name
  hypergen generate --help                       every setting
  hypergen serve                                 serve OpenAI's image API on this machine";

const SERVE_EXAMPLES: &str = "\
Examples:
  hypergen serve
      serves the model inside this program at http://127.0.0.1:8000/v1; its API is shown at /docs
  HYPERGEN_API_KEY=sk-mine hypergen serve ./stable-diffusion-v1-5 --host 0.0.0.0
      serves a model of your own to everybody who has the key
  hypergen serve stabilityai/sdxl-turbo
      serves a model from the hub, downloaded the first time
  hypergen serve --config /etc/hypergen.toml
      takes the settings from a file: the names are those of the flags, such as max-queue-size = 20";

const GENERATE_EXAMPLES: &str = "\
Examples:
  hypergen generate \"red apple\"
      writes red-apple-SEED.png and prints its name
  hypergen generate \"rocket, blue background\" -o rocket.webp --seed 7
      the same seed draws the same picture again
  hypergen generate \"cat face\" -n 4 -o cat.png
      writes cat-1.png, cat-2.png, cat-3.png and cat-4.png
  hypergen generate \"a castle at dusk\" --model ./stable-diffusion-v1-5 --size 512x768 --steps 25
      a model of your own, in the diffusers folder layout
  hypergen generate \"a castle at dusk\" --model ./v1-5-pruned.safetensors --vae ./vae-ft-mse.safetensors
      a single file, with another VAE than its own
  hypergen generate \"a (red:1.3) fox, [snow]\" --prompt-syntax a1111 --clip-skip 1 --model ./stable-diffusion-v1-5
      weights as in A1111's web interface; docs/prompts.md tells the rules
  hypergen generate \"a fox\" --model ./stable-diffusion-v1-5 --lora ink.safetensors:0.8 --lora detail.safetensors
      with LoRAs, each with its strength
  hypergen generate \"red apple\" -o - | magick - apple.gif
      writes a PNG to standard output

Standard output holds the name of each written file and nothing else. Progress is shown on a terminal only.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C (at the next step, without half a file).";

/// What `hypergen pull` takes.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Its name on the hub: OWNER/NAME, or OWNER/NAME/FILE.safetensors; @REVISION may follow.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
}

const PULL_EXAMPLES: &str = "\
Examples:
  hypergen pull stabilityai/sdxl-turbo
      downloads what is needed, half precision where there is a choice, and prints the folder
  HF_TOKEN=hf_mine hypergen pull owner/gated-model
      with the token of an account that has accepted the model's terms

The cache is the one that other tools share: HF_HUB_CACHE, or hub in HF_HOME [default: ~/.cache/huggingface]. HF_ENDPOINT names
another hub, HF_HUB_OFFLINE=1 forbids to ask any. A download that was cut off goes on where it was.";

/// What `hypergen bench` takes.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Published shapes with random weights, for which no file is needed: sd15, sd21, sdxl, sdxl-turbo or emoji.
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(bench_presets()), hide_possible_values = true)]
    pub(crate) preset: Option<String>,

    /// Model to measure instead: a folder in the diffusers layout, a .safetensors file, or a name on the hub.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::AnyPath, conflicts_with = "preset")]
    pub(crate) model: Option<String>,

    /// Width and height as WIDTHxHEIGHT [default: the model's native size].
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,

    /// Denoising steps of each round.
    #[arg(long, value_name = "STEPS", default_value_t = 4, value_parser = whole::<usize>)]
    pub(crate) steps: usize,

    /// Pictures that share forward passes.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) batch: u16,

    /// More than 1 measures both halves of guidance in a step, 1 only one [default: 7.5, and 1 for sdxl-turbo].
    #[arg(long, value_name = "SCALE", value_parser = number)]
    pub(crate) guidance_scale: Option<f64>,

    /// Rounds that count, after one that does not.
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) rounds: u16,

    /// Also measure what switching a LoRA of random values of this rank costs.
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) lora_rank: Option<u16>,

    /// Number type: auto, float32 or bfloat16.
    #[arg(long, value_name = "TYPE", default_value_t = DTypeChoice::Auto, value_parser = dtype_parser(), hide_possible_values = true)]
    pub(crate) dtype: DTypeChoice,

    /// Threads that share the work [default: all that the process may use].
    #[arg(long, value_name = "COUNT", value_parser = at_least_one)]
    pub(crate) threads: Option<NonZeroU16>,

    /// Show which operation of which shape takes how long, the longest first.
    #[arg(long)]
    pub(crate) profile: bool,

    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The embedded model beside the presets.
pub(crate) const EMOJI: &str = "emoji";

fn bench_presets() -> Vec<&'static str> {
    Preset::ALL.iter().map(|p| p.name()).chain([EMOJI]).collect()
}

const BENCH_EXAMPLES: &str = "\
Examples:
  hypergen bench --preset sd15
      seconds of each stage at 512x512, TFLOP/s, and how near that is to what the processor can do
  hypergen bench --preset sdxl --size 1024x1024 --steps 2 --json
      the same for programs
  HYPERGEN_ISA=avx512 hypergen bench --preset sd15 --dtype float32
      on a lower instruction set";

const COMPLETIONS_EXAMPLE: &str = "\
Example, for bash:
  hypergen completions bash > ~/.local/share/bash-completion/completions/hypergen";

const OUTPUT_HELP: &str =
    "File to write: .png, .jpg or .webp; a folder; or - for standard output [default: PROMPT-SEED.png]";

const OUTPUT_LONG_HELP: &str = "\
File to write. The extension chooses the format: .png, .jpg, .jpeg or .webp (lossless). A file of that name is replaced. With \
-n the pictures are numbered: -n 2 -o apple.png writes apple-1.png and apple-2.png.

A folder, or no -o at all, takes a name from the prompt and the seed, red-apple-42.png, and never replaces a file: should one \
of that name be there, a number is added. - writes one PNG to standard output.";

const SIZE_HELP: &str =
    "Width and height as WIDTHxHEIGHT, or auto for the model's native size [default: see --help]";

fn size_long_help() -> String {
    format!(
        "Width and height in pixels as WIDTHxHEIGHT, each a multiple of {} and at most {}, or auto for the model's native size.\n\n\
         The default is the model's native size, unless that is smaller than {}: then pictures are enlarged to {}, as the model \
         inside this program enlarges all that it draws at a size larger than its own.",
        Size::MULTIPLE,
        Size::MAX_SIDE,
        crate::generate::SMALL,
        crate::generate::COMFORTABLE
    )
}

#[cfg(test)]
mod tests {
    //! Tests that the declaration holds together; the binary's own tests run it.
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_declaration_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_help() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn names_of_samplers_and_types_are_taken() {
        for sampler in SamplerKind::ALL {
            let cli = Cli::try_parse_from(["hypergen", "generate", "x", "--sampler", sampler.name()]);
            let Command::Generate(args) = cli.expect("a known sampler").command else { panic!("generate") };
            assert_eq!(args.sampler, Some(*sampler));
        }
        for dtype in DTypeChoice::ALL {
            let cli = Cli::try_parse_from(["hypergen", "generate", "x", "--dtype", dtype.name()]);
            let Command::Generate(args) = cli.expect("a known type").command else { panic!("generate") };
            assert_eq!(args.dtype, dtype);
        }
        for family in FamilyName::all() {
            let cli = Cli::try_parse_from(["hypergen", "generate", "x", "--family", family.name()]);
            let Command::Generate(args) = cli.expect("a known family").command else { panic!("generate") };
            assert_eq!(args.family, Some(family));
        }
        for wrong in [
            ["--family", "flux"],
            ["--sampler", "magic"],
            ["--dtype", "int8"],
            ["--threads", "0"],
            ["--seed", "-1"],
        ] {
            let error = Cli::try_parse_from(["hypergen", "generate", "x"].into_iter().chain(wrong));
            assert_eq!(error.expect_err("a wrong value").exit_code(), 2, "{wrong:?}");
        }
    }
}
