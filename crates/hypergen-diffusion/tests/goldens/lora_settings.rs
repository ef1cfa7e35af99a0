//! What trainers write of a LoRA's strength, as the savers of diffusers and
//! PEFT do it; what changes on the disk while a model is loaded; and files that
//! are links, as in the hub's cache.

use std::fs;
use std::path::Path;

use hypergen_diffusion::lora::Lora;
#[cfg(unix)]
use hypergen_diffusion::{ErrorKind, Generator, lora::LoraLibrary};
use serde_json::json;

use crate::fixture::{self, Numbers, psnr};
use crate::lora_files::{Goldens, Model, float32};

/// As in `lora.rs`.
const PICTURE: f64 = 70.0;

fn goldens() -> Goldens {
    serde_json::from_value(fixture::json("lora_settings.json")).expect("a fixture")
}

#[test]
fn files_of_every_saver_are_as_strong_as_diffusers_and_peft_make_them() {
    let goldens = goldens();
    let numbers = Numbers::open("lora_settings.safetensors");
    let mut model = goldens.model("sd1", &float32());
    let mut wrong = vec![];
    for (name, case) in &goldens.cases {
        let loras = case.loras.iter().map(|(lora, scale)| model.lora(lora, *scale)).collect();
        let picture = psnr(&model.draw(&goldens.request(loras)), &numbers.bytes(name));
        println!("{name}: {picture:.1} dB");
        if picture < PICTURE {
            wrong.push(format!("{name}: {picture:.1} dB"));
        }
    }
    assert_eq!(goldens.cases.len(), 4);
    assert!(wrong.is_empty(), "not what diffusers and PEFT draw:\n{}", wrong.join("\n"));
}

fn draw(model: &mut Model, goldens: &Goldens, path: &Path, scale: f64) -> Vec<u8> {
    let lora = Lora { name: "given".to_owned(), path: path.to_owned(), scale };
    model.draw(&goldens.request(vec![lora]))
}

/// Every file that was read counts: the settings too, and a file that took
/// another's name, size and time.
#[test]
fn what_changes_on_the_disk_is_read_anew() {
    let goldens = goldens();
    let mut model = goldens.model("sd1", &float32());
    let path = model.files["sd1_save_pretrained"].clone();
    let config = path.with_file_name("adapter_config.json");
    let text = fs::read_to_string(&config).expect("settings");
    let first = draw(&mut model, &goldens, &path, 1.0);
    // As long as before: alpha 12 is twice the strength of 6 where no pattern says otherwise.
    let doubled = json!({"r": 4, "lora_alpha": 12}).to_string();
    fs::write(&config, &doubled).expect("edited");
    let plain = draw(&mut model, &goldens, &path, 1.0);
    assert!(plain != first, "the settings were edited");
    fs::write(&config, doubled.replace("12", "24")).expect("edited");
    let stronger = draw(&mut model, &goldens, &path, 0.5);
    assert!(stronger == plain, "half of twice the strength");
    fs::remove_file(&config).expect("removed");
    let without = draw(&mut model, &goldens, &path, 1.0);
    assert!(without != plain && without != stronger, "the settings were removed");
    fs::write(&config, &text).expect("put back");
    assert!(draw(&mut model, &goldens, &path, 1.0) == first);

    // One value of the weights, under the same name, size and time.
    let mut bytes = fs::read(&path).expect("a file");
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    let new = path.with_file_name("new");
    fs::write(&new, &bytes).expect("written");
    let time = fs::metadata(&path).and_then(|m| m.modified()).expect("a time");
    fs::File::options().write(true).open(&new).and_then(|f| f.set_modified(time)).expect("set");
    fs::rename(&new, &path).expect("replaced");
    assert!(draw(&mut model, &goldens, &path, 1.0) != first, "the file was replaced");
}

/// The hub's cache keeps files under their hashes, and names are links to them.
#[cfg(unix)]
#[test]
fn links_are_what_their_names_say() {
    use std::os::unix::fs::symlink;
    let goldens = goldens();
    let mut model = goldens.model("sd1", &float32());
    let root = tempfile::tempdir().expect("a folder");
    let repository = root.path().join("models--a--b");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/4d7a"));
    fs::create_dir_all(&blobs).expect("made");
    fs::create_dir_all(&snapshot).expect("made");
    let link = |file: &Path, blob: &str, name: &str| {
        fs::copy(file, blobs.join(blob)).expect("copied");
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).expect("a link");
    };
    let (header, peft) =
        (model.files["sd1_save_lora_weights"].clone(), model.files["sd1_save_pretrained"].clone());
    link(&header, "4d7a", "pytorch_lora_weights.safetensors");
    link(&peft, "77aa", "adapter_model.safetensors");
    link(&peft.with_file_name("adapter_config.json"), "00ff", "adapter_config.json");
    symlink(&snapshot, root.path().join("linked")).expect("a link");
    let cases = [("pytorch_lora_weights", &header), ("adapter_model", &peft)];
    let expected: Vec<Vec<u8>> =
        cases.iter().map(|(_, file)| draw(&mut model, &goldens, file, 1.0)).collect();
    let library = |folder: &Path| LoraLibrary::new(Some(folder)).expect("a folder");
    for (i, (name, _)) in cases.iter().enumerate() {
        let by_path = snapshot.join(format!("{name}.safetensors"));
        let by_folder = root.path().join(format!("linked/{name}.safetensors"));
        let anywhere = LoraLibrary::new(None).expect("no folder");
        let found = [
            anywhere.find(by_path.to_str().expect("UTF-8"), 1.0),
            anywhere.find(by_folder.to_str().expect("UTF-8"), 1.0),
            library(root.path()).find(&format!("models--a--b/snapshots/4d7a/{name}"), 1.0),
            library(root.path()).find(&format!("linked/{name}"), 1.0),
            library(&repository).find(&format!("snapshots/4d7a/{name}.safetensors"), 1.0),
            library(&snapshot).find(name, 1.0),
            library(&snapshot).find(by_path.to_str().expect("UTF-8"), 1.0),
        ];
        for lora in found {
            let picture = model.draw(&goldens.request(vec![lora.expect(name)]));
            assert!(picture == expected[i], "{name}");
        }
    }
    for folder in [&repository, &snapshot] {
        let listed: Vec<String> = library(folder).list().into_iter().map(|l| l.name).collect();
        let prefix = if folder == &snapshot { "" } else { "snapshots/4d7a/" };
        let names = ["adapter_model", "pytorch_lora_weights"].map(|name| format!("{prefix}{name}"));
        assert_eq!(listed, names);
    }
    // A blob has no name, so it is nothing; and a link out of the cache leads out of the folder.
    let outside = root.path().join("outside.safetensors");
    fs::copy(&header, &outside).expect("copied");
    symlink(&outside, snapshot.join("outside.safetensors")).expect("a link");
    symlink("../../blobs/gone", snapshot.join("gone.safetensors")).expect("a link");
    for bad in ["outside", "gone", "../../blobs/4d7a", "../../../outside"] {
        assert_eq!(library(&snapshot).find(bad, 1.0).expect_err(bad).kind, ErrorKind::Model);
    }
    let lora = Lora { name: "blob".to_owned(), path: blobs.join("4d7a"), scale: 1.0 };
    let error = model.pipeline.check_loras(&[lora]).expect_err("no name");
    assert!(error.message.contains("no readable LoRA file"), "{error}");
}
