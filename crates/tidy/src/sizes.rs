//! A repository that is quick to clone: nothing large but the embedded model,
//! and few fixtures.

use crate::{Finding, Tree};

/// Largest file outside `models/`, in bytes.
const MAX_FILE: u64 = 20_000_000;
/// All fixtures together, in bytes.
const MAX_FIXTURES: u64 = 4_000_000;

/// Sizes of single files, and of all fixtures together.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut fixtures = 0;
    for file in &tree.files {
        if file.bytes > MAX_FILE && !file.path.starts_with("models/") {
            findings.push(Finding::file(&file.path, format!("{} bytes, {MAX_FILE} are allowed", file.bytes)));
        }
        // The scripts that make goldens and the tests that read them are code, not data.
        let code = file.path.ends_with(".rs") || file.path.ends_with(".py");
        if !code && file.path.split('/').any(|part| matches!(part, "fixtures" | "goldens")) {
            fixtures += file.bytes;
        }
    }
    if fixtures > MAX_FIXTURES {
        let message = format!("all fixtures together take {fixtures} bytes, {MAX_FIXTURES} are allowed");
        findings.push(Finding::file("fixtures", message));
    }
    findings
}

#[cfg(test)]
mod tests {
    //! Files of sizes that are and are not allowed.
    use super::*;
    use crate::File;

    fn findings(files: &[(&str, u64)]) -> usize {
        let files = files.iter().map(|&(path, bytes)| File { path: path.to_owned(), bytes, text: None });
        check(&Tree { files: files.collect() }).len()
    }

    #[test]
    fn only_models_are_large() {
        assert_eq!(
            findings(&[("models/emoji/unet/w.safetensors", 2 * MAX_FILE), ("docs/a.png", MAX_FILE)]),
            0
        );
        assert_eq!(findings(&[("docs/a.png", MAX_FILE + 1)]), 1);
        assert_eq!(findings(&[("crates/a/models/w.bin", MAX_FILE + 1)]), 1);
    }

    #[test]
    fn fixtures_are_counted_together() {
        let half = MAX_FIXTURES / 2;
        assert_eq!(findings(&[("crates/a/tests/fixtures/x", half), ("crates/b/tests/fixtures/y", half)]), 0);
        assert_eq!(findings(&[("crates/a/tests/fixtures/x", half), ("goldens/y", half + 1)]), 1);
        assert_eq!(findings(&[("crates/a/src/x", 2 * MAX_FIXTURES)]), 0);
        assert_eq!(findings(&[("goldens/make.py", MAX_FIXTURES + 1)]), 0);
    }
}
