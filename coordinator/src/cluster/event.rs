//! What can happen to a cluster. Facts in the past tense, already checked for form but not yet for sense.

use std::path::PathBuf;

use proto::v1;

/// A worker's number for one session. Numbers are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A session was opened. `address` is where the worker's peers reach its exchange.
    WorkerJoined {
        worker: WorkerId,
        join: v1::Join,
        address: String,
    },
    /// The worker has loaded model and state.
    WorkerReady { worker: WorkerId, ready: v1::Ready },
    /// The worker is in a generation; what its accumulator holds is known.
    WorkerEntered {
        worker: WorkerId,
        entered: v1::Entered,
    },
    /// The worker follows a feed and has come to this step.
    WorkerSynced {
        worker: WorkerId,
        synced: v1::Synced,
    },
    /// The feed that the worker followed is over.
    FeedLost {
        worker: WorkerId,
        lost: v1::FeedLost,
    },
    /// The worker computed a slot; in training its gradient is in the worker's accumulator.
    SlotDone {
        worker: WorkerId,
        done: v1::SlotDone,
    },
    /// The worker gave back slots that it was asked for, before they were in its accumulator.
    SlotsWithdrawn {
        worker: WorkerId,
        withdrawn: v1::Withdrawn,
    },
    /// The worker finished the exchange and the update of a step, and says which weights it has.
    StepReported {
        worker: WorkerId,
        report: v1::StepReport,
    },
    /// The worker's exchange broke because of the peer of that rank.
    PeerLost {
        worker: WorkerId,
        lost: v1::PeerLost,
    },
    /// The worker tried to reach others.
    Probed {
        worker: WorkerId,
        probed: v1::Probed,
    },
    /// Rank 0 made the identifier of the generation's communicator.
    NcclIdentified {
        worker: WorkerId,
        nccl_id: v1::NcclId,
    },
    /// NCCL failed on this worker, for whatever reason.
    NcclLost {
        worker: WorkerId,
        lost: v1::NcclLost,
    },
    /// A heartbeat.
    Heard { worker: WorkerId },
    /// The worker was asked to stop, and stays until it is let go.
    WorkerDraining { worker: WorkerId, reason: String },
    /// The worker left, or its session ended without a word.
    WorkerLost { worker: WorkerId, reason: String },
    /// All of a state asked for is here.
    StateArrived { worker: WorkerId, step: u64 },
    /// A state asked for is safe on disk.
    StateStored {
        step: u64,
        path: PathBuf,
        weights_digest: String,
        /// Whether it is the result of the run, and no checkpoint.
        is_result: bool,
    },
    /// The result could not be made of the best weights' checkpoint.
    ResultFailed {
        reason: String,
        /// Whether the checkpoint is at fault, and not the room on the disk.
        is_damaged: bool,
    },
    /// A state asked for did not arrive or could not be stored.
    StateFailed {
        worker: WorkerId,
        step: u64,
        reason: String,
        /// The coordinator's disk is at fault: room on it may be made.
        disk: bool,
    },
    /// The user or the system asks for an end before the last step.
    /// `resumable`: it is to be started again, and its workers wait for that.
    StopRequested { reason: String, resumable: bool },
    /// The run cannot go on for a reason outside the cluster.
    GaveUp { reason: String },
    /// Time passed.
    Ticked,
}

impl Event {
    /// The worker that just showed that it lives.
    pub fn speaker(&self) -> Option<WorkerId> {
        match self {
            Self::WorkerJoined { worker, .. }
            | Self::WorkerReady { worker, .. }
            | Self::WorkerEntered { worker, .. }
            | Self::SlotDone { worker, .. }
            | Self::SlotsWithdrawn { worker, .. }
            | Self::StepReported { worker, .. }
            | Self::WorkerSynced { worker, .. }
            | Self::FeedLost { worker, .. }
            | Self::PeerLost { worker, .. }
            | Self::Probed { worker, .. }
            | Self::NcclIdentified { worker, .. }
            | Self::NcclLost { worker, .. }
            | Self::WorkerDraining { worker, .. }
            | Self::Heard { worker } => Some(*worker),
            Self::WorkerLost { .. }
            | Self::StateArrived { .. }
            | Self::StateStored { .. }
            | Self::StateFailed { .. }
            | Self::ResultFailed { .. }
            | Self::StopRequested { .. }
            | Self::GaveUp { .. }
            | Self::Ticked => None,
        }
    }
}
