//! A worker's state on its way to another, with what it remembers of its newest updates, and taken over from one.
//!
//! What comes from a peer is checked here before anything of it counts.

use std::collections::VecDeque;

use common::files::Snapshot;
use prost::Message;
use proto::v1;

use super::super::backend::{StepCollective, StepTrainer};
use super::super::error::RunError;
use super::{REMEMBERED_UPDATES, StepLoop};
use crate::collective::CollectiveError;
use crate::collective::state::StateCopy;

impl<Trainer, Collective> StepLoop<Trainer, Collective>
where
    Trainer: StepTrainer,
    Collective: StepCollective<Trainer>,
{
    /// Receives the state that the generation begins with from the member that has it, and the updates that member remembers.
    pub(super) async fn receive_state(
        &self,
        generation: &v1::Generation,
    ) -> Result<(Snapshot, VecDeque<v1::Update>), CollectiveError> {
        let layout = self.trainer.layout();
        let state = self.collective.receive_state(generation, &layout).await?;
        let updates = updates_in(&state.memory).map_err(|reason| {
            let source = generation.source;
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
        if self.trainer.step() == generation.step {
            self.collective.send_state(generation, self.state_copy()?);
        }
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
