//! Weights and optimizer state from one member of a mesh to another, within a generation.

use std::sync::Arc;

use common::failpoint;
use common::files::layout::Layout;

use super::CollectiveError;
use super::frame::FrameKind;
use super::state::{Assembly, StateCopy, StateHeader, piece, piece_count};
use super::tcp::Mesh;

impl Mesh {
    /// Sends `state` to the peer with this rank.
    pub fn send_state(&self, rank: u32, state: &StateCopy) -> Result<(), CollectiveError> {
        let mut sender = self.sender(rank)?;
        let header = StateHeader::of(state).encode();
        sender.send(FrameKind::StateHeader, 0, &header)?;
        let snapshot = &state.snapshot;
        for index in 0..piece_count(&snapshot.layout) {
            sender.send(FrameKind::State, index, piece(snapshot, index))?;
            failpoint::reached("state-send");
        }
        Ok(())
    }

    /// Receives the state after `step` updates from the peer with this rank.
    pub fn receive_state(
        &self,
        rank: u32,
        step: u64,
        layout: &Arc<Layout>,
    ) -> Result<StateCopy, CollectiveError> {
        let mut receiver = self.receiver(rank)?;
        let header = receiver.receive_any_length(FrameKind::StateHeader, 0)?;
        let header = StateHeader::decode(&header, layout).and_then(|header| {
            let found = header.step;
            let due = || format!("sent the state of step {found}, not {step}");
            (found == step).then_some(header).ok_or_else(due)
        });
        let header = header.map_err(|fault| receiver.error(&fault))?;
        let mut assembly = Assembly::new(header, layout.clone());
        while let Some((index, piece)) = assembly.next_piece() {
            receiver.receive(FrameKind::State, index, piece)?;
            failpoint::reached("state-receive");
            assembly.advance();
        }
        assembly.finish().map_err(|fault| receiver.error(&fault))
    }
}
