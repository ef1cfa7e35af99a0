//! Weights on disk: safetensors, one file, several by an index, or bytes in
//! the binary. Files are memory-mapped and nothing is copied before a tensor
//! is packed. Pickles are not read, here or anywhere.

mod numbers;
mod refused;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, UncheckedAdvice};
use safetensors::SafeTensors;
use thiserror::Error;

pub use numbers::FileDType;
use numbers::widen;
use refused::{MAX_HEADER, explain, file_size, foreign};

/// Why a checkpoint cannot be read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not a safetensors file, or a damaged one.
    #[error("{path} is not a usable safetensors file: {reason}")]
    Format {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An index of shards that makes no sense.
    #[error("{path} is not a usable index of weight files: {reason}")]
    Index {
        /// The index file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the model needs is not there.
    #[error("tensor '{name}' is missing in {path}{hint}")]
    Missing {
        /// Full name in the checkpoint.
        name: String,
        /// The file or folder.
        path: String,
        /// What else may help, or nothing.
        hint: String,
    },
    /// A tensor of another shape than the model's configuration says.
    #[error("tensor '{name}' in {path} has shape {found:?}, but the configuration asks for {expected:?}")]
    Shape {
        /// Full name in the checkpoint.
        name: String,
        /// The file.
        path: String,
        /// As the file has it.
        found: Vec<usize>,
        /// As the model needs it.
        expected: Vec<usize>,
    },
    /// A number type that weights do not come in.
    #[error("tensor '{name}' in {path} is stored as {found}; weights are read as F32, F16 or BF16")]
    Type {
        /// Full name in the checkpoint.
        name: String,
        /// The file.
        path: String,
        /// The type found.
        found: String,
    },
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// As PyTorch has it.
    pub shape: Vec<usize>,
    dtype: Result<FileDType, String>,
    source: usize,
    start: usize,
    end: usize,
    /// The file has rows and columns in each other's place.
    transposed: bool,
}

/// Which part of a stored tensor a name in a view stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// One of several blocks of rows of the same height.
    Rows {
        /// Which, from 0.
        index: usize,
        /// Of how many.
        of: usize,
    },
    /// All of a matrix, rows and columns exchanged.
    Transposed,
}

/// One tensor of a view: another name for (a part of) a stored one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renamed {
    /// The name in the view.
    pub to: String,
    /// The name in the file.
    pub from: String,
    /// What of it.
    pub part: Part,
}

impl TensorInfo {
    /// The number type, where it is one that is read.
    pub fn dtype(&self) -> Option<FileDType> {
        self.dtype.as_ref().ok().copied()
    }

    /// Stored size.
    pub fn bytes(&self) -> u64 {
        (self.end - self.start) as u64
    }
}

enum Bytes {
    Mapped(Mmap),
    Read(MmapMut),
    Static(&'static [u8]),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
            Self::Static(bytes) => bytes,
        }
    }
}

/// A file or static bytes, and what they are called.
struct Stored {
    label: String,
    bytes: Bytes,
}

/// The tensors of one model part, by name. Clones and views share the bytes.
#[derive(Clone)]
pub struct Checkpoint {
    /// Has every tensor that is asked for, of random values.
    random: bool,
    label: String,
    sources: Vec<Arc<Stored>>,
    tensors: HashMap<String, TensorInfo>,
    metadata: HashMap<String, String>,
}

/// More tensors than this in one file is not a model but an attack.
const MAX_TENSORS: usize = 1_000_000;

impl Checkpoint {
    /// Maps one safetensors file.
    ///
    /// # Errors
    /// When it cannot be read or its header does not fit its contents.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_as(path, &path.display().to_string())
    }

    /// Maps one safetensors file that messages call `label`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_as(path: &Path, label: &str) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self::empty(label.to_owned());
        checkpoint.add_file(path, label.to_owned())?;
        Ok(checkpoint)
    }

    /// Reads one safetensors file of at most `limit` bytes into memory, so that
    /// whatever happens to the file later does no harm. Messages call it `label`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and when the file is larger.
    pub fn read(path: &Path, label: &str, limit: u64) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: label.to_owned(), source };
        let wrong = |reason: String| CheckpointError::Format { path: label.to_owned(), reason };
        file_size(path, label)?;
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        if size > limit {
            return Err(wrong(format!("its {size} bytes are more than the {limit} allowed")));
        }
        let len = usize::try_from(size).map_err(|e| wrong(e.to_string()))?;
        let mut bytes = MmapMut::map_anon(len).map_err(io)?;
        // A hint: fresh memory arrives much faster in huge pages.
        #[cfg(target_os = "linux")]
        let _ = bytes.advise(memmap2::Advice::HugePage);
        file.read_exact(&mut bytes).map_err(io)?;
        let mut checkpoint = Self::empty(label.to_owned());
        checkpoint.add(label.to_owned(), Bytes::Read(bytes))?;
        Ok(checkpoint)
    }

    /// Maps all files that a `*.safetensors.index.json` names. They lie
    /// beside the index; a name that points anywhere else is refused.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and when the index and the files disagree.
    pub fn open_index(path: &Path) -> Result<Self, CheckpointError> {
        let label = path.display().to_string();
        let wrong = |reason: String| CheckpointError::Index { path: label.clone(), reason };
        let size = file_size(path, &label)?;
        if size > MAX_HEADER {
            return Err(wrong(format!("it has {size} bytes, and no index has more than {MAX_HEADER}")));
        }
        let text =
            std::fs::read(path).map_err(|source| CheckpointError::Io { path: label.clone(), source })?;
        let json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        let map = json.get("weight_map").and_then(|m| m.as_object());
        let map = map.ok_or_else(|| wrong("it has no object 'weight_map'".into()))?;
        let mut checkpoint = Self::empty(label.clone());
        let mut files: Vec<&str> = vec![];
        for (tensor, file) in map {
            let file =
                file.as_str().ok_or_else(|| wrong(format!("'{tensor}' is not mapped to a file name")))?;
            files.push(file);
        }
        files.sort_unstable();
        files.dedup();
        if files.is_empty() {
            return Err(wrong("its 'weight_map' is empty".into()));
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        for file in files {
            let path = folder.join(beside(file).map_err(&wrong)?);
            if !path.exists() {
                return Err(wrong(format!("it names {file}, which is not there; is the download complete?")));
            }
            checkpoint.add_file(&path, path.display().to_string())?;
        }
        for (tensor, file) in map {
            let found = checkpoint.tensors.get(tensor);
            let is_there = found.is_some_and(|t| {
                file.as_str().is_some_and(|f| Path::new(&checkpoint.sources[t.source].label).ends_with(f))
            });
            if !is_there {
                return Err(wrong(format!("it says that {file} holds '{tensor}', which is not so")));
            }
        }
        Ok(checkpoint)
    }

    /// Reads a safetensors file that is part of the binary.
    ///
    /// # Errors
    /// When its header does not fit its contents.
    pub fn from_static(label: &str, bytes: &'static [u8]) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self::empty(label.to_owned());
        checkpoint.add(label.to_owned(), Bytes::Static(bytes))?;
        Ok(checkpoint)
    }

    /// A checkpoint without a file: whatever tensor is asked for is there, in
    /// the shape asked for, with random weights of the usual size. For
    /// measurements, which need a model's shapes but not its pictures.
    pub fn random(label: &str) -> Self {
        Self { random: true, ..Self::empty(label.to_owned()) }
    }

    fn empty(label: String) -> Self {
        Self { random: false, label, sources: vec![], tensors: HashMap::new(), metadata: HashMap::new() }
    }

    fn add_file(&mut self, path: &Path, label: String) -> Result<(), CheckpointError> {
        let io = |source| CheckpointError::Io { path: label.clone(), source };
        file_size(path, &label)?;
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is read-only and private. Should another process
        // shorten the file meanwhile, reads beyond its end raise SIGBUS; that
        // is the known price of mapping, and every reader of weights pays it.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        self.add(label, Bytes::Mapped(map))
    }

    fn add(&mut self, label: String, bytes: Bytes) -> Result<(), CheckpointError> {
        let wrong = |reason: String| CheckpointError::Format { path: label.clone(), reason };
        let data = bytes.as_slice();
        let declared = data.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        // A longer one than the file is told of below.
        if declared > MAX_HEADER && declared <= data.len() as u64 {
            return Err(wrong(format!(
                "its header has {declared} bytes, and no model's has more than {MAX_HEADER}"
            )));
        }
        let (header, metadata) = SafeTensors::read_metadata(data)
            .map_err(|e| wrong(foreign(data).unwrap_or_else(|| explain(&e, data.len()))))?;
        // The crate checks offsets against each other; the end of the file is for us to check.
        let begin = header + 8;
        let tensors = metadata.tensors();
        if tensors.len() > MAX_TENSORS {
            return Err(wrong(format!("it lists {} tensors", tensors.len())));
        }
        let source = self.sources.len();
        for (name, info) in tensors {
            let (start, end) = info.data_offsets;
            if begin.checked_add(end).is_none_or(|end| end > data.len()) {
                return Err(wrong(format!(
                    "it is truncated: '{name}' ends at byte {}, but the file has {} bytes; download it again",
                    begin.saturating_add(end),
                    data.len()
                )));
            }
            let dtype = FileDType::of(info.dtype);
            let info = TensorInfo {
                shape: info.shape.clone(),
                dtype,
                source,
                start: begin + start,
                end: begin + end,
                transposed: false,
            };
            if let Some(other) = self.tensors.insert(name.clone(), info) {
                return Err(wrong(format!("'{name}' is also in {}", self.sources[other.source].label)));
            }
        }
        self.metadata.extend(metadata.metadata().clone().unwrap_or_default());
        self.sources.push(Arc::new(Stored { label, bytes }));
        Ok(())
    }

    /// The same bytes under other names: the tensors that `names` lists and no
    /// others. Nothing is read or copied.
    ///
    /// # Errors
    /// When a tensor is not there, or is not of a shape that has such a part.
    pub fn view(&self, label: String, names: &[Renamed]) -> Result<Self, CheckpointError> {
        let mut view = Self { sources: self.sources.clone(), ..Self::empty(label) };
        for Renamed { to, from, part } in names {
            let info = self.tensors.get(from).ok_or_else(|| self.missing(from))?;
            let wrong = |reason: String| CheckpointError::Format {
                path: self.sources[info.source].label.clone(),
                reason: format!("its tensor '{from}' of shape {:?} {reason}", info.shape),
            };
            let mut info = info.clone();
            match *part {
                Part::Whole => {}
                Part::Rows { index, of } => {
                    let Some(rows) = info.shape.first_mut().filter(|rows| **rows % of == 0) else {
                        return Err(wrong(format!("cannot be cut into {of} blocks of rows")));
                    };
                    *rows /= of;
                    let len = (info.end - info.start) / of;
                    info.start += index * len;
                    info.end = info.start + len;
                }
                Part::Transposed => {
                    if info.shape.len() != 2 {
                        return Err(wrong("is not a matrix".into()));
                    }
                    info.shape.reverse();
                    info.transposed = !info.transposed;
                }
            }
            view.tensors.insert(to.clone(), info);
        }
        Ok(view)
    }

    /// What the file says of itself beside its tensors.
    pub fn metadata(&self, field: &str) -> Option<&str> {
        self.metadata.get(field).map(String::as_str)
    }

    fn missing(&self, name: &str) -> CheckpointError {
        CheckpointError::Missing { name: name.to_owned(), path: self.label.clone(), hint: String::new() }
    }

    /// What the checkpoint is called in messages: its file or index.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// All tensor names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor's shape and place, if it is there.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Bytes of all tensors, as stored.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(TensorInfo::bytes).sum()
    }

    /// Values of all tensors.
    pub fn elements(&self) -> u64 {
        self.tensors.values().map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }

    /// The tensor's stored values, checked against the shape that the model
    /// needs. Dimensions of size 1 at the end may be missing or added (a 1x1
    /// convolution is a linear layer).
    ///
    /// # Errors
    /// When it is missing, of another shape, or of a type that weights have not.
    pub fn tensor(&self, name: &str, expected: &[usize]) -> Result<Values<'_>, CheckpointError> {
        if self.random {
            return Ok(Values(Source::Random(Random::new(name, expected))));
        }
        let info = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let path = &self.sources[info.source].label;
        if trimmed(&info.shape) != trimmed(expected) {
            return Err(CheckpointError::Shape {
                name: name.to_owned(),
                path: path.clone(),
                found: info.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        match &info.dtype {
            Ok(dtype) if !dtype.is_of_weights() => Err(self.type_error(name, dtype.name())),
            _ => self.stored(name),
        }
    }

    /// A tensor's values in the shape that it has, of any number type.
    ///
    /// # Errors
    /// When it is missing, or of a type that is not read at all.
    pub fn stored(&self, name: &str) -> Result<Values<'_>, CheckpointError> {
        let info = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        Ok(Values(Source::Stored {
            bytes: &self.sources[info.source].bytes.as_slice()[info.start..info.end],
            dtype: info.dtype.clone().map_err(|found| self.type_error(name, &found))?,
            columns: info.transposed.then(|| info.shape[0]),
        }))
    }

    fn type_error(&self, name: &str, found: &str) -> CheckpointError {
        let path = match self.tensors.get(name) {
            Some(info) => self.sources[info.source].label.clone(),
            None => self.label.clone(),
        };
        CheckpointError::Type { name: name.to_owned(), path, found: found.to_owned() }
    }

    /// Tells the system that a tensor's pages are not needed again: while a
    /// model loads, the file's pages would otherwise count as memory in use.
    pub(crate) fn release(&self, name: &str) {
        const PAGE: usize = 4096;
        let Some(info) = self.tensors.get(name) else { return };
        let Bytes::Mapped(map) = &self.sources[info.source].bytes else { return };
        let (start, end) = (info.start.next_multiple_of(PAGE), info.end / PAGE * PAGE);
        if start < end {
            // SAFETY: the mapping is of a file and read-only, so a dropped page
            // is read from the file again when it is touched. Failure is
            // harmless: the pages stay.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}

/// Values as they are stored.
#[derive(Clone, Copy)]
pub struct Values<'a>(Source<'a>);

#[derive(Clone, Copy)]
enum Source<'a> {
    /// `columns`: of the stored matrix, where it is to be read transposed.
    Stored {
        bytes: &'a [u8],
        dtype: FileDType,
        columns: Option<usize>,
    },
    Random(Random),
}

impl Values<'_> {
    /// Number of values.
    pub fn len(self) -> usize {
        match self.0 {
            Source::Stored { bytes, dtype, .. } => bytes.len() / dtype.size(),
            Source::Random(random) => random.len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Writes values `start ..` as float32 into all of `out`.
    ///
    /// # Panics
    /// When that reaches beyond the end.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        match self.0 {
            Source::Stored { bytes, dtype, columns: None } => {
                let size = dtype.size();
                widen(&bytes[start * size..][..out.len() * size], dtype, out);
            }
            Source::Stored { bytes, dtype, columns: Some(columns) } => {
                let (size, rows) = (dtype.size(), self.len() / columns);
                for (i, out) in (start..).zip(out) {
                    let stored = i % rows * columns + i / rows;
                    widen(&bytes[stored * size..][..size], dtype, std::slice::from_mut(out));
                }
            }
            Source::Random(random) => random.read(start, out),
        }
    }

    /// All values as float32.
    pub fn to_vec(self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.read(0, &mut out);
        out
    }
}

/// Random weights: matrices keep the variance of what goes through them,
/// scales are 1 and shifts 0.
#[derive(Clone, Copy)]
struct Random {
    seed: u64,
    len: usize,
    mean: f32,
    /// Values lie within this of the mean.
    spread: f32,
}

impl Random {
    fn new(name: &str, shape: &[usize]) -> Self {
        let fan_in: usize = shape.iter().skip(1).product();
        let seed = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let is_vector = shape.len() == 1;
        Self {
            seed,
            len: shape.iter().product(),
            mean: if is_vector && name.ends_with("weight") { 1.0 } else { 0.0 },
            spread: if is_vector { 0.0 } else { (3.0 / fan_in as f32).sqrt() },
        }
    }

    fn read(&self, start: usize, out: &mut [f32]) {
        for (i, out) in (start as u64..).zip(out) {
            let mut x = (self.seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            *out = self.mean + self.spread * ((x >> 40) as f32 / (1 << 23) as f32 - 1.0);
        }
    }
}

fn trimmed(shape: &[usize]) -> &[usize] {
    let ones = shape.iter().rev().take_while(|&&d| d == 1).count();
    &shape[..shape.len() - ones]
}

/// A shard's file name, if it is just that.
fn beside(file: &str) -> Result<PathBuf, String> {
    let path = Path::new(file);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(_)), None) if file.ends_with(".safetensors") => Ok(path.to_owned()),
        _ => Err(format!("'{file}' is not the name of a safetensors file beside the index")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A file with this header, an object of JSON, and this many bytes after it.
    fn file(header: &str, data: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::Builder::new().suffix(".safetensors").tempfile().expect("a temporary file");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        file.write_all(&bytes).expect("written");
        file
    }

    fn error(file: &tempfile::NamedTempFile) -> String {
        match Checkpoint::open(file.path()) {
            Ok(_) => panic!("a damaged file was read"),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn every_damage_has_its_own_words() {
        let tensor = |dtype: &str, shape: &str, end: usize| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
        };
        let whole = tensor("F32", "[2,2]", 16);
        assert!(Checkpoint::open(file(&whole, 16).path()).is_ok());
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        for (header, data, words) in [
            (whole.as_str(), 15, "not as many as its header says"),
            (whole.as_str(), 17, "not as many as its header says"),
            (tensor("F32", "[2,3]", 16).as_str(), 16, "do not fit the bytes"),
            (tensor("F32", "[4611686018427387904,4]", 16).as_str(), 16, "absurdly large"),
            (tensor("X9", "[2,2]", 16).as_str(), 16, "header does not parse"),
            (tensor("F32", "[-1]", 16).as_str(), 16, "header does not parse"),
            (overlap, 12, "'b' makes no sense"),
            ("{", 0, "header does not parse"),
        ] {
            let message = error(&file(header, data));
            assert!(message.contains(words), "{header}: {message}");
        }
    }

    #[test]
    fn what_is_no_safetensors_file_is_named() {
        let mut pickle = tempfile::NamedTempFile::new().expect("a temporary file");
        pickle.write_all(b"\x80\x02}q\x00X\x05\xff\xff\xff and so on").expect("written");
        assert!(error(&pickle).contains("is a pickle"), "{}", error(&pickle));
        let empty = tempfile::NamedTempFile::new().expect("a temporary file");
        assert!(error(&empty).contains("empty"), "{}", error(&empty));
        let missing =
            Checkpoint::open(Path::new("/no/such/file.safetensors")).err().expect("an error").to_string();
        assert!(missing.contains("/no/such/file.safetensors"), "{missing}");
    }

    #[test]
    fn an_index_stays_in_its_folder() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let index = folder.path().join("model.safetensors.index.json");
        for (text, words) in [
            (r#"{"weight_map":{"w":"../secret.safetensors"}}"#, "beside the index"),
            (r#"{"weight_map":{"w":"/etc/passwd"}}"#, "beside the index"),
            (r#"{"weight_map":{"w":"model.safetensors.index.json"}}"#, "beside the index"),
            (r#"{"weight_map":{"w":7}}"#, "not mapped to a file name"),
            (r#"{"weight_map":{}}"#, "empty"),
            ("[]", "no object 'weight_map'"),
            ("{", "EOF"),
            (r#"{"weight_map":{"w":"gone.safetensors"}}"#, "gone.safetensors"),
        ] {
            std::fs::write(&index, text).expect("written");
            let message = Checkpoint::open_index(&index).err().expect("an error").to_string();
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    /// `a` is [[0, 1], [2, 3], [4, 5], [6, 7]] in float32.
    #[test]
    fn a_view_renames_cuts_and_turns_without_copying() {
        let header = r#"{"a":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]},"__metadata__":{"k":"v"}}"#;
        let file = file(header, 32);
        let numbers: Vec<u8> = (0..8u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let mut bytes = std::fs::read(file.path()).expect("the file");
        let data = bytes.len() - 32;
        bytes[data..].copy_from_slice(&numbers);
        std::fs::write(file.path(), bytes).expect("written");
        let whole = Checkpoint::open(file.path()).expect("a whole file");
        assert_eq!(whole.metadata("k"), Some("v"));
        let name = |to: &str, part| Renamed { to: to.into(), from: "a".into(), part };
        let names = [
            name("whole", Part::Whole),
            name("second", Part::Rows { index: 1, of: 2 }),
            name("turned", Part::Transposed),
        ];
        let view = whole.view("a view".into(), &names).expect("a view");
        let read = |name: &str, shape: &[usize]| view.tensor(name, shape).expect(name).to_vec();
        assert_eq!(read("whole", &[4, 2]), [0., 1., 2., 3., 4., 5., 6., 7.]);
        assert_eq!(read("second", &[2, 2]), [4., 5., 6., 7.]);
        assert_eq!(read("turned", &[2, 4]), [0., 2., 4., 6., 1., 3., 5., 7.]);
        let mut row = [0.0; 3];
        view.tensor("turned", &[2, 4]).expect("turned").read(3, &mut row);
        assert_eq!(row, [6., 1., 3.], "from the middle of a row on");
        assert!(view.get("a").is_none());
        for (from, part, words) in [
            ("a", Part::Rows { index: 0, of: 3 }, "'a' of shape [4, 2] cannot be cut into 3 blocks"),
            ("b", Part::Whole, "'b' is missing"),
        ] {
            let names = [Renamed { to: "x".into(), from: from.into(), part }];
            let error = whole.view("a view".into(), &names).err().expect("an error").to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn tensors_are_checked_when_they_are_asked_for() {
        let header = r#"{"w":{"dtype":"F16","shape":[2,2,1,1],"data_offsets":[0,8]},"i":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}"#;
        let file = file(header, 16);
        let checkpoint = Checkpoint::open(file.path()).expect("a whole file");
        assert_eq!(
            checkpoint.tensor("w", &[2, 2]).map(Values::len).ok(),
            Some(4),
            "a 1x1 convolution is a matrix"
        );
        let message = |name: &str, shape: &[usize]| match checkpoint.tensor(name, shape) {
            Ok(_) => panic!("{name} was read as {shape:?}"),
            Err(e) => e.to_string(),
        };
        assert!(message("w", &[4]).contains("[2, 2, 1, 1]"));
        assert!(message("i", &[1]).contains("I64"));
        assert!(message("x", &[1]).contains("'x' is missing"));
    }
}
