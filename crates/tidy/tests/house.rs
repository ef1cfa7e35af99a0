//! The rules of the house, on this very repository.

use std::path::Path;

use tidy::{Finding, Tree};

#[test]
fn the_house_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let tree = Tree::read(&root).expect("the repository can be read");
    // Guards against passing because nothing was found to look at.
    for path in ["Cargo.toml", "README.md", "docs/architecture.md", "crates/hypergen/src/main.rs"] {
        assert!(tree.text(path).is_some(), "{path} was not read");
    }
    let findings: Vec<String> = tidy::check(&tree).iter().map(Finding::to_string).collect();
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}
