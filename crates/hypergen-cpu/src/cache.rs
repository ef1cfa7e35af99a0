//! Cache sizes, as far as blocking depends on them. They decide how work is
//! cut, never the order of a sum: results are the same on every machine that
//! has the same instruction set.

use std::sync::OnceLock;

/// What is assumed where the system does not tell.
const DEFAULT: usize = 1 << 20;

/// Bytes of the second-level cache of a core.
pub(crate) fn second_level_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let told = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").ok();
        // A guest may be told anything; beyond these bounds it is not a second-level cache.
        told.and_then(|text| parse(&text)).unwrap_or(DEFAULT).clamp(256 << 10, 4 << 20)
    })
}

/// Reads `2048K` or `2M`.
fn parse(text: &str) -> Option<usize> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse("2048K\n"), Some(2 << 20));
        assert_eq!(parse("2M"), Some(2 << 20));
        assert_eq!(parse("512"), Some(512));
        assert_eq!(parse("many"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn the_answer_is_plausible() {
        assert!((256 << 10..=4 << 20).contains(&second_level_bytes()));
    }
}
