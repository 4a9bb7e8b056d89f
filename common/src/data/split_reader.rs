//! The rows that a dataset's split names, in the order in which it names them.

use std::collections::VecDeque;
use std::path::PathBuf;

use super::record::{RawRow, RowReader};
use crate::job::{DatasetSpec, RowRange};

/// Reads the rows of a split, slice by slice.
pub struct SplitReader {
    path: PathBuf,
    rows: RowReader,
    /// Slices that are still to be read, the first of them in part.
    ranges: VecDeque<RowRange>,
    /// Row after the last one that the split asks for; None where it asks for all there are.
    asked: Option<usize>,
    /// Rows of the file, where the split needs to know that; else 0.
    counted: usize,
    /// Number of rows of the file that were passed, those outside of the slices too.
    seen: usize,
    /// Most rows of the file that were passed so far.
    most_seen: usize,
    /// Rows that may still be given out.
    left: u64,
}

impl SplitReader {
    pub fn open(dataset: &DatasetSpec) -> Result<Self, String> {
        let split = dataset.rows().map_err(|reason| format!("split {reason}"))?;
        let count = match split.needs_count() {
            true => RowReader::open(&dataset.path)?.count(),
            false => 0,
        };
        let ranges = split.ranges(count);
        let asked = ranges.iter().map(|(from, to)| match *to {
            usize::MAX => from.saturating_add(1),
            to => to,
        });
        let is_all = ranges == [(0, usize::MAX)];
        Ok(Self {
            asked: asked.max().filter(|_| !is_all),
            path: dataset.path.clone(),
            rows: RowReader::open(&dataset.path)?,
            ranges: ranges.into(),
            counted: count,
            seen: 0,
            most_seen: 0,
            left: dataset.max_samples.unwrap_or(u64::MAX),
        })
    }

    /// How many rows the file has, if the split asks for more than those. For a split that was read to its end.
    pub fn rows_beyond(&self) -> Option<usize> {
        Some(self.most_seen).filter(|seen| self.asked.is_some_and(|asked| *seen < asked))
    }

    /// Rows of the file, where the split was made of shares of them or counts from the end; else 0.
    pub fn counted(&self) -> usize {
        self.counted
    }

    /// The next row of the first slice; None where that is over.
    fn next_of_slice(&mut self, (from, to): RowRange) -> Option<RawRow> {
        while self.seen < to {
            let row = self.rows.next()?;
            self.seen += 1;
            self.most_seen = self.most_seen.max(self.seen);
            if self.seen > from {
                return Some(row);
            }
        }
        None
    }
}

impl Iterator for SplitReader {
    type Item = RawRow;

    fn next(&mut self) -> Option<RawRow> {
        if self.left == 0 {
            return None;
        }
        loop {
            let range = *self.ranges.front()?;
            if let Some(row) = self.next_of_slice(range) {
                self.left -= 1;
                return Some(row);
            }
            self.ranges.pop_front();
            let (from, _) = *self.ranges.front()?;
            if from < self.seen {
                match RowReader::open(&self.path) {
                    Ok(rows) => self.rows = rows,
                    Err(reason) => {
                        self.ranges.clear();
                        return Some(RawRow::Unreadable(0, reason));
                    }
                }
                self.seen = 0;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::job::{DatasetKind, FieldNames};

    fn open(path: &Path, split: &str) -> SplitReader {
        let dataset = DatasetSpec {
            path: path.to_owned(),
            kind: DatasetKind::Auto,
            split: Some(split.to_owned()),
            max_samples: None,
            roles: Vec::new(),
            fields: FieldNames::default(),
        };
        SplitReader::open(&dataset).unwrap()
    }

    #[test]
    fn slices_are_read_in_the_order_in_which_they_stand() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let rows: String = (0..10)
            .map(|row| format!("{{\"text\": \"{row}\"}}\n"))
            .collect();
        std::fs::write(&path, rows).unwrap();
        let lines = |split: &str| -> Vec<u64> {
            let rows = open(&path, split).map(|row| match row {
                RawRow::Value(line, _) => line,
                RawRow::Unreadable(_, reason) => panic!("{reason}"),
            });
            rows.collect()
        };
        assert_eq!(lines("train[:30%]"), [1, 2, 3]);
        assert_eq!(lines("train[-20%:]"), [9, 10]);
        assert_eq!(lines("train[:2]+train[-2:]"), [1, 2, 9, 10]);
        assert_eq!(lines("train[-2:]+train[:2]"), [9, 10, 1, 2]);
        assert_eq!(lines("train[3:5]+train[4:6]"), [4, 5, 5, 6]);
        let mut beyond = open(&path, "train[8:20]");
        assert_eq!(beyond.by_ref().count(), 2);
        assert_eq!(beyond.rows_beyond(), Some(10));
        let mut within = open(&path, "train[-2:]+train[:2]");
        assert_eq!(within.by_ref().count(), 4);
        assert_eq!(within.rows_beyond(), None);
        let mut nothing = open(&path, "train[:1%]");
        assert!(nothing.next().is_none() && nothing.counted() == 10);
    }
}
