//! Plans of products on tiles, without a tile: whatever the sizes, every output
//! is computed once, and nothing is read or written outside of what is there.

use std::collections::HashSet;

use proptest::prelude::*;

use super::super::packed::TILE_K;
use super::super::tiles::{Direct, Gathered};
use super::*;
use crate::AlignedVec;
use crate::gemm::Rows;

/// Where the scratch memory of a plan would begin: far from any operand.
const SCRATCH: usize = 1 << 60;

/// What a plan is made for beside its left operand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Around {
    panels: usize,
    unit: usize,
    threads: usize,
    cache: usize,
}

/// Panels, panels that stay together, and threads, with a cache of a megabyte.
impl From<[usize; 3]> for Around {
    fn from([panels, unit, threads]: [usize; 3]) -> Self {
        Self { panels, unit, threads, cache: 1 << 20 }
    }
}

/// Weights, threads and caches of any size.
pub(crate) fn around() -> impl Strategy<Value = Around> {
    (1..=40_usize, 1..=2_usize, 1..=70_usize, 18..=22_u32).prop_map(|(panels, unit, threads, cache)| Around {
        panels: panels * unit,
        unit,
        threads,
        cache: 1 << cache,
    })
}

/// A size: small ones, any up to beyond the largest picture's side, and some that mattered.
pub(crate) fn side() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 1..=70_usize,
        3 => 1..=4200_usize,
        2 => prop::sample::select(vec![64, 128, 135, 270, 540, 1024, 1080, 2047, 2048, 2049, 2056, 2064, 4095, 4096]),
    ]
}

/// Asserts that a plan covers the output once, and stays inside its memory:
/// `operand` says whether an operand's bytes from one address to another may be read.
pub(crate) fn check<L: Left>(a: &L, k: usize, with: Around, operand: impl Fn(usize, usize) -> bool) {
    let Around { panels, unit, threads, cache } = with;
    let plan = Plan::new(a, panels, unit, threads, cache);
    let places: Vec<Place> = (0..plan.blocks()).map(|i| plan.place(i)).collect();
    let corners: HashSet<_> = places.iter().map(|p| (p.rows.start, p.panels.start)).collect();
    assert_eq!(corners.len(), places.len(), "a block for each place");
    let rows: Vec<&Place> = places.iter().filter(|p| p.panels.start == 0).collect();
    let columns: Vec<&Place> = places.iter().filter(|p| p.rows.start == 0).collect();
    assert_eq!(rows.len() * columns.len(), places.len(), "blocks are a grid");
    follow_one_another(rows.iter().map(|p| p.rows.clone()), a.count());
    follow_one_another(columns.iter().map(|p| p.panels.clone()), panels);
    assert!(columns.iter().all(|p| p.panels.len().is_multiple_of(unit)), "values stay with their gates");

    covers_k(a, k, rows[0].rows.len());
    for place in rows {
        check_block(a, place, &operand);
    }
}

fn follow_one_another(ranges: impl Iterator<Item = Range<usize>>, end: usize) {
    let mut at = 0;
    for range in ranges {
        assert!(range.start == at && range.end > at, "{range:?} behind {at}");
        at = range.end;
    }
    assert_eq!(at, end);
}

/// The runs of all chunks take every step of a panel once.
fn covers_k<L: Left>(a: &L, k: usize, rows: usize) {
    let mut list = [Run { a: 0, b: 0, steps: 0 }; MAX_RUNS];
    let mut all = vec![];
    for chunk in 0..a.chunks() {
        let count = a.runs(rows, chunk, &mut list);
        all.extend_from_slice(&list[..count]);
    }
    all.sort_by_key(|run| run.b);
    let ranges = all.iter().map(|run| run.b..run.b + run.steps * STEP * 2);
    follow_one_another(ranges, k.div_ceil(TILE_K) * STEP * 2);
    for pairs in [1, 2, 7, 64, 200] {
        let run = all.first().copied().unwrap_or(Run { a: 0, b: 0, steps: 1 });
        let mut at = run.b;
        for pair in 0..pairs {
            let (start, lines) = brought_ahead(&run, pair, pairs);
            assert!(start == at, "lines are brought once");
            at += lines * 64;
        }
        assert_eq!(at, run.b + run.steps * STEP * 2, "all lines are brought");
    }
}

fn check_block<L: Left>(a: &L, place: &Place, operand: &impl Fn(usize, usize) -> bool) {
    let tiles = a.tiles(place.rows.clone());
    let room = Plan::room(a, place, tiles);
    let waiting = room.accumulators / ACC_LEN;
    assert!(waiting >= if a.chunks() > 1 { tiles.div_ceil(2) * place.panels.len() } else { RING });
    assert!((room.left + room.accumulators) * 4 < 256 << 20, "scratch of {room:?} for {place:?}");
    let scratch = SCRATCH..SCRATCH + room.left * 4;

    // The furthest byte that any run reads in a row.
    let mut list = [Run { a: 0, b: 0, steps: 0 }; MAX_RUNS];
    let mut furthest = 0;
    for chunk in 0..a.chunks() {
        let count = a.runs(place.rows.len(), chunk, &mut list);
        furthest = list[..count].iter().map(|run| run.a + run.steps * TILE_K * 2).fold(furthest, usize::max);
    }
    let (mut at, mut count) = (place.rows.start, 0);
    a.spots(place.rows.clone(), std::ptr::without_provenance(SCRATCH), |spot| {
        assert!(spot.row == at && (1..=TILE_ROWS).contains(&spot.rows), "{spot:?} behind row {at}");
        let start = spot.a.addr();
        let end = start + (TILE_ROWS - 1) * a.stride() + furthest;
        let inside = scratch.contains(&start) && end <= scratch.end;
        assert!(furthest == 0 || inside || operand(start, end), "{start}..{end} of {scratch:?}");
        at += spot.rows;
        count += 1;
    });
    assert_eq!((at, count), (place.rows.end, tiles));
    let unit_tiles = a.tiles(place.rows.start..place.rows.start + a.unit().min(place.rows.len()));
    assert!(tiles <= BLOCK_TILES.max(unit_tiles), "{tiles} tiles in a block");
}

/// Rows of which only the number matters.
struct Many(usize);

impl Rows<bf16> for Many {
    fn count(&self) -> usize {
        self.0
    }
    unsafe fn copy<S: Simd, E: crate::Element>(&self, _: usize, _: usize, _: usize, _: *mut E) {
        unreachable!("a plan copies nothing");
    }
    fn multiply_on_tiles(
        &self,
        _: &crate::Cpu,
        _: &crate::PackedMatrix<bf16>,
        _: &crate::gemm::Output<'_, bf16>,
    ) {
        unreachable!("a plan multiplies nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn rows_where_they_lie(m in prop_oneof![side(), 1..=100_000_usize], k in 1..=160_usize, with in around()) {
        let k = k * TILE_K;
        // Only the place of the first value is looked at.
        let data = AlignedVec::<bf16>::zeroed(32);
        if let Some(a) = Direct::new(data.as_slice(), m, k) {
            let start = data.as_slice().as_ptr().addr();
            check(&a, k, with, |from, to| from >= start && to <= start + m * k * 2);
        }
    }

    #[test]
    fn rows_that_are_copied(m in prop_oneof![side(), 1..=100_000_usize], k in 0..=12_000_usize, with in around()) {
        check(&Gathered::new(&Many(m), k), k, with, |_, _| false);
    }
}
