//! From an input to files: a text of several sections, and safetensors files
//! described in lines, whose offsets are right whatever a mutation does to the
//! names and shapes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A folder for the whole process.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

/// Makes the folder.
pub(crate) fn prepare() {
    LazyLock::force(&FOLDER);
}

/// A file of this name for the input; its folder holds nothing else of that name.
pub(crate) fn path(name: &str) -> PathBuf {
    FOLDER.path().join(name)
}

/// Writes a file, making its folder.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder");
    // A link to a file that all inputs share is replaced, never written through.
    let _ = fs::remove_file(path);
    fs::write(path, bytes).expect("a written file");
}

/// Sections of an input, each begun by a line `=== NAME`; what precedes the
/// first one has the name `first`.
pub(crate) fn sections<'a>(data: &'a [u8], first: &'a str) -> Vec<(&'a str, &'a [u8])> {
    let mut sections = vec![(first, &data[..0])];
    let (mut start, mut at) = (0, 0);
    for line in data.split_inclusive(|&b| b == b'\n') {
        let name = line.strip_prefix(b"=== ").and_then(|name| std::str::from_utf8(name).ok());
        if let Some(name) = name {
            if let Some(last) = sections.last_mut() {
                last.1 = &data[start..at];
            }
            start = at + line.len();
            sections.push((name.trim(), &data[..0]));
        }
        at += line.len();
    }
    if let Some(last) = sections.last_mut() {
        last.1 = &data[start..];
    }
    sections
}

/// Bytes of the elements of the types that a description may use.
fn size_of(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" | "U64" => 8,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "U8" | "I8" | "BOOL" => 1,
        _ => 4,
    }
}

/// The largest file that is made, and up to where it is filled with values;
/// what follows are holes that read as zeros and take no room.
const LARGEST: u64 = 1 << 40;
const FILLED: u64 = 1 << 20;

/// Writes the safetensors file that `text` describes, and returns its size. Each
/// line is `NAME TYPE DIMENSIONS [BYTE]`, as `a.weight F32 64,2 63` for a tensor all of
/// whose bytes are 63, or `@KEY VALUE` for metadata. `None`: no such file can be.
pub(crate) fn write_described(path: &Path, text: &str) -> Option<u64> {
    let (mut header, mut metadata) = (Map::new(), Map::new());
    let (mut end, mut fills) = (0_u64, vec![]);
    for line in text.lines() {
        if let Some((key, value)) = line.strip_prefix('@').and_then(|line| line.split_once(' ')) {
            metadata.insert(key.to_owned(), value.into());
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(name), Some(dtype)) = (words.next(), words.next()) else { continue };
        let dimensions = words.next().unwrap_or_default();
        let shape: Vec<u64> = dimensions.split(',').filter_map(|d| d.parse().ok()).collect();
        let fill = words.next().and_then(|byte| byte.parse::<u8>().ok()).unwrap_or_default();
        let bytes = shape.iter().try_fold(size_of(dtype), |bytes, &d| bytes.checked_mul(d));
        let bytes = bytes.filter(|bytes| *bytes <= LARGEST)?;
        let start = end;
        end += bytes;
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        if header.insert(name.to_owned(), info).is_some() || end > LARGEST {
            return None;
        }
        fills.push((bytes, fill));
    }
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), Value::Object(metadata));
    }
    let header = Value::Object(header).to_string();
    let size = 8 + header.len() as u64 + end;
    let mut bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let mut room = FILLED;
    for (len, fill) in fills {
        let len = len.min(room);
        bytes.resize(bytes.len() + usize::try_from(len).ok()?, fill);
        room -= len;
    }
    let _ = fs::remove_file(path);
    let mut file = File::create(path).expect("a file");
    file.write_all(&bytes).expect("a written file");
    file.set_len(size).expect("a file with holes");
    Some(size)
}
