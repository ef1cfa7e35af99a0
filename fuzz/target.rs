//! The program of every target: it runs what `hypergen-fuzz` has under its own
//! name, and lets that crate's mutator make every other input. It holds no
//! checks of its own.

#![no_main]

use hypergen_fuzz::mutate::{Random, mutated};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|data: &[u8]| hypergen_fuzz::run(env!("CARGO_BIN_NAME"), data));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 2 == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let made = mutated(&[data[..size].to_vec()], &mut Random(seed.into()));
    let len = made.len().min(max_size);
    data[..len].copy_from_slice(&made[..len]);
    len
});
