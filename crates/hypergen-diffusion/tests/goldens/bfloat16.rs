//! Whole pipelines in bfloat16: no farther from diffusers' float32 than
//! diffusers' own bfloat16 is.
//!
//! With random weights the rounding of a single number decides which of many
//! neighbouring pictures is drawn, so one case alone is a coin's toss: what is
//! demanded is the mean over all cases of a checkpoint, and of each case that
//! it is no outlier.

use hypergen_diffusion::DTypeChoice;

use crate::fixture::{distance, psnr};
use crate::pipelines::Goldens;

/// How much farther than diffusers' bfloat16 a single case may be.
const OUTLIER: f64 = 2.0;

fn check(checkpoint: &str) {
    let goldens = Goldens::read();
    let (mut ours, mut theirs, mut wrong) = (vec![], vec![], vec![]);
    for group in goldens.of(checkpoint) {
        let mut model = goldens.load(group[0].1, DTypeChoice::Bfloat16, 2);
        for (name, case) in group {
            let (latents, picture) = model.draw(&case.request());
            let latents = distance(&latents, &goldens.latents(name));
            let picture = psnr(&picture, &goldens.picture(name));
            let reference = &case.bfloat16;
            println!(
                "{name}: latents {latents:.4} and {:.4}, picture {picture:.1} and {:.1} dB",
                reference.latents, reference.picture
            );
            if latents > OUTLIER * reference.latents {
                wrong.push(format!("{name}: latents {latents:.4}, diffusers {:.4}", reference.latents));
            }
            ours.push((latents.ln(), picture));
            theirs.push((reference.latents.ln(), reference.picture));
        }
    }
    let mean = |all: &[(f64, f64)]| {
        let n = all.len() as f64;
        (all.iter().map(|r| r.0).sum::<f64>() / n, all.iter().map(|r| r.1).sum::<f64>() / n)
    };
    let (ours, theirs) = (mean(&ours), mean(&theirs));
    println!(
        "{checkpoint}: ours {:.4} and {:.1} dB, diffusers {:.4} and {:.1} dB",
        ours.0.exp(),
        ours.1,
        theirs.0.exp(),
        theirs.1
    );
    assert!(wrong.is_empty(), "bfloat16 is far from float32:\n{}", wrong.join("\n"));
    assert!(
        ours.0 <= theirs.0,
        "latents are farther from float32 than diffusers' bfloat16: {ours:?}, {theirs:?}"
    );
    assert!(
        ours.1 >= theirs.1,
        "pictures are farther from float32 than diffusers' bfloat16: {ours:?}, {theirs:?}"
    );
}

#[test]
fn stable_diffusion_1_is_as_near_to_float32_as_diffusers_is() {
    check("sd1");
}

#[test]
fn stable_diffusion_2_is_as_near_to_float32_as_diffusers_is() {
    check("sd2");
}

#[test]
fn sdxl_is_as_near_to_float32_as_diffusers_is() {
    check("sdxl");
}

#[test]
fn the_emoji_model_is_as_near_to_float32_as_diffusers_is() {
    check("emoji");
}
