//! What holds for the store whatever is put into it: its bound, that the oldest
//! go first, that time ends what is left, and that the disk holds just that.

use proptest::prelude::*;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

/// Names and sizes of the files on the disk.
fn on_disk(store: &ImageStore) -> (usize, u64) {
    let files = std::fs::read_dir(store.folder()).expect("the folder").map(|file| file.expect("a file"));
    let sizes: Vec<u64> = files.map(|file| file.metadata().expect("a size").len()).collect();
    (sizes.len(), sizes.iter().sum())
}

/// How many of the last ones fit into the bound.
fn fitting(sizes: &[usize], bound: u64) -> usize {
    let mut room = bound;
    let fits = |size: &&usize| {
        let left = room.checked_sub(**size as u64);
        room = left.unwrap_or(0);
        left.is_some()
    };
    sizes.iter().rev().take_while(fits).count()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_last_ones_that_fit_are_kept(sizes in prop::collection::vec(0..=120_usize, 1..30), bound in 1..=300_u64) {
        let store = ImageStore::open(None, HOUR, bound).expect("a temporary folder");
        let (mut names, mut stored) = (vec![], vec![]);
        for &size in &sizes {
            match store.put(&vec![7; size], ImageFormat::Png) {
                Ok(name) => {
                    names.push(name);
                    stored.push(size);
                }
                Err(StoreError::TooLarge { .. }) => prop_assert!(size as u64 > bound),
                Err(e) => panic!("{e}"),
            }
            prop_assert!(store.usage().1 <= bound);
            prop_assert_eq!(on_disk(&store), store.usage());
        }
        let kept = fitting(&stored, bound);
        for (i, name) in names.iter().enumerate() {
            let found = store.get(name).expect("the disk works").map(|stored| stored.bytes.len());
            let there = i >= names.len() - kept;
            prop_assert_eq!(found, there.then_some(stored[i]), "{} of {}", i, names.len());
        }
    }

    #[test]
    fn what_an_earlier_server_left_ages_on_and_keeps_the_bound(
        ages in prop::collection::vec((0..=100_u64, 1..=50_usize), 0..20),
        bound in 1..=300_u64,
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let now = SystemTime::now();
        // Minutes, with half of one beside the hour's end: this test takes less.
        let mut left: Vec<(u64, usize, Name)> = vec![];
        for (minutes, size) in ages {
            let name = Name::random(ImageFormat::Webp).expect("random numbers");
            let path = folder.path().join(name.to_string());
            std::fs::write(&path, vec![1; size]).expect("written");
            let modified = now - Duration::from_secs(60 * minutes + 30);
            std::fs::File::options().write(true).open(&path).and_then(|f| f.set_modified(modified)).expect("dated");
            left.push((minutes, size, name));
        }
        let store = ImageStore::open(Some(folder.path()), HOUR, bound).expect("opened");
        let bytes = store.usage().1;
        prop_assert!(bytes <= bound, "{} bytes are kept of {}", bytes, bound);
        prop_assert_eq!(on_disk(&store), store.usage());
        let young: u64 = left.iter().filter(|(minutes, ..)| *minutes < 60).map(|(_, size, _)| *size as u64).sum();
        for (minutes, size, name) in &left {
            let found = store.get(name).expect("the disk works").map(|stored| stored.bytes.len());
            if *minutes >= 60 {
                prop_assert_eq!(found, None, "after {} minutes", minutes);
            } else if young <= bound {
                prop_assert_eq!(found, Some(*size), "after {} minutes", minutes);
            }
        }
    }
}
