//! Draws one request and writes its latents and its picture as raw numbers,
//! for `bench/fidelity`: pictures alone would hide what happened before them.
//!
//!     latents FOLDER REQUEST_AS_JSON OUT
//!
//! writes `OUT.latents` (float32, height by width by channels) and
//! `OUT.picture` (bytes, RGB), and prints their shape and the peak memory.

use std::error::Error;
use std::fs;

use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{DTypeChoice, LoadOptions, Request, Silent, load};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Wanted {
    prompt: String,
    negative_prompt: Option<String>,
    size: String,
    steps: usize,
    guidance_scale: f64,
    seed: u64,
    dtype: String,
    sampler: Option<String>,
    prompt_syntax: Option<String>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, wanted, out] = arguments.as_slice() else {
        return Err("usage: latents FOLDER REQUEST_AS_JSON OUT".into());
    };
    let wanted: Wanted = serde_json::from_str(wanted)?;
    let options = LoadOptions { dtype: wanted.dtype.parse::<DTypeChoice>()?, ..LoadOptions::default() };
    let mut pipeline = load(Some(folder), &options, &mut |_| {})?;
    let request = Request {
        negative_prompt: wanted.negative_prompt,
        size: wanted.size.parse()?,
        steps: wanted.steps,
        // At 1 and below guidance is off; what the distilled models take below 1 says nothing more.
        guidance_scale: wanted.guidance_scale.max(1.0),
        seed: wanted.seed,
        sampler: wanted.sampler.map(|s| s.parse()).transpose()?,
        prompt_syntax: wanted.prompt_syntax.map_or(Ok(PromptSyntax::Plain), |s| s.parse())?,
        ..Request::new(wanted.prompt)
    };
    let latents = pipeline.latents(&[request], &mut Silent)?.remove(0);
    let bytes: Vec<u8> = latents.values.iter().flat_map(|v| v.to_le_bytes()).collect();
    fs::write(format!("{out}.latents"), bytes)?;
    fs::write(format!("{out}.picture"), pipeline.decode(&latents)?)?;
    println!("{}", json!({"height": latents.height, "width": latents.width, "peak_rss_bytes": peak_rss()}));
    Ok(())
}

/// The most memory that the process has held, where the system tells.
fn peak_rss() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
