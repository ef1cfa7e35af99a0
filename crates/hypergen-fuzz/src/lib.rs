//! What is done with a fuzzer's input: one target for each kind of thing that
//! reaches the program from outside. libFuzzer calls [`run`] from `fuzz/`, and
//! the tests here call it with the corpus and its mutations, on any compiler.
//!
//! A target reads its input as the program does, by public API alone, and
//! asserts what has to hold for every input: errors that name something, at
//! bounded length; whatever is printed reads back as itself; what was
//! listed can be loaded. That it neither panics nor takes more memory than
//! its input is worth is asserted here, for all of them. It finds inputs for
//! no one: those come from the mutator, or from libFuzzer.

#![forbid(unsafe_code)]

mod files;
pub mod mutate;
mod targets;
mod tiny;

use peak_alloc::PeakAlloc;

/// Counts what every thread holds, here and in every program that links this crate.
#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Memory that any input may take, and that each of its bytes may.
const MEMORY_OF_ANY: usize = 64 << 20;
const MEMORY_OF_A_BYTE: usize = 16;

/// One kind of input.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: also that of its folder of the corpus, and of its program under libFuzzer.
    pub name: &'static str,
    /// Makes what all inputs share (a loaded model), so that no input pays for it.
    prepare: fn(),
    /// Reads one input; returns the bytes that it stands for (those of a file that it describes).
    read: fn(&[u8]) -> u64,
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "body", prepare: targets::body::prepare, read: targets::body::read },
    Target { name: "checkpoint", prepare: files::prepare, read: targets::checkpoint::read },
    Target { name: "http", prepare: targets::http::prepare, read: targets::http::read },
    Target { name: "lora", prepare: targets::lora::prepare, read: targets::lora::read },
    Target { name: "model", prepare: targets::model::prepare, read: targets::model::read },
    Target { name: "names", prepare: || {}, read: targets::names::read },
    Target { name: "picture", prepare: || {}, read: targets::picture::read },
    Target { name: "prompt", prepare: targets::prompt::prepare, read: targets::prompt::read },
    Target { name: "scheduler", prepare: || {}, read: targets::scheduler::read },
    Target { name: "settings", prepare: files::prepare, read: targets::settings::read },
    Target { name: "single_file", prepare: files::prepare, read: targets::single_file::read },
];

impl Target {
    /// The target of this name.
    pub fn named(name: &str) -> Option<&'static Target> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Reads one input. One at a time: the memory is counted for the whole process.
    ///
    /// # Panics
    /// When anything that has to hold does not.
    pub fn run(&self, data: &[u8]) {
        (self.prepare)();
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        let stands_for = (self.read)(data);
        let taken = MEMORY.peak_usage().saturating_sub(before);
        let bytes = usize::try_from(stands_for).unwrap_or(usize::MAX).max(data.len());
        let allowed = MEMORY_OF_ANY.saturating_add(bytes.saturating_mul(MEMORY_OF_A_BYTE));
        assert!(
            taken <= allowed,
            "{bytes} bytes of input took {taken} bytes of memory, {allowed} are allowed"
        );
    }
}

/// Runs a target by its name, for programs of libFuzzer.
///
/// # Panics
/// When there is none, or when anything that has to hold does not.
pub fn run(name: &str, data: &[u8]) {
    Target::named(name).expect("a target of TARGETS").run(data);
}

/// Longest message about an input, in characters: a screen or two, so that no
/// input is repeated whole.
const LONGEST_MESSAGE: usize = 2000;

/// Checks a message: not empty, of bounded length, and one of `names` in it (the
/// file, field or parameter that it is about). It may repeat line ends of what it is about.
fn check_message(message: &str, names: &[&str]) {
    let shown: String = message.chars().take(LONGEST_MESSAGE).collect();
    assert!(!message.trim().is_empty(), "an error without words");
    assert!(message.chars().count() <= LONGEST_MESSAGE, "an error of {} bytes: {shown}", message.len());
    assert!(
        names.is_empty() || names.iter().any(|name| message.contains(name)),
        "none of {names:?} in: {shown}"
    );
}
