//! Measures what LoRAs cost on a model: a switch to one that was not applied
//! before, as long as that takes fresh memory and later, to one that is kept,
//! to the one that is applied already; and what the other way would cost at
//! every step, the low-rank products beside the weights. The LoRA is a file of
//! random values for all that kohya's trainer changes by default, the
//! attentions of the UNet and the text encoders, and reading it is part of a switch.

use std::collections::HashMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use half::f16;
use hypergen_tensor::ops::{self, Epilogue};
use hypergen_tensor::{Checkpoint, DType, Device, Loader, Module, Tensor};

use super::names::Component;
use super::{Lora, adapters::Adapters, lora_error};
use crate::bench::Measured;
use crate::models::unet::UNetConfig;
use crate::{Error, Size};

/// Times that each switch is measured.
const ROUNDS: usize = 7;

/// What is measured on.
pub(crate) struct Subject<'a> {
    pub(crate) device: &'a Device,
    pub(crate) dtype: DType,
    pub(crate) unet: &'a UNetConfig,
    /// Pixels of a latent's side.
    pub(crate) factor: usize,
    pub(crate) size: Size,
    /// Pictures of a forward pass, both halves of guidance.
    pub(crate) batch: usize,
}

/// Measures it all for a rank; leaves the base model behind.
///
/// # Errors
/// When the file cannot be written or applied.
pub(crate) fn measure(
    adapters: &mut Adapters,
    subject: &Subject<'_>,
    rank: usize,
) -> Result<Vec<Measured>, Error> {
    let modules: Vec<(Component, Module)> = adapters
        .targets()
        .modules()
        .filter(|(c, m)| by_default(*c, m.name()))
        .map(|(c, m)| (c, m.clone()))
        .collect();
    let half = File::write(&modules, rank, "F16", |v| f16::from_f32(v).to_le_bytes().to_vec())?;
    let single = File::write(&modules, rank, "F32", |v| v.to_le_bytes().to_vec())?;
    // Scales that were never there before.
    let mut scales = (0..).map(|i| 0.5 + f64::from(i) / 100.0);
    let mut next = || scales.next().unwrap_or_default();
    let mut timed = |file: &File, scale: f64| -> Result<(Duration, usize), Error> {
        let lora = Lora { name: "random".to_owned(), path: file.0.clone(), scale };
        let started = Instant::now();
        adapters.activate(&[lora], subject.device)?;
        Ok((started.elapsed(), adapters.held()))
    };
    // Until as much is kept as may be, every switch takes fresh memory.
    let (mut first, mut held) = (vec![], 0);
    loop {
        let (elapsed, now) = timed(&half, next())?;
        if now == held {
            break;
        }
        first.push(elapsed);
        held = now;
    }
    let (mut switch, mut wide, mut kept, mut same) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let scale = next();
        switch.push(timed(&half, scale)?.0);
        same.push(timed(&half, scale)?.0);
        timed(&half, 0.0)?;
        kept.push(timed(&half, scale)?.0);
        wide.push(timed(&single, next())?.0);
    }
    timed(&half, 0.0)?;
    let stage = |stage, times: &[Duration]| Measured {
        stage,
        seconds: times.iter().map(Duration::as_secs_f64).collect(),
        flop: 0,
    };
    Ok(vec![
        stage("lora_first", &first),
        stage("lora_switch", &switch),
        stage("lora_switch_f32", &wide),
        stage("lora_kept", &kept),
        stage("lora_same", &same),
        Measured { stage: "lora_beside", seconds: beside(&modules, subject, rank)?, flop: 0 },
    ])
}

/// What kohya's trainer changes where nothing else is said.
fn by_default(component: Component, module: &str) -> bool {
    match component {
        Component::UNet => module.contains(".attentions."),
        Component::Text | Component::Text2 => module.contains("layers."),
    }
}

/// Seconds of a step that low-rank products beside the weights would take: one
/// down and one up for every matrix, added to its output. Keys and values of
/// the text are left out, as they are computed once a request.
fn beside(modules: &[(Component, Module)], subject: &Subject<'_>, rank: usize) -> Result<Vec<f64>, Error> {
    let mut shapes: HashMap<[usize; 3], usize> = HashMap::new();
    for (_, module) in modules.iter().filter(|(c, _)| *c == Component::UNet) {
        let name = module.name();
        if !name.ends_with("attn2.to_k") && !name.ends_with("attn2.to_v") {
            *shapes.entry([tokens(name, subject), module.inputs(), module.outputs()]).or_default() += 1;
        }
    }
    let random = Checkpoint::random("random");
    let loader = Loader::new(&random, subject.device, subject.dtype, &|_| {});
    let mut rounds = vec![0.0; ROUNDS];
    for ([tokens, inputs, outputs], count) in shapes {
        let down = loader.root().pp("down").linear(inputs, rank, false)?;
        let up = loader.root().pp("up").linear(rank, outputs, false)?;
        let zeros = |width: usize| {
            let values = vec![0.0; subject.batch * tokens * width];
            Tensor::from_f32(subject.device, [subject.batch, tokens, width], subject.dtype, &values)
        };
        let (x, y) = (zeros(inputs), zeros(outputs));
        for seconds in &mut rounds {
            let started = Instant::now();
            let inner = ops::linear(&x, &down, Epilogue::default());
            black_box(ops::linear(&inner, &up, Epilogue::residual(&y)));
            *seconds += count as f64 * started.elapsed().as_secs_f64();
        }
    }
    Ok(rounds)
}

/// Tokens of a picture at a module's level.
fn tokens(module: &str, subject: &Subject<'_>) -> usize {
    let levels = subject.unet.levels.len();
    let mut parts = module.split('.');
    let (block, number) = (parts.next(), parts.next().and_then(|n| n.parse::<usize>().ok()));
    let level = match (block, number) {
        (Some("down_blocks"), Some(i)) => i,
        (Some("up_blocks"), Some(i)) => levels.saturating_sub(1 + i),
        _ => levels - 1,
    };
    let side = |pixels: usize| (pixels / subject.factor) >> level;
    side(subject.size.width) * side(subject.size.height)
}

/// A LoRA file that goes when it goes.
struct File(PathBuf);

impl File {
    /// As kohya's trainer writes it, in the number type `dtype`, into which
    /// `store` turns a value.
    fn write(
        modules: &[(Component, Module)],
        rank: usize,
        dtype: &str,
        store: impl Fn(f32) -> Vec<u8>,
    ) -> Result<Self, Error> {
        let (mut header, mut data) = (serde_json::Map::new(), vec![]);
        let mut put = |name: String, shape: &[usize], values: &mut dyn FnMut() -> f32| {
            let start = data.len();
            (0..shape.iter().product()).for_each(|_: usize| data.extend(store(values())));
            let offsets = [start, data.len()];
            header.insert(name, serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        };
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.01
        };
        for (component, module) in modules {
            let part = match component {
                Component::UNet => "lora_unet",
                Component::Text => "lora_te1",
                Component::Text2 => "lora_te2",
            };
            let name = format!("{part}_{}", module.name().replace('.', "_"));
            put(format!("{name}.alpha"), &[], &mut || rank as f32);
            put(format!("{name}.lora_down.weight"), &[rank, module.inputs()], &mut random);
            put(format!("{name}.lora_up.weight"), &[module.outputs(), rank], &mut random);
        }
        let header = serde_json::Value::Object(header).to_string();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        let name = format!("hypergen-bench-{}-{rank}-{dtype}.safetensors", std::process::id());
        let path: PathBuf = Path::new(&std::env::temp_dir()).join(name);
        std::fs::write(&path, bytes)
            .map_err(|e| lora_error(format!("cannot write {}: {e}", path.display())))?;
        Ok(Self(path))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // A file left in the temporary folder is the system's to sweep up.
        let _ = std::fs::remove_file(&self.0);
    }
}
