//! Weights and inputs that are a formula of their name: the same float32 bits
//! as `goldens/formula.py` makes. Nothing here knows a model.

/// 64-bit FNV-1a.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// `count` numbers in [-1, 1): the top 24 bits of a splitmix64 stream that the
/// name seeds.
pub(crate) fn uniform(name: &str, count: usize) -> impl Iterator<Item = f32> + use<> {
    let seed = fnv1a(name);
    (1..=count as u64).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 40) as i32 - (1 << 23)) as f32 * 2f32.powi(-23)
    })
}

/// A checkpoint's tensor; `name` starts with the component's folder.
pub(crate) fn weight(name: &str, shape: &[usize], gain: f64) -> Vec<f32> {
    let (scale, center) = match shape {
        [_, inner @ ..] if !inner.is_empty() => {
            ((3.0 / inner.iter().product::<usize>() as f64).sqrt() * gain, 0.0)
        }
        _ if name.ends_with("weight") => (0.25 * gain, 1.0),
        _ => (0.125 * gain, 0.0),
    };
    uniform(name, shape.iter().product()).map(|u| center + scale as f32 * u).collect()
}

/// An input of about unit variance.
pub(crate) fn signal(name: &str, shape: &[usize]) -> Vec<f32> {
    uniform(name, shape.iter().product()).map(|u| 3f64.sqrt() as f32 * u).collect()
}

/// The name that seeds a tensor, the same in both generations of files.
pub(crate) fn canonical(part: &str, key: &str) -> String {
    format!("{part}/{}", key.strip_prefix("text_model.").unwrap_or(key))
}
