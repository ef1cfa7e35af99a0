//! Just enough of Rust's lexical rules to tell code from comments and literals.
//! It is no parser: it blanks what is not code and leaves the rest in place.

/// `source` with comments and the insides of string and character literals
/// replaced by spaces; every line keeps its number and its length in characters.
pub fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_or_comment(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// The end of the comment or literal that begins at `at`, or `at` if none does.
fn literal_or_comment(chars: &[char], at: usize) -> usize {
    let next = chars.get(at + 1).copied();
    match chars[at] {
        '/' if next == Some('/') => (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len()),
        '/' if next == Some('*') => block_comment(chars, at),
        '"' => string(chars, at + 1),
        '\'' => character(chars, at),
        // A raw string, unless the `r` ends a longer word.
        'r' if at == 0 || !is_word(chars[at - 1]) || is_prefix(chars, at) => raw_string(chars, at),
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the letter before an `r` is a literal's prefix (`br"..."`, `cr"..."`) and not the end of a word.
fn is_prefix(chars: &[char], at: usize) -> bool {
    matches!(chars[at - 1], 'b' | 'c') && (at == 1 || !is_word(chars[at - 2]))
}

fn block_comment(chars: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut i = at;
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                i += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of a string whose inside begins at `at`.
fn string(chars: &[char], at: usize) -> usize {
    let mut i = at;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of a character literal; a lifetime is none.
fn character(chars: &[char], at: usize) -> usize {
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), _) => {
            (at + 3..chars.len()).find(|&i| chars[i] == '\'').map_or(chars.len(), |end| end + 1)
        }
        (Some(_), Some('\'')) => at + 3,
        _ => at,
    }
}

/// The end of `r"..."` or `r#"..."#`; a raw identifier (`r#type`) is none.
fn raw_string(chars: &[char], at: usize) -> usize {
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return at;
    }
    let closes = |i: usize| chars[i] == '"' && (1..=hashes).all(|h| chars.get(i + h) == Some(&'#'));
    (open + 1..chars.len()).find(|&i| closes(i)).map_or(chars.len(), |end| end + 1 + hashes)
}

/// Whether `line` holds `word` (or a path such as `std::arch`), and not as a part of a longer name.
pub fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[cfg(test)]
mod tests {
    //! Tests on what is easily taken for something else.
    use super::*;

    fn words(source: &str) -> Vec<String> {
        let code = code_only(source);
        assert_eq!(code.lines().count(), source.lines().count());
        code.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn comments_and_literals_vanish() {
        for (source, expected) in [
            ("a // b\nc", vec!["a", "c"]),
            ("a /* b /* c */ d */ e", vec!["a", "e"]),
            (r#"a "b \" c" d"#, vec!["a", "d"]),
            (r##"a r#"b " c"# d"##, vec!["a", "d"]),
            (r##"a br#"b"# d"##, vec!["a", "b", "d"]),
            ("a '\"' b \"c\" d", vec!["a", "b", "d"]),
            (r"a '\'' b", vec!["a", "b"]),
            (r"a '\u{1F34E}' b", vec!["a", "b"]),
            ("fn a<'b>(c: &'b str)", vec!["fn", "a<'b>(c:", "&'b", "str)"]),
            ("r#type for_r \"x\" y", vec!["r#type", "for_r", "y"]),
            ("a \"b // c\" d // e", vec!["a", "d"]),
            ("a /* open", vec!["a"]),
            ("a \"open", vec!["a"]),
            ("", vec![]),
        ] {
            assert_eq!(words(source), expected, "{source}");
        }
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("use std::arch::x86_64;", "std::arch"));
        assert!(has_word("a UNet, b", "UNet"));
        assert!(!has_word("UNet2D", "UNet"));
        assert!(!has_word("my_unsafe_thing", "unsafe"));
        assert!(!has_word("clap_complete", "clap"));
    }
}
