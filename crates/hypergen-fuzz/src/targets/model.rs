//! The JSON and text files of a folder in the diffusers layout, each in the
//! place of the same file of a tiny model, which is then loaded.

use std::fs;
use std::path::Path;

use hypergen_diffusion::{Error, ErrorKind, Generator};

use crate::tiny::{self, OnlyTheBeginning};
use crate::{check_message, files};

/// Files that an input may replace or add.
const FILES: &[&str] = &[
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
];
/// A section with this before its name removes the file of that name.
const WITHOUT: char = '-';

/// Writes the tiny model, and the folder of links to it.
pub(crate) fn prepare() {
    tiny::folder();
}

/// Every section is a file.
pub(crate) fn read(data: &[u8]) -> u64 {
    let folder = files::path("model");
    restore(tiny::folder(), &folder);
    for (name, content) in files::sections(data, "") {
        if let Some(name) = name.strip_prefix(WITHOUT) {
            if FILES.contains(&name) || name.ends_with(".safetensors") && !name.contains("..") {
                let _ = fs::remove_file(folder.join(name));
            }
        } else if FILES.contains(&name) {
            files::write(&folder.join(name), content);
        }
    }
    match tiny::open(&folder) {
        Err(error) => check(&error),
        Ok(mut model) => {
            let mut request = tiny::request("a Fox, 2 <|endoftext|> naïve 日本 !");
            // The model may be of a kind with other sizes; that is for it to say.
            request.size = model.info().native_size;
            match model.check(&request) {
                Err(error) => check_message(&error.message, &[]),
                Ok(()) if request.size.width * request.size.height <= 512 * 512 => {
                    let stopped = model.generate(&[request], &mut OnlyTheBeginning::default());
                    let error = stopped.expect_err("a generation that is stopped");
                    assert!(
                        matches!(
                            error.kind,
                            ErrorKind::Cancelled | ErrorKind::OutOfMemory | ErrorKind::Internal
                        ),
                        "{error}"
                    );
                }
                Ok(()) => {}
            }
        }
    }
    // The tiny model itself is part of every input.
    (4 << 20) + data.len() as u64
}

/// Makes the folder what it was, with links to the tiny model's files.
fn restore(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the tiny model").flatten() {
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            restore(&path, &copy);
        } else {
            #[cfg(unix)]
            std::os::unix::fs::symlink(&path, &copy).expect("a link");
            #[cfg(not(unix))]
            fs::copy(&path, &copy).map(drop).expect("a copy");
        }
    }
}

fn check(error: &Error) {
    assert_eq!(error.kind, ErrorKind::Model, "{error}");
    let folder = files::path("model");
    let shown = folder.display().to_string();
    // What concerns two parts at once is told in words of both.
    check_message(&error.message, &[&shown, "UNet", "text encoder"]);
}
