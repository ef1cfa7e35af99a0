//! One module for each target; what each of them may take for granted is in
//! the corpus's folder of that name.

pub(crate) mod body;
pub(crate) mod checkpoint;
pub(crate) mod http;
pub(crate) mod lora;
pub(crate) mod model;
pub(crate) mod names;
pub(crate) mod picture;
pub(crate) mod prompt;
pub(crate) mod scheduler;
pub(crate) mod settings;
pub(crate) mod single_file;

/// Bytes of an input that describes nothing larger than itself.
pub(crate) fn itself(data: &[u8]) -> u64 {
    data.len() as u64
}
