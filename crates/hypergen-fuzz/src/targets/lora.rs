//! A LoRA file, listed, inspected, bound to a tiny model, and applied.

use std::sync::LazyLock;

use hypergen_diffusion::lora::{Lora, LoraLibrary, PARAM, inspect};
use hypergen_diffusion::{Error, ErrorKind, Generator, Request};

use crate::tiny::{self, OnlyTheBeginning};
use crate::{check_message, files};

/// What the files are called, for errors have to say.
const NAME: &str = "ink";
/// Larger files are left out: reading them takes time and finds nothing more.
const LARGEST: u64 = 4 << 20;

/// Loads the model.
pub(crate) fn prepare() {
    LazyLock::force(&tiny::MODEL);
}

/// The input describes the tensors in lines, as `files` has it, or is the file
/// itself where it does not begin like a text; a section `adapter_config.json` is the
/// file beside it.
pub(crate) fn read(data: &[u8]) -> u64 {
    let sections = files::sections(data, "ink.safetensors");
    let folder = files::path("lora");
    let path = folder.join("ink.safetensors");
    let settings = folder.join("adapter_config.json");
    files::write(&path, b"");
    let _ = std::fs::remove_file(&settings);
    let mut size = data.len() as u64;
    for (name, content) in sections {
        match (name, std::str::from_utf8(content)) {
            ("ink.safetensors", Ok(text)) if !content.starts_with(&[0]) && content.get(7) != Some(&0) => {
                match files::write_described(&path, text) {
                    Some(written) if written <= LARGEST => size += written,
                    _ => return size,
                }
            }
            ("ink.safetensors", _) => files::write(&path, content),
            ("adapter_config.json", _) => files::write(&settings, content),
            _ => {}
        }
    }
    let inspected = inspect(&path, NAME);
    if let Err(error) = &inspected {
        check(error);
    }
    let library = LoraLibrary::new(Some(&folder)).expect("a folder");
    let listed = library.list();
    assert_eq!(listed.len(), usize::from(inspected.is_ok()), "what is understood is listed");
    for entry in listed {
        let found = library.find(&entry.name, 1.0).unwrap_or_else(|e| panic!("listed, but: {e}"));
        apply(found);
    }
    size
}

/// Applies a LoRA, which has to go as it was said beforehand.
fn apply(lora: Lora) {
    let mut model = tiny::MODEL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let checked = model.check_loras(std::slice::from_ref(&lora));
    if let Err(error) = &checked {
        check(error);
    }
    let request = Request { loras: vec![lora], ..tiny::request("fox") };
    let applied = model.generate(&[request], &mut OnlyTheBeginning::default());
    match (checked, applied.map(|_| ())) {
        (_, Ok(())) => panic!("the generation was to be stopped"),
        (Ok(()), Err(error)) if error.kind == ErrorKind::Cancelled => {}
        (Ok(()), Err(error)) => {
            // Finite values may overflow where they meet the weights; that is told as well.
            check_message(&error.message, &[NAME, "not finite"]);
        }
        (Err(checked), Err(error)) => assert_eq!(error, checked),
    }
}

fn check(error: &Error) {
    assert_eq!((error.kind, error.param), (ErrorKind::Model, Some(PARAM)), "{error}");
    check_message(&error.message, &[NAME]);
}
