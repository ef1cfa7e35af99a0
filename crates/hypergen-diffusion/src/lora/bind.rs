//! From a file's tensors to changes of one model's weights: every module is
//! looked up, every shape is checked before any value is read, and what would
//! make a weight infinite is found before it is drawn with. What a module's
//! tensors mean is `adapter.rs`'s part.

use std::collections::{BTreeSet, HashMap};

use hypergen_tensor::{Change, Device, Module, Vector, overflowing};

use super::adapter::{Fault, Reader};
use super::embeddings::{Embedding, embeddings};
use super::file::{LoraFile, SD1, SD2, SDXL};
use super::names::{Component, Place, newer, original_path, path};
use super::{clipped, lora_error, some_of};
use crate::Error;

/// What can be changed of one part of a model.
pub(crate) struct Part {
    pub(crate) component: Component,
    pub(crate) modules: Vec<Module>,
    pub(crate) vectors: Vec<Vector>,
}

/// A module of a model: a matrix or convolution, or a normalisation.
pub(super) struct Target {
    pub(super) component: Component,
    name: String,
    pub(super) matrix: Option<Module>,
    /// A normalisation's scale.
    pub(super) weight: Option<Vector>,
    pub(super) bias: Option<Vector>,
}

impl Target {
    /// As the checkpoint names it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// What can be changed in a model.
pub(crate) struct Targets {
    targets: Vec<Target>,
    by_path: HashMap<(Component, String), usize>,
}

impl Targets {
    /// The modules of each part, as its checkpoint names them.
    pub(crate) fn new(parts: impl IntoIterator<Item = Part>) -> Self {
        let targets = parts.into_iter().flat_map(targets).collect::<Vec<_>>();
        let mut by_path = HashMap::new();
        for (i, target) in targets.iter().enumerate() {
            by_path.insert((target.component, path(&target.name)), i);
        }
        let unet: Vec<&str> =
            targets.iter().filter(|t| t.component == Component::UNet).map(Target::name).collect();
        let layers = count(&unet, "down_blocks.0.resnets.");
        let attends =
            |level: usize| unet.iter().any(|n| n.starts_with(&format!("up_blocks.{level}.attentions.")));
        for (i, target) in targets.iter().enumerate().filter(|(_, t)| t.component == Component::UNet) {
            if let Some(original) = original_path(&target.name, layers, attends) {
                by_path.entry((Component::UNet, original)).or_insert(i);
            }
        }
        Self { targets, by_path }
    }

    /// All matrices and convolutions, each with its part.
    pub(super) fn modules(&self) -> impl Iterator<Item = (Component, &Module)> {
        self.targets.iter().filter_map(|t| Some((t.component, t.matrix.as_ref()?)))
    }

    pub(super) fn find(&self, place: &Place) -> Option<&Target> {
        let among: &[Component] = match &place.component {
            Some(component) => std::slice::from_ref(component),
            None => &[Component::UNet, Component::Text, Component::Text2],
        };
        let lookup = |component: Component, path: &str| self.by_path.get(&(component, path.to_owned()));
        let found =
            among.iter().find_map(|&c| lookup(c, &place.path).or_else(|| lookup(c, &newer(c, &place.path)?)));
        found.map(|&i| &self.targets[i])
    }

    /// Width of the text that the UNet attends to, which tells families apart.
    fn context(&self) -> Option<usize> {
        self.modules().find(|(_, m)| m.name().ends_with("attn2.to_k")).map(|(_, m)| m.inputs())
    }

    /// Width of a token in a text encoder, if there is that one.
    pub(super) fn text_width(&self, component: Component) -> Option<usize> {
        let projects = |c, m: &Module| c == component && m.name().ends_with("self_attn.q_proj");
        self.modules().find(|(c, m)| projects(*c, m)).map(|(_, m)| m.inputs())
    }
}

/// The modules of a part, matrices with their biases and normalisations.
fn targets(part: Part) -> Vec<Target> {
    let component = part.component;
    let mut targets: Vec<Target> = vec![];
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut at = |name: &str, targets: &mut Vec<Target>| {
        *places.entry(name.to_owned()).or_insert_with(|| {
            let name = name.to_owned();
            targets.push(Target { component, name, matrix: None, weight: None, bias: None });
            targets.len() - 1
        })
    };
    for module in part.modules {
        let place = at(module.name(), &mut targets);
        targets[place].matrix = Some(module);
    }
    for vector in part.vectors {
        if let Some(name) = vector.name().strip_suffix(".weight") {
            let place = at(name, &mut targets);
            targets[place].weight = Some(vector);
        } else if let Some(name) = vector.name().strip_suffix(".bias") {
            let place = at(name, &mut targets);
            targets[place].bias = Some(vector);
        }
    }
    targets
}

/// How many different numbers follow a prefix.
fn count(names: &[&str], prefix: &str) -> usize {
    let numbers = names.iter().filter_map(|n| n.strip_prefix(prefix)?.split('.').next());
    numbers.collect::<BTreeSet<_>>().len()
}

/// A file as changes of a model's weights.
pub(super) struct Bound {
    pub(super) changes: Vec<(Module, Change)>,
    pub(super) vectors: Vec<(Vector, Vec<f32>)>,
    pub(super) embeddings: Vec<Embedding>,
    /// Whether what a text encoder makes of a prompt changes.
    pub(super) text: bool,
}

/// Turns a file into changes, each scaled by `scale`.
///
/// # Errors
/// When the model has no such module, or one of another shape; where the file
/// is for another family, the message says for which.
pub(super) fn bind(file: &LoraFile, targets: &Targets, scale: f64, device: &Device) -> Result<Bound, Error> {
    let label = file.checkpoint.label();
    let failed = |fault: Fault| match (&fault, other_family(file, targets)) {
        (Fault::Shape(_), Some(family)) => lora_error(family),
        (Fault::Shape(message) | Fault::Other(message), _) => lora_error(format!("{label}: {message}")),
    };
    // First all names and shapes, then the values.
    let readers = readers(file, targets, &failed)?;
    let embeddings = embeddings(file, targets).map_err(&failed)?;
    let text = !embeddings.is_empty() || readers.iter().any(|r| r.target().component != Component::UNet);
    let mut bound = Bound { changes: vec![], vectors: vec![], embeddings, text };
    let read = device.map(readers.len(), |i| readers[i].read(scale));
    for (reader, read) in readers.iter().zip(read) {
        let (target, read) = (reader.target(), read.map_err(&failed)?);
        let vector = |vector: &Option<Vector>, values| Some((vector.clone()?, values?));
        bound.changes.extend(target.matrix.clone().zip(read.matrix));
        bound.vectors.extend(vector(&target.weight, read.weight));
        bound.vectors.extend(vector(&target.bias, read.bias));
    }
    match overflowing(device, &bound.changes, &bound.vectors) {
        None => Ok(bound),
        Some(name) => Err(lora_error(format!(
            "{label}: added to '{name}' at scale {scale}, its values are too large to be numbers: the training that \
             made it has failed, or its alpha or the scale is far too large"
        ))),
    }
}

/// Looks every module up, and compares every shape.
fn readers<'a>(
    file: &'a LoraFile,
    targets: &'a Targets,
    failed: &impl Fn(Fault) -> Error,
) -> Result<Vec<Reader<'a>>, Error> {
    let label = file.checkpoint.label();
    let mut absent = vec![];
    let mut seen = HashMap::new();
    let mut readers = vec![];
    for entry in &file.entries {
        let Some(target) = targets.find(&entry.place) else {
            absent.push(entry.name.as_str());
            continue;
        };
        if let Some(twin) = seen.insert((target.component, target.name()), &entry.name) {
            let (twin, name) = (clipped(twin), clipped(&entry.name));
            return Err(lora_error(format!("{label}: '{twin}' and '{name}' are the same module")));
        }
        readers.push(Reader::new(file, entry, target).map_err(failed)?);
    }
    if absent.is_empty() {
        return Ok(readers);
    }
    Err(lora_error(other_family(file, targets).unwrap_or_else(|| {
        format!(
            "{label} changes modules that this model does not have, and is not applied in part: {}",
            some_of(&absent)
        )
    })))
}

/// Says so where a file is for another family than the model's.
fn other_family(file: &LoraFile, targets: &Targets) -> Option<String> {
    let own = targets.context().map(|width| match width {
        768 => SD1.to_owned(),
        1024 => SD2.to_owned(),
        2048 => SDXL.to_owned(),
        width => format!("one with {width} values of text a token"),
    });
    let (family, own) = (file.family()?, own?);
    (family != own).then(|| {
        format!(
            "{} fits {family}, but this model is {own}: use it with a model of its family",
            file.checkpoint.label()
        )
    })
}

#[cfg(test)]
mod tests;
