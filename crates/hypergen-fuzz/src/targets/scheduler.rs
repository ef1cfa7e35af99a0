//! A scheduler's JSON, and every sampler built from it.

use std::sync::Arc;

use hypergen_diffusion::samplers::{Sampler, SamplerError, SamplerKind, Trajectory, read_config};
use hypergen_diffusion::{Error, ErrorKind};
use serde_json::Value;

use crate::check_message;
use crate::targets::itself;

/// Steps that samplers are built for, when the file names the sampler.
const STEPS: [usize; 4] = [1, 2, 20, 150];

/// The input is the file.
pub(crate) fn read(data: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(data);
    let config = match read_config(&text) {
        Ok(config) => config,
        Err(error) => {
            check(&error);
            return itself(data);
        }
    };
    for steps in STEPS {
        build(None, &config, steps);
    }
    // Each kind at a few steps and at many would say no more of the file.
    for (i, kind) in SamplerKind::ALL.iter().enumerate() {
        build(Some(*kind), &config, STEPS[i % STEPS.len()]);
    }
    itself(data)
}

fn build(kind: Option<SamplerKind>, config: &Value, steps: usize) {
    let sampler = match Sampler::new(kind, config, steps) {
        Ok(sampler) => sampler,
        Err(error) => return check(&error),
    };
    assert!(kind.is_none_or(|kind| kind == sampler.kind()));
    // Runge-Kutta's first steps of PNDM take the most: four each.
    assert!(
        (1..=4 * steps + 12).contains(&sampler.evaluations()),
        "{steps} steps, {}",
        sampler.evaluations()
    );
    assert!(sampler.initial_scale().is_finite());
    let kind = sampler.kind();
    let mut trajectory = Trajectory::new(Arc::new(sampler), vec![0.5; 4]);
    while let Some(query) = trajectory.query() {
        let timestep = query.timestep;
        assert!(timestep.is_finite() && timestep >= 0.0, "{kind:?} with {steps} steps: timestep {timestep}");
        let answer = query.input.iter().map(|x| x * 0.1).collect();
        trajectory.advance(answer, &mut |noise| noise.fill(0.25));
    }
    assert_eq!(trajectory.done(), trajectory.evaluations(), "{kind:?} with {steps} steps");
    assert_eq!(trajectory.latents().len(), 4);
}

fn check(error: &SamplerError) {
    // As whoever asked for the sampler hands it on.
    check_message(
        &Error::new(ErrorKind::Model, error.to_string()).message,
        &["scheduler", "sampler", "steps", "betas"],
    );
}
