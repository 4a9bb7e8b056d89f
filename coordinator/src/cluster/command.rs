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
    /// Tell a member of its generation. The rank is apart from the shared message: a thousand members are told of a thousand.
    SendGeneration {
        worker: WorkerId,
        rank: u32,
        generation: Arc<v1::Generation>,
    },
    /// Give a member the identifier of the generation's NCCL communicator.
    SendNcclId {
        worker: WorkerId,
        nccl_id: v1::NcclId,
    },
    /// Ask a worker to try whether it reaches the exchange of others.
    SendProbe {
        worker: WorkerId,
        probe: v1::Probe,
    },
    /// Tell a worker that it takes no part for now, because it and others do not reach each other.
    SendAside {
        worker: WorkerId,
        aside: v1::Aside,
    },
    /// Tell a newcomer to copy the state of a member and repeat its updates.
    SendFollow {
        worker: WorkerId,
        follow: v1::Follow,
    },
    /// Tell a member to let a newcomer copy its state and the updates after it.
    SendFeed {
        worker: WorkerId,
        feed: v1::Feed,
    },
    /// Tell a member what the next step (or evaluation) is.
    SendPlan {
        worker: WorkerId,
        plan: v1::Plan,
    },
    SendLease {
        worker: WorkerId,
        lease: v1::Lease,
    },
    /// Ask a member to give back slots that are not in its accumulator yet.
    SendWithdraw {
        worker: WorkerId,
        withdraw: v1::Withdraw,
    },
    /// Tell a member that every slot is held: sum the gradients over all members, update, report.
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
    /// Make the checkpoint of step `best` the result of a run that ends after `step` updates.
    StoreBest {
        best: u64,
        step: u64,
    },
    /// Let a worker go: the run is over, or the worker was asked to stop and has handed over what counts.
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
    /// Tell the observers (terminal, metrics files, journal) what happened.
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
    /// The run cannot go on.
    Failed {
        reason: String,
        /// Training blocks whose data is at fault; empty where it is not the data.
        blocks: Vec<u64>,
    },
}
