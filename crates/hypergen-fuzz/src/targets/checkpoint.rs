//! A safetensors file, byte by byte, and an index of several.

use std::path::Path;

use hypergen_diffusion::Error;
use hypergen_tensor::{Checkpoint, CheckpointError, Part, Renamed};

use crate::targets::itself;
use crate::{check_message, files};

/// Largest tensor whose values are read.
const READ: u64 = 1 << 20;

/// An input that begins like JSON and names a `weight_map` is an index beside one
/// good file, `a.safetensors`; any other is the file itself.
pub(crate) fn read(data: &[u8]) -> u64 {
    let is_index = data.first() == Some(&b'{') && data.windows(10).any(|w| w == b"weight_map");
    if is_index {
        let good = files::path("index/a.safetensors");
        if !good.exists() {
            files::write(&good, b"");
            files::write_described(&good, "x F32 2,2\ny F16 4\n").expect("a good file");
        }
        let path = files::path("index/model.safetensors.index.json");
        files::write(&path, data);
        look("model.safetensors.index.json", Checkpoint::open_index(&path));
    } else {
        let path = files::path("checkpoint.safetensors");
        files::write(&path, data);
        look("checkpoint.safetensors", Checkpoint::open(&path));
        same_when_read(&path);
    }
    itself(data)
}

/// A file is the same whether it is mapped or read, and no larger one is read.
fn same_when_read(path: &Path) {
    let limit = 1 << 20;
    let names = |file: Result<Checkpoint, CheckpointError>| {
        file.ok().map(|file| {
            let mut names: Vec<String> = file.names().map(str::to_owned).collect();
            names.sort_unstable();
            (names, file.bytes(), file.elements())
        })
    };
    assert_eq!(names(Checkpoint::open(path)), names(Checkpoint::read(path, "label", limit)));
}

fn look(label: &str, opened: Result<Checkpoint, CheckpointError>) {
    let file = match opened {
        Ok(file) => file,
        Err(error) => return check_message(&Error::from(error).message, &[label]),
    };
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    let mut total = 0;
    for name in &names {
        let info = file.get(name).expect("a tensor that was listed");
        total += info.bytes();
        match file.tensor(name, &info.shape) {
            Ok(values) => {
                let elements: usize = info.shape.iter().product();
                assert_eq!(values.len(), elements, "{name}");
                if info.bytes() <= READ {
                    assert_eq!(values.to_vec().len(), elements, "{name}");
                }
            }
            Err(error) => check_message(&Error::from(error).message, &["stored as"]),
        }
        for part in [Part::Rows { index: 1, of: 2 }, Part::Transposed] {
            let renamed = Renamed { to: "part".to_owned(), from: name.clone(), part };
            if let Ok(view) = file.view("view".to_owned(), &[renamed]) {
                let info = view.get("part").expect("the view's tensor");
                if let Ok(values) = view.tensor("part", &info.shape)
                    && info.bytes() <= READ
                {
                    assert_eq!(values.to_vec().len(), info.shape.iter().product::<usize>(), "{name}");
                }
            }
        }
    }
    assert_eq!(file.bytes(), total);
    assert!(names.is_empty() || file.tensor("no such tensor at all", &[1]).is_err() || names.len() > 100);
}
