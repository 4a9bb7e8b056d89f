//! Which rows of a split are read: one of several parts that are drawn from the seed, behind those that are passed over.
//!
//! Enters: what the job says, and the number of rows where it takes that. Leaves: for each row in turn whether it is read.
//! The parts are as large as those of `Dataset.shard` of the library `datasets` 5.2, of rows that were shuffled before, as
//! Axolotl does; who draws is ours. They hold every row once, and a part's rows stay in the order of the data.

use crate::job::{Selection, Shard};
use crate::rng::CounterRng;

/// Random stream that draws the rows of the parts.
const STREAM_SHARDS: u64 = u64::from_be_bytes(*b"shards\0\0");

/// Says of each row in turn whether it is read.
#[derive(Debug, Default)]
pub struct Chooser {
    /// For each row whether it is in the part; None where all are.
    drawn: Option<Vec<bool>>,
    /// Number of rows that were asked about.
    seen: usize,
    /// Number of rows that are still to be passed over.
    skip: u64,
}

impl Chooser {
    /// `rows` counts the rows, where a part of them is read. An error says why there is no such part.
    pub fn new(
        selection: &Selection,
        seed: u64,
        rows: impl FnOnce() -> Result<usize, String>,
    ) -> Result<Self, String> {
        let drawn = match selection.shard {
            Some(shard) => Some(drawn(shard, rows()?, seed)?),
            None => None,
        };
        Ok(Self {
            drawn,
            seen: 0,
            skip: selection.skip,
        })
    }

    /// Whether the next row is read.
    pub fn takes_next(&mut self) -> bool {
        let is_drawn = self
            .drawn
            .as_ref()
            .is_none_or(|drawn| drawn.get(self.seen).copied().unwrap_or(false));
        self.seen += 1;
        if is_drawn && self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        is_drawn
    }
}

/// For each of so many rows whether it is in the part.
fn drawn(shard: Shard, rows: usize, seed: u64) -> Result<Vec<bool>, String> {
    let too_many = || {
        format!(
            "shards: {} parts of {rows} rows leave some without any: give as many as there are rows at most",
            shard.count
        )
    };
    let count = usize::try_from(shard.count).map_err(|_| too_many())?;
    let index = usize::try_from(shard.index).map_err(|_| too_many())?;
    if count > rows {
        return Err(too_many());
    }
    let mut order: Vec<usize> = (0..rows).collect();
    // The same draw for every part of the same rows, so that no two parts share one.
    CounterRng::new(seed, &[STREAM_SHARDS]).shuffle(&mut order);
    let (size, larger) = (rows / count, rows % count);
    let start = size * index + index.min(larger);
    let end = start + size + usize::from(index < larger);
    let mut drawn = vec![false; rows];
    for row in &order[start..end] {
        drawn[*row] = true;
    }
    Ok(drawn)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rows(count: u64, index: u64, seed: u64, rows: usize) -> Vec<usize> {
        let selection = Selection {
            shard: Some(Shard { count, index }),
            ..Selection::default()
        };
        let mut chooser = Chooser::new(&selection, seed, || Ok(rows)).unwrap();
        (0..rows).filter(|_| chooser.takes_next()).collect()
    }

    #[test]
    fn parts_hold_every_row_once_and_are_as_large_as_those_of_the_library_datasets() {
        let parts: Vec<Vec<usize>> = (0..4).map(|index| rows(4, index, 42, 11)).collect();
        // Dataset.from_dict({"a": range(11)}).shard(4, i)
        let sizes: Vec<usize> = parts.iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 3, 3, 2]);
        let mut all = parts.concat();
        all.sort_unstable();
        assert_eq!(all, (0..11).collect::<Vec<_>>());
        assert!(parts.iter().all(|part| part.is_sorted()));
    }

    #[test]
    fn a_part_is_drawn_from_the_seed() {
        assert_eq!(rows(3, 1, 7, 300), rows(3, 1, 7, 300));
        assert_ne!(rows(3, 1, 7, 300), rows(3, 1, 8, 300));
        assert_ne!(rows(3, 0, 7, 300), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn rows_are_passed_over_within_the_part() {
        let selection = Selection {
            shard: Some(Shard { count: 2, index: 0 }),
            skip: 3,
            ..Selection::default()
        };
        let mut chooser = Chooser::new(&selection, 42, || Ok(10)).unwrap();
        let taken: Vec<usize> = (0..10).filter(|_| chooser.takes_next()).collect();
        assert_eq!(taken, rows(2, 0, 42, 10)[3..]);
    }

    #[test]
    fn more_parts_than_rows_are_refused() {
        let selection = Selection {
            shard: Some(Shard { count: 3, index: 0 }),
            ..Selection::default()
        };
        let error = Chooser::new(&selection, 1, || Ok(2)).unwrap_err();
        assert!(error.contains("3 parts of 2 rows"), "{error}");
    }
}
