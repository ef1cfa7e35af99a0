//! The LoRAs of a loaded model: which are applied now, and which were lately.
//!
//! Applied weights are kept as long as they fit into a bound of bytes, so that
//! requests that alternate exchange pointers. A set of LoRAs is known by its
//! scales and by the stamps of all files that are read for it, so that what was
//! replaced, edited or removed is read anew; a scale of 0 is no LoRA.

use std::collections::VecDeque;

use hypergen_tensor::{Changed, Device, apply, bytes_to_change};

use super::bind::{Targets, bind};
use super::file::LoraFile;
use super::stamp::Stamp;
use super::{Embedding, Lora, PARAM, settings};
use crate::{Error, memory};

/// One LoRA of a set, as far as it decides about weights.
#[derive(Debug, Clone, PartialEq)]
struct Part {
    /// The weights, and every place where their settings may lie.
    files: Vec<Stamp>,
    scale: f64,
}

/// Changed weights of a set of LoRAs.
struct Set {
    parts: Vec<Part>,
    changed: Changed,
    embeddings: Vec<Embedding>,
    /// A number that tells its text encoders' weights from all others; 0 where
    /// they are the loaded ones.
    text: u64,
}

/// See the module's description.
pub(crate) struct Adapters {
    targets: Targets,
    /// Bytes of changed weights that may be kept.
    limit: usize,
    /// The latest first; the first may be the active one.
    sets: VecDeque<Set>,
    active: bool,
    made: u64,
}

impl Adapters {
    pub(crate) fn new(targets: Targets, limit: usize) -> Self {
        Self { targets, limit, sets: VecDeque::new(), active: false, made: 0 }
    }

    /// What can be changed.
    pub(super) fn targets(&self) -> &Targets {
        &self.targets
    }

    /// Bytes of changed weights that are held.
    pub(crate) fn held(&self) -> usize {
        self.sets.iter().map(|set| set.changed.bytes()).sum()
    }

    /// A number that tells the text encoders' present weights from others: 0
    /// for the loaded ones.
    pub(crate) fn text(&self) -> u64 {
        self.sets.front().filter(|_| self.active).map_or(0, |set| set.text)
    }

    /// The words that the LoRAs in use bring along; later ones count where two are the same.
    pub(crate) fn embeddings(&self) -> &[Embedding] {
        self.sets.front().filter(|_| self.active).map_or(&[], |set| &set.embeddings)
    }

    /// Whether these LoRAs can be applied.
    ///
    /// # Errors
    /// As [`Adapters::activate`].
    pub(crate) fn check(&self, loras: &[Lora], device: &Device) -> Result<(), Error> {
        loras.iter().try_for_each(|lora| {
            bind(&LoraFile::read(&lora.path, &lora.name)?, &self.targets, lora.scale, device).map(|_| ())
        })
    }

    /// Lets the model compute with these LoRAs, and with no others.
    ///
    /// # Errors
    /// When a file cannot be used; the model then computes with its loaded weights.
    pub(crate) fn activate(&mut self, loras: &[Lora], device: &Device) -> Result<(), Error> {
        let wanted: Vec<&Lora> = loras.iter().filter(|l| l.scale != 0.0).collect();
        let parts: Vec<Part> = wanted.iter().map(|lora| Part::of(lora)).collect();
        let same = |set: &Set| set.parts == parts;
        if self.active && self.sets.front().is_some_and(same) {
            return Ok(());
        }
        let forgotten = self.deactivate();
        if parts.is_empty() {
            return Ok(());
        }
        let set = match self.sets.iter().position(same).and_then(|at| self.sets.remove(at)) {
            Some(set) => set,
            None => self.make(&wanted, parts, forgotten, device)?,
        };
        set.changed.install();
        self.sets.push_front(set);
        self.active = true;
        Ok(())
    }

    /// Goes back to the loaded weights; what is no longer kept is handed out.
    fn deactivate(&mut self) -> Vec<Set> {
        if std::mem::take(&mut self.active)
            && let Some(set) = self.sets.front()
        {
            set.changed.restore();
        }
        self.shrink(0)
    }

    /// Takes out the oldest sets until `more` bytes fit into the bound, or none is left.
    fn shrink(&mut self, more: usize) -> Vec<Set> {
        let mut forgotten = vec![];
        while self.held() + more > self.limit {
            let Some(set) = self.sets.pop_back() else { break };
            forgotten.push(set);
        }
        forgotten
    }

    /// Makes a new set, in the memory of a forgotten one where that fits.
    fn make(
        &mut self,
        loras: &[&Lora],
        parts: Vec<Part>,
        mut forgotten: Vec<Set>,
        device: &Device,
    ) -> Result<Set, Error> {
        let (mut changes, mut vectors, mut embeddings) = (vec![], vec![], vec![]);
        let mut text = false;
        for lora in loras {
            let bound = bind(&LoraFile::read(&lora.path, &lora.name)?, &self.targets, lora.scale, device)?;
            changes.extend(bound.changes);
            vectors.extend(bound.vectors);
            embeddings.extend(bound.embeddings);
            text |= bound.text;
        }
        let bytes = bytes_to_change(changes.iter().map(|(module, _)| module));
        forgotten.extend(self.shrink(bytes));
        let memory = forgotten.into_iter().map(|set| set.changed.into_memory()).find(|m| m.fits(bytes));
        if memory.is_none() {
            memory::check_lora(bytes).map_err(|e| Error { param: Some(PARAM), ..e })?;
        }
        let changed = apply(device, &changes, &vectors, memory);
        self.made += 1;
        Ok(Set { parts, changed, embeddings, text: if text { self.made } else { 0 } })
    }
}

impl Part {
    fn of(lora: &Lora) -> Self {
        let settings = settings::beside(&lora.path);
        let files = std::iter::once(&lora.path).chain(&settings).map(|path| Stamp::of(path));
        Self { files: files.collect(), scale: lora.scale }
    }
}

/// What may be kept where nothing else is said: three LoRAs of SD 1.5 in bfloat16.
pub(crate) const DEFAULT_CACHE: usize = 2 << 30;
