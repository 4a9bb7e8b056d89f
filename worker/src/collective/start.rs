//! The first frame of an exchange.

use super::{CollectiveError, Contribution};
use crate::engine::slot;
use crate::engine::slot::HeldSlots;

/// First frame of an exchange: what a member brings.
///
/// It makes a mix-up an error and never a wrong sum, and tells every member what the whole step amounts to.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    step: u64,
    slots: u32,
    pub invalid: u64,
    held: HeldSlots,
}

const START_BYTES: usize = 40;

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
        let mut bytes = Vec::new();
        let words = [
            self.step,
            scalars as u64,
            self.invalid,
            u64::from(mode),
            u64::from(self.slots),
        ];
        for word in words {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(slot::encode(&self.held));
        bytes
    }

    /// Reads what a peer brings, or says why it does not fit to `ours`.
    pub fn decode(bytes: &[u8], mode: u8, scalars: usize, ours: &Self) -> Result<Self, String> {
        let Some((head, held)) = bytes.split_at_checked(START_BYTES) else {
            return Err("sent a start that is cut short".to_owned());
        };
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&head[8 * index..8 * index + 8]);
            u64::from_le_bytes(word)
        };
        for (what, theirs, ours) in [
            ("step", word(0), ours.step),
            ("trainable scalars", word(1), scalars as u64),
            ("reduction", word(3), u64::from(mode)),
            ("slots", word(4), u64::from(ours.slots)),
        ] {
            if theirs != ours {
                return Err(format!("differs in {what}: {theirs} there, {ours} here"));
            }
        }
        Ok(Self {
            step: ours.step,
            slots: ours.slots,
            invalid: word(2),
            held: slot::decode(held)?,
        })
    }

    /// Adds what a peer brought; a slot that two members hold would be trained twice.
    pub fn merge(&mut self, peer: Self) -> Result<(), CollectiveError> {
        self.invalid = self.invalid.saturating_add(peer.invalid);
        for (slot, outcome) in peer.held {
            if self.held.insert(slot, outcome).is_some() {
                return Err(self.error(format!("slot {slot} is held twice")));
            }
        }
        Ok(())
    }

    /// Returns all slots of the step, each of which must have been held by some member.
    pub fn complete(self) -> Result<HeldSlots, CollectiveError> {
        match (0..self.slots).find(|slot| !self.held.contains_key(slot)) {
            Some(slot) => Err(self.error(format!("slot {slot} is missing"))),
            None if self.held.len() > self.slots as usize => {
                Err(self.error(format!("more than {} slots are held", self.slots)))
            }
            None => Ok(self.held),
        }
    }

    fn error(&self, reason: String) -> CollectiveError {
        CollectiveError::Slots {
            step: self.step,
            reason,
        }
    }
}
