//! Every setting of the server, declared once: command line, environment
//! (`HYPERGEN_...`) and file all come from this one struct. It parses and
//! checks; it opens and binds nothing.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, Parser, ValueEnum};
use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{
    CLIP_SKIP, DTypeChoice, FamilyName, GUIDANCE_RESCALE, GUIDANCE_SCALE, LORA_SCALE, LoadOptions, STEPS,
};

use crate::api::Defaults;
use crate::auth::ApiKey;
use crate::logging::LogLevel;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Device {
    /// The fastest one that is there.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Human,
    /// An object a line.
    Json,
}

/// Settings of `hypergen serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeConfig {
    /// What to serve: a folder in the diffusers layout, a single-file checkpoint or a hub id; the embedded model where none is given
    #[arg(env = "HYPERGEN_MODEL")]
    pub model: Option<String>,

    /// A VAE to use instead of the model's own: a .safetensors file or a folder
    #[arg(long, env = "HYPERGEN_VAE", value_name = "PATH")]
    pub vae: Option<PathBuf>,

    /// The model's family, where its files do not say it, such as sdxl-turbo for a distilled model in a single file (default: as recognised)
    #[arg(long, env = "HYPERGEN_FAMILY", value_name = "FAMILY")]
    pub family: Option<FamilyName>,

    /// Settings in a TOML file; the command line and the environment overrule it
    #[arg(long, env = "HYPERGEN_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Address to listen on; 0.0.0.0 or :: for all
    #[arg(long, env = "HYPERGEN_HOST", default_value = "127.0.0.1")]
    pub host: String,

    /// Port to listen on; 0 for any free one
    #[arg(long, env = "HYPERGEN_PORT", default_value_t = 8000, value_parser = port)]
    pub port: u16,

    /// A key that clients must send as 'Authorization: Bearer KEY'; may be given several times (separated by commas in the environment)
    #[arg(
        long = "api-key",
        env = "HYPERGEN_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        value_name = "KEY"
    )]
    pub api_keys: Vec<ApiKey>,

    /// Number type: auto, float32, bfloat16 or float16
    #[arg(long, env = "HYPERGEN_DTYPE", default_value_t = DTypeChoice::Auto)]
    pub dtype: DTypeChoice,

    /// What computes
    #[arg(long, env = "HYPERGEN_DEVICE", value_enum, default_value_t = Device::Auto)]
    pub device: Device,

    /// Threads that share the computing; all processors where it is not given
    #[arg(long, env = "HYPERGEN_THREADS", value_parser = at_least_one)]
    pub threads: Option<usize>,

    /// LoRA weights for every request that names none
    #[arg(long, env = "HYPERGEN_LORA", value_name = "FILE")]
    pub lora: Option<PathBuf>,

    /// Strength of --lora where a request does not say
    #[arg(long, env = "HYPERGEN_LORA_SCALE", default_value_t = LORA_SCALE.default, value_parser = lora_scale)]
    pub lora_scale: f64,

    /// Folder to which the LoRA files of requests are confined, and in which their names are looked up
    #[arg(long, env = "HYPERGEN_LORA_DIR", value_name = "FOLDER")]
    pub lora_dir: Option<PathBuf>,

    /// Room for weights with LoRAs that are kept for their next request, such as 4GiB; those in use are kept anyway
    #[arg(long, env = "HYPERGEN_LORA_CACHE", default_value = "2GiB", value_name = "BYTES")]
    pub lora_cache: Bytes,

    /// Steps of a request that names none (default: the model's own, or 50)
    #[arg(long, env = "HYPERGEN_DEFAULT_STEPS", value_parser = steps)]
    pub default_steps: Option<usize>,

    /// Guidance scale of a request that names none (default: the model's own, or 7.5)
    #[arg(long, env = "HYPERGEN_DEFAULT_GUIDANCE", value_parser = guidance)]
    pub default_guidance: Option<f64>,

    /// How prompts are read where a request does not say: plain, or a1111 with weights like (word:1.2), BREAK and any length
    #[arg(long, env = "HYPERGEN_PROMPT_SYNTAX", default_value_t = PromptSyntax::Plain, value_name = "SYNTAX")]
    pub prompt_syntax: PromptSyntax,

    /// Layers of the text encoder to leave out where a request does not say; 1 is the penultimate layer, as in diffusers
    #[arg(long, env = "HYPERGEN_CLIP_SKIP", default_value_t = CLIP_SKIP.default, value_parser = clip_skip, value_name = "LAYERS")]
    pub clip_skip: usize,

    /// How far to take back the contrast that guidance adds, 0 to 1, where a request does not say
    #[arg(long, env = "HYPERGEN_GUIDANCE_RESCALE", default_value_t = GUIDANCE_RESCALE.default, value_parser = guidance_rescale)]
    pub guidance_rescale: f64,

    /// Requests that may wait; more are answered with 429
    #[arg(long, env = "HYPERGEN_MAX_QUEUE_SIZE", default_value_t = 100, value_parser = at_least_one)]
    pub max_queue_size: usize,

    /// Pictures of one size and one set of LoRAs that may be drawn at once, in shared forward passes
    #[arg(long, env = "HYPERGEN_MAX_BATCH_SIZE", default_value_t = 1, value_parser = at_least_one)]
    pub max_batch_size: usize,

    /// Address of this server as clients see it, for the links of 'url' answers (default: the request's Host)
    #[arg(long, env = "HYPERGEN_PUBLIC_URL", value_name = "URL", value_parser = public_url)]
    pub public_url: Option<String>,

    /// Folder for the pictures behind links (default: a private temporary one, removed at exit)
    #[arg(long, env = "HYPERGEN_IMAGE_DIR", value_name = "FOLDER")]
    pub image_dir: Option<PathBuf>,

    /// How long links work: seconds, or a time like 90m or 1h
    #[arg(long, env = "HYPERGEN_IMAGE_TTL", default_value = "1h", value_name = "TIME")]
    pub image_ttl: Seconds,

    /// Room for the pictures behind links, such as 512MiB; the oldest go first
    #[arg(long, env = "HYPERGEN_IMAGE_STORE_SIZE", default_value = "1GiB", value_name = "BYTES")]
    pub image_store_size: Bytes,

    /// Leave the generation parameters out of the picture files
    #[arg(long, env = "HYPERGEN_NO_METADATA", value_parser = BoolishValueParser::new())]
    pub no_metadata: bool,

    /// A web origin whose pages may use this server, such as https://example.com, or * for all; may be given several times
    #[arg(long = "cors-origin", env = "HYPERGEN_CORS_ORIGIN", value_delimiter = ',', value_name = "ORIGIN", value_parser = origin)]
    pub cors_origins: Vec<String>,

    /// Largest request body
    #[arg(long, env = "HYPERGEN_MAX_BODY_SIZE", default_value = "1MiB", value_name = "BYTES")]
    pub max_body_size: Bytes,

    /// Connections that may be open at once; more wait
    #[arg(long, env = "HYPERGEN_MAX_CONNECTIONS", default_value_t = 1024, value_parser = at_least_one)]
    pub max_connections: usize,

    /// Time for a request's head, for its body, and for an idle connection
    #[arg(long, env = "HYPERGEN_READ_TIMEOUT", default_value = "30s", value_name = "TIME")]
    pub read_timeout: Seconds,

    /// Time after which a client that takes none of its answer is given up
    #[arg(long, env = "HYPERGEN_WRITE_TIMEOUT", default_value = "60s", value_name = "TIME")]
    pub write_timeout: Seconds,

    /// Time for what is being drawn to finish when the server is told to stop
    #[arg(long, env = "HYPERGEN_SHUTDOWN_TIMEOUT", default_value = "30s", value_name = "TIME")]
    pub shutdown_timeout: Seconds,

    /// What to log: off, error, warn, info, debug or trace; parts may have a level of their own, such as warn,hypergen_server=debug
    #[arg(long, env = "HYPERGEN_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    pub log_level: LogLevel,

    /// Form of the log
    #[arg(long, env = "HYPERGEN_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,

    /// Log the prompts too: they are private otherwise
    #[arg(long, env = "HYPERGEN_LOG_PROMPTS", value_parser = BoolishValueParser::new())]
    pub log_prompts: bool,
}

/// For parsing the settings by themselves.
#[derive(Parser)]
struct Alone {
    #[command(flatten)]
    config: ServeConfig,
}

impl ServeConfig {
    /// Parses arguments (the program's name not among them).
    ///
    /// # Errors
    /// clap's, with its help in it.
    pub fn parse_from<I: IntoIterator<Item = T>, T: Into<std::ffi::OsString> + Clone>(
        args: I,
    ) -> Result<Self, clap::Error> {
        let args = std::iter::once("serve".into()).chain(args.into_iter().map(Into::into));
        Alone::try_parse_from(args).map(|alone| alone.config)
    }

    /// What loading the model needs to know.
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            dtype: self.dtype,
            threads: self.threads,
            vae: self.vae.clone(),
            family: self.family,
            lora_cache: Some(usize::try_from(self.lora_cache.0).unwrap_or(usize::MAX)),
            ..LoadOptions::default()
        }
    }

    /// What requests get that do not say.
    pub fn defaults(&self) -> Defaults {
        Defaults {
            steps: self.default_steps,
            guidance: self.default_guidance,
            prompt_syntax: self.prompt_syntax,
            clip_skip: self.clip_skip,
            guidance_rescale: self.guidance_rescale,
        }
    }

    /// Checks what no single argument can tell.
    ///
    /// # Errors
    /// One line with the cause and the fix.
    pub fn check(&self) -> Result<(), String> {
        for key in &self.api_keys {
            key.check()?;
        }
        if self.device == Device::Cuda {
            return Err("this build of HyperGen has no CUDA: use --device cpu or auto".to_owned());
        }
        Ok(())
    }
}

impl Default for ServeConfig {
    /// What an empty command line gives.
    fn default() -> Self {
        Self::parse_from(std::iter::empty::<&str>()).expect("every argument has a default or may be absent")
    }
}

/// A time in settings: a number of seconds, or with units, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seconds(pub Duration);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(seconds) => Ok(Self(Duration::from_secs(seconds))),
            Err(_) => humantime::parse_duration(text).map(Self).map_err(|_| {
                "a time is a number of seconds, or has a unit, such as 90s, 5m or 1h".to_owned()
            }),
        }
    }
}

/// A number of bytes in settings: `1048576`, `1MiB`, `1MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "a size is a number of bytes, or has a unit, such as 512KiB, 1MiB or 1GB".to_owned();
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(Self).ok_or_else(wrong)
    }
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| "must be a whole number between 0 and 65535; 0 is any free port".to_owned())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(value) if value >= 1 => Ok(value),
        _ => Err("must be a whole number, at least 1".to_owned()),
    }
}

fn steps(text: &str) -> Result<usize, String> {
    let value = text.parse().map_err(|_| "must be a whole number".to_owned())?;
    STEPS.check(value).map_err(|e| e.to_string())
}

fn clip_skip(text: &str) -> Result<usize, String> {
    let value = text.parse().map_err(|_| "must be a whole number".to_owned())?;
    CLIP_SKIP.check(value).map_err(|e| e.to_string())
}

fn guidance_rescale(text: &str) -> Result<f64, String> {
    let value = text.parse().map_err(|_| "must be a number".to_owned())?;
    GUIDANCE_RESCALE.check(value).map_err(|e| e.to_string())
}

/// From 0, as distilled models take that; whether this one does is checked
/// once it is loaded.
fn guidance(text: &str) -> Result<f64, String> {
    let value = text.parse().map_err(|_| "must be a number".to_owned())?;
    hypergen_diffusion::Range { min: 0.0, ..GUIDANCE_SCALE }.check(value).map_err(|e| e.to_string())
}

fn lora_scale(text: &str) -> Result<f64, String> {
    let value = text.parse().map_err(|_| "must be a number".to_owned())?;
    LORA_SCALE.check(value).map_err(|e| e.to_string())
}

fn public_url(text: &str) -> Result<String, String> {
    let wrong = || "must be an address like https://pictures.example.com, without a query".to_owned();
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).ok_or_else(wrong)?;
    let plain = rest.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'"' | b'<' | b'>'));
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() || !plain {
        return Err(wrong());
    }
    Ok(text.trim_end_matches('/').to_owned())
}

fn origin(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let good = host.is_some_and(|host| {
        !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'*' | b'?' | b'#'))
    });
    if text == "*" || good {
        return Ok(text.to_owned());
    }
    Err("must be * or an origin like https://example.com, without a path".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<ServeConfig, String> {
        ServeConfig::parse_from(args).map_err(|e| e.to_string())
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let config = ServeConfig::default();
        assert_eq!((config.host.as_str(), config.port), ("127.0.0.1", 8000));
        assert_eq!((config.max_queue_size, config.max_batch_size), (100, 1));
        assert_eq!(config.image_ttl.0, Duration::from_secs(3600));
        assert_eq!(config.image_store_size.0, 1 << 30);
        assert_eq!(config.max_body_size.0, 1 << 20);
        assert!(config.api_keys.is_empty() && config.cors_origins.is_empty() && !config.log_prompts);
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn times_and_sizes_have_units() {
        assert_eq!("90".parse(), Ok(Seconds(Duration::from_secs(90))));
        assert_eq!("1h 30m".parse(), Ok(Seconds(Duration::from_secs(5400))));
        assert!("soon".parse::<Seconds>().is_err());
        assert_eq!("10".parse(), Ok(Bytes(10)));
        assert_eq!("2 KiB".parse(), Ok(Bytes(2048)));
        assert_eq!("3mb".parse(), Ok(Bytes(3_000_000)));
        for wrong in ["", "MiB", "-1", "1.5GiB", "99999999999999999999", "99999999TiB", "1XB"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (args, word) in [
            (vec!["--max-queue-size", "0"], "max-queue-size"),
            (vec!["--threads", "0"], "threads"),
            (vec!["--port", "65536"], "between 0 and 65535"),
            (vec!["--log-level", "loud"], "off, error, warn, info, debug, trace"),
            (vec!["--default-steps", "151"], "between 1 and 150"),
            (vec!["--default-guidance", "NaN"], "between 0 and 20"),
            (vec!["--dtype", "int4"], "float32"),
            (vec!["--prompt-syntax", "comfy"], "plain or a1111"),
            (vec!["--family", "flux"], "sdxl-turbo"),
            (vec!["--clip-skip", "33"], "between 0 and 32"),
            (vec!["--guidance-rescale", "2"], "between 0 and 1"),
            (vec!["--public-url", "pictures.example.com"], "https://"),
            (vec!["--cors-origin", "https://example.com/path"], "without a path"),
            (vec!["--no-such-thing"], "no-such-thing"),
        ] {
            let error = parse(&args).expect_err("refused");
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn keys_are_taken_several_times_and_appear_nowhere() {
        let config = parse(&["--api-key", "sk-a", "--api-key", "sk-b,sk-c"]).expect("fine");
        assert_eq!(config.api_keys.len(), 3);
        assert!(!format!("{config:?}").contains("sk-"));
        let config = parse(&["--api-key", "sk a"]).expect("judged later");
        assert!(!config.check().expect_err("a space").contains("sk a"));
    }

    #[test]
    fn what_is_not_built_yet_says_so() {
        assert!(parse(&["--device", "cuda"]).expect("known").check().is_err());
    }

    #[test]
    fn public_urls_lose_their_last_slash() {
        let config = parse(&["--public-url", "https://example.com/pictures/"]).expect("fine");
        assert_eq!(config.public_url.as_deref(), Some("https://example.com/pictures"));
    }
}
