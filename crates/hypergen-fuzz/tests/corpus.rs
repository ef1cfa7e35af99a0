//! Every input of the corpus, and some hundreds of mutations of them: the short
//! form of what `fuzz/run` does for hours, on any compiler. An input that fails is left
//! in the target folder, and belongs into the corpus once it is understood.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypergen_fuzz::mutate::{Random, mutated};
use hypergen_fuzz::{TARGETS, Target};

/// Mutations of a run; `HYPERGEN_FUZZ_RUNS` asks for more.
const RUNS: usize = 300;
/// What takes longer hangs: a limit, not a measurement, far above what any input takes
/// without optimisation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Failures of a target that are looked for.
const ENOUGH: usize = 20;

/// Memory is counted for the whole process, so one target runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut inputs: Vec<(String, Vec<u8>)> = files
        .map(|file| file.expect("an entry").path())
        .map(|path| {
            (path.file_name().expect("a name").to_string_lossy().into_owned(), fs::read(&path).expect("read"))
        })
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{name} has no corpus");
    inputs
}

/// Runs an input, which is on the disk until it is known to be fine: an abort leaves
/// it there. Returns what is wrong, if anything is.
fn run(target: &Target, number: usize, what: &str, data: &[u8]) -> Option<String> {
    let name = format!("fuzz-{}-{number}", target.name);
    let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, data).expect("written");
    let start = Instant::now();
    let panicked = catch_unwind(AssertUnwindSafe(|| target.run(data))).is_err();
    let taken = start.elapsed();
    if panicked || taken >= PATIENCE {
        let why = if panicked { "fails".to_owned() } else { format!("takes {taken:?}") };
        return Some(format!("{what} {why}; the input is {}", path.display()));
    }
    fs::remove_file(&path).expect("removed");
    None
}

fn check(name: &str) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let target = Target::named(name).expect("a target");
    let inputs = corpus(name);
    let replayed = inputs.iter().map(|(file, data)| (format!("{name}/{file}"), data.clone()));
    let runs = std::env::var("HYPERGEN_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(RUNS);
    let seeds: Vec<Vec<u8>> = inputs.iter().map(|(_, data)| data.clone()).collect();
    let mut random = Random(0);
    let mutations = (0..runs).map(|i| (format!("mutation {i} of {name}"), mutated(&seeds, &mut random)));
    let all = replayed.chain(mutations).enumerate();
    let failures = all.filter_map(|(number, (what, data))| run(target, number, &what, &data));
    let failures: Vec<String> = failures.take(ENOUGH).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A test for each target, so that its name says what broke.
macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*

        #[test]
        fn every_target_has_its_test_and_every_corpus_its_target() {
            let mut tested = vec![$(stringify!($name)),*];
            tested.sort_unstable();
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(tested, names);
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
            let folders = fs::read_dir(folder).expect("the corpus").map(|entry| entry.expect("an entry").file_name());
            let mut folders: Vec<String> = folders.map(|name| name.to_string_lossy().into_owned()).collect();
            folders.sort();
            assert_eq!(folders, names);
        }
    };
}

targets!(body, checkpoint, http, lora, model, names, picture, prompt, scheduler, settings, single_file);
