//! One module's tensors as a change of it. Every size is compared with the
//! module's before a value is read, for a small file can describe a huge
//! product. Then comes the mathematics of each kind of adapter, in PyTorch's
//! order of dimensions:
//!
//! * LoRA: `up * down`; with taps apart `up * (mid * down)`;
//! * LoHa: `(w1_a * w1_b) o (w2_a * w2_b)`, element by element;
//! * LoKr: `w1 (x) w2`, Kronecker's product;
//! * GLoRA: `W * (a1 * a2) + b1 * b2`, where `W` are the loaded weights;
//! * differences of weights, biases and normalisations as they are;
//! * DoRA: any of them with lengths that the result is brought to.

use hypergen_tensor::{Change, Delta, Lengths, Magnitude, Module, Product};

use super::bind::Target;
use super::file::{Entry, LoraFile};
use super::names::Role;
use super::{clipped, some_of};

/// Why a module's tensors make no change.
pub(super) enum Fault {
    /// They are not of the module's shape.
    Shape(String),
    Other(String),
}

/// What a module's tensors add up to.
pub(super) struct Read {
    pub(super) matrix: Option<Change>,
    /// Added to a normalisation's scale.
    pub(super) weight: Option<Vec<f32>>,
    /// Added to the bias.
    pub(super) bias: Option<Vec<f32>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Lora,
    Hadamard,
    Kronecker,
    Glora,
    Difference,
}

/// Each kind with the tensors of which one tells it, and those that may stand
/// beside them. Alpha, lengths and a bias's difference may stand beside any.
const KINDS: &[(Kind, &[Role], &[Role])] = &[
    (Kind::Lora, &[Role::Down, Role::Up], &[Role::Mid, Role::UpBias]),
    (
        Kind::Hadamard,
        &[Role::HadaW1A, Role::HadaW1B, Role::HadaW2A, Role::HadaW2B],
        &[Role::HadaT1, Role::HadaT2],
    ),
    (
        Kind::Kronecker,
        &[Role::KronW1, Role::KronW1A, Role::KronW1B, Role::KronW2, Role::KronW2A, Role::KronW2B],
        &[Role::KronT2],
    ),
    (Kind::Glora, &[Role::GloraA1, Role::GloraA2, Role::GloraB1, Role::GloraB2], &[]),
    (Kind::Difference, &[Role::Diff], &[]),
];

/// Dimensions of a matrix or kernel: `[rows, columns, taps]`.
#[derive(Clone, Copy)]
struct Dims {
    rows: usize,
    columns: usize,
    taps: usize,
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

/// A left and a right factor, or, where they are larger than what they make, that.
enum Side {
    Factors(Product),
    Whole(Block),
}

impl Side {
    fn factors(up: Block, down: Block) -> Self {
        Self::Factors(Product { rank: up.columns, up: up.values, down: down.values })
    }

    /// `up * (taps * down)`. A rank beyond the outputs would make the right
    /// factor larger than the module itself, so that is multiplied out.
    fn tucker(up: Block, taps: &Block, down: &Block) -> Self {
        match up.columns <= up.rows {
            true => Self::factors(up, taps.spread(down)),
            false => Self::Whole(up.times(taps).spread(down)),
        }
    }

    /// Multiplied out, for a module of these outputs.
    fn whole(self, outputs: usize) -> Vec<f32> {
        match self {
            Self::Whole(block) => block.values,
            Self::Factors(p) => {
                let columns = p.down.len() / p.rank;
                let up = Block { rows: outputs, columns: p.rank, taps: 1, values: p.up };
                up.times(&Block { rows: p.rank, columns, taps: 1, values: p.down }).values
            }
        }
    }
}

impl LoraFile {
    /// A tensor's values, of any number type.
    fn numbers(&self, name: &str) -> Result<Vec<f32>, Fault> {
        let values = self.checkpoint.stored(name).map_err(|e| Fault::Other(e.to_string()))?.to_vec();
        // Without a way out in the middle a run takes a few instructions.
        let finite = |run: &[f32]| run.iter().fold(true, |all, v| all & v.is_finite());
        match values.chunks(1024).all(finite) {
            true => Ok(values),
            false => Err(Fault::Other(format!(
                "'{}' holds values that are not finite: the training that made it has failed",
                clipped(name)
            ))),
        }
    }

    /// As [`LoraFile::numbers`], of what is no whole number by its nature: such
    /// a type means that values were packed in a way that is not known here.
    pub(super) fn floats(&self, name: &str) -> Result<Vec<f32>, Fault> {
        let dtype = self.checkpoint.get(name).and_then(|t| t.dtype());
        match dtype.filter(|dtype| dtype.is_integer()) {
            None => self.numbers(name),
            Some(dtype) => Err(Fault::Other(format!(
                "'{}' is stored as {}, and an adapter's weights are no whole numbers: save them as F16, BF16 or F32",
                clipped(name),
                dtype.name()
            ))),
        }
    }
}

/// Reads one module's tensors.
pub(super) struct Reader<'a> {
    file: &'a LoraFile,
    entry: &'a Entry,
    target: &'a Target,
}

impl<'a> Reader<'a> {
    /// A reader, once names and shapes fit; no value is read for that.
    pub(super) fn new(file: &'a LoraFile, entry: &'a Entry, target: &'a Target) -> Result<Self, Fault> {
        let reader = Self { file, entry, target };
        reader.check()?;
        Ok(reader)
    }

    pub(super) fn target(&self) -> &'a Target {
        self.target
    }

    /// All of it, for a request's scale.
    pub(super) fn read(&self, scale: f64) -> Result<Read, Fault> {
        let times = |role, scale: f64| -> Result<Option<Vec<f32>>, Fault> {
            let values = self.has(role).then(|| self.values(role)).transpose()?;
            Ok(values.map(|v| v.iter().map(|v| (scale * f64::from(*v)) as f32).collect()))
        };
        let matrix = match (&self.target.matrix, self.kind()?) {
            (Some(module), Some(kind)) => Some(self.change(module, kind, scale)?),
            _ => None,
        };
        let weight = match self.target.matrix {
            Some(_) => None,
            None => times(Role::NormWeight, scale)?.or(times(Role::Diff, scale)?),
        };
        let mut bias = times(Role::NormBias, scale)?.or(times(Role::DiffBias, scale)?);
        if let Some(more) = times(Role::UpBias, scale * self.strength()?)? {
            let mut sum = bias.unwrap_or_else(|| vec![0.0; more.len()]);
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            bias = Some(sum);
        }
        Ok(Read { matrix, weight, bias })
    }

    fn change(&self, module: &Module, kind: Kind, scale: f64) -> Result<Change, Fault> {
        let delta = match kind {
            Kind::Lora => self.product()?,
            Kind::Hadamard => self.hadamard(module)?,
            Kind::Kronecker => self.kronecker()?,
            Kind::Glora => self.glora(module)?,
            Kind::Difference => Delta::Full(self.values(Role::Diff)?),
        };
        let own = self.strength()?;
        let Some(role) = self.magnitude_role() else {
            return Ok(Change { delta, scale: (scale * own) as f32, magnitude: None });
        };
        let values = self.values(role)?;
        let lengths = if self.of_inputs(role) { Lengths::Inputs(values) } else { Lengths::Outputs(values) };
        // LyCORIS scales what the finished adapter does to the weight; PEFT
        // scales the product, and lengthens its sum with the weight.
        let (inside, outside) = if role == Role::DoraScale { (own, scale) } else { (scale * own, 1.0) };
        let magnitude = Some(Magnitude { lengths, strength: outside as f32 });
        Ok(Change { delta, scale: inside as f32, magnitude })
    }

    fn has(&self, role: Role) -> bool {
        self.entry.tensors.contains_key(&role)
    }

    /// Names and shapes.
    fn check(&self) -> Result<(), Fault> {
        let kind = self.kind()?;
        if self.has(Role::Alpha) {
            self.agree(Role::Alpha, self.count(Role::Alpha) == Some(1), "one number")?;
        }
        for role in [Role::DiffBias, Role::NormBias, Role::UpBias] {
            self.check_vector(role, self.target.bias.as_ref().map(|v| v.len()), "a bias")?;
        }
        let Some(module) = &self.target.matrix else {
            let scale = self.target.weight.as_ref().map(|v| v.len());
            return [Role::Diff, Role::NormWeight]
                .into_iter()
                .try_for_each(|role| self.check_vector(role, scale, "a scale"));
        };
        let size = Size::of(module);
        match kind {
            None => Ok(()),
            Some(Kind::Lora) => self.check_product(&size),
            Some(Kind::Hadamard) => self
                .check_side(&size, [Role::HadaW1A, Role::HadaW1B], Role::HadaT1)
                .and_then(|()| self.check_side(&size, [Role::HadaW2A, Role::HadaW2B], Role::HadaT2)),
            Some(Kind::Kronecker) => self.check_kronecker(&size),
            Some(Kind::Glora) => self.glora_rank(module).map(|_| ()),
            Some(Kind::Difference) => {
                let d = self.dims(Role::Diff)?;
                self.fits(Role::Diff, d.rows == size.outputs && d.row_is(size.inputs, size.taps))
            }
        }?;
        self.check_magnitude(&size)
    }

    /// The one kind of adapter that the tensors make, or none: a bias alone.
    fn kind(&self) -> Result<Option<Kind>, Fault> {
        let named = |role: &Role| self.entry.tensors.get(role);
        let present: Vec<_> = KINDS.iter().filter(|(_, own, _)| own.iter().any(|r| self.has(*r))).collect();
        let norm = [Role::NormWeight, Role::NormBias];
        if self.target.matrix.is_none() {
            let plain = |r: &Role| norm.contains(r) || [Role::Diff, Role::DiffBias, Role::Alpha].contains(r);
            let strange: Vec<&String> =
                self.entry.tensors.iter().filter(|(r, _)| !plain(r)).map(|(_, n)| n).collect();
            let twice = |a, b| self.has(a) && self.has(b);
            if !strange.is_empty()
                || twice(Role::Diff, Role::NormWeight)
                || twice(Role::DiffBias, Role::NormBias)
                || self.entry.tensors.keys().all(|r| *r == Role::Alpha)
            {
                return Err(self
                    .no_kind("a normalisation changes by one difference of its scale and one of its bias"));
            }
            return Ok(None);
        }
        if let Some(name) = norm.iter().find_map(named) {
            let what = self.target.name();
            return Err(Fault::Other(format!(
                "'{}' is for a normalisation, and {} is none",
                clipped(name),
                clipped(what)
            )));
        }
        let (kind, own, beside) = match present.as_slice() {
            [one] => (Some(one.0), one.1, one.2),
            [] if self.has(Role::DiffBias) => (None, &[][..], &[][..]),
            _ => return Err(self.no_kind("there have to be the tensors of one kind, and of no other")),
        };
        let any = [Role::Alpha, Role::DiffBias];
        let lengths = [Role::DoraScale, Role::Magnitude];
        let known = |r: &Role| {
            own.contains(r)
                || beside.contains(r)
                || any.contains(r)
                || (kind.is_some() && lengths.contains(r))
        };
        let mut strange: Vec<&String> =
            self.entry.tensors.iter().filter(|(r, _)| !known(r)).map(|(_, n)| n).collect();
        if lengths.iter().all(|r| self.has(*r)) {
            strange.extend(lengths.iter().filter_map(named));
        }
        match strange.is_empty() {
            true => Ok(kind),
            false => Err(self.without_partners(&strange)),
        }
    }

    fn no_kind(&self, wanted: &str) -> Fault {
        let names: Vec<&String> = self.entry.tensors.values().collect();
        Fault::Other(format!(
            "'{}' is no adapter of one kind: it has {}; {wanted}",
            clipped(&self.entry.name),
            some_of(&names)
        ))
    }

    fn without_partners(&self, names: &[&String]) -> Fault {
        Fault::Other(format!("tensors without their partners: {}", some_of(names)))
    }

    /// A difference of a vector that has `len` values, if it is there at all.
    fn check_vector(&self, role: Role, len: Option<usize>, what: &str) -> Result<(), Fault> {
        let Some(name) = self.entry.tensors.get(&role) else { return Ok(()) };
        let Some(len) = len else {
            let module = clipped(self.target.name());
            return Err(Fault::Other(format!("'{}' changes {what}, and {module} has none", clipped(name))));
        };
        let longest = self.shape(role).iter().copied().max();
        let fits = self.count(role) == Some(len) && longest == Some(len);
        self.agree(role, fits, &format!("the {len} values of {}", clipped(self.target.name())))
    }

    /// Alpha over rank; by the tensor, else by the settings, else 1.
    fn strength(&self) -> Result<f64, Fault> {
        // What is stored as a difference has no rank, and is taken as it is.
        if self.has(Role::Diff) || self.kind()?.is_none() {
            return Ok(1.0);
        }
        let rank = match (&self.target.matrix, self.has(Role::GloraA1)) {
            (Some(module), true) => Some(self.glora_rank(module)?.0),
            _ => self.file.rank(self.entry),
        };
        if !self.has(Role::Alpha) {
            return Ok(self.file.configured_scale(self.entry, rank));
        }
        let alpha = self.values(Role::Alpha)?.first().copied().unwrap_or(1.0);
        // LoKr with both sides whole has no rank to divide by, and its trainers
        // then take no notice of alpha.
        Ok(rank.map_or(1.0, |rank| f64::from(alpha) / rank as f64))
    }

    fn check_product(&self, size: &Size) -> Result<(), Fault> {
        let (up, down) = (self.dims(Role::Up)?, self.dims(Role::Down)?);
        self.fits(Role::Up, up.rows == size.outputs && up.taps == 1)?;
        if !self.has(Role::Mid) {
            self.fits(Role::Up, up.columns == down.rows)?;
            // Kernels may be stored flat.
            return self.fits(Role::Down, down.row_is(size.inputs, size.taps));
        }
        let mid = self.dims(Role::Mid)?;
        self.fits(Role::Down, down.columns == size.inputs && down.taps == 1)?;
        self.fits(Role::Mid, mid.rows == up.columns && mid.columns == down.rows && mid.taps == size.taps)
    }

    fn product(&self) -> Result<Delta, Fault> {
        let (up, down) = (self.block(Role::Up)?, self.block(Role::Down)?);
        let side = match self.has(Role::Mid) {
            true => Side::tucker(up, &self.block(Role::Mid)?, &down),
            false => Side::factors(up, down),
        };
        Ok(match side {
            Side::Factors(product) => Delta::Product(product),
            Side::Whole(block) => Delta::Full(block.values),
        })
    }

    fn check_side(&self, size: &Size, [a, b]: [Role; 2], taps: Role) -> Result<(), Fault> {
        let (left, right) = (self.dims(a)?, self.dims(b)?);
        if !self.has(taps) {
            self.fits(a, left.rows == size.outputs && left.taps == 1)?;
            self.fits(a, left.columns == right.rows)?;
            return self.fits(b, right.row_is(size.inputs, size.taps));
        }
        self.check_tucker(a, b, taps, [size.outputs, size.inputs, size.taps])
    }

    /// LyCORIS's product with taps apart: `a` is `[rank, outputs]`.
    fn check_tucker(
        &self,
        a: Role,
        b: Role,
        taps: Role,
        [outputs, inputs, count]: [usize; 3],
    ) -> Result<(), Fault> {
        let (left, right, mid) = (self.dims(a)?, self.dims(b)?, self.dims(taps)?);
        self.fits(a, left.columns == outputs && left.taps == 1)?;
        self.fits(b, right.columns == inputs && right.taps == 1)?;
        self.fits(taps, mid.rows == left.rows && mid.columns == right.rows && mid.taps == count)
    }

    fn hadamard(&self, module: &Module) -> Result<Delta, Fault> {
        let side = |a: Role, b: Role, taps: Role| -> Result<Side, Fault> {
            let (a, b) = (self.block(a)?, self.block(b)?);
            Ok(match self.has(taps) {
                true => Side::tucker(a.turned(), &self.block(taps)?, &b),
                false => Side::factors(a, b),
            })
        };
        let first = side(Role::HadaW1A, Role::HadaW1B, Role::HadaT1)?;
        let second = side(Role::HadaW2A, Role::HadaW2B, Role::HadaT2)?;
        if let (Side::Factors(p), Side::Factors(q)) = (&first, &second) {
            return Ok(Delta::Hadamard(p.clone(), q.clone()));
        }
        let (mut values, other) = (first.whole(module.outputs()), second.whole(module.outputs()));
        values.iter_mut().zip(other).for_each(|(v, o)| *v *= o);
        Ok(Delta::Full(values))
    }

    fn check_kronecker(&self, size: &Size) -> Result<(), Fault> {
        let [left, right] = [Role::KronW1, Role::KronW2].map(|whole| self.has(whole));
        let [left_factors, right_factors] = [[Role::KronW1A, Role::KronW1B], [Role::KronW2A, Role::KronW2B]]
            .map(|f| f.iter().any(|r| self.has(*r)));
        if (left && left_factors) || (right && (right_factors || self.has(Role::KronT2))) {
            return Err(Fault::Other(format!(
                "'{}' has one side of its product both whole and in factors",
                clipped(&self.entry.name)
            )));
        }
        // The left side first: it says how large the right one has to be.
        let divides = |part: usize, whole: usize| whole.is_multiple_of(part);
        let (rows, columns) = if left {
            let w1 = self.dims(Role::KronW1)?;
            let fits = divides(w1.rows, size.outputs) && divides(w1.columns, size.inputs) && w1.taps == 1;
            self.fits(Role::KronW1, fits)?;
            (w1.rows, w1.columns)
        } else {
            let (a, b) = (self.dims(Role::KronW1A)?, self.dims(Role::KronW1B)?);
            self.fits(Role::KronW1A, divides(a.rows, size.outputs) && a.taps == 1)?;
            self.fits(Role::KronW1B, divides(b.columns, size.inputs) && b.taps == 1)?;
            self.fits(Role::KronW1B, a.columns == b.rows)?;
            (a.rows, b.columns)
        };
        let (height, width) = (size.outputs / rows, size.inputs / columns);
        if right {
            let w2 = self.dims(Role::KronW2)?;
            return self.fits(Role::KronW2, w2.rows == height && w2.row_is(width, size.taps));
        }
        if self.has(Role::KronT2) {
            return self.check_tucker(Role::KronW2A, Role::KronW2B, Role::KronT2, [height, width, size.taps]);
        }
        let (a, b) = (self.dims(Role::KronW2A)?, self.dims(Role::KronW2B)?);
        self.fits(Role::KronW2A, a.rows == height && a.taps == 1 && a.columns == b.rows)?;
        self.fits(Role::KronW2B, b.row_is(width, size.taps))
    }

    fn kronecker(&self) -> Result<Delta, Fault> {
        let left = match self.has(Role::KronW1) {
            true => self.block(Role::KronW1)?,
            false => self.block(Role::KronW1A)?.times(&self.block(Role::KronW1B)?),
        };
        let right = if self.has(Role::KronW2) {
            self.block(Role::KronW2)?.values
        } else {
            let (a, b) = (self.block(Role::KronW2A)?, self.block(Role::KronW2B)?);
            match self.has(Role::KronT2) {
                true => {
                    let height = a.columns;
                    Side::tucker(a.turned(), &self.block(Role::KronT2)?, &b).whole(height)
                }
                false => a.times(&b).values,
            }
        };
        Ok(Delta::Kronecker { left: left.values, shape: [left.rows, left.columns], right })
    }

    /// GLoRA's rank, and whether the file has LyCORIS's first order of the
    /// factors, `b2 * b1 + W * (a2 * a1)`, instead of today's `b1 * b2 + W *
    /// (a1 * a2)`. Where shapes do not tell, as in a matrix of rank and inputs
    /// alike, it is the first, as other readers take it.
    fn glora_rank(&self, module: &Module) -> Result<(usize, bool), Fault> {
        let size = Size::of(module);
        let roles = [Role::GloraA1, Role::GloraA2, Role::GloraB1, Role::GloraB2];
        let mut dims = [Dims { rows: 0, columns: 0, taps: 0 }; 4];
        for (dims, role) in dims.iter_mut().zip(roles) {
            *dims = self.dims(role)?;
        }
        // Left and right factor of either product, each with its role.
        let order = |first: bool| {
            let at = |i: usize| (roles[i], dims[i]);
            if first { [at(1), at(0), at(3), at(2)] } else { [at(0), at(1), at(2), at(3)] }
        };
        let wrong = |first: bool| {
            let [a_left, a_right, b_left, b_right] = order(first);
            let rank = a_left.1.columns;
            let left = |d: Dims, rows: usize| d.rows == rows && d.columns == rank && d.taps == 1;
            let checks = [
                (a_left.0, left(a_left.1, size.inputs)),
                (
                    a_right.0,
                    a_right.1.rows == rank && a_right.1.columns == size.inputs && a_right.1.taps == 1,
                ),
                (b_left.0, left(b_left.1, size.outputs)),
                (b_right.0, b_right.1.rows == rank && b_right.1.row_is(size.inputs, size.taps)),
            ];
            checks.into_iter().find(|(_, fits)| !fits).map(|(role, _)| role)
        };
        match (wrong(true), wrong(false)) {
            (None, _) => Ok((dims[1].columns, true)),
            (Some(_), None) => Ok((dims[0].columns, false)),
            (Some(_), Some(role)) => Err(self.fits(role, false).err().unwrap_or_else(|| self.no_kind(""))),
        }
    }

    fn glora(&self, module: &Module) -> Result<Delta, Fault> {
        let (rank, first) = self.glora_rank(module)?;
        let product = |one: Role, two: Role| -> Result<Product, Fault> {
            let (left, right) = if first { (two, one) } else { (one, two) };
            Ok(Product { up: self.values(left)?, down: self.values(right)?, rank })
        };
        Ok(Delta::Glora {
            through: product(Role::GloraA1, Role::GloraA2)?,
            plus: product(Role::GloraB1, Role::GloraB2)?,
        })
    }

    fn magnitude_role(&self) -> Option<Role> {
        [Role::DoraScale, Role::Magnitude].into_iter().find(|r| self.has(*r))
    }

    /// LyCORIS writes `[1, inputs, 1, 1]` for lengths of inputs; PEFT a
    /// convolution's outputs in that very form.
    fn of_inputs(&self, role: Role) -> bool {
        let shape = self.shape(role);
        role == Role::DoraScale && shape.len() > 1 && shape.first() == Some(&1)
    }

    fn check_magnitude(&self, size: &Size) -> Result<(), Fault> {
        let Some(role) = self.magnitude_role() else { return Ok(()) };
        let wanted = if self.of_inputs(role) { size.inputs } else { size.outputs };
        let longest = self.shape(role).iter().copied().max();
        self.fits(role, self.count(role) == Some(wanted) && longest == Some(wanted))
    }

    fn shape(&self, role: Role) -> &[usize] {
        self.file.shape(self.entry, role).unwrap_or_default()
    }

    /// How many values a tensor has.
    fn count(&self, role: Role) -> Option<usize> {
        self.shape(role).iter().try_fold(1_usize, |all, d| all.checked_mul(*d))
    }

    /// Dimensions of a tensor of two and its taps.
    fn dims(&self, role: Role) -> Result<Dims, Fault> {
        if !self.has(role) {
            let present: Vec<&String> = self.entry.tensors.values().collect();
            return Err(self.without_partners(&present));
        }
        let &[rows, columns, ref taps @ ..] = self.shape(role) else {
            return Err(self.shape_fault(role, "a matrix or a kernel"));
        };
        match (self.count(role), taps.iter().try_fold(1_usize, |all, d| all.checked_mul(*d))) {
            (Some(1..), Some(taps)) => Ok(Dims { rows, columns, taps }),
            _ => Err(self.shape_fault(role, "a matrix with values")),
        }
    }

    fn block(&self, role: Role) -> Result<Block, Fault> {
        let Dims { rows, columns, taps } = self.dims(role)?;
        Ok(Block { rows, columns, taps, values: self.values(role)? })
    }

    fn values(&self, role: Role) -> Result<Vec<f32>, Fault> {
        let name = self.entry.tensors.get(&role).map_or("", String::as_str);
        match role {
            Role::Alpha => self.file.numbers(name),
            _ => self.file.floats(name),
        }
    }

    fn agree(&self, role: Role, agrees: bool, wanted: &str) -> Result<(), Fault> {
        if agrees { Ok(()) } else { Err(self.shape_fault(role, wanted)) }
    }

    fn fits(&self, role: Role, fits: bool) -> Result<(), Fault> {
        if fits {
            return Ok(());
        }
        let layer = self.target.matrix.as_ref().map(|m| match m.kernel() {
            1 => format!("a layer of {} inputs and {} outputs", m.inputs(), m.outputs()),
            k => format!("a {k}x{k} convolution of {} channels to {}", m.inputs(), m.outputs()),
        });
        Err(self.shape_fault(role, &format!("what fits {}", layer.unwrap_or_default())))
    }

    fn shape_fault(&self, role: Role, wanted: &str) -> Fault {
        let name = self.entry.tensors.get(&role).map_or("", String::as_str);
        let shape = self.shape(role);
        // A header may list any number of dimensions; PyTorch's own limit is 64.
        let shown = match shape.len() {
            0..=8 => format!("{shape:?}"),
            n => format!("of {n} dimensions"),
        };
        Fault::Shape(format!("'{}' has shape {shown}, which is not {wanted}", clipped(name)))
    }
}

impl Dims {
    /// Whether a row holds `inputs` channels with their taps, as a kernel or flat.
    fn row_is(self, inputs: usize, taps: usize) -> bool {
        self.columns.checked_mul(self.taps) == Some(inputs * taps)
    }
}

/// What a module's changes have to be like.
struct Size {
    outputs: usize,
    inputs: usize,
    taps: usize,
}

impl Size {
    fn of(module: &Module) -> Self {
        let taps = module.kernel() * module.kernel();
        Self { outputs: module.outputs(), inputs: module.inputs(), taps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(rows: usize, columns: usize, taps: usize) -> Block {
        let values = (0..rows * columns * taps).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        Block { rows, columns, taps, values }
    }

    /// Whole numbers, so that the order of sums makes no difference.
    #[test]
    fn taps_apart_are_the_same_product_in_either_order() {
        for (outputs, rank) in [(4, 2), (4, 4), (4, 9)] {
            let (up, taps, down) = (block(outputs, rank, 1), block(rank, 3, 4), block(3, 5, 1));
            let want = up.times(&taps.spread(&down)).values;
            let side = Side::tucker(up, &taps, &down);
            assert_eq!(matches!(side, Side::Whole(_)), rank > outputs, "what is held is the smaller one");
            assert_eq!(side.whole(outputs), want, "rank {rank}");
        }
    }
}
