//! A compact list of tokens with their loss mask: four bytes each.
//!
//! Enters: token ids in order. Leaves: any range of them. Grows by whole chunks, so that nothing is ever copied.

use std::ops::Range;

/// Tokens in a chunk.
const CHUNK: usize = 1 << 18;

/// The bit that says that a token is learned. No vocabulary reaches it.
pub const TRAINED: u32 = 1 << 31;

/// Token ids with their loss mask, in chunks.
#[derive(Default)]
pub struct Tokens {
    chunks: Vec<Vec<u32>>,
    len: usize,
}

impl Tokens {
    pub fn extend(&mut self, ids: &[u32], trained: &[bool]) {
        for (id, trained) in ids.iter().zip(trained) {
            if self.len.is_multiple_of(CHUNK) {
                self.chunks.push(Vec::with_capacity(CHUNK));
            }
            assert!(
                *id < TRAINED,
                "token ids are below the size of a vocabulary"
            );
            let bit = if *trained { TRAINED } else { 0 };
            if let Some(chunk) = self.chunks.last_mut() {
                chunk.push(*id | bit);
            }
            self.len += 1;
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Ids in a range, and whether each is learned.
    pub fn range(&self, range: Range<usize>) -> impl Iterator<Item = (u32, bool)> + '_ {
        range.map(|index| {
            let packed = self.chunks[index / CHUNK][index % CHUNK];
            (packed & !TRAINED, packed & TRAINED != 0)
        })
    }

    /// Ids in a range that are learned.
    pub fn trained(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        self.range(range)
            .filter(|(_, trained)| *trained)
            .map(|(id, _)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_go_over_the_ends_of_chunks() {
        let mut tokens = Tokens::default();
        let ids: Vec<u32> = (0..CHUNK as u32 + 10).collect();
        let trained: Vec<bool> = ids.iter().map(|id| id % 3 == 0).collect();
        tokens.extend(&ids[..7], &trained[..7]);
        tokens.extend(&ids[7..], &trained[7..]);
        assert_eq!(tokens.len(), ids.len());
        let range = CHUNK - 4..CHUNK + 4;
        let found: Vec<(u32, bool)> = tokens.range(range.clone()).collect();
        let expected = ids[range.clone()].iter().map(|id| (*id, id % 3 == 0));
        assert_eq!(found, expected.collect::<Vec<_>>());
        assert!(tokens.trained(range).all(|id| id % 3 == 0));
    }
}
