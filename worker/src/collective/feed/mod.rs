//! A feed: a newcomer copies the state of one member and repeats the updates after it, while the members go on.
//!
//! [`Feeds`] is the member's side: one copy of its state, taken between two orders and shared by all followers that
//! still need it, and a bounded log of the updates since. [`Follower`] is the newcomer's side: after a broken connection
//! it calls again and goes on at the first piece that it lacks. Nothing here waits for a generation, and no generation
//! waits for it.

mod follower;
mod serve;
mod source;

use super::frame::PIECE_SCALARS;
use crate::engine::slot;
use crate::engine::slot::{HeldSlots, SlotOutcome};

pub use self::follower::{FeedTimeouts, Follower, News, Source};
pub use self::source::{FeedLimits, Feeds, MEMBER};

/// One update, as everyone who is at the step before it can repeat it to the same bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// Number of updates before this one.
    pub step: u64,
    pub learning_rate: f64,
    /// Whether the update counted as a step but changed nothing.
    pub skipped: bool,
    /// Whether the digest of the updated weights is asked for.
    pub digest: bool,
    /// The slots of the whole step with their outcomes.
    pub slots: HeldSlots,
    /// The mean gradient in layout order; empty where the update was skipped.
    pub mean: Vec<f32>,
}

impl Update {
    fn bytes(&self) -> usize {
        let slots = self.slots.len() * size_of::<(u32, SlotOutcome)>();
        size_of_val(self.mean.as_slice()) + slots + size_of::<Self>()
    }

    fn header(&self) -> UpdateHeader {
        UpdateHeader {
            step: self.step,
            learning_rate: self.learning_rate,
            skipped: self.skipped,
            digest: self.digest,
            slots: self.slots.clone(),
        }
    }

    fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.mean.chunks(PIECE_SCALARS).map(bytemuck::cast_slice)
    }
}

/// What is sent of an update before its mean gradient.
struct UpdateHeader {
    step: u64,
    learning_rate: f64,
    skipped: bool,
    digest: bool,
    slots: HeldSlots,
}

/// Encoded size of an update's fixed fields; its slots follow.
const UPDATE_BYTES: usize = 24;

impl UpdateHeader {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.step.to_le_bytes());
        bytes.extend(self.learning_rate.to_le_bytes());
        let marks = u64::from(self.skipped) | u64::from(self.digest) << 1;
        bytes.extend(marks.to_le_bytes());
        bytes.extend(slot::encode(&self.slots));
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some((bytes, slots)) = bytes.split_at_checked(UPDATE_BYTES) else {
            return Err("sent an update that is cut short".to_owned());
        };
        let marks = word(bytes, 2);
        if marks > 3 {
            return Err("sent an update of an unknown kind".to_owned());
        }
        let learning_rate = f64::from_bits(word(bytes, 1));
        match learning_rate.is_finite() {
            true => Ok(Self {
                step: word(bytes, 0),
                learning_rate,
                skipped: marks & 1 != 0,
                digest: marks & 2 != 0,
                slots: slot::decode(slots)?,
            }),
            false => Err("sent an update with a learning rate that is no number".to_owned()),
        }
    }
}

/// What a follower has when it calls, so that the feed goes on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    /// Identity of the state whose pieces it has.
    identity: [u8; 32],
    pieces: u64,
    /// Updates that its weights have seen, once it has a whole state.
    step: Option<u64>,
}

const REQUEST_BYTES: usize = 48;
/// Sent in place of a step where the follower has no whole state.
const NO_STEP: u64 = u64::MAX;

impl Request {
    fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..8].copy_from_slice(&self.pieces.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.step.unwrap_or(NO_STEP).to_le_bytes());
        bytes[16..].copy_from_slice(&self.identity);
        bytes
    }

    fn decode(bytes: &[u8; REQUEST_BYTES]) -> Self {
        let mut identity = [0; 32];
        identity.copy_from_slice(&bytes[16..]);
        Self {
            identity,
            pieces: word(bytes, 0),
            step: Some(word(bytes, 1)).filter(|step| *step != NO_STEP),
        }
    }
}

/// The `index`th little-endian 64-bit word of `bytes`.
fn word(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[8 * index..8 * index + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_updates_round_trip() {
        for step in [None, Some(0), Some(7)] {
            let request = Request {
                identity: [3; 32],
                pieces: 5,
                step,
            };
            assert_eq!(Request::decode(&request.encode()), request);
        }
        let header = UpdateHeader {
            step: 9,
            learning_rate: 0.1,
            skipped: true,
            digest: false,
            slots: [(2, SlotOutcome::default())].into(),
        };
        let mut bytes = header.encode();
        let decoded = UpdateHeader::decode(&bytes);
        assert!(decoded.is_ok_and(|found| {
            let marks = (found.skipped, found.digest);
            (found.step, found.learning_rate, marks) == (9, 0.1, (true, false))
                && found.slots == header.slots
        }));
        bytes[16] = 4;
        assert!(UpdateHeader::decode(&bytes).is_err());
    }
}
