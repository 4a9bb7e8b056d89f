//! Leaves out examples that are too short, and rows whose tokens were there before.
//!
//! Enters: examples, whole rows at a time, in the order of the data. Leaves: those that stay, and how many went. Keeps a
//! digest of 16 bytes for each row, and only where duplicates are looked for.

use std::collections::HashSet;

use super::example::Example;
use crate::job::MixtureSpec;

const DIGEST_BYTES: usize = 16;

/// Decides which examples stay.
#[derive(Debug, Default)]
pub struct Filter {
    min_sample_len: usize,
    /// Digests of the rows so far; None where duplicates stay.
    seen: Option<HashSet<[u8; DIGEST_BYTES]>>,
    /// Number of examples that were too short.
    pub short_examples: u64,
    /// Number of rows that were there before.
    pub duplicate_rows: u64,
}

impl Filter {
    pub fn new(mixture: &MixtureSpec) -> Self {
        Self {
            min_sample_len: mixture.min_sample_len,
            seen: mixture.deduplicate.then(HashSet::new),
            ..Self::default()
        }
    }

    /// The examples of these rows that stay.
    pub fn keep(&mut self, examples: Vec<Example>) -> Vec<Example> {
        if self.min_sample_len == 0 && self.seen.is_none() {
            return examples;
        }
        let mut kept = Vec::with_capacity(examples.len());
        let mut row = Vec::new();
        for example in examples {
            let is_last = !example.is_apart;
            row.push(example);
            if is_last {
                self.keep_row(std::mem::take(&mut row), &mut kept);
            }
        }
        kept
    }

    /// Adds what stays of a row to `kept`.
    fn keep_row(&mut self, mut row: Vec<Example>, kept: &mut Vec<Example>) {
        let before = row.len();
        row.retain(|example| example.ids.len() >= self.min_sample_len);
        self.short_examples += (before - row.len()) as u64;
        if let Some(first) = row.first_mut() {
            first.starts_row = true;
        }
        if let Some(last) = row.last_mut() {
            last.is_apart = false;
        }
        if row.is_empty() {
            return;
        }
        if let Some(seen) = &mut self.seen
            && !seen.insert(digest(&row))
        {
            self.duplicate_rows += 1;
            return;
        }
        kept.extend(row);
    }
}

/// Digest of a row's tokens, and of which of them are learned.
fn digest(row: &[Example]) -> [u8; DIGEST_BYTES] {
    let mut hasher = blake3::Hasher::new();
    for example in row {
        hasher.update(&(example.ids.len() as u64).to_le_bytes());
        let tokens = example.ids.iter().zip(&example.trained);
        let bytes: Vec<u8> = tokens
            .flat_map(|(id, trained)| (*id | u32::from(*trained) << 31).to_le_bytes())
            .collect();
        hasher.update(&bytes);
    }
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..DIGEST_BYTES]);
    digest
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A row of examples of these tokens, of which the second is learned.
    fn row(examples: &[&[u32]]) -> Vec<Example> {
        let count = examples.len();
        let numbered = examples.iter().enumerate();
        let example = |(index, ids): (usize, &&[u32])| Example {
            ids: ids.to_vec(),
            trained: (0..ids.len()).map(|token| token == 1).collect(),
            starts_row: index == 0,
            is_apart: index + 1 < count,
            ..Example::default()
        };
        numbered.map(example).collect()
    }

    fn ids(examples: &[Example]) -> Vec<Vec<u32>> {
        examples.iter().map(|example| example.ids.clone()).collect()
    }

    #[test]
    fn rows_that_were_there_before_are_left_out_by_tokens_and_mask() {
        let mut filter = Filter::new(&MixtureSpec {
            deduplicate: true,
            ..MixtureSpec::default()
        });
        let mut other_mask = row(&[&[1, 2, 3]]);
        other_mask[0].trained = vec![false, true, true];
        let rows = [
            row(&[&[1, 2, 3]]),
            row(&[&[1, 2, 3]]),
            other_mask,
            row(&[&[1, 2], &[3]]),
        ];
        let kept = filter.keep(rows.concat());
        assert_eq!(kept.len(), 4);
        // In a later batch, too.
        assert!(filter.keep(row(&[&[1, 2], &[3]])).is_empty());
        assert_eq!((filter.duplicate_rows, filter.short_examples), (2, 0));
    }

    #[test]
    fn short_examples_are_left_out_and_the_rest_of_their_row_stays_a_row() {
        let mut filter = Filter::new(&MixtureSpec {
            min_sample_len: 3,
            ..MixtureSpec::default()
        });
        let rows = [row(&[&[1, 2], &[1, 2, 3], &[4]]), row(&[&[1, 2]])];
        let kept = filter.keep(rows.concat());
        assert_eq!(ids(&kept), [vec![1, 2, 3]]);
        assert!(kept[0].starts_row && !kept[0].is_apart);
        assert_eq!(filter.short_examples, 3);
    }

    #[test]
    fn nothing_is_left_out_where_nothing_is_asked_for() {
        let mut filter = Filter::new(&MixtureSpec::default());
        let rows = [row(&[&[]]), row(&[&[1]]), row(&[&[1]])].concat();
        assert_eq!(filter.keep(rows.clone()), rows);
    }
}
