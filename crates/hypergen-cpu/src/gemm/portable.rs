//! The matrix product's registers in plain Rust.

use super::vector::Registers;
use crate::simd::portable::Portable;

impl Registers for Portable {
    // Sixteen registers of four floats on the x86 baseline.
    const ROWS: usize = 3;
}
