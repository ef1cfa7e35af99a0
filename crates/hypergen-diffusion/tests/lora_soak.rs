//! A thousand requests that alternate three LoRAs and none: every picture is
//! its first twin, bit for bit, and memory stays where it is. A binary of its
//! own, so that no other test's memory is measured.

// What the goldens' tests use to write models and LoRA files; not all of it is
// needed here.
#[allow(dead_code)]
#[path = "goldens/checkpoint.rs"]
mod checkpoint;
#[allow(dead_code)]
#[path = "goldens/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "goldens/formula.rs"]
mod formula;
#[allow(dead_code)]
#[path = "goldens/lora_files.rs"]
mod lora_files;

use std::fs;

use hypergen_diffusion::{DTypeChoice, LoadOptions, Request, Size};
use lora_files::{Goldens, float32};

const REQUESTS: usize = 1000;
/// Requests after which memory has settled.
const SETTLED: usize = 200;
/// Bytes by which it may drift afterwards: a set of merged weights here takes
/// some hundred KB, so one that were lost each time would show many times over.
const DRIFT: u64 = 16 << 20;

/// Resident memory, where the system tells.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[test]
fn a_thousand_requests_with_three_loras_and_none() {
    let goldens = Goldens::read();
    // Room for some of the sets, so that they are made, kept and forgotten.
    let options = LoadOptions { dtype: DTypeChoice::Bfloat16, lora_cache: Some(600_000), ..float32() };
    let mut model = goldens.model("sd1", &options);
    let loras = [
        vec![],
        vec![model.lora("sd1_kohya", 0.8)],
        vec![model.lora("sd1_locon", 1.0)],
        vec![model.lora("sd1_peft_dora", 1.5)],
    ];
    let requests = loras.map(|loras| Request {
        size: Size::new(16, 16).expect("a size"),
        steps: 1,
        guidance_scale: 1.0,
        ..goldens.request(loras)
    });
    let mut first: [Option<Vec<u8>>; 4] = [const { None }; 4];
    let (mut state, mut settled) = (1_u32, None);
    for i in 0..REQUESTS {
        // Now in turns, now at random: what is kept differs.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let kind = if i / 100 % 2 == 0 { i % 4 } else { (state >> 16) as usize % 4 };
        let picture = model.draw(&requests[kind]);
        match &first[kind] {
            None => first[kind] = Some(picture),
            Some(twin) => assert!(*twin == picture, "request {i}, kind {kind}"),
        }
        if i == SETTLED {
            settled = resident();
        }
    }
    let pictures: Vec<_> = first.iter().flatten().collect();
    assert_eq!(pictures.len(), 4, "all four were drawn");
    for (i, a) in pictures.iter().enumerate() {
        assert!(pictures[..i].iter().all(|b| a != b), "kind {i} is the picture of another");
    }
    if let (Some(settled), Some(end)) = (settled, resident()) {
        println!("{settled} bytes after {SETTLED} requests, {end} after {REQUESTS}");
        assert!(end < settled + DRIFT, "memory grew from {settled} to {end} bytes");
    }
}
