//! From a file's tensors to changes of one model's weights: every module is
//! looked up, every shape is checked, and every value is a number. Here the
//! mathematics of each kind of adapter is, in PyTorch's order of dimensions:
//!
//! * LoRA: `up * down`; with taps apart `up * (mid * down)`;
//! * LoHa: `(w1_a * w1_b) o (w2_a * w2_b)`, element by element;
//! * LoKr: `w1 (x) w2`, Kronecker's product;
//! * DoRA: any of them with lengths that the result is brought to.

use std::collections::{BTreeSet, HashMap};

use hypergen_tensor::{Change, Delta, Device, Magnitude, Module, Product};

use super::file::{Entry, LoraFile, SD1, SD2, SDXL};
use super::names::{Component, Place, Role, newer, original_path, path};
use super::{lora_error, some_of};
use crate::Error;

/// What can be changed in a model.
pub(crate) struct Targets {
    modules: Vec<(Component, Module)>,
    by_path: HashMap<(Component, String), usize>,
}

impl Targets {
    /// The modules of each part, as its checkpoint names them.
    pub(crate) fn new(parts: impl IntoIterator<Item = (Component, Vec<Module>)>) -> Self {
        let modules: Vec<(Component, Module)> = parts
            .into_iter()
            .flat_map(|(part, modules)| modules.into_iter().map(move |m| (part, m)))
            .collect();
        let mut by_path = HashMap::new();
        let unet: Vec<&str> =
            modules.iter().filter(|(c, _)| *c == Component::UNet).map(|(_, m)| m.name()).collect();
        let layers = count(&unet, "down_blocks.0.resnets.");
        let attends =
            |level: usize| unet.iter().any(|n| n.starts_with(&format!("up_blocks.{level}.attentions.")));
        for (i, (component, module)) in modules.iter().enumerate() {
            by_path.insert((*component, path(module.name())), i);
            if *component == Component::UNet
                && let Some(original) = original_path(module.name(), layers, attends)
            {
                by_path.insert((Component::UNet, original), i);
            }
        }
        Self { modules, by_path }
    }

    /// All modules, each with its part.
    pub(super) fn modules(&self) -> &[(Component, Module)] {
        &self.modules
    }

    fn find(&self, place: &Place) -> Option<&(Component, Module)> {
        let among: &[Component] = match &place.component {
            Some(component) => std::slice::from_ref(component),
            None => &[Component::UNet, Component::Text, Component::Text2],
        };
        let lookup = |component: Component, path: &str| self.by_path.get(&(component, path.to_owned()));
        let found =
            among.iter().find_map(|&c| lookup(c, &place.path).or_else(|| lookup(c, &newer(c, &place.path)?)));
        found.map(|&i| &self.modules[i])
    }

    /// Width of the text that the UNet attends to, which tells families apart.
    fn context(&self) -> Option<usize> {
        let attends = |m: &&(Component, Module)| m.1.name().ends_with("attn2.to_k");
        self.modules.iter().find(attends).map(|(_, m)| m.inputs())
    }
}

/// How many different numbers follow a prefix.
fn count(names: &[&str], prefix: &str) -> usize {
    let numbers = names.iter().filter_map(|n| n.strip_prefix(prefix)?.split('.').next());
    numbers.collect::<BTreeSet<_>>().len()
}

/// A file as changes of a model's weights.
pub(super) struct Bound {
    pub(super) changes: Vec<(Module, Change)>,
    /// Whether a text encoder is among what is changed.
    pub(super) text: bool,
}

/// Turns a file into changes, each scaled by `scale`.
///
/// # Errors
/// When the model has no such module, or one of another shape; where the file
/// is for another family, the message says for which.
pub(super) fn bind(file: &LoraFile, targets: &Targets, scale: f64, device: &Device) -> Result<Bound, Error> {
    let label = file.checkpoint.label();
    let mut absent = vec![];
    let mut seen = HashMap::new();
    let mut readers = vec![];
    let mut text = false;
    for entry in &file.entries {
        let Some((component, module)) = targets.find(&entry.place) else {
            absent.push(entry.name.as_str());
            continue;
        };
        if let Some(twin) = seen.insert((*component, module.name()), &entry.name) {
            return Err(lora_error(format!("{label}: '{twin}' and '{}' are the same module", entry.name)));
        }
        text |= *component != Component::UNet;
        readers.push(Reader { file, entry, module });
    }
    let changes: Result<Vec<(Module, Change)>, Fault> = device
        .map(readers.len(), |i| Ok((readers[i].module.clone(), readers[i].change(scale)?)))
        .into_iter()
        .collect();
    let changes = changes.map_err(|e| match (&e, other_family(file, targets)) {
        (Fault::Shape(_), Some(family)) => lora_error(family),
        (Fault::Shape(message) | Fault::Other(message), _) => lora_error(format!("{label}: {message}")),
    })?;
    if absent.is_empty() {
        return Ok(Bound { changes, text });
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

/// Why a module's tensors make no change.
enum Fault {
    /// They are not of the module's shape.
    Shape(String),
    Other(String),
}

/// A matrix or kernel out of the file: `[rows, columns, taps]`.
struct Block {
    rows: usize,
    columns: usize,
    taps: usize,
    values: Vec<f32>,
}

impl Block {
    /// `self * other`, where `other` is `[columns, n, taps]` and `self` has no taps.
    fn times(&self, other: &Block) -> Block {
        let width = other.columns * other.taps;
        let mut values = vec![0.0; self.rows * width];
        for (row, to) in self.values.chunks_exact(self.columns).zip(values.chunks_exact_mut(width)) {
            for (&a, from) in row.iter().zip(other.values.chunks_exact(width)) {
                to.iter_mut().zip(from).for_each(|(to, b)| *to += a * b);
            }
        }
        Block { rows: self.rows, columns: other.columns, taps: other.taps, values }
    }

    /// Rows and columns exchanged, without taps.
    fn turned(&self) -> Block {
        let mut values = Vec::with_capacity(self.values.len());
        for column in 0..self.columns {
            values.extend(self.values.iter().skip(column).step_by(self.columns));
        }
        Block { rows: self.columns, columns: self.rows, taps: 1, values }
    }

    /// Taps `[i, j, taps]` over channels `[j, c]`: `[i, c, taps]`.
    fn spread(&self, channels: &Block) -> Block {
        let (taps, c) = (self.taps, channels.columns);
        let mut values = vec![0.0; self.rows * c * taps];
        for (i, to) in values.chunks_exact_mut(c * taps).enumerate() {
            for j in 0..self.columns {
                let from = &self.values[(i * self.columns + j) * taps..][..taps];
                for (&a, to) in channels.values[j * c..][..c].iter().zip(to.chunks_exact_mut(taps)) {
                    to.iter_mut().zip(from).for_each(|(to, t)| *to += a * t);
                }
            }
        }
        Block { rows: self.rows, columns: c, taps, values }
    }
}

/// Reads one module's tensors.
struct Reader<'a> {
    file: &'a LoraFile,
    entry: &'a Entry,
    module: &'a Module,
}

impl Reader<'_> {
    fn has(&self, role: Role) -> bool {
        self.entry.tensors.contains_key(&role)
    }

    fn change(&self, scale: f64) -> Result<Change, Fault> {
        let lora = [Role::Down, Role::Up];
        let loha = [Role::HadaW1A, Role::HadaW1B, Role::HadaW2A, Role::HadaW2B];
        let lokr = [Role::KronW1, Role::KronW1A, Role::KronW1B, Role::KronW2, Role::KronW2A, Role::KronW2B];
        let kinds: &[(&[Role], &[Role])] =
            &[(&lora, &[Role::Mid]), (&loha, &[Role::HadaT1, Role::HadaT2]), (&lokr, &[Role::KronT2])];
        let present: Vec<usize> = (0..3).filter(|&i| kinds[i].0.iter().any(|&r| self.has(r))).collect();
        let &[kind] = present.as_slice() else {
            let names: Vec<&String> = self.entry.tensors.values().collect();
            return Err(Fault::Other(format!(
                "'{}' is no adapter of one kind: it has {}",
                self.entry.name,
                some_of(&names)
            )));
        };
        let known = |r: &Role| {
            kinds[kind].0.contains(r)
                || kinds[kind].1.contains(r)
                || matches!(r, Role::Alpha | Role::Magnitude)
        };
        let strange: Vec<&String> =
            self.entry.tensors.iter().filter(|(r, _)| !known(r)).map(|(_, n)| n).collect();
        if !strange.is_empty() {
            return Err(Fault::Other(format!("tensors without their partners: {}", some_of(&strange))));
        }
        let delta = match kind {
            0 => self.product()?,
            1 => self.hadamard()?,
            _ => self.kronecker()?,
        };
        Ok(Change { delta, scale: (scale * self.strength()?) as f32, magnitude: self.magnitude()? })
    }

    /// Alpha over rank; by the tensor, else by the settings, else 1.
    fn strength(&self) -> Result<f64, Fault> {
        let rank = self.file.rank(self.entry);
        if !self.has(Role::Alpha) {
            return Ok(self.file.configured_scale(self.entry, rank));
        }
        let alpha = self.values(Role::Alpha)?;
        let &[alpha] = alpha.as_slice() else {
            return Err(self.shape_fault(Role::Alpha, "one number"));
        };
        // LoKr with both sides whole has no rank to divide by, and its trainers
        // then take no notice of alpha.
        Ok(rank.map_or(1.0, |rank| f64::from(alpha) / rank as f64))
    }

    fn product(&self) -> Result<Delta, Fault> {
        let up = self.block(Role::Up)?;
        let mut down = self.block(Role::Down)?;
        if self.has(Role::Mid) {
            let mid = self.block(Role::Mid)?;
            self.agree(Role::Mid, mid.columns == down.rows && down.taps == 1)?;
            down = mid.spread(&down);
        }
        Ok(Delta::Product(self.finish(up, down, Role::Up, Role::Down)?))
    }

    /// A product of the module's shape.
    fn finish(&self, up: Block, down: Block, left: Role, right: Role) -> Result<Product, Fault> {
        let taps = self.module.kernel() * self.module.kernel();
        self.agree(left, up.rows == self.module.outputs() && up.taps == 1)?;
        self.agree(left, up.columns == down.rows && up.columns > 0)?;
        // Kernels may be stored flat.
        self.agree(right, down.columns * down.taps == self.module.inputs() * taps)?;
        Ok(Product { rank: up.columns, up: up.values, down: down.values })
    }

    fn hadamard(&self) -> Result<Delta, Fault> {
        let side = |a: Role, b: Role, taps: Role| {
            let (a_block, b_block) = (self.block(a)?, self.block(b)?);
            if !self.has(taps) {
                return self.finish(a_block, b_block, a, b);
            }
            let taps_block = self.block(taps)?;
            self.agree(taps, taps_block.columns == b_block.rows && b_block.taps == 1 && a_block.taps == 1)?;
            self.finish(a_block.turned(), taps_block.spread(&b_block), a, b)
        };
        Ok(Delta::Hadamard(
            side(Role::HadaW1A, Role::HadaW1B, Role::HadaT1)?,
            side(Role::HadaW2A, Role::HadaW2B, Role::HadaT2)?,
        ))
    }

    fn kronecker(&self) -> Result<Delta, Fault> {
        let left = self.whole(Role::KronW1, Role::KronW1A, Role::KronW1B, None)?;
        let right = self.whole(Role::KronW2, Role::KronW2A, Role::KronW2B, Some(Role::KronT2))?;
        let (outputs, inputs) = (self.module.outputs(), self.module.inputs());
        let taps = self.module.kernel() * self.module.kernel();
        let role = if self.has(Role::KronW2) { Role::KronW2 } else { Role::KronW2B };
        self.agree(role, left.taps == 1 && left.rows * right.rows == outputs)?;
        self.agree(role, left.columns * right.columns * right.taps == inputs * taps)?;
        self.agree(role, left.columns > 0 && inputs.is_multiple_of(left.columns))?;
        Ok(Delta::Kronecker { left: left.values, shape: [left.rows, left.columns], right: right.values })
    }

    /// One side of LoKr: stored whole, or as a product.
    fn whole(&self, whole: Role, a: Role, b: Role, taps: Option<Role>) -> Result<Block, Fault> {
        match (self.has(whole), self.has(a) || self.has(b)) {
            (true, false) => self.block(whole),
            (true, true) => Err(Fault::Other(format!(
                "'{}' has one side of its product both whole and in factors",
                self.entry.name
            ))),
            (false, _) => {
                let (left, right) = (self.block(a)?, self.block(b)?);
                let Some(taps) = taps.filter(|&t| self.has(t)) else {
                    self.agree(a, left.columns == right.rows && left.taps == 1)?;
                    return Ok(left.times(&right));
                };
                let mid = self.block(taps)?;
                self.agree(taps, mid.columns == right.rows && mid.rows == left.rows)?;
                self.agree(taps, left.taps == 1 && right.taps == 1)?;
                Ok(left.turned().times(&mid.spread(&right)))
            }
        }
    }

    fn magnitude(&self) -> Result<Option<Magnitude>, Fault> {
        let Some(name) = self.entry.tensors.get(&Role::Magnitude) else { return Ok(None) };
        let values = self.values(Role::Magnitude)?;
        let shape = self.file.shape(self.entry, Role::Magnitude).unwrap_or_default();
        // LyCORIS writes `[1, inputs, 1, 1]` for lengths of inputs; PEFT a
        // convolution's outputs in that very form.
        let of_inputs = name.ends_with(".dora_scale") && shape.len() > 1 && shape[0] == 1;
        let wanted = if of_inputs { self.module.inputs() } else { self.module.outputs() };
        self.agree(Role::Magnitude, values.len() == wanted)?;
        Ok(Some(if of_inputs { Magnitude::Inputs(values) } else { Magnitude::Outputs(values) }))
    }

    /// A tensor of two dimensions and its taps.
    fn block(&self, role: Role) -> Result<Block, Fault> {
        let values = self.values(role)?;
        let shape = self.file.shape(self.entry, role).unwrap_or_default();
        let &[rows, columns, ref taps @ ..] = shape else {
            return Err(self.shape_fault(role, "a matrix or a kernel"));
        };
        if values.is_empty() {
            return Err(self.shape_fault(role, "a matrix with values"));
        }
        Ok(Block { rows, columns, taps: taps.iter().product(), values })
    }

    fn values(&self, role: Role) -> Result<Vec<f32>, Fault> {
        let Some(name) = self.entry.tensors.get(&role) else {
            let present: Vec<&String> = self.entry.tensors.values().collect();
            return Err(Fault::Other(format!("tensors without their partners: {}", some_of(&present))));
        };
        let shape = self.file.shape(self.entry, role).unwrap_or_default();
        let values =
            self.file.checkpoint.tensor(name, shape).map_err(|e| Fault::Other(e.to_string()))?.to_vec();
        // Without a way out in the middle a run takes a few instructions.
        let finite = |run: &[f32]| run.iter().fold(true, |all, v| all & v.is_finite());
        match values.chunks(1024).all(finite) {
            true => Ok(values),
            false => Err(Fault::Other(format!(
                "'{name}' holds values that are not finite: the training that made it has failed"
            ))),
        }
    }

    fn agree(&self, role: Role, agrees: bool) -> Result<(), Fault> {
        let m = self.module;
        let fits = || match m.kernel() {
            1 => format!("a layer of {} inputs and {} outputs", m.inputs(), m.outputs()),
            k => format!("a {k}x{k} convolution of {} channels to {}", m.inputs(), m.outputs()),
        };
        if agrees { Ok(()) } else { Err(self.shape_fault(role, &format!("what fits {}", fits()))) }
    }

    fn shape_fault(&self, role: Role, wanted: &str) -> Fault {
        let name = self.entry.tensors.get(&role).map_or("", String::as_str);
        let shape = self.file.shape(self.entry, role).unwrap_or_default();
        Fault::Shape(format!("'{name}' has shape {shape:?}, which is not {wanted}"))
    }
}
