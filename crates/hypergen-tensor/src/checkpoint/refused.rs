//! What is refused before it is read as weights: by its size, its kind, or how
//! it begins; and words for what the reader of safetensors refuses.

use std::path::Path;

use safetensors::SafeTensorError;

use super::CheckpointError;

/// Headers and indices larger than this are not parsed. Those of the largest
/// models have less than one MiB, and parsing takes several times their size.
pub(super) const MAX_HEADER: u64 = 32 << 20;

/// The size of what is a file. It is asked before the file is opened, since to
/// open a pipe is to wait for somebody who writes.
pub(super) fn file_size(path: &Path, label: &str) -> Result<u64, CheckpointError> {
    let metadata =
        std::fs::metadata(path).map_err(|source| CheckpointError::Io { path: label.to_owned(), source })?;
    let reason = match metadata {
        m if m.is_dir() => "it is a folder",
        m if !m.is_file() => "it is not a file",
        m if m.len() == 0 => "it is empty",
        m => return Ok(m.len()),
    };
    Err(CheckpointError::Format { path: label.to_owned(), reason: reason.into() })
}

/// Longest text that is told from weights by its words.
const LONGEST_TEXT: usize = 1 << 16;

/// What a file that is no safetensors file is, by how it begins.
pub(super) fn foreign(data: &[u8]) -> Option<String> {
    // Weights of gigabytes are not read through to find that they are no text.
    let data = &data[..data.len().min(LONGEST_TEXT + 1)];
    // A page may have space, or a mark of its encoding, before its first tag.
    let visible = data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data).trim_ascii_start();
    let page = |tag: &[u8]| visible.get(..tag.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(tag));
    let what = match data {
        // A zip archive, and the pickle protocols 2 to 5: both forms of torch.save.
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => {
            "it is a pickle, which can run code when it is read, and is never read here: get the model's .safetensors \
             file, or convert it where you trust it"
        }
        _ if data.starts_with(b"version https://git-lfs") => {
            "it is a Git LFS pointer and not the file itself: run 'git lfs pull' where it came from"
        }
        _ if page(b"<!doctype html") || page(b"<html") => {
            "it is a web page: the download asked for a login or failed; download the file again"
        }
        _ if data.starts_with(b"GGUF") => {
            "it is a GGUF file, which holds quantized weights; only safetensors files are read: get the same model as \
             safetensors"
        }
        [0x1f, 0x8b, ..] => "it is a gzip archive: unpack it, and give what was in it",
        // The version and the name of who made it, as ONNX files begin.
        [0x08, 1..=20, 0x12, ..] => {
            "it is an ONNX model, for ONNX Runtime; get the same model as safetensors"
        }
        _ => return text(data),
    };
    Some(what.to_owned())
}

/// Words for a short text where weights should be: most often what a server
/// answered in their place.
fn text(data: &[u8]) -> Option<String> {
    const SHOWN: usize = 60;
    let text = std::str::from_utf8(data).ok().filter(|text| text.len() <= LONGEST_TEXT)?.trim();
    if text.len() < 8 || text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(SHOWN).collect();
    Some(format!(
        "it is a text, of another format than safetensors, and begins with '{line}'; if it was downloaded, the server \
         has answered with words and not with the file: download it again"
    ))
}

/// Words for the reader's terse errors, with the fix.
pub(super) fn explain(error: &SafeTensorError, len: usize) -> String {
    let again = "the file is truncated or damaged: download it again";
    match error {
        SafeTensorError::HeaderTooSmall => format!("it has only {len} bytes; {again}"),
        SafeTensorError::InvalidHeaderLength | SafeTensorError::MetadataIncompleteBuffer => {
            format!("its {len} bytes are not as many as its header says; {again}")
        }
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeader(_) => {
            "it does not begin with a safetensors header; it is of another format".to_owned()
        }
        SafeTensorError::InvalidHeaderDeserialization(e) => {
            format!("its header does not parse ({e}); {again}")
        }
        SafeTensorError::InvalidOffset(tensor) => {
            format!("the place of its tensor '{tensor}' makes no sense; {again}")
        }
        SafeTensorError::TensorInvalidInfo => {
            format!("a tensor's type and shape do not fit the bytes that it has; {again}")
        }
        SafeTensorError::ValidationOverflow => format!("a tensor's shape is absurdly large; {again}"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::Checkpoint;
    use super::*;

    fn error(path: &Path) -> String {
        Checkpoint::open(path).err().expect("an error").to_string()
    }

    #[test]
    fn what_is_given_for_weights_is_named() {
        for (content, words) in [
            (&b" \n<!doctype HTML><p>Sign in</p>"[..], "is a web page"),
            (b"{\"error\": \"Repository not found\"}", "'{\"error\": \"Repository"),
            (b"Invalid username or password.", "begins with 'Invalid username"),
            (b"\x08\x07\x12\x07pytorch\x1a\x05", "ONNX"),
            (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00", "gzip"),
            (b"GGUF\x03\x00\x00\x00\x00", "GGUF"),
        ] {
            let mut other = tempfile::NamedTempFile::new().expect("a temporary file");
            other.write_all(content).expect("written");
            assert!(error(other.path()).contains(words), "{words}: {}", error(other.path()));
        }
    }

    /// Sparse files have any size and take no room.
    #[test]
    fn headers_and_indices_beyond_reason_are_not_parsed() {
        let size = MAX_HEADER + 1;
        let mut long = tempfile::NamedTempFile::new().expect("a temporary file");
        long.write_all(&size.to_le_bytes()).expect("written");
        long.as_file().set_len(2 * size).expect("a sparse file");
        assert!(error(long.path()).contains("header has 33554433 bytes"), "{}", error(long.path()));
        let read = Checkpoint::read(long.path(), "x", u64::MAX).err().expect("an error").to_string();
        assert!(read.contains("header has 33554433 bytes"), "{read}");
        let index = tempfile::NamedTempFile::new().expect("a temporary file");
        index.as_file().set_len(1 << 40).expect("a sparse file");
        let message = Checkpoint::open_index(index.path()).err().expect("an error").to_string();
        assert!(message.contains("1099511627776 bytes"), "{message}");
    }

    /// A damaged header in front of 16 GiB: what is mapped and touched counts as memory.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_large_file_is_refused_by_its_beginning() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").expect("the kernel's words");
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
            line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
        };
        let before = resident();
        // NULs, as holes are read, are text to a decoder.
        for begin in [&b"\x02\0\0\0\0\0\0\0{]"[..], b"\0"] {
            let mut large = tempfile::NamedTempFile::new().expect("a temporary file");
            large.write_all(begin).expect("written");
            large.as_file().set_len(16 << 30).expect("a sparse file");
            assert!(!error(large.path()).is_empty());
        }
        assert!(resident() < before + (1 << 30), "{before} and then {}", resident());
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_not_opened() {
        let device = Path::new("/dev/zero");
        for error in [
            Checkpoint::open(device).err(),
            Checkpoint::open_index(device).err(),
            Checkpoint::read(device, "/dev/zero", 1 << 20).err(),
        ] {
            let message = error.expect("an error").to_string();
            assert!(message.contains("not a file"), "{message}");
        }
    }
}
