//! `hypergen generate`: from the command line's settings to pictures on the
//! disk, one after the other, so that each is safe as soon as it is done.
//!
//! It draws with whatever [`Generator`] it is given; the tests give it a fake.

use anyhow::{anyhow, bail};
use hypergen_diffusion::{
    ErrorKind, GUIDANCE_SCALE, Generator, IMAGES, LoadOptions, ModelInfo, Range, Request, STEPS, Size, load,
};
use hypergen_server::encode::{self, Metadata};

use crate::cli::GenerateArgs;
use crate::console::Console;
use crate::interrupt::{Interrupt, Stopped};
use crate::model::locate;
use crate::output::Output;
use crate::progress::{Drawing, Loading};

/// A native side below this is too small to look at.
pub(crate) const SMALL: usize = 256;
/// What such a small picture is enlarged to where no size is given.
pub(crate) const COMFORTABLE: Size = Size { width: 512, height: 512 };
/// Nothing that shows is lost, in a quarter of the bytes that 100 takes.
const JPEG_QUALITY: u8 = 92;

/// The size that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SizeChoice {
    /// Nothing was said.
    Default,
    /// `auto`: as the model draws.
    Native,
    /// `WIDTHxHEIGHT`.
    Exact(Size),
}

impl SizeChoice {
    fn parse(text: Option<&str>) -> anyhow::Result<Self> {
        match text {
            None => Ok(Self::Default),
            Some("auto") => Ok(Self::Native),
            Some(text) => Ok(Self::Exact(text.parse()?)),
        }
    }

    fn resolve(self, native: Size) -> Size {
        match self {
            Self::Exact(size) => size,
            Self::Default if native.width.min(native.height) < SMALL => COMFORTABLE,
            Self::Default | Self::Native => native,
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs, console: &mut Console<'_>) -> anyhow::Result<()> {
    // All that can be known to be wrong is found out before the weights load.
    check(args)?;
    let output = Output::plan(args.output.as_deref(), args.count)?;
    let interrupt = Interrupt::install()?;
    if let Some(caveat) = args.dtype.caveat() {
        console.tell(&format!("warning: {caveat}"));
    }
    let mut options = LoadOptions {
        dtype: args.dtype,
        threads: args.threads.map(|n| n.get().into()),
        vae: args.vae.clone(),
        family: args.family,
        ..LoadOptions::default()
    };
    let model = locate(args.model.as_deref(), &mut options)?;
    let mut pipeline = {
        let loading = Loading::start();
        load(model.as_deref(), &options, &mut |progress| loading.update(progress))?
    };
    interrupt.defer();
    draw(&mut pipeline, args, &output, &interrupt, console)
}

/// Checks every setting that does not depend on the model.
fn check(args: &GenerateArgs) -> anyhow::Result<()> {
    if args.prompt.is_empty() {
        bail!("the prompt is empty: say what to draw, for example hypergen generate \"red apple\"");
    }
    SizeChoice::parse(args.size.as_deref())?;
    named("-n", IMAGES).check(args.count)?;
    if let Some(steps) = args.steps {
        named("--steps", STEPS).check(steps)?;
    }
    if let Some(scale) = args.guidance_scale {
        // Whether 0 is allowed, the model will say.
        let range =
            if scale < GUIDANCE_SCALE.min { Range { min: 0.0, ..GUIDANCE_SCALE } } else { GUIDANCE_SCALE };
        named("--guidance-scale", range).check(scale)?;
    }
    args.prompting.check()?;
    args.loras.find(&args.prompting.apply(Request::new(&args.prompt)))?;
    Ok(())
}

/// A range under the name of its flag.
fn named<T>(flag: &'static str, range: Range<T>) -> Range<T> {
    Range { name: flag, ..range }
}

/// Draws and writes all pictures.
fn draw(
    generator: &mut dyn Generator,
    args: &GenerateArgs,
    output: &Output,
    interrupt: &Interrupt,
    console: &mut Console<'_>,
) -> anyhow::Result<()> {
    let info = generator.info();
    let seed = match args.seed {
        Some(seed) => seed,
        None => random_seed()?,
    };
    let requests = requests(args, &info, seed)?;
    for request in &requests {
        generator.check(request)?;
    }
    if args.seed.is_none() {
        console.tell(&format!("seed {seed}"));
    }
    let mut warned: Vec<String> = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        let stopped = |exit_code| Stopped::drawing(exit_code, index, args.count);
        if let Some(code) = interrupt.exit_code() {
            bail!(stopped(code));
        }
        let mut drawing = Drawing::start(index, args.count, request.steps, interrupt);
        let drawn = generator.generate(std::slice::from_ref(request), &mut drawing);
        let summary = drawing.summary();
        drop(drawing);
        let pictures = match (drawn, interrupt.exit_code()) {
            (Err(e), Some(code)) if e.kind == ErrorKind::Cancelled => bail!(stopped(code)),
            (drawn, _) => drawn?,
        };
        let picture = pictures.into_iter().next().ok_or_else(|| anyhow!("the model returned no picture"))?;
        for warning in &picture.warnings {
            if !warned.contains(warning) {
                console.tell(&format!("warning: {warning}"));
                warned.push(warning.clone());
            }
        }
        let metadata = (!args.no_metadata).then(|| Metadata::new(request, &info));
        let quality = match output.format() {
            encode::ImageFormat::Jpeg => JPEG_QUALITY,
            _ => encode::OUTPUT_COMPRESSION.default,
        };
        let bytes = encode::encode(&picture, output.format(), quality, metadata.as_ref())?;
        if let Some(path) = output.write(index, &request.prompt, request.seed, &bytes)? {
            console.announce(&path.display().to_string(), &format!("{}, {summary}", picture.size))?;
        }
    }
    Ok(())
}

/// One request for each picture.
fn requests(args: &GenerateArgs, info: &ModelInfo, seed: u64) -> anyhow::Result<Vec<Request>> {
    let guidance_scale = match args.guidance_scale {
        Some(scale) => info.check_guidance("--guidance-scale", scale)?,
        None => info.default_guidance.unwrap_or(GUIDANCE_SCALE.default),
    };
    let first = Request {
        negative_prompt: args.negative_prompt.clone(),
        size: SizeChoice::parse(args.size.as_deref())?.resolve(info.native_size),
        steps: args.steps.or(info.default_steps).unwrap_or(STEPS.default),
        guidance_scale,
        seed,
        sampler: args.sampler,
        ..Request::new(&args.prompt)
    };
    let mut first = args.prompting.apply(first);
    first.loras = args.loras.find(&first)?;
    Ok((0..args.count as u64).map(|i| Request { seed: seed.wrapping_add(i), ..first.clone() }).collect())
}

/// A seed that can be read out and typed in again: 32 of its 64 bits are
/// enough, and other tools take no more.
fn random_seed() -> anyhow::Result<u64> {
    let seed =
        getrandom::u32().map_err(|e| anyhow!("no random seed to be had: {e}; give one with --seed"))?;
    Ok(seed.into())
}

#[cfg(test)]
mod tests;
