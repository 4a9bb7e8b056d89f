//! Blocks as one batch: the used tokens of a slot's blocks in one line, without the padding.
//!
//! Nothing but attention looks across tokens, and attention stays within segments, so the padding and the borders
//! between blocks can go. The batch is a function of the slot's content alone.

use std::sync::Arc;

use common::data::block::{Block, PADDING_SEGMENT};

use super::EngineError;
use super::ops::cross_entropy::Target;
use super::ops::segments::Segments;

/// A slot's tokens as one line, with their positions, segments and targets.
#[derive(Clone, Debug)]
pub struct Batch {
    pub ids: Vec<u32>,
    /// Position of each token, which restarts at 0 with each segment.
    pub positions: Arc<Vec<u32>>,
    pub segments: Arc<Segments>,
    /// The trained tokens, each with the row that predicts it: that of the token before it.
    pub targets: Arc<Vec<Target>>,
}

impl Batch {
    /// Makes a batch of a slot's blocks.
    ///
    /// # Errors
    /// Where a token is outside the vocabulary.
    pub fn from_blocks(blocks: &[Block], vocabulary: usize) -> Result<Self, EngineError> {
        let mut ids = Vec::new();
        let mut positions: Vec<u32> = Vec::new();
        let mut lengths: Vec<usize> = Vec::new();
        let mut targets = Vec::new();
        for block in blocks {
            let mut previous = PADDING_SEGMENT;
            for index in 0..block.used_len() {
                let (token, segment) = (block.tokens[index], block.segments[index]);
                match lengths.last_mut() {
                    Some(length) if segment == previous => {
                        positions.push(*length as u32);
                        *length += 1;
                    }
                    _ => {
                        positions.push(0);
                        lengths.push(1);
                    }
                }
                if block.trained[index] && segment == previous {
                    targets.push(Target {
                        row: ids.len() - 1,
                        id: token,
                    });
                }
                ids.push(token);
                previous = segment;
            }
        }
        check_vocabulary(&ids, vocabulary)?;
        Ok(Self {
            ids,
            positions: Arc::new(positions),
            segments: Arc::new(Segments::new(&lengths)),
            targets: Arc::new(targets),
        })
    }

    /// Makes a batch of one sequence, without targets.
    pub fn from_tokens(tokens: &[u32], vocabulary: usize) -> Result<Self, EngineError> {
        check_vocabulary(tokens, vocabulary)?;
        Ok(Self {
            ids: tokens.to_vec(),
            positions: Arc::new((0..tokens.len() as u32).collect()),
            segments: Arc::new(Segments::new(&[tokens.len()])),
            targets: Arc::new(Vec::new()),
        })
    }

    /// Makes a batch of the tokens of a text from `first` on, which see those before them, too; without targets.
    pub fn continuing(text: &[u32], first: usize, vocabulary: usize) -> Result<Self, EngineError> {
        let new = &text[first..];
        check_vocabulary(new, vocabulary)?;
        Ok(Self {
            ids: new.to_vec(),
            positions: Arc::new((first as u32..text.len() as u32).collect()),
            segments: Arc::new(Segments::continuing(text.len(), first)),
            targets: Arc::new(Vec::new()),
        })
    }

    /// Tokens of the longest segment: the positions that a table of rotary angles must hold.
    pub fn longest_segment(&self) -> usize {
        self.positions
            .iter()
            .max()
            .map_or(0, |last| *last as usize + 1)
    }
}

fn check_vocabulary(ids: &[u32], vocabulary: usize) -> Result<(), EngineError> {
    match ids.iter().find(|id| **id as usize >= vocabulary) {
        Some(&token) => Err(EngineError::TokenOutOfRange { token, vocabulary }),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_dropped_and_positions_restart() {
        let block = |tokens: [u32; 5], segments: [u16; 5], trained: [u8; 5]| Block {
            tokens: tokens.to_vec(),
            segments: segments.to_vec(),
            trained: trained.iter().map(|t| *t == 1).collect(),
        };
        let blocks = [
            block([5, 6, 7, 8, 0], [1, 1, 2, 2, 0], [0, 1, 0, 1, 0]),
            block([9, 10, 11, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]),
        ];
        let batch = Batch::from_blocks(&blocks, 12).unwrap();
        assert_eq!(batch.ids, [5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(*batch.positions, [0, 1, 0, 1, 0, 1, 2]);
        let target = |row, id| Target { row, id };
        assert_eq!(*batch.targets, [target(0, 6), target(2, 8), target(5, 11)]);
        assert!(Batch::from_blocks(&blocks, 11).is_err());
    }
}
