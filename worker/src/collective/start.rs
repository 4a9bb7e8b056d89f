//! The first frame of an exchange.

use std::collections::BTreeSet;

use super::{CollectiveError, Contribution};

/// Opens an exchange: what a member brings, so that a mix-up is an error and never a wrong sum.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    step: u64,
    slots: u32,
    pub invalid: u64,
    held: BTreeSet<u32>,
}

const START_BYTES: usize = 40;

/// Slots that a peer may name.
const MAX_SLOTS: usize = 1 << 20;

impl Start {
    pub fn of(contribution: &Contribution<'_>) -> Self {
        Self {
            step: contribution.step,
            slots: contribution.slots,
            invalid: contribution.invalid,
            held: contribution.held.clone(),
        }
    }

    pub fn encode(&self, mode: u8, scalars: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(START_BYTES + 4 * self.held.len());
        bytes.extend(self.step.to_le_bytes());
        bytes.extend((scalars as u64).to_le_bytes());
        bytes.extend(self.invalid.to_le_bytes());
        bytes.extend(u64::from(mode).to_le_bytes());
        bytes.extend(self.slots.to_le_bytes());
        bytes.extend((self.held.len() as u32).to_le_bytes());
        for slot in &self.held {
            bytes.extend(slot.to_le_bytes());
        }
        bytes
    }

    /// What a peer brings, or why it does not fit to `ours`.
    pub fn decode(bytes: &[u8], mode: u8, scalars: usize, ours: &Self) -> Result<Self, String> {
        let word = |at: usize| -> u64 {
            bytes
                .get(at..at + 8)
                .and_then(|word| word.try_into().ok())
                .map_or(u64::MAX, u64::from_le_bytes)
        };
        let half = |at: usize| word(at) as u32;
        if bytes.len() < START_BYTES {
            return Err("sent a start that is cut short".to_owned());
        }
        let (slots, held) = (half(32), (word(32) >> 32) as usize);
        if held > MAX_SLOTS || bytes.len() != START_BYTES + 4 * held {
            return Err("sent a start of the wrong length".to_owned());
        }
        for (what, theirs, ours) in [
            ("step", word(0), ours.step),
            ("trainable scalars", word(8), scalars as u64),
            ("reduction", word(24), u64::from(mode)),
            ("slots", u64::from(slots), u64::from(ours.slots)),
        ] {
            if theirs != ours {
                return Err(format!("differs in {what}: {theirs} there, {ours} here"));
            }
        }
        let held = bytes[START_BYTES..]
            .chunks_exact(4)
            .map(|slot| u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]));
        Ok(Self {
            step: ours.step,
            slots,
            invalid: word(16),
            held: held.collect(),
        })
    }

    /// Adds what a peer brought; a slot that two members hold would be trained twice.
    pub fn merge(&mut self, peer: Self) -> Result<(), CollectiveError> {
        self.invalid = self.invalid.saturating_add(peer.invalid);
        for slot in peer.held {
            if !self.held.insert(slot) {
                return Err(self.error(format!("slot {slot} is held twice")));
            }
        }
        Ok(())
    }

    pub fn check_complete(&self) -> Result<(), CollectiveError> {
        match (0..self.slots).find(|slot| !self.held.contains(slot)) {
            Some(slot) => Err(self.error(format!("slot {slot} is missing"))),
            None if self.held.len() > self.slots as usize => {
                Err(self.error(format!("more than {} slots are held", self.slots)))
            }
            None => Ok(()),
        }
    }

    fn error(&self, reason: String) -> CollectiveError {
        CollectiveError::Slots {
            step: self.step,
            reason,
        }
    }
}
