//! Functions that fit on a screen. Tests are left out: theirs are tables.

use crate::lexer::code_only;
use crate::{Finding, Tree};

/// Longest function in lines, from its name to its closing brace.
const MAX_LINES: usize = 80;

/// The length of every function.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in tree.texts(&["rs"]) {
        if file.path.split('/').any(|part| matches!(part, "tests" | "tests.rs")) {
            continue;
        }
        let code = code_only(text);
        for (name, begin, lines) in functions(&code) {
            if lines > MAX_LINES {
                let message = format!("`{name}` has {lines} lines, {MAX_LINES} are allowed: divide it");
                findings.push(Finding::line(&file.path, begin, message));
            }
        }
    }
    findings
}

/// Name, first line from 0 and number of lines of each function before the tests.
fn functions(code: &str) -> Vec<(&str, usize, usize)> {
    let end = code.find("#[cfg(test)]\nmod").unwrap_or(code.len());
    let code = &code[..end];
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let part_of_a_word = code[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let rest = &code[at + 3..];
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        // `fn (` is a type.
        if part_of_a_word || name.is_empty() {
            continue;
        }
        let Some(length) = body_end(rest) else { continue };
        let begin = code[..at].matches('\n').count();
        found.push((name, begin, rest[..length].matches('\n').count() + 1));
    }
    found
}

/// The end of the body that follows a function's name; none for a declaration.
fn body_end(rest: &str) -> Option<usize> {
    let mut open = 0;
    let mut brackets = 0;
    for (i, c) in rest.char_indices() {
        match c {
            '(' | '[' if open == 0 => brackets += 1,
            ')' | ']' if open == 0 => brackets -= 1,
            // Not the one in `[u8; 4]`.
            ';' if open == 0 && brackets == 0 => return None,
            '{' => open += 1,
            '}' => {
                open -= 1;
                if open == 0 {
                    return Some(i);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    //! Functions that are and are not too long.
    use super::*;
    use crate::File;

    fn findings(path: &str, text: &str) -> Vec<Finding> {
        check(&Tree { files: vec![File::sample(path, text)] })
    }

    fn function(lines: usize) -> String {
        format!("//! x\n\npub(crate) fn f<T>(a: [u8; 4]) -> T {{\n{}}}\n", "    g();\n".repeat(lines - 2))
    }

    #[test]
    fn a_function_fits_on_a_screen() {
        assert_eq!(findings("a.rs", &function(MAX_LINES)), []);
        let long = findings("a.rs", &function(MAX_LINES + 1));
        assert_eq!((long.len(), long[0].line), (1, Some(3)));
        assert!(long[0].message.starts_with("`f` has 81 lines"), "{}", long[0]);
    }

    #[test]
    fn tests_and_what_is_no_function_do_not_count() {
        let long = function(MAX_LINES + 1);
        assert_eq!(findings("crates/a/tests/b.rs", &long), []);
        assert_eq!(findings("a.rs", &format!("//! x\n#[cfg(test)]\nmod tests {{\n{long}}}\n")), []);
        let declared = format!("//! x\nfn f();\ntype F = fn (u8);\n// fn g() {{\n{}", "\n".repeat(MAX_LINES));
        assert_eq!(findings("a.rs", &declared), []);
    }
}
