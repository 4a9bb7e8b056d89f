//! Weights and optimizer state on their way to a worker that is behind, in pieces: over the mesh
//! ([`state_transfer`](super::state_transfer)) or over a feed ([`feed`](super::feed)).
//!
//! The receiver trusts nothing: step, layout and lengths must be the ones due, every piece carries a checksum, and
//! weights and optimizer state must each have the digest that was announced.

use std::sync::Arc;

use common::files::layout::Layout;
use common::files::snapshot::Snapshot;

use super::frame::PIECE_SCALARS;

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
    (1 + layout.moments) * layout.scalars.div_ceil(PIECE_SCALARS)
}

/// The bytes of one piece. No piece reaches over two buffers.
pub(super) fn piece(snapshot: &Snapshot, index: usize) -> &[u8] {
    let each = snapshot.layout.scalars.div_ceil(PIECE_SCALARS);
    let buffer = match index / each {
        0 => &snapshot.weights,
        moment => &snapshot.moments[moment - 1],
    };
    let start = index % each * PIECE_SCALARS;
    let end = buffer.len().min(start + PIECE_SCALARS);
    bytemuck::cast_slice(&buffer[start..end])
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
        let buffer = || vec![0f32; layout.scalars].into();
        let snapshot = Snapshot {
            step: header.step,
            weights: buffer(),
            moments: (0..layout.moments).map(|_| buffer()).collect(),
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
        let each = self.snapshot.layout.scalars.div_ceil(PIECE_SCALARS);
        let Snapshot {
            weights, moments, ..
        } = &mut self.snapshot;
        let buffer = match index / each {
            0 => weights,
            moment => moments.get_mut(moment - 1)?,
        };
        let start = index % each * PIECE_SCALARS;
        let end = buffer.len().min(start + PIECE_SCALARS);
        Some((index, bytemuck::cast_slice_mut(&mut buffer[start..end])))
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
    use super::*;

    const SCALARS: usize = 2 * PIECE_SCALARS + 3;

    fn state() -> StateCopy {
        let flat = |seed: f32| (0..SCALARS).map(|i| seed + i as f32).collect();
        let snapshot = Snapshot {
            step: 4,
            layout: Arc::new(Layout::new([("a".into(), vec![SCALARS])])),
            weights: flat(0.5),
            moments: vec![flat(-0.25), flat(0.125)],
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
        for moments in [0, 1] {
            let mut state = state();
            state.snapshot.moments.truncate(moments);
            let layout = (*state.snapshot.layout).clone().with_moments(moments);
            state.snapshot.layout = Arc::new(layout);
            assert_eq!(assemble(&state, &state), Ok(state));
        }
    }

    #[test]
    fn a_state_with_one_wrong_scalar_in_any_buffer_is_refused() {
        for (buffer, expected) in ["weights", "optimizer state", "optimizer state"]
            .into_iter()
            .enumerate()
        {
            let mut wrong = state();
            let wrong_buffer = match buffer {
                0 => &mut wrong.snapshot.weights,
                moment => &mut wrong.snapshot.moments[moment - 1],
            };
            wrong_buffer[SCALARS - 1] += 1.0;
            let refused = assemble(&state(), &wrong).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn a_state_of_other_tensors_is_refused() {
        let header = StateHeader::of(&state()).encode();
        let other = Layout::new([("b".into(), vec![SCALARS])]);
        assert!(StateHeader::decode(&header, &other).is_err());
        let one_moment = (*state().snapshot.layout).clone().with_moments(1);
        assert!(StateHeader::decode(&header, &one_moment).is_err());
        let cut = &header[..HEADER_BYTES - 1];
        assert!(StateHeader::decode(cut, &state().snapshot.layout).is_err());
    }
}
