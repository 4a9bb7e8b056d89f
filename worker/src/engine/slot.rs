//! What a computed slot amounts to, and how workers and the coordinator tell each other.
//!
//! Every member of an exchange learns the results of all slots, so that any one that outlives the step can complete its
//! record.

use std::collections::BTreeMap;

use proto::v1;

/// What a slot came to: its loss and its counts of tokens, the same whoever computes it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotOutcome {
    /// Cross-entropy summed over the trained tokens, in nats.
    pub loss_sum: f64,
    pub trained_tokens: u64,
    /// Trained tokens that the model held for the likeliest.
    pub correct_tokens: u64,
    /// Scalars of the slot's gradient that were not finite or out of range: the step will be skipped.
    pub invalid_scalars: u64,
}

/// Slots by number, with their outcomes.
pub type HeldSlots = BTreeMap<u32, SlotOutcome>;

/// Bytes of a slot in the encoding between workers.
const SLOT_BYTES: usize = 36;

/// Encodes slots for a peer; [`decode`] reads it.
pub fn encode(slots: &HeldSlots) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SLOT_BYTES * slots.len());
    for (slot, outcome) in slots {
        bytes.extend(slot.to_le_bytes());
        bytes.extend(outcome.loss_sum.to_le_bytes());
        bytes.extend(outcome.trained_tokens.to_le_bytes());
        bytes.extend(outcome.correct_tokens.to_le_bytes());
        bytes.extend(outcome.invalid_scalars.to_le_bytes());
    }
    bytes
}

/// Decodes the slots that a peer sent. An error is a sentence without its subject.
pub fn decode(bytes: &[u8]) -> Result<HeldSlots, String> {
    if !bytes.len().is_multiple_of(SLOT_BYTES) {
        return Err("sent slots that are cut short".to_owned());
    }
    let mut slots = HeldSlots::new();
    for bytes in bytes.chunks_exact(SLOT_BYTES) {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[4 + 8 * index..12 + 8 * index]);
            u64::from_le_bytes(word)
        };
        let slot = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let outcome = SlotOutcome {
            loss_sum: f64::from_bits(word(0)),
            trained_tokens: word(1),
            correct_tokens: word(2),
            invalid_scalars: word(3),
        };
        if slots.insert(slot, outcome).is_some() {
            return Err(format!("sent slot {slot} twice"));
        }
    }
    Ok(slots)
}

/// Turns slots into messages for the coordinator.
pub fn to_wire(slots: &HeldSlots) -> Vec<v1::HeldSlot> {
    let held = |(slot, outcome): (&u32, &SlotOutcome)| v1::HeldSlot {
        slot: *slot,
        loss_sum: outcome.loss_sum,
        trained_tokens: outcome.trained_tokens,
        correct_tokens: outcome.correct_tokens,
        invalid_scalars: outcome.invalid_scalars,
    };
    slots.iter().map(held).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_round_trip_and_odd_ones_are_refused() {
        let outcome = |slot: u32| SlotOutcome {
            loss_sum: f64::from(slot) + 0.1,
            trained_tokens: 7,
            correct_tokens: u64::from(slot),
            invalid_scalars: 1,
        };
        let slots: HeldSlots = [3, 9].map(|slot| (slot, outcome(slot))).into();
        let mut bytes = encode(&slots);
        assert_eq!(decode(&bytes), Ok(slots));
        assert_eq!(decode(&[]), Ok(HeldSlots::new()));
        assert!(decode(&bytes[1..]).is_err());
        bytes.copy_within(..SLOT_BYTES, SLOT_BYTES);
        assert_eq!(decode(&bytes), Err("sent slot 3 twice".to_owned()));
    }
}
