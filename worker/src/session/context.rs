//! What a worker keeps from one session to the next.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::collective::Collective;
use crate::run::engine_thread::EngineThread;
use crate::session::waits::Waits;
use crate::{ComputeDevice, JoinOptions};

/// What a worker keeps from one session to the next.
pub struct WorkerContext {
    pub options: JoinOptions,
    pub device: ComputeDevice,
    pub shutdown: CancellationToken,
    /// This worker's end of the exchange, and the host that peers are told to reach it at.
    pub exchange: Option<(Arc<Collective>, String)>,
    /// The engine's thread and with it the state held, if any.
    pub engine: Option<EngineThread>,
    /// Whether a coordinator has ever taken this worker.
    pub was_welcomed: bool,
    /// Shows what the coordinator is at while it prepares the run.
    pub waits: Waits,
}

impl WorkerContext {
    pub fn updates(&self) -> u64 {
        self.engine.as_ref().map_or(0, EngineThread::updates)
    }
}
