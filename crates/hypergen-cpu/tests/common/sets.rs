//! The instruction sets that tests of kernels run on: those of this machine.
//! What it lacks is said once by a test, and not skipped in silence where it is
//! demanded. Shared by the unit tests, which take this file in.
#![allow(dead_code, reason = "each test uses its own part")]

use super::Isa;

/// Names of sets, separated by commas, that tests have to run on.
const DEMANDED: &str = "HYPERGEN_TEST_REQUIRE_ISA";

/// The sets to test on.
///
/// # Panics
/// When a demanded set is not there.
pub(crate) fn sets() -> &'static [Isa] {
    let demanded = std::env::var(DEMANDED).unwrap_or_default();
    let missing = missing(&demanded, Isa::supported());
    assert!(missing.is_empty(), "{DEMANDED} demands what this machine has not: {}", missing.join(", "));
    Isa::supported()
}

/// What of a list of names is not among the sets.
pub(crate) fn missing(demanded: &str, sets: &[Isa]) -> Vec<String> {
    let names = demanded.split(',').map(str::trim).filter(|name| !name.is_empty());
    // Names that are none as well: a typing error must not demand nothing.
    let there = |name: &&str| name.parse::<Isa>().is_ok_and(|isa| sets.contains(&isa));
    names.filter(|name| !there(name)).map(str::to_owned).collect()
}

/// One line that says which sets were tested and which were not.
pub(crate) fn summary(sets: &[Isa]) -> String {
    let names = |there: bool| {
        let all = Isa::ALL.iter().filter(|isa| sets.contains(isa) == there);
        all.map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
    };
    match names(false) {
        none if none.is_empty() => format!("instruction sets tested: {}", names(true)),
        lacking => format!("instruction sets tested: {}; not on this machine: {lacking}", names(true)),
    }
}
