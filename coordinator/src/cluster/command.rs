//! What the driver must do. Commands to one worker reach it in the order in which they were given.

use std::sync::Arc;

use proto::v1;

use super::event::WorkerId;
use super::run_event::RunEvent;

/// An order to the driver.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Greet the worker; it starts from the newest state on disk.
    Welcome {
        worker: WorkerId,
    },
    /// To each member with its own rank, which the shared message leaves open: a thousand members are told of a thousand.
    SendGeneration {
        worker: WorkerId,
        rank: u32,
        generation: Arc<v1::Generation>,
    },
    SendNcclId {
        worker: WorkerId,
        nccl_id: v1::NcclId,
    },
    SendProbe {
        worker: WorkerId,
        probe: v1::Probe,
    },
    SendAside {
        worker: WorkerId,
        aside: v1::Aside,
    },
    SendFollow {
        worker: WorkerId,
        follow: v1::Follow,
    },
    SendFeed {
        worker: WorkerId,
        feed: v1::Feed,
    },
    SendPlan {
        worker: WorkerId,
        plan: v1::Plan,
    },
    SendLease {
        worker: WorkerId,
        lease: v1::Lease,
    },
    SendWithdraw {
        worker: WorkerId,
        withdraw: v1::Withdraw,
    },
    SendExchange {
        worker: WorkerId,
        exchange: v1::Exchange,
    },
    /// Ask for the state after `step` updates; `last` is the result of the run.
    RequestState {
        worker: WorkerId,
        step: u64,
        last: bool,
    },
    SendFinish {
        worker: WorkerId,
        finish: v1::Finish,
    },
    /// End the session; the worker cannot take part in this run.
    Refuse {
        worker: WorkerId,
        reason: String,
    },
    /// End the session; the worker may come back as a newcomer.
    Expel {
        worker: WorkerId,
        reason: String,
    },
    /// Tell the observers.
    Emit(RunEvent),
    /// Stop serving. No command follows.
    End(Outcome),
}

/// How the cluster's work ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are committed and the last state is stored.
    Finished { step: u64, weights_digest: String },
    /// Stopped before the end. The state of `step` is on disk, or with the workers where they were told to wait.
    Stopped {
        step: u64,
        reason: String,
        /// The workers were told to wait for the next term.
        resumable: bool,
    },
    Failed {
        reason: String,
        /// Those whose data is at fault, where it is.
        blocks: Vec<u64>,
    },
}
