//! How a source file is written: what it opens with, what must not stand in
//! it, how long it may be, and that every `unsafe` says why it is safe.

use crate::lexer::{code_only, has_word};
use crate::{Finding, Tree};

/// Longest source file in lines.
const MAX_LINES: usize = 800;
/// What counts as a source file there.
const SOURCES: [&str; 6] = ["rs", "py", "mjs", "js", "ts", "css"];
/// Crates that may hold `unsafe`; all others forbid it to themselves.
const UNSAFE: [&str; 3] = ["hypergen-cpu", "hypergen-tensor", "hypergen-cuda"];
/// Calls and attributes that stand for work not done, or for work forgotten.
const UNFINISHED: [&str; 3] = ["todo!", "unimplemented!", "dbg!"];
/// Features that choose a device.
const DEVICES: [&str; 3] = ["cuda", "metal", "vulkan"];

/// Every rule of this file, on every source file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in tree.texts(&SOURCES) {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            findings.push(Finding::file(
                &file.path,
                format!("{lines} lines, {MAX_LINES} are allowed: divide it"),
            ));
        }
    }
    let mut device_files = Vec::new();
    for (file, text) in tree.texts(&["rs"]) {
        let code = code_only(text);
        findings.extend(opening(&file.path, text));
        findings.extend(unfinished(&file.path, &code));
        findings.extend(unsafety(&file.path, text, &code));
        device_files.extend(device(&file.path, text));
    }
    let first = device_files.first().map(|finding| finding.path.clone());
    findings.extend(device_files.into_iter().filter(|finding| Some(&finding.path) != first.as_ref()));
    findings
}

fn opening(path: &str, text: &str) -> Option<Finding> {
    let fine = text.lines().next().is_some_and(|line| line.starts_with("//! ") && line.len() > "//! ".len());
    (!fine).then(|| Finding::file(path, "the first line must be `//!` and say what the file is"))
}

fn unfinished(path: &str, code: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        for word in UNFINISHED.iter().filter(|word| has_word(line, word)) {
            findings.push(Finding::line(path, index, format!("`{word}` must not stay")));
        }
        if line.replace(' ', "").contains("#[ignore") {
            findings.push(Finding::line(
                path,
                index,
                "a test that is ignored tests nothing: fix or remove it",
            ));
        }
    }
    findings
}

/// The crate that a source file belongs to.
fn crate_of(path: &str) -> Option<&str> {
    path.strip_prefix("crates/")?.split('/').next()
}

fn unsafety(path: &str, text: &str, code: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let allowed = crate_of(path).is_some_and(|name| UNSAFE.contains(&name));
    let is_root = path.ends_with("/src/lib.rs") || path.ends_with("/src/main.rs");
    if !allowed && is_root && !code.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]") {
        findings.push(Finding::file(path, "must begin with #![forbid(unsafe_code)]"));
    }
    let text: Vec<&str> = text.lines().collect();
    let code: Vec<&str> = code.lines().collect();
    let exempt = exempt(&text, &code);
    for (index, line) in code.iter().enumerate() {
        // Attributes name the word too: `unsafe_code`, `unsafe(no_mangle)`.
        if !has_word(line, "unsafe") || line.trim_start().starts_with('#') {
            continue;
        }
        if !allowed {
            let message = "`unsafe` may stand only in the crates of kernels and tensors";
            findings.push(Finding::line(path, index, message));
        } else if acts(line) && !exempt.contains(&index) && !is_explained(&text, &code, index) {
            findings.push(Finding::line(path, index, "`unsafe` without a `// SAFETY:` note"));
        }
    }
    findings
}

/// Whether the line's `unsafe` claims that something is sound, and does not
/// only pass the duty on, as an `unsafe fn` does. (Of public ones clippy wants
/// a `# Safety` section; those of a trait share the trait's.)
fn acts(line: &str) -> bool {
    !["unsafe fn", "unsafe extern"].iter().any(|passes| line.contains(passes)) || line.contains("unsafe {")
}

/// Lines of items that state one reason for all their blocks, in the attribute
/// that tells clippy: a table of intrinsics, say, under one contract.
fn exempt(text: &[&str], code: &[&str]) -> Vec<usize> {
    let mut lines = Vec::new();
    for (start, line) in text.iter().enumerate() {
        if !line.contains("#[allow(clippy::undocumented_unsafe_blocks, reason = \"") {
            continue;
        }
        let end = format!("{}}}", " ".repeat(line.len() - line.trim_start().len()));
        lines.extend((start..code.len()).take_while(|&i| i == start || code[i - 1].trim_end() != end));
    }
    lines
}

/// Whether a note of safety stands on the line, or in the comments above the
/// statement or declaration that it belongs to.
fn is_explained(text: &[&str], code: &[&str], index: usize) -> bool {
    let is_note = |line: &str| line.contains("SAFETY:");
    if is_note(text[index]) {
        return true;
    }
    for above in (0..index).rev() {
        let is_comment = text[above].trim_start().starts_with("//");
        if is_comment && is_note(text[above]) {
            return true;
        }
        let code = code[above].trim();
        let is_attribute = code.starts_with("#[");
        let ends_another = code.is_empty() || code.ends_with([';', '{', '}']);
        if !is_comment && !is_attribute && ends_another {
            return false;
        }
    }
    false
}

/// The first line that asks for a device's feature.
fn device(path: &str, text: &str) -> Option<Finding> {
    // The lexer would blank the feature's name, which is a string.
    let (index, name) = text.lines().enumerate().find_map(|(index, line)| {
        let code = line.split("//").next().unwrap_or(line);
        let asks = |name: &&str| code.contains("cfg") && code.contains(&format!("feature = \"{name}\""));
        Some((index, DEVICES.into_iter().find(|name| asks(name))?))
    })?;
    let message = format!("cfg(feature = \"{name}\") in a second file: a device is chosen in one");
    Some(Finding::line(path, index, message))
}

#[cfg(test)]
mod tests {
    //! Each rule, broken on purpose.
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<Finding> {
        check(&Tree::sample(&[(path, text)]))
    }

    #[test]
    fn a_clean_file_has_no_findings() {
        let text = "//! A file.\n\n#![forbid(unsafe_code)]\n// todo!() and unsafe in words\nfn f() { g(\"dbg!\") }\n";
        assert_eq!(findings("crates/hypergen/src/main.rs", text), []);
    }

    #[test]
    fn a_file_opens_by_saying_what_it_is() {
        for text in ["", "\n//! Late.\n", "// A plain comment.\n", "//!\n//! Empty first.\n", "fn f() {}\n"] {
            assert_eq!(findings("crates/hypergen-cpu/src/a.rs", text).len(), 1, "{text:?}");
        }
    }

    #[test]
    fn nothing_is_left_unfinished() {
        for line in [
            "todo!()",
            "unimplemented!(\"later\")",
            "dbg!(x);",
            "#[ignore]",
            "#[ignore = \"slow\"]",
            "# [ ignore ]",
        ] {
            let found = findings("crates/hypergen/src/a.rs", &format!("//! A file.\n{line}\n"));
            assert_eq!(found.len(), 1, "{line}");
            assert_eq!(found[0].line, Some(2));
        }
    }

    #[test]
    fn crates_without_unsafe_forbid_it_and_hold_none() {
        assert_eq!(findings("crates/hypergen-diffusion/src/lib.rs", "//! A crate.\n").len(), 1);
        assert_eq!(findings("crates/hypergen-tensor/src/lib.rs", "//! A crate.\n"), []);
        let found = findings("crates/hypergen-server/src/a.rs", "//! A.\n// SAFETY: none.\nunsafe { f() }\n");
        assert_eq!(found.len(), 1);
        assert_eq!(findings("examples/a.rs", "//! A.\nunsafe { f() }\n").len(), 1);
    }

    #[test]
    fn every_unsafe_says_why_it_is_safe() {
        let path = "crates/hypergen-cpu/src/a.rs";
        for explained in [
            "// SAFETY: it is.\nunsafe { f() }",
            "// SAFETY: it is,\n// and here is why.\nlet x =\n    unsafe { f() };",
            "/// # Safety\n/// Only after.\npub unsafe fn f() {",
            "#[allow(clippy::undocumented_unsafe_blocks, reason = \"one for all\")]\nimpl A for B {\n    unsafe { f() }\n}",
            "unsafe { f() } // SAFETY: it is.",
            "// SAFETY: it is.\nunsafe impl Send for X {}",
            "type F = unsafe fn(u8);",
            "let call: unsafe fn() = f;",
            "#[unsafe(no_mangle)]",
        ] {
            assert_eq!(findings(path, &format!("//! A.\n\n{explained}\n")), [], "{explained}");
        }
        for bare in [
            "unsafe { f() }",
            "// It is fine.\nunsafe { f() }",
            "// SAFETY: of another.\nlet y = 1;\nunsafe { f() }",
            "// SAFETY: of another.\n\nunsafe { f() }",
            "unsafe fn f() { unsafe { g() } }",
            "#[allow(clippy::undocumented_unsafe_blocks)]\nimpl A for B {\n    unsafe { f() }\n}",
            "#[allow(clippy::undocumented_unsafe_blocks, reason = \"one\")]\nimpl A for B {\n}\nunsafe { f() }",
            "unsafe impl Send for X {}",
            "let s = \"SAFETY:\"; let t = 1;\nunsafe { f() }",
        ] {
            assert_eq!(findings(path, &format!("//! A.\n\n{bare}\n")).len(), 1, "{bare}");
        }
    }

    #[test]
    fn long_files_are_divided() {
        for extension in SOURCES {
            let path = format!("bench/a.{extension}");
            let long = format!("//! A.\n{}", "\n".repeat(MAX_LINES));
            assert_eq!(findings(&path, &long).len(), 1, "{extension}");
            let fits = format!("//! A.\n{}", "\n".repeat(MAX_LINES - 1));
            assert_eq!(findings(&path, &fits), [], "{extension}");
        }
        assert_eq!(findings("docs/a.md", &"\n".repeat(2 * MAX_LINES)), []);
    }

    #[test]
    fn a_device_is_chosen_in_one_file() {
        let one = (
            "crates/hypergen-tensor/src/a.rs",
            "//! A.\n#[cfg(feature = \"cuda\")]\n#[cfg(feature = \"cuda\")]\n",
        );
        let two = ("crates/hypergen-tensor/src/b.rs", "//! B.\nif cfg!(feature = \"cuda\") {}\n");
        let other = ("crates/hypergen-tensor/src/c.rs", "//! C.\n#[cfg(feature = \"hub\")]\n");
        assert_eq!(check(&Tree::sample(&[one, other])), []);
        let found = check(&Tree::sample(&[one, two, other]));
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].path.as_str(), found[0].line), (two.0, Some(2)));
    }
}
