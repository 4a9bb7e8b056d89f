//! A block: one packed sequence, and its fixed-size encoding on disk and on the wire.

use thiserror::Error;

/// Segment number of padding. Examples are numbered from 1 within their block.
pub const PADDING_SEGMENT: u16 = 0;

/// Bytes per token: id (u32), segment (u16), trained (u8), reserved zero (u8), little-endian.
pub const TOKEN_BYTES: usize = 8;

/// One packed sequence. All three lists have `sequence_len` entries; padding comes last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    pub tokens: Vec<u32>,
    /// Segment (example) that each token belongs to; attention and positions never cross from one to another.
    pub segments: Vec<u16>,
    /// The loss mask: whether the token is predicted (from the one before it in its segment) and counts in the loss. Never set on
    /// the first token of a segment, nor on padding.
    pub trained: Vec<bool>,
}

/// Why bytes are no block.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BlockError {
    #[error("a block has {found} bytes where {expected} were expected")]
    Size { found: usize, expected: usize },
    #[error("token {index} of a block is not well formed")]
    Token { index: usize },
}

impl Block {
    /// Bytes of an encoded block.
    pub fn encoded_len(sequence_len: usize) -> usize {
        sequence_len * TOKEN_BYTES
    }

    /// Appends the block's encoding to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + self.tokens.len() * TOKEN_BYTES, 0);
        let places = out[start..].chunks_exact_mut(TOKEN_BYTES);
        let tokens = self.tokens.iter().zip(&self.segments).zip(&self.trained);
        for (place, ((token, segment), trained)) in places.zip(tokens) {
            let mask = u64::from(*trained) << 48;
            let all = u64::from(*token) | u64::from(*segment) << 32 | mask;
            place.copy_from_slice(&all.to_le_bytes());
        }
    }

    /// Decodes a block. Refuses any length but `sequence_len` tokens, and any mask or segment that no packer writes.
    pub fn decode(bytes: &[u8], sequence_len: usize) -> Result<Self, BlockError> {
        let expected = Self::encoded_len(sequence_len);
        if bytes.len() != expected {
            return Err(BlockError::Size {
                found: bytes.len(),
                expected,
            });
        }
        let mut block = Self::default();
        let mut previous = None;
        for (index, token) in bytes.chunks_exact(TOKEN_BYTES).enumerate() {
            let segment = u16::from_le_bytes([token[4], token[5]]);
            let starts_segment = previous != Some(segment);
            let well_formed = match (token[6], token[7]) {
                (0, 0) => true,
                (1, 0) => segment != PADDING_SEGMENT && !starts_segment,
                _ => false,
            } && (!starts_segment
                || segment == PADDING_SEGMENT
                || segment == previous.unwrap_or(PADDING_SEGMENT) + 1);
            if !well_formed || (previous == Some(PADDING_SEGMENT) && segment != PADDING_SEGMENT) {
                return Err(BlockError::Token { index });
            }
            previous = Some(segment);
            block
                .tokens
                .push(u32::from_le_bytes([token[0], token[1], token[2], token[3]]));
            block.segments.push(segment);
            block.trained.push(token[6] == 1);
        }
        Ok(block)
    }

    /// Number of tokens that count in the loss.
    pub fn trained_tokens(&self) -> u64 {
        self.trained.iter().filter(|trained| **trained).count() as u64
    }

    /// Number of tokens before the padding.
    pub fn used_len(&self) -> usize {
        self.segments
            .iter()
            .take_while(|segment| **segment != PADDING_SEGMENT)
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> Block {
        Block {
            tokens: vec![5, 6, 7, 8, 0],
            segments: vec![1, 1, 2, 2, 0],
            trained: vec![false, true, false, true, false],
        }
    }

    #[test]
    fn encoding_round_trips() {
        let mut bytes = Vec::new();
        block().encode(&mut bytes);
        assert_eq!(Block::decode(&bytes, 5), Ok(block()));
    }

    #[test]
    fn hostile_bytes_are_refused() {
        let mut bytes = Vec::new();
        block().encode(&mut bytes);
        assert!(Block::decode(&bytes[1..], 5).is_err());
        for (position, value) in [(6, 1), (7, 1), (4, 3), (14, 2), (36, 1)] {
            let mut hostile = bytes.clone();
            hostile[position] = value;
            assert!(Block::decode(&hostile, 5).is_err(), "byte {position}");
        }
    }
}
