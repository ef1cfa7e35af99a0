//! One picture's way from noise to the clean sample latents, one call of the network at a
//! time. Whoever owns the network owns the loop: it may give several
//! trajectories turns in one forward pass, look at a step, or stop.

use std::sync::Arc;

use super::prediction::{Level, Predicted};
use super::{Noise, Sampler};

/// What a solver keeps between calls of the network.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The latents.
    pub(super) x: Vec<f32>,
    /// Where the network is asked next, if not at the latents: a point within a step.
    pub(super) probe: Option<Vec<f32>>,
    /// What earlier calls gave that the solver looks back to, newest first.
    pub(super) outputs: Vec<Vec<f32>>,
    /// Latents from which the present group of calls started.
    pub(super) start: Vec<f32>,
    /// What a later call of the same step uses again: a draw of noise, a sum of slopes.
    pub(super) kept: Vec<f32>,
}

impl State {
    /// Keeps an output as the newest, and forgets those beyond `most`.
    pub(super) fn remember(&mut self, output: Vec<f32>, most: usize) {
        self.outputs.truncate(most - 1);
        self.outputs.insert(0, output);
    }
}

/// See the module's description.
pub struct Trajectory {
    sampler: Arc<Sampler>,
    state: State,
    /// Calls of the network that are done.
    done: usize,
    /// The latents of the last call, and what the network answered.
    asked: Vec<f32>,
    answer: Vec<f32>,
    /// The input as the network wants it, kept to spare an allocation per call.
    scaled: Vec<f32>,
}

/// What the network is asked now.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Latents, scaled to the variance that the network was trained on.
    pub input: &'a [f32],
    /// The timestep that it is told; may be fractional.
    pub timestep: f32,
    /// The noise in the latents.
    pub level: NoiseLevel,
}

/// How much of latents is signal and how much is noise: `alpha * denoised + sigma * noise`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseLevel {
    /// Factor of the denoised sample.
    pub alpha: f32,
    /// Factor of unit normal noise.
    pub sigma: f32,
}

/// What came of one call of the network.
pub struct StepView<'a> {
    /// The latents after it.
    pub x: &'a [f32],
    predicted: Predicted<'a>,
}

impl StepView<'_> {
    /// The denoised latents that this call of the network predicted: what a preview shows.
    pub fn denoised(&self) -> Vec<f32> {
        self.predicted.denoised()
    }
}

impl Trajectory {
    /// Starts from unit normal `noise`, which the sampler scales to its first level.
    pub fn new(sampler: Arc<Sampler>, mut noise: Vec<f32>) -> Self {
        let scale = sampler.initial_scale();
        noise.iter_mut().for_each(|x| *x *= scale);
        let state = State { x: noise, ..State::default() };
        Self { sampler, state, done: 0, asked: vec![], answer: vec![], scaled: vec![] }
    }

    /// What to ask the network now: `None` at the end of the way. Asking again
    /// without [`Trajectory::advance`] gives the same.
    pub fn query(&mut self) -> Option<Query<'_>> {
        if self.done >= self.evaluations() {
            return None;
        }
        let level = *self.level();
        let x = self.state.probe.as_ref().unwrap_or(&self.state.x);
        let input = if level.norm == 1.0 {
            x
        } else {
            self.scaled.clear();
            self.scaled.extend(x.iter().map(|v| v / level.norm));
            &self.scaled
        };
        let Level { alpha, sigma, timestep, .. } = level;
        Some(Query { input, timestep, level: NoiseLevel { alpha, sigma } })
    }

    /// Takes the network's answer to [`Trajectory::query`]: epsilon, v or the sample, guidance
    /// applied. `noise` fills a slice with unit normal draws, wherever the sampler needs fresh ones.
    ///
    /// # Panics
    /// At the end of the way, and where the answer has another length than the latents.
    pub fn advance(&mut self, answer: Vec<f32>, noise: &mut dyn FnMut(&mut [f32])) -> StepView<'_> {
        assert!(self.done < self.evaluations(), "the trajectory has ended");
        assert_eq!(answer.len(), self.state.x.len(), "the network answers for every latent");
        let level = *self.level();
        self.asked = self.state.probe.take().unwrap_or_else(|| self.state.x.clone());
        self.answer = answer;
        let (prediction, clamp) = (self.sampler.built.prediction, self.sampler.built.clamp);
        let predicted = Predicted { x: &self.asked, raw: &self.answer, level, prediction, clamp };
        self.sampler.built.solver.advance(self.done, &predicted, &mut self.state, noise);
        self.done += 1;
        StepView { x: &self.state.x, predicted }
    }

    /// Calls of the network that are done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Calls of the network on the whole way.
    pub fn evaluations(&self) -> usize {
        self.sampler.evaluations()
    }

    /// The latents as they are now.
    pub fn latents(&self) -> &[f32] {
        &self.state.x
    }

    /// The latents at the end of the way.
    pub fn into_latents(self) -> Vec<f32> {
        self.state.x
    }

    fn level(&self) -> &Level {
        self.sampler.built.solver.level(self.done)
    }
}

/// A solver's draw of noise of the latents' length.
pub(super) fn draw(len: usize, noise: Noise<'_>) -> Vec<f32> {
    let mut fresh = vec![0.0; len];
    noise(&mut fresh);
    fresh
}
