//! What holds for every prompt, of whatever characters.

use proptest::prelude::*;

use super::parse::{Parsed, Part, parse, parse_any};
use crate::MAX_PROMPT;

/// Pieces that mean something, and some that do not.
const PIECES: &[&str] = &[
    "(",
    ")",
    "[",
    "]",
    ":",
    "\\",
    "|",
    "<",
    ">",
    "1.3",
    "-",
    "+",
    ".",
    " ",
    "  ",
    "\n",
    "BREAK",
    "BREAK ",
    "AND",
    "_",
    "lora",
    "<lora:",
    "<lora:x:1>",
    "<lyco:",
    "<hypernet:",
    "é",
    "日",
    "e\u{301}",
    "a",
    "red fox",
    ":1)",
    ":.5]",
    "((",
    "))",
    "\u{0}",
    "\u{feff}",
    "🍎",
    "1e9",
    "9999999999",
    "inf",
];

/// Texts of those pieces and of arbitrary characters.
fn prompts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![4 => prop::sample::select(PIECES).prop_map(str::to_owned), 1 => "\\PC{0,3}"];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// The text of a prompt, its breaks as spaces.
fn text(parsed: &Parsed) -> String {
    let text = |part: &Part| match part {
        Part::Text { text, .. } => text.clone(),
        Part::Break => " ".to_owned(),
    };
    parsed.parts.iter().map(text).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every text is a prompt or an error on one line that names the
    /// parameter; weights are finite, and nothing is there that was not written.
    #[test]
    fn every_text_is_a_prompt_or_an_error(prompt in prompts()) {
        match parse("negative_prompt", &prompt) {
            Err(error) => {
                prop_assert_eq!(error.param, "negative_prompt");
                prop_assert!(error.message.starts_with("negative_prompt") && error.message.len() < 600);
            }
            Ok(parsed) => {
                let mut letters = prompt.chars().filter(|c| c.is_alphabetic());
                for part in &parsed.parts {
                    let Part::Text { text, weight } = part else { continue };
                    prop_assert!((*weight as f32).is_finite());
                    // Letters keep their order; those of tags and breaks are left out.
                    for letter in text.chars().filter(|c| c.is_alphabetic()) {
                        prop_assert!(letters.any(|c| c == letter), "{:?} in {:?}", text, prompt);
                    }
                }
                for tag in &parsed.loras {
                    prop_assert!(tag.scale.is_finite() && !tag.name.is_empty() && !tag.name.contains('>'));
                }
            }
        }
    }

    /// A text whose brackets and backslashes are escaped is that text, with
    /// weight 1, whatever else is in it.
    #[test]
    fn escaped_text_survives(plain in prompts()) {
        let mut plain = plain;
        for word in ["BREAK", "AND", "lora:", "lyco:", "hypernet:"] {
            while plain.contains(word) {
                plain = plain.replace(word, "");
            }
        }
        let mut escaped = String::new();
        for c in plain.chars() {
            if "()[]\\".contains(c) {
                escaped.push('\\');
            }
            escaped.push(c);
        }
        let parsed = parse("prompt", &escaped).expect("text");
        let weighed = parse("prompt", &format!("({escaped}:1.5)")).expect("text");
        prop_assert_eq!(&text(&parsed), &plain);
        prop_assert!(parsed.parts.len() <= 1 && parsed.loras.is_empty());
        prop_assert_eq!(&text(&weighed), &plain);
        for part in &weighed.parts {
            let Part::Text { text, weight } = part else { panic!("no break was written") };
            prop_assert!(*weight == 1.5 || text.is_empty(), "{}", weight);
        }
    }

    /// A tag gives back the name and the scale that it was written with.
    #[test]
    fn tags_keep_names_and_scales(name in "[^>\\s]([^>]{0,20}[^>\\s])?", scale in -1e6..1e6_f64, around in "[a-z ]{0,8}") {
        let prompt = format!("{around}<lora:{name}:{scale}>{around}");
        let parsed = parse("prompt", &prompt).expect("a tag");
        prop_assert_eq!(text(&parsed), format!("{around}{around}"));
        prop_assert_eq!(parsed.loras.len(), 1);
        prop_assert_eq!((&*parsed.loras[0].name, parsed.loras[0].scale), (&*name, scale));
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Repeating a text of any pieces thousands of times is read, too: with a
    /// time that grows with its square this would take hours.
    #[test]
    fn long_texts_are_read(pieces in prop::collection::vec(prop::sample::select(PIECES), 1..4), end in prop::sample::select(PIECES)) {
        let piece = pieces.concat();
        let long = piece.repeat((1 << 15) / piece.len()) + end;
        if let Ok(parsed) = parse_any("prompt", &long) {
            prop_assert!(text(&parsed).len() <= long.len());
        }
    }
}

/// A mebibyte of every piece, and of pieces that could lead a parser back to
/// its beginning each time: seconds in all, where a quadratic one takes hours.
#[test]
fn a_mebibyte_of_anything_is_read() {
    let more = [
        "<a",
        "<lora:x",
        "<lora:x ",
        "(a",
        "(a:",
        "(a:1",
        "(a:1 ",
        ": ",
        ":1",
        ":1 ",
        "[a:",
        "[a:1",
        "a|",
        "BREAKBREAK",
        "_BREAK",
        "AND_",
    ];
    for piece in PIECES.iter().chain(&more).filter(|piece| !piece.is_empty()) {
        for end in ["", ")]>"] {
            let long = piece.repeat((1 << 20) / piece.len()) + end;
            match parse_any("prompt", &long) {
                Ok(parsed) => assert!(text(&parsed).len() <= long.len(), "{piece}"),
                Err(error) => assert!(error.message.len() < 600, "{piece}: {error}"),
            }
            let error = parse("prompt", &long).expect_err(piece);
            assert!(error.message.contains(&format!("at most {MAX_PROMPT} characters")), "{error}");
        }
    }
}

/// Every bracket opens and closes as deep as it may, around as much text as fits.
#[test]
fn deep_brackets_are_read_and_deeper_ones_refused() {
    for (open, close) in [("(", ")"), ("[", "]"), ("([", "])"), ("((", ":1))")] {
        let depth = 256 / open.len();
        let nested =
            |depth: usize| format!("{}{}{}", open.repeat(depth), "a(b)".repeat(50), close.repeat(depth));
        assert!(parse("prompt", &nested(depth - 1)).is_ok(), "{open}");
        assert!(parse("prompt", &nested(depth + 1)).expect_err(open).message.contains("256 brackets"));
    }
}
