//! What a worker keeps from one session to the next.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::collective::Collective;
use crate::run::engine_thread::EngineThread;
use crate::session::waits::Waits;
use crate::{ComputeDevice, JoinOptions};

/// What outlives a session.
pub struct WorkerContext {
    pub options: JoinOptions,
    pub device: ComputeDevice,
    pub shutdown: CancellationToken,
    /// This worker's end of the exchange, and the host that peers are told.
    pub exchange: Option<(Arc<Collective>, String)>,
    /// The state held, if any.
    pub engine: Option<EngineThread>,
    /// A coordinator has taken this worker once.
    pub was_welcomed: bool,
    /// What is said while a coordinator prepares.
    pub waits: Waits,
}

impl WorkerContext {
    pub fn updates(&self) -> u64 {
        self.engine.as_ref().map_or(0, EngineThread::updates)
    }
}
