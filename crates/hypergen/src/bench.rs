//! `hypergen bench`: what each stage of a model takes on this machine, and
//! how near it comes to what the machine can do.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::Result;
use hypergen_diffusion::bench::{BenchOptions, Measured, ProfileEntry, Report, Subject, bench};
use hypergen_diffusion::presets::Preset;
use hypergen_diffusion::{GUIDANCE_SCALE, LoadOptions};
use hypergen_server::encode::{self, ImageFormat};
use serde_json::{Value, json};

use crate::cli::{BenchArgs, EMOJI};
use crate::console::Console;
use crate::model::locate;
use crate::progress::{Loading, Rounds};

/// Times that the last picture is encoded.
const ENCODINGS: usize = 5;

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, console: &mut Console<'_>) -> Result<()> {
    let mut load = LoadOptions {
        dtype: args.dtype,
        threads: args.threads.map(|n| n.get().into()),
        ..LoadOptions::default()
    };
    let subject = match (&args.preset, &args.model) {
        (Some(name), _) if name != EMOJI => Subject::Preset(name.parse()?),
        (_, model) => Subject::Model(locate(model.as_deref(), &mut load)?),
    };
    let guidance = if subject == Subject::Preset(Preset::SdxlTurbo) { 1.0 } else { GUIDANCE_SCALE.default };
    let options = BenchOptions {
        subject,
        load,
        size: args.size,
        steps: args.steps,
        batch: args.batch.into(),
        guidance_scale: args.guidance_scale.unwrap_or(guidance),
        rounds: args.rounds.into(),
        lora_rank: args.lora_rank.map(usize::from),
        profile: args.profile,
    };
    let loading = Loading::start();
    let rounds = Rounds::start();
    let mut report = bench(&options, &mut |p| loading.update(p), &mut |i, count| {
        loading.finish();
        rounds.update(i, count);
    })?;
    drop((loading, rounds));
    report.stages.push(encoding(&report)?);
    let text =
        if args.json { format!("{:#}\n", to_json(&report, &options)) } else { to_table(&report, &options) };
    console.print(&text)
}

/// Encodes the last picture as PNG.
fn encoding(report: &Report) -> Result<Measured> {
    let mut seconds = vec![];
    for _ in 0..ENCODINGS {
        let started = Instant::now();
        encode::encode(&report.picture, ImageFormat::Png, encode::OUTPUT_COMPRESSION.default, None)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(Measured { stage: "png", seconds, flop: 0 })
}

fn to_json(report: &Report, options: &BenchOptions) -> Value {
    let stages: Vec<Value> = report
        .stages
        .iter()
        .map(|s| {
            json!({
                "stage": s.stage,
                "median_s": s.median(),
                "min_s": s.min(),
                "max_s": s.max(),
                "samples": s.seconds.len(),
                "tflop": s.flop as f64 / 1e12,
                "tflops": s.rate().map(|r| r / 1e12),
                "fraction_of_limit": s.rate().map(|r| r / report.limit),
            })
        })
        .collect();
    let profile: Vec<Value> = report
        .profile
        .iter()
        .map(|e| {
            json!({
                "operation": e.operation,
                "sizes": e.sizes,
                "calls": e.calls,
                "total_s": e.time.as_secs_f64(),
                "tflops": rate(e).map(|r| r / 1e12),
            })
        })
        .collect();
    json!({
        "model": report.info.name,
        "size": report.size.to_string(),
        "batch": options.batch,
        "guidance_scale": options.guidance_scale,
        "dtype": report.info.dtype,
        "isa": report.info.isa,
        "threads": report.info.threads,
        "limit_tflops": report.limit / 1e12,
        "peak_rss_bytes": peak_rss(),
        "stages": stages,
        "profile": profile,
    })
}

fn to_table(report: &Report, options: &BenchOptions) -> String {
    let info = &report.info;
    let halves = if options.guidance_scale > 1.0 { "both halves of guidance" } else { "no guidance" };
    let mut out = format!(
        "{}, {}, batch {}, {halves}; {} on {} with {} threads, whose limit is {:.2} TFLOP/s\n\n",
        info.name,
        report.size,
        options.batch,
        info.dtype,
        info.isa,
        info.threads,
        report.limit / 1e12
    );
    out += "stage          median s      min s      max s   TFLOP/s   of limit\n";
    for s in &report.stages {
        let _ = write!(out, "{:<11} {:>11.4} {:>10.4} {:>10.4}", s.stage, s.median(), s.min(), s.max());
        if let Some(rate) = s.rate() {
            let _ = write!(out, " {:>9.2} {:>8.0} %", rate / 1e12, 100.0 * rate / report.limit);
        }
        out.push('\n');
    }
    if !report.profile.is_empty() {
        out += &profile_table(report);
    }
    if let Some(peak) = peak_rss() {
        let _ = writeln!(out, "\npeak memory: {:.2} GB", peak as f64 / 1e9);
    }
    out
}

/// Floating-point operations a second of an operation that counts them.
fn rate(entry: &ProfileEntry) -> Option<f64> {
    let seconds = entry.time.as_secs_f64();
    (entry.flop > 0 && seconds > 0.0).then(|| entry.flop as f64 / seconds)
}

fn profile_table(report: &Report) -> String {
    let all: f64 = report.profile.iter().map(|e| e.time.as_secs_f64()).sum();
    let mut out = String::from(
        "\noperation                                      calls    total s   share   TFLOP/s   of limit\n",
    );
    for e in &report.profile {
        let seconds = e.time.as_secs_f64();
        let sizes = e.sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
        let name = format!("{} {sizes}", e.operation);
        let _ = write!(out, "{name:<45} {:>6} {seconds:>10.4} {:>5.1} %", e.calls, 100.0 * seconds / all);
        if let Some(rate) = rate(e) {
            let _ = write!(out, " {:>9.2} {:>8.0} %", rate / 1e12, 100.0 * rate / report.limit);
        }
        out.push('\n');
    }
    out
}

/// The most memory that the process has held, where the system tells.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
