//! Weights and optimizer state on their way to a member that is behind.
//!
//! The receiver trusts nothing: step, layout and lengths must be the ones due, every frame carries a checksum, and the
//! weights must have the digest that was announced.

use std::sync::Arc;

use common::failpoint;
use common::files::layout::Layout;
use common::files::snapshot::Snapshot;

use super::CollectiveError;
use super::frame::{FrameKind, PIECE_SCALARS};
use super::tcp::Mesh;

/// Step, scalars, then two digests in hex.
const HEADER_BYTES: usize = 16 + 2 * DIGEST_BYTES;
const DIGEST_BYTES: usize = 64;

impl Mesh {
    /// Sends `snapshot` to the peer with this rank.
    pub fn send_state(&self, rank: u32, snapshot: &Snapshot) -> Result<(), CollectiveError> {
        let mut sender = self.sender(rank)?;
        let header = encode_header(snapshot);
        sender.send(FrameKind::StateHeader, 0, &header)?;
        let mut index = 0;
        for buffer in [&snapshot.weights, &snapshot.exp_avg, &snapshot.exp_avg_sq] {
            for piece in buffer.chunks(PIECE_SCALARS) {
                sender.send(FrameKind::State, index, bytemuck::cast_slice(piece))?;
                failpoint::reached("state-send");
                index += 1;
            }
        }
        Ok(())
    }

    /// Receives the state after `step` updates from the peer with this rank.
    pub fn receive_state(
        &self,
        rank: u32,
        step: u64,
        layout: &Arc<Layout>,
    ) -> Result<Snapshot, CollectiveError> {
        let mut receiver = self.receiver(rank)?;
        let header = receiver.receive_any_length(FrameKind::StateHeader, 0)?;
        let weights_digest =
            check_header(&header, step, layout).map_err(|fault| receiver.error(&fault))?;
        let mut index = 0;
        let mut receive_buffer = || -> Result<Vec<f32>, CollectiveError> {
            let mut buffer = vec![0f32; layout.scalars];
            for piece in buffer.chunks_mut(PIECE_SCALARS) {
                receiver.receive(FrameKind::State, index, bytemuck::cast_slice_mut(piece))?;
                failpoint::reached("state-receive");
                index += 1;
            }
            Ok(buffer)
        };
        let snapshot = Snapshot {
            step,
            layout: layout.clone(),
            weights: receive_buffer()?,
            exp_avg: receive_buffer()?,
            exp_avg_sq: receive_buffer()?,
        };
        match snapshot.weights_digest() == weights_digest {
            true => Ok(snapshot),
            false => Err(receiver.error("sent weights that differ from the digest it announced")),
        }
    }
}

fn encode_header(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend(snapshot.step.to_le_bytes());
    bytes.extend((snapshot.layout.scalars as u64).to_le_bytes());
    bytes.extend(snapshot.layout.digest().as_bytes());
    bytes.extend(snapshot.weights_digest().as_bytes());
    bytes
}

/// The announced digest of the weights, or why this is not the state that is due.
fn check_header(bytes: &[u8], step: u64, layout: &Layout) -> Result<String, String> {
    if bytes.len() != HEADER_BYTES {
        return Err("announced its state in a header of the wrong length".to_owned());
    }
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let (layout_digest, weights_digest) = bytes[16..].split_at(DIGEST_BYTES);
    if word(0) != step {
        return Err(format!("sent the state of step {}, not {step}", word(0)));
    }
    if word(8) != layout.scalars as u64 || layout_digest != layout.digest().as_bytes() {
        return Err("has other trainable tensors (layout digests differ)".to_owned());
    }
    Ok(String::from_utf8_lossy(weights_digest).into_owned())
}
