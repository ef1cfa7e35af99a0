//! Measures a model stage by stage. It draws real pictures through the same
//! pipeline as everyone else and watches, so that nothing is measured that
//! users do not get.

use std::time::{Duration, Instant};

pub use hypergen_tensor::ProfileEntry;

use crate::files::ModelFiles;
use crate::load::{LoadOptions, LoadProgress, load_files};
use crate::lora;
use crate::presets::Preset;
use crate::{Error, Generator, ModelInfo, Observer, Picture, Pipeline, Request, STEPS, Size, Stage};

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// Random weights in a family's published shapes.
    Preset(Preset),
    /// A model as users name it; `None` is the embedded one.
    Model(Option<String>),
}

/// How to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// What.
    pub subject: Subject,
    /// How to load it.
    pub load: LoadOptions,
    /// Size of the pictures; `None`: the model's native one.
    pub size: Option<Size>,
    /// Denoising steps of each round.
    pub steps: usize,
    /// Pictures that share forward passes.
    pub batch: usize,
    /// 1 measures one half of guidance, more than 1 both.
    pub guidance_scale: f64,
    /// Rounds that count, after one that does not.
    pub rounds: usize,
    /// Also measures a LoRA of random values of this rank.
    pub lora_rank: Option<usize>,
    /// Whether to record which operation takes how long in the rounds that count.
    pub profile: bool,
}

/// One part of the work, over all rounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// `load`, `text`, `unet_step` or `vae_decode`; with a LoRA also `lora_first`, `lora_switch`, `lora_switch_f32`,
    /// `lora_kept`, `lora_same` and `lora_beside` (see `docs/lora.md`).
    pub stage: &'static str,
    /// Seconds, one for each time.
    pub seconds: Vec<f64>,
    /// Floating-point operations each time; 0 where there are none to count.
    pub flop: u64,
}

/// What was measured.
pub struct Report {
    /// The model.
    pub info: ModelInfo,
    /// Size of the pictures that were decoded.
    pub size: Size,
    /// Floating-point operations a second that the machine's multipliers give
    /// for the number type in use.
    pub limit: f64,
    /// In the order in which they happen.
    pub stages: Vec<Measured>,
    /// Operations by shape, the longest first; empty unless asked for.
    pub profile: Vec<ProfileEntry>,
    /// A picture of the last round, for whoever measures its encoding.
    pub picture: Picture,
}

impl Measured {
    /// Floating-point operations a second of the median; `None` where there
    /// are none to count.
    pub fn rate(&self) -> Option<f64> {
        (self.flop > 0 && self.median() > 0.0).then(|| self.flop as f64 / self.median())
    }

    /// The middle of the times.
    pub fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    /// The shortest time.
    pub fn min(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The longest time.
    pub fn max(&self) -> f64 {
        self.seconds.iter().copied().fold(0.0, f64::max)
    }
}

/// Loads, draws and measures. `progress` sees the loading, `round` each round
/// as it begins.
///
/// # Errors
/// As [`crate::load`] and [`Generator::generate`].
pub fn bench(
    options: &BenchOptions,
    progress: &mut dyn FnMut(LoadProgress),
    round: &mut dyn FnMut(usize, usize),
) -> Result<Report, Error> {
    STEPS.check(options.steps)?;
    let started = Instant::now();
    let mut pipeline = match &options.subject {
        Subject::Preset(preset) => {
            load_files(&ModelFiles::Random(*preset), Some(preset.name()), &options.load, progress)?
        }
        Subject::Model(model) => crate::load(model.as_deref(), &options.load, progress)?,
    };
    let load = Measured { stage: "load", seconds: vec![started.elapsed().as_secs_f64()], flop: 0 };
    let size = options.size.unwrap_or(pipeline.info().native_size);
    let mut watch = Watch { pipeline_flop: 0, text: vec![], steps: vec![], decode: vec![], flop: [0; 3] };
    let mut picture = None;
    for i in 0..=options.rounds.max(1) {
        round(i, options.rounds.max(1));
        let requests: Vec<Request> =
            (0..options.batch.max(1)).map(|j| request(options, size, i, j)).collect();
        if i == 1 {
            watch.forget();
            pipeline.device.record_profile(options.profile);
        }
        picture = draw(&mut pipeline, &requests, &mut watch)?;
    }
    let stage = |stage, times: &[Duration], flop| Measured {
        stage,
        seconds: times.iter().map(Duration::as_secs_f64).collect(),
        flop,
    };
    let mut stages = vec![
        load,
        stage("text", &watch.text, watch.flop[0]),
        stage("unet_step", &watch.steps, watch.flop[1]),
        stage("vae_decode", &watch.decode, watch.flop[2]),
    ];
    if let Some(rank) = options.lora_rank {
        let halves = if options.guidance_scale > 1.0 { 2 } else { 1 };
        let subject = lora::bench::Subject {
            device: &pipeline.device,
            dtype: pipeline.dtype,
            unet: pipeline.unet.config(),
            factor: pipeline.vae.config().factor(),
            size,
            batch: halves * options.batch.max(1),
        };
        stages.extend(lora::bench::measure(&mut pipeline.adapters, &subject, rank)?);
    }
    let picture = picture.ok_or_else(|| Error::new(crate::ErrorKind::Internal, "nothing was drawn"))?;
    let profile = pipeline.device.profile();
    let limit = pipeline.device.measure_peak(pipeline.dtype);
    Ok(Report { info: pipeline.info(), size, limit, stages, profile, picture })
}

fn draw(pipeline: &mut Pipeline, requests: &[Request], watch: &mut Watch) -> Result<Option<Picture>, Error> {
    let device = pipeline.device.clone();
    watch.pipeline_flop = device.flop();
    let mut observer = Counting { watch, device };
    Ok(pipeline.generate(requests, &mut observer)?.pop())
}

/// Every round has prompts of its own: the latest are remembered.
fn request(options: &BenchOptions, size: Size, round: usize, index: usize) -> Request {
    Request {
        negative_prompt: Some(format!("round {round}")),
        size,
        steps: options.steps,
        guidance_scale: options.guidance_scale,
        seed: index as u64,
        ..Request::new(format!("round {round}, picture {index}"))
    }
}

/// Times and operations of the rounds that count.
struct Watch {
    pipeline_flop: u64,
    text: Vec<Duration>,
    steps: Vec<Duration>,
    decode: Vec<Duration>,
    flop: [u64; 3],
}

impl Watch {
    fn forget(&mut self) {
        self.text.clear();
        self.steps.clear();
        self.decode.clear();
    }
}

struct Counting<'a> {
    watch: &'a mut Watch,
    device: hypergen_tensor::Device,
}

impl Observer for Counting<'_> {
    fn stage(&mut self, stage: Stage, _: usize, _: usize, elapsed: Duration) {
        let watch = &mut *self.watch;
        let (times, at) = match stage {
            Stage::Text => (&mut watch.text, 0),
            Stage::Step => (&mut watch.steps, 1),
            Stage::Decode => (&mut watch.decode, 2),
        };
        times.push(elapsed);
        let flop = self.device.flop();
        watch.flop[at] = flop - watch.pipeline_flop;
        watch.pipeline_flop = flop;
    }
}
