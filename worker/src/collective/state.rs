//! Weights and optimizer state on their way to a worker that is behind, in pieces: over the mesh
//! ([`state_transfer`](super::state_transfer)) or over a feed ([`feed`](super::feed)).
//!
//! The receiver trusts nothing: step, layout and lengths must be the ones due, every piece carries a checksum, and
//! weights and optimizer state must each have the digest that was announced.

use std::ops::Range;
use std::sync::Arc;

use common::files::layout::Layout;
use common::files::snapshot::Snapshot;
use common::files::{FlatWeights, Moment};

use super::frame::PIECE_SCALARS;

/// Most bytes of a piece.
const PIECE_BYTES: usize = PIECE_SCALARS * size_of::<f32>();

/// Fixed bytes of a state's header: step, scalars, then three digests in hex. What the sender remembers follows.
const HEADER_BYTES: usize = 16 + 3 * DIGEST_BYTES;
const DIGEST_BYTES: usize = 64;

/// A worker's state as it is handed to another, who then stands in for the first.
#[derive(Clone, Debug, PartialEq)]
pub struct StateCopy {
    pub snapshot: Snapshot,
    /// What the state's owner remembers of its newest updates. It means nothing here; at most 8 MiB with the header.
    pub memory: Vec<u8>,
}

/// Announces a state: its step, its layout, and the digests that it must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StateHeader {
    pub step: u64,
    scalars: u64,
    layout_digest: String,
    weights_digest: String,
    optimizer_digest: String,
    memory: Vec<u8>,
}

impl StateHeader {
    pub fn of(state: &StateCopy) -> Self {
        let StateCopy { snapshot, memory } = state;
        Self {
            step: snapshot.step,
            scalars: snapshot.layout.scalars as u64,
            layout_digest: snapshot.layout.digest(),
            weights_digest: snapshot.weights_digest(),
            optimizer_digest: snapshot.optimizer_digest(),
            memory: memory.clone(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.memory.len());
        bytes.extend(self.step.to_le_bytes());
        bytes.extend(self.scalars.to_le_bytes());
        bytes.extend(self.layout_digest.as_bytes());
        bytes.extend(self.weights_digest.as_bytes());
        bytes.extend(self.optimizer_digest.as_bytes());
        bytes.extend(&self.memory);
        bytes
    }

    /// Reads an announcement, or says why it is no state of this layout.
    pub fn decode(bytes: &[u8], layout: &Layout) -> Result<Self, String> {
        let Some((bytes, memory)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err("announced its state in a header that is cut short".to_owned());
        };
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let digest = |index: usize| {
            let at = 16 + index * DIGEST_BYTES;
            String::from_utf8_lossy(&bytes[at..at + DIGEST_BYTES]).into_owned()
        };
        let header = Self {
            step: word(0),
            scalars: word(8),
            layout_digest: digest(0),
            weights_digest: digest(1),
            optimizer_digest: digest(2),
            memory: memory.to_vec(),
        };
        if header.scalars != layout.scalars as u64 || header.layout_digest != layout.digest() {
            return Err("has other trainable tensors (layout digests differ)".to_owned());
        }
        Ok(header)
    }

    /// Digest of the announcement: two states with one identity are equal to the bit.
    pub fn identity(&self) -> [u8; 32] {
        *blake3::hash(&self.encode()).as_bytes()
    }
}

/// Number of pieces that a state of this layout is sent in.
pub(super) fn piece_count(layout: &Layout) -> usize {
    let buffers = layout.buffer_bytes();
    buffers
        .iter()
        .map(|bytes| bytes.div_ceil(PIECE_BYTES))
        .sum()
}

/// The bytes of one piece, of those that there are. No piece reaches over two buffers.
pub(super) fn piece(snapshot: &Snapshot, index: usize) -> &[u8] {
    let buffers = snapshot.buffers();
    let lengths = buffers.iter().map(|buffer| buffer.len());
    let (buffer, range) = place(lengths, index).expect("a state has this piece");
    &buffers[buffer][range]
}

/// The buffer that a piece is of, and its bytes there. None behind the last one.
fn place(lengths: impl Iterator<Item = usize>, mut index: usize) -> Option<(usize, Range<usize>)> {
    for (buffer, length) in lengths.enumerate() {
        let pieces = length.div_ceil(PIECE_BYTES);
        if index < pieces {
            let start = index * PIECE_BYTES;
            return Some((buffer, start..length.min(start + PIECE_BYTES)));
        }
        index -= pieces;
    }
    None
}

/// A state that arrives piece by piece.
pub(super) struct Assembly {
    header: StateHeader,
    snapshot: Snapshot,
    received: usize,
}

impl Assembly {
    /// Begins to receive a state whose header was decoded for this layout.
    pub fn new(header: StateHeader, layout: Arc<Layout>) -> Self {
        let snapshot = Snapshot {
            step: header.step,
            weights: FlatWeights::zeros(&layout),
            moments: (0..layout.moments.count)
                .map(|_| Moment::zeros(&layout))
                .collect(),
            layout,
        };
        Self {
            header,
            snapshot,
            received: 0,
        }
    }

    pub fn header(&self) -> &StateHeader {
        &self.header
    }

    /// Number of pieces that are here.
    pub fn received(&self) -> usize {
        self.received
    }

    /// The index of the piece that is due, and the place for its bytes. None where all are here.
    pub fn next_piece(&mut self) -> Option<(usize, &mut [u8])> {
        let index = self.received;
        let mut buffers = self.snapshot.buffers_mut();
        let lengths = buffers.iter().map(|buffer| buffer.len());
        let (buffer, range) = place(lengths, index)?;
        Some((index, &mut buffers.swap_remove(buffer)[range]))
    }

    /// Counts the piece that was due: its bytes are in their place.
    pub fn advance(&mut self) {
        self.received += 1;
    }

    /// Returns the whole state, or says why it is not the one that was announced.
    pub fn finish(self) -> Result<StateCopy, String> {
        let Self {
            header, snapshot, ..
        } = self;
        if snapshot.weights_digest() != header.weights_digest {
            return Err("sent weights that differ from the digest it announced".to_owned());
        }
        if snapshot.optimizer_digest() != header.optimizer_digest {
            return Err(
                "sent optimizer state that differs from the digest it announced".to_owned(),
            );
        }
        Ok(StateCopy {
            snapshot,
            memory: header.memory,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::files::Flat;
    use common::job::{BaseDtype, MomentDtype, Moments, Optimizer};
    use half::bf16;

    use super::*;

    const SCALARS: usize = 2 * PIECE_SCALARS + 3;

    fn state() -> StateCopy {
        let flat = |seed: f32| (0..SCALARS).map(|i| seed + i as f32).collect::<Flat>();
        let snapshot = Snapshot {
            step: 4,
            layout: Arc::new(Layout::new([("a".into(), vec![SCALARS])])),
            weights: flat(0.5).into(),
            moments: vec![flat(-0.25).into(), flat(0.125).into()],
        };
        StateCopy {
            snapshot,
            memory: vec![1, 2, 3],
        }
    }

    /// Sends `sent` under the header of `announced`.
    fn assemble(announced: &StateCopy, sent: &StateCopy) -> Result<StateCopy, String> {
        let header = StateHeader::of(announced).encode();
        let header = StateHeader::decode(&header, &announced.snapshot.layout)?;
        let mut assembly = Assembly::new(header, announced.snapshot.layout.clone());
        while let Some((index, place)) = assembly.next_piece() {
            place.copy_from_slice(piece(&sent.snapshot, index));
            assembly.advance();
        }
        let pieces = piece_count(&announced.snapshot.layout);
        assert_eq!(assembly.received(), pieces);
        assembly.finish()
    }

    #[test]
    fn a_state_arrives_whole() {
        assert_eq!(assemble(&state(), &state()), Ok(state()));
        for count in [0, 1] {
            let mut state = state();
            state.snapshot.moments.truncate(count);
            state.snapshot.layout = Arc::new(with_moments(&state, count));
            assert_eq!(assemble(&state, &state), Ok(state));
        }
        for state in [eight_bits(), in_bfloat16()] {
            assert_eq!(assemble(&state, &state), Ok(state));
        }
    }

    /// The state with weights of bfloat16.
    fn in_bfloat16() -> StateCopy {
        let mut state = state();
        let weights: Vec<bf16> = (0..SCALARS).map(|i| bf16::from_f32(i as f32)).collect();
        let layout = (*state.snapshot.layout).clone();
        state.snapshot.layout = Arc::new(layout.with_weights(BaseDtype::Bfloat16));
        state.snapshot.weights = FlatWeights::Bfloat16(weights.into());
        state
    }

    fn with_moments(state: &StateCopy, count: usize) -> Layout {
        let dtype = MomentDtype::Float32;
        let layout = (*state.snapshot.layout).clone();
        layout.with_moments(Moments { count, dtype })
    }

    /// The state with moments of 8 bits.
    fn eight_bits() -> StateCopy {
        let mut state = state();
        let snapshot = &mut state.snapshot;
        let layout = (*snapshot.layout).clone();
        snapshot.layout = Arc::new(layout.with_moments(Optimizer::Adamw8bit.moments()));
        snapshot.moments = vec![Moment::zeros(&snapshot.layout); 2];
        for (index, buffer) in snapshot.buffers_mut()[1..].iter_mut().enumerate() {
            for (place, byte) in buffer.iter_mut().enumerate() {
                *byte = ((place + index) % 64) as u8;
            }
        }
        state
    }

    #[test]
    fn moments_of_8_bits_are_a_quarter_of_the_pieces() {
        let pieces = |state: &StateCopy| piece_count(&state.snapshot.layout);
        // Three for the weights, and of each moment one for the codes, one for the blocks' magnitudes.
        assert_eq!((pieces(&state()), pieces(&eight_bits())), (9, 3 + 2 * 2));
        let mut wrong = eight_bits();
        wrong.snapshot.buffers_mut()[2][5] ^= 1;
        let refused = assemble(&eight_bits(), &wrong).unwrap_err();
        assert!(refused.contains("optimizer state"), "{refused}");
    }

    #[test]
    fn a_state_with_one_wrong_scalar_in_any_buffer_is_refused() {
        for (buffer, expected) in ["weights", "optimizer state", "optimizer state"]
            .into_iter()
            .enumerate()
        {
            let mut wrong = state();
            wrong.snapshot.buffers_mut()[buffer][SCALARS * 4 - 2] ^= 1;
            let refused = assemble(&state(), &wrong).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn a_state_of_other_tensors_is_refused() {
        let header = StateHeader::of(&state()).encode();
        let other = Layout::new([("b".into(), vec![SCALARS])]);
        assert!(StateHeader::decode(&header, &other).is_err());
        for layout in [
            with_moments(&state(), 1),
            (*eight_bits().snapshot.layout).clone(),
            (*in_bfloat16().snapshot.layout).clone(),
        ] {
            assert!(StateHeader::decode(&header, &layout).is_err());
        }
        let cut = &header[..HEADER_BYTES - 1];
        assert!(StateHeader::decode(cut, &state().snapshot.layout).is_err());
    }
}
