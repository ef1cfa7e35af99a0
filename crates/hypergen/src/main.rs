//! The `hypergen` binary.
fn main() {}
