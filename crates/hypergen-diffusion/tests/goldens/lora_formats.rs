//! What trainers do differently with the same numbers: number types, values
//! that are too large, words that a file brings along.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::bf16;
use hypergen_diffusion::lora::Lora;
use hypergen_diffusion::{ErrorKind, Generator, Silent};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::lora_files::{Goldens, float32};

/// A tensor: type, dimensions, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, tensors: &BTreeMap<String, Stored>) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("a shape that fits its bytes"))
    });
    safetensors::serialize_to_file(views, None, path).expect("a LoRA file");
}

fn read(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("a LoRA file");
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

fn floats((dtype, _, bytes): &Stored) -> Vec<f32> {
    assert_eq!(*dtype, Dtype::F32);
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn lora(path: &Path, scale: f64) -> Vec<Lora> {
    vec![Lora { name: "given".to_owned(), path: path.to_owned(), scale }]
}

#[test]
fn alpha_is_read_in_every_number_type() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let want = model.draw(&goldens.request(vec![model.lora("sd1_kohya", 1.0)]));
    let original = read(&model.files["sd1_kohya"]);
    let path = model.files["sd1_kohya"].with_file_name("typed.safetensors");
    // Alpha is 2 in all of them.
    let types: [(Dtype, Vec<u8>); 14] = [
        (Dtype::F32, 2.0_f32.to_le_bytes().into()),
        (Dtype::F64, 2.0_f64.to_le_bytes().into()),
        (Dtype::F16, half::f16::from_f32(2.0).to_le_bytes().into()),
        (Dtype::BF16, bf16::from_f32(2.0).to_le_bytes().into()),
        (Dtype::F8_E4M3, vec![0x40]),
        (Dtype::F8_E5M2, vec![0x40]),
        (Dtype::I64, 2_i64.to_le_bytes().into()),
        (Dtype::I32, 2_i32.to_le_bytes().into()),
        (Dtype::I16, 2_i16.to_le_bytes().into()),
        (Dtype::I8, vec![2]),
        (Dtype::U64, 2_u64.to_le_bytes().into()),
        (Dtype::U32, 2_u32.to_le_bytes().into()),
        (Dtype::U16, 2_u16.to_le_bytes().into()),
        (Dtype::U8, vec![2]),
    ];
    for (dtype, bytes) in types {
        for shape in [vec![], vec![1], vec![1, 1]] {
            let mut tensors = original.clone();
            for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".alpha")) {
                *tensor = (dtype, shape.clone(), bytes.clone());
            }
            write(&path, &tensors);
            let picture = model.draw(&goldens.request(lora(&path, 1.0)));
            assert!(picture == want, "{dtype:?} {shape:?}");
            fs::remove_file(&path).expect("removed");
        }
    }
}

#[test]
fn weights_are_read_in_every_floating_point_type() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let original = read(&model.files["sd1_kohya"]);
    let path = model.files["sd1_kohya"].with_file_name("typed.safetensors");
    let mut draw = |round: &dyn Fn(f32) -> (Vec<u8>, f32), dtype: Dtype| {
        let pictures = [false, true].map(|plain| {
            let mut tensors = original.clone();
            for (_, tensor) in tensors.iter_mut().filter(|(name, _)| !name.ends_with(".alpha")) {
                let rounded = floats(tensor).into_iter().map(round);
                // The rounded numbers in float32 are what the type has to be read as.
                let bytes = rounded.flat_map(|(b, v)| if plain { v.to_le_bytes().to_vec() } else { b });
                let dtype = if plain { Dtype::F32 } else { dtype };
                *tensor = (dtype, tensor.1.clone(), bytes.collect());
            }
            write(&path, &tensors);
            let picture = model.draw(&goldens.request(lora(&path, 1.0)));
            fs::remove_file(&path).expect("removed");
            picture
        });
        assert!(pictures[0] == pictures[1], "{dtype:?}");
    };
    draw(&|v| (f64::from(v).to_le_bytes().into(), v), Dtype::F64);
    draw(&|v| (bf16::from_f32(v).to_le_bytes().into(), bf16::from_f32(v).to_f32()), Dtype::BF16);
    // The upper half of a half, cut off.
    let upper = |v: f32| half::f16::from_f32(v).to_bits() & 0xff00;
    draw(&|v| (vec![(upper(v) >> 8) as u8], half::f16::from_bits(upper(v)).to_f32()), Dtype::F8_E5M2);
}

/// What a file's own values are multiplied by, which tensors, and what is said.
#[test]
fn finite_values_that_overflow_are_the_loras_fault_by_name() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let plain = model.draw(&goldens.request(vec![]));
    for (file, ends, factor, module) in [
        ("sd1_kohya", &[".lora_up.weight", ".lora_down.weight"][..], 1e25_f32, "added to '"),
        ("sd1_kohya", &[".alpha", ".lora_up.weight"], 1e20, "added to '"),
        ("sd1_loha", &[".hada_w1_a", ".hada_w2_b"], 1e30, "added to '"),
        ("sd1_lokr", &[".lokr_w1", ".lokr_w2_a", ".lokr_w1_a", ".lokr_w2"], 1e25, "added to '"),
        ("sd1_glora", &[".a1.weight", ".a2.weight"], 1e30, "added to '"),
        ("sd1_dora_inputs", &[".lora_up.weight", ".lora_down.weight"], 1e25, "added to '"),
        ("sd1_differences", &[".b_norm"], 1e37, ".bias'"),
    ] {
        let path = model.files[file].with_file_name("huge.safetensors");
        let mut tensors = read(&model.files[file]);
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| ends.iter().any(|end| name.ends_with(end))) {
            // In magnitude alike, so that no product of theirs stays small.
            let large = floats(tensor).into_iter().map(|v| (factor * 40.0).min(3e38).copysign(v));
            tensor.2 = large.flat_map(f32::to_le_bytes).collect();
        }
        write(&path, &tensors);
        let loras = lora(&path, 2.0);
        let checked = model.pipeline.check_loras(&loras).expect_err(&format!("{file} {ends:?}"));
        let drawn = model.pipeline.generate(&[goldens.request(loras)], &mut Silent).expect_err(file);
        assert_eq!(checked, drawn);
        assert_eq!(checked.kind, ErrorKind::Model, "{checked}");
        for words in ["given", module, "at scale 2", "too large"] {
            assert!(checked.message.contains(words), "{file}: {checked}");
        }
        assert!(model.draw(&goldens.request(vec![])) == plain, "{file}: the model is itself");
    }
}

/// Weights that are numbers, but so large that the network's are none: here,
/// too, the LoRA is named.
#[test]
fn a_network_that_overflows_names_its_loras() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let path = model.files["sd1_locon"].with_file_name("large.safetensors");
    let mut tensors = read(&model.files["sd1_locon"]);
    for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".lora_up.weight")) {
        let large = floats(tensor).into_iter().map(|v| v * 1e33);
        tensor.2 = large.flat_map(f32::to_le_bytes).collect();
    }
    write(&path, &tensors);
    let loras = lora(&path, 1.0);
    assert_eq!(model.pipeline.check_loras(&loras), Ok(()), "its weights are numbers");
    let error = model.pipeline.generate(&[goldens.request(loras)], &mut Silent).expect_err("no numbers");
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(
        error.message.contains("not finite") && error.message.contains("LoRA 'given' at scale 1"),
        "{error}"
    );
}

#[test]
fn a_bundled_word_is_plain_text_again_without_its_lora() {
    let goldens = Goldens::read();
    let mut model = goldens.model("sd1", &float32());
    let bundle = |scale| vec![model.lora("sd1_bundle", scale)];
    let [with_it, without] = [bundle(1.0), bundle(0.0)];
    let mut draw = |prompt: &str, loras: &[Lora]| {
        let mut request = goldens.request(loras.to_vec());
        request.prompt = prompt.to_owned();
        model.draw(&request)
    };
    let (word, other) = ("a red foxxy, in the snow", "a red fox, in the snow");
    let plain = [draw(word, &[]), draw(other, &[])];
    let with = draw(word, &with_it);
    assert!(with != plain[0], "the word means something else");
    assert!(draw(word, &[]) == plain[0], "the word is text again");
    assert!(draw(word, &without) == plain[0], "a scale of 0 is none of it");
    assert!(draw(word, &with_it) == with, "from what was kept");
    assert!(draw(other, &[]) == plain[1]);
}
