//! What the step is told to do, in the order in which the coordinator said it, and by whom.

use std::sync::Arc;

use common::wire::PlanKind;
use proto::v1;
use tokio::sync::mpsc;

use super::leases::Leases;
use crate::collective::feed::Source;
use crate::rpc::blocks::PendingBlocks;
use crate::rpc::upload::State;

/// An order of the coordinator or of this worker, which the step carries out in turn.
pub enum Order {
    /// A new session has begun: say what is held, and talk to this one from now on.
    Attach(CoordinatorLink),
    Enter(v1::Generation),
    Plan(v1::Plan),
    Lease(Lease),
    Exchange(v1::Exchange),
    Save(v1::SaveState),
    Follow(Source),
    /// Let another worker follow this one: feed it the state and the updates after it.
    Feed {
        run_id: [u8; 32],
        feed: v1::Feed,
    },
    /// The worker is on its way out.
    Stop,
}

/// Slots to compute; their blocks are on their way already.
pub struct Lease {
    pub generation: u64,
    pub step: u64,
    pub kind: PlanKind,
    pub slots: Vec<(u32, PendingBlocks)>,
}

/// A session, as far as the step needs it.
pub struct CoordinatorLink {
    /// Ends with the session, which the engine must not keep open.
    pub up: mpsc::WeakSender<v1::WorkerMessage>,
    /// Begins to hand a state over; training goes on at once.
    pub upload: Box<dyn Fn(State) + Send + Sync>,
    pub leases: Arc<Leases>,
    /// Updates that the coordinator has on record.
    pub recorded: u64,
    /// Takes the reason why the session is of no use any more.
    pub given_up: mpsc::Sender<String>,
}
