//! How an attention on tiles is cut: tasks, items, and the sizes of what is
//! packed and kept. Nothing here computes, so that plans are tested on machines
//! that have no tiles.

use std::ops::Range;

use super::AttentionShape;

/// 32-bit words of a tile: 16 rows of 64 bytes, packed one after another on
/// cache lines, because rows that straddle lines load three times slower.
pub(super) const TILE: usize = 256;
/// Queries of an item.
pub(super) const QUERIES: usize = 32;
/// Keys of an item. The order of the sums depends on it, so it is the same for
/// every shape.
pub(super) const KEYS: usize = 64;

/// Sizes of packed heads, in tiles and 32-bit words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Tiles over the width of a head for the scores, 32 columns each.
    pub(super) steps: usize,
    /// Tiles over the width of a head and the column of ones, 16 columns each.
    pub(super) columns: usize,
    /// Words of a head's keys: `[kv / 32][steps][2]` tiles.
    pub(super) keys: usize,
    /// Words of a head's values: `[kv / 32][columns]` tiles.
    values: usize,
}

impl Layout {
    pub(super) fn new(s: &AttentionShape) -> Self {
        let (steps, columns, groups) =
            (s.head_dim.div_ceil(32), (s.head_dim + 1).div_ceil(16), s.kv_len.div_ceil(32));
        Self { steps, columns, keys: groups * 2 * steps * TILE, values: groups * columns * TILE }
    }

    /// Words of a head.
    pub(super) fn head(&self) -> usize {
        self.keys + self.values
    }

    /// Words of an item's queries: `[2][steps]` tiles.
    pub(super) fn queries(&self) -> usize {
        2 * self.steps * TILE
    }

    /// Words of an item's output: `[columns][2]` tiles.
    pub(super) fn output(&self) -> usize {
        2 * self.columns * TILE
    }

    /// Where an item's keys begin in a head.
    pub(super) fn keys_of(&self, item: Item) -> usize {
        item.start / 32 * 2 * self.steps * TILE
    }

    /// Where an item's values begin in a head.
    pub(super) fn values_of(&self, item: Item) -> usize {
        self.keys + item.start / 32 * self.columns * TILE
    }
}

/// Who computes what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Items of queries that one task takes, so that keys and values that were
    /// brought to the first cache serve all of them.
    units: usize,
    /// Tasks over the queries of a head.
    blocks: usize,
    /// Heads that a task takes.
    heads: usize,
    /// Heads of all pictures.
    all_heads: usize,
    q_len: usize,
}

impl Plan {
    /// The plan for this many threads with `cache` bytes of second-level cache.
    pub(super) fn new(s: &AttentionShape, layout: &Layout, threads: usize, cache: usize) -> Self {
        let all_heads = s.batch * s.heads;
        // One item of queries where there would not be work for all threads.
        let all = s.q_len.div_ceil(QUERIES);
        let units = (all_heads * all).div_ceil(4 * threads).min(all).clamp(1, 2);
        let blocks = s.q_len.div_ceil(units * QUERIES);
        // Few keys, as those of a prompt, stay near for all heads, so a task takes
        // all heads of its queries: these lie side by side in the same lines.
        let few = s.heads * layout.head() * 4 <= cache / 4;
        let heads = if few && s.batch * blocks >= 4 * threads { s.heads } else { 1 };
        Self { units, blocks, heads, all_heads, q_len: s.q_len }
    }

    /// Tasks in all.
    pub(super) fn tasks(&self) -> usize {
        self.all_heads / self.heads * self.blocks
    }

    /// Heads and queries of a task.
    pub(super) fn task(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let (head, query) = (i / self.blocks * self.heads, i % self.blocks * self.units * QUERIES);
        (head..head + self.heads, query..self.q_len.min(query + self.units * QUERIES))
    }
}

/// Some 32 queries against some 64 keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    /// Which of the task's 32 queries.
    pub(super) unit: usize,
    /// The first key.
    pub(super) start: usize,
    /// Keys.
    pub(super) len: usize,
}

/// The items of a task, in the order in which they are computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Items {
    /// Times that the task has 32 queries.
    pub(super) units: usize,
    /// Keys that any of its queries sees.
    visible: usize,
}

impl Items {
    pub(super) fn new(s: &AttentionShape, queries: &Range<usize>) -> Self {
        Self { units: queries.len().div_ceil(QUERIES), visible: s.visible(queries.end - 1) }
    }

    pub(super) fn count(&self) -> usize {
        self.visible.div_ceil(KEYS) * self.units
    }

    /// The `i`th of them.
    pub(super) fn item(&self, i: usize) -> Item {
        let start = i / self.units * KEYS;
        Item { unit: i % self.units, start, len: KEYS.min(self.visible - start) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Every query of every head is in one task, meets every key that it sees
        /// once, and nothing lies outside of what is packed.
        #[test]
        fn every_query_meets_its_keys_once(
            batch in 1..=3_usize, heads in 1..=20_usize, head_dim in 1..=600_usize,
            q_len in prop_oneof![1..=200_usize, 1..=4096_usize], kv_len in prop_oneof![1..=200_usize, 1..=4096_usize],
            causal in any::<bool>(), threads in 1..=64_usize, cache in 18..=22_u32,
        ) {
            let s = AttentionShape { batch, heads, head_dim, q_len, kv_len, scale: 1.0, causal };
            let layout = Layout::new(&s);
            prop_assert!(layout.steps * 32 >= head_dim && layout.columns * 16 > head_dim);
            let plan = Plan::new(&s, &layout, threads, 1 << cache);
            let mut next = vec![0; batch * heads];
            for i in 0..plan.tasks() {
                let (of, queries) = plan.task(i);
                for head in of {
                    prop_assert!(next[head] == queries.start && !queries.is_empty());
                    next[head] = queries.end;
                }
                let items = Items::new(&s, &queries);
                let mut seen = vec![0; items.units];
                for item in (0..items.count()).map(|i| items.item(i)) {
                    prop_assert!(item.start == seen[item.unit] && (1..=KEYS).contains(&item.len));
                    seen[item.unit] += item.len;
                    let groups = item.len.div_ceil(32);
                    prop_assert!(layout.keys_of(item) + groups * layout.queries() <= layout.keys);
                    prop_assert!(layout.values_of(item) + groups * layout.columns * TILE <= layout.head());
                }
                prop_assert!(seen.iter().all(|&keys| keys == s.visible(queries.end - 1)));
            }
            prop_assert!(next.iter().all(|&queries| queries == q_len));
        }
    }
}
