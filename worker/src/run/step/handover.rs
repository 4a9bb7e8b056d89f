//! A worker's state on its way to another, with what it remembers of its newest updates, and taken over from one.
//!
//! What comes from a peer is checked here before anything of it counts.

use std::collections::VecDeque;

use common::files::Snapshot;
use prost::Message;
use proto::v1;

use super::{REMEMBERED_UPDATES, Run, RunError};
use crate::collective::CollectiveError;
use crate::collective::state::StateCopy;

impl Run {
    /// Receives the state that the generation begins with from the member that has it, and the updates that member remembers.
    pub(super) fn receive_state(
        &self,
        generation: &v1::Generation,
    ) -> Result<(Snapshot, VecDeque<v1::Update>), CollectiveError> {
        let mesh = self.channels.collective.mesh(self.generation)?;
        let source = generation.source;
        let state = mesh.receive_state(source, generation.step, &self.trainer.layout())?;
        let updates = updates_in(&state.memory).map_err(|reason| {
            let member = generation.members.get(source as usize);
            CollectiveError::Peer {
                rank: source,
                name: member.map_or_else(String::new, |member| member.name.clone()),
                reason,
            }
        })?;
        Ok((state.snapshot, updates))
    }

    /// Sends this worker's state to members that are behind, in the background: the others go on with the step meanwhile.
    pub(super) fn send_state(&self, generation: &v1::Generation) -> Result<(), RunError> {
        if self.trainer.step() != generation.step {
            return Ok(());
        }
        let (state, behind) = (self.state_copy()?, generation.behind.clone());
        let (collective, number) = (self.channels.collective.clone(), self.generation);
        std::thread::spawn(move || {
            let sent = collective.mesh(number).and_then(|mesh| {
                behind
                    .iter()
                    .try_for_each(|rank| mesh.send_state(*rank, &state))
            });
            // The receiver notices too, and reports it.
            if let Err(error) = sent {
                tracing::debug!("state could not be sent: {error}");
            }
        });
        Ok(())
    }

    pub(super) fn state_copy(&self) -> Result<StateCopy, RunError> {
        let updates = self.updates.iter().cloned().collect();
        Ok(StateCopy {
            snapshot: self.trainer.snapshot()?,
            memory: v1::Updates { updates }.encode_to_vec(),
        })
    }

    /// Takes over another worker's state, and goes on as that worker would.
    pub(super) fn take_over(
        &mut self,
        snapshot: &Snapshot,
        updates: VecDeque<v1::Update>,
    ) -> Result<(), RunError> {
        self.trainer.restore(snapshot)?;
        self.plan = None;
        self.updates = updates;
        Ok(())
    }
}

/// Decodes what the owner of a state remembers: its newest updates, oldest first, and no more than a worker keeps.
pub(super) fn updates_in(memory: &[u8]) -> Result<VecDeque<v1::Update>, String> {
    let memory = v1::Updates::decode(memory);
    let memory = memory.map_err(|error| format!("sent a memory that cannot be read: {error}"))?;
    let mut updates = VecDeque::from(memory.updates);
    updates.drain(..updates.len().saturating_sub(REMEMBERED_UPDATES));
    Ok(updates)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn update(step: u64) -> v1::Update {
        v1::Update {
            report: Some(v1::StepReport {
                step,
                ..v1::StepReport::default()
            }),
            ..v1::Update::default()
        }
    }

    #[test]
    fn of_too_many_updates_the_newest_are_kept() {
        let all = 1..=REMEMBERED_UPDATES as u64 + 3;
        let updates = all.map(update).collect();
        let memory = v1::Updates { updates }.encode_to_vec();
        let kept = updates_in(&memory).unwrap();
        assert_eq!(kept.len(), REMEMBERED_UPDATES);
        assert_eq!(kept.front(), Some(&update(4)));
        assert!(updates_in(&[]).unwrap().is_empty());
    }

    #[test]
    fn a_memory_that_cannot_be_read_is_an_error() {
        let updates = vec![update(1)];
        let memory = v1::Updates { updates }.encode_to_vec();
        let error = updates_in(&memory[..memory.len() - 1]).unwrap_err();
        assert!(error.contains("cannot be read"), "{error}");
    }
}
