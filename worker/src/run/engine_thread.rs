//! The engine's own thread, which outlives sessions: model, weights, optimizer and accumulator stay where they are when a
//! coordinator dies, and go on under the next one.
//!
//! In: what to start from, then a [`CoordinatorLink`] for each session. Out: how the engine ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::error::RunError;
use super::on_engine::{Start, load};
use super::on_mesh::MeshCollective;
use super::orders::{CoordinatorLink, Order};
use super::step::{StateIdentity, StepChannels, StepLoop};
use crate::collective::Collective;
use crate::rpc::upload::weights_format;
use crate::status::Doing;

/// Orders that may wait for the engine: a few for each generation that comes and goes during one slot.
const MAX_ORDERS: usize = 1024;
/// How long the end of the thread is waited for, while it finishes the slot in hand: in full training on a slow machine that
/// takes minutes. After that the engine counts as hung.
const ENDING: Duration = Duration::from_secs(1800);
/// A number above every generation. Stored when a new session begins, so that what an earlier one ordered is void.
const NO_GENERATION: u64 = u64::MAX;

/// Why the engine came to a bad end.
#[derive(Debug, Error)]
pub enum EngineThreadError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("the engine stopped for a fault of its own (see above)")]
    Panicked,
    #[error("the engine hangs: it did not end within {seconds} s; start this worker again")]
    Hangs { seconds: u64 },
}

/// The state of one run, and the thread that works on it.
pub struct EngineThread {
    /// Digest of the job that the state belongs to.
    pub job_digest: String,
    /// Identifier of the run that the state belongs to; the same in every term.
    pub run: String,
    pub orders: mpsc::Sender<Order>,
    /// The newest generation heard of: what was leased under an earlier one need not be begun.
    pub newest_generation: Arc<AtomicU64>,
    updates: Arc<AtomicU64>,
    collective: Arc<Collective>,
    stop: Arc<AtomicBool>,
    ready: Arc<AtomicBool>,
    /// The thread's ends of the channels, until it starts.
    channels: Option<StepChannels>,
    ended: Option<oneshot::Receiver<Result<(), RunError>>>,
}

impl EngineThread {
    pub fn new(job_digest: String, run: String, collective: Arc<Collective>) -> Self {
        let (orders, waiting_orders) = mpsc::channel(MAX_ORDERS);
        let newest_generation = Arc::<AtomicU64>::default();
        let updates = Arc::<AtomicU64>::default();
        let (stop, ready) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let channels = StepChannels {
            orders: waiting_orders,
            newest_generation: newest_generation.clone(),
            stop: stop.clone(),
            ready: ready.clone(),
            updates: updates.clone(),
        };
        Self {
            job_digest,
            run,
            orders,
            newest_generation,
            updates,
            collective,
            stop,
            ready,
            channels: Some(channels),
            ended: None,
        }
    }

    pub fn has_started(&self) -> bool {
        self.channels.is_none()
    }

    /// Set once the model is loaded and orders are obeyed.
    pub fn ready_flag(&self) -> Arc<AtomicBool> {
        self.ready.clone()
    }

    /// Updates made so far in this process.
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::SeqCst)
    }

    /// Starts the thread, which loads the model and then obeys orders. Does nothing where it was started already.
    pub fn start(&mut self, start: Start) {
        let Some(channels) = self.channels.take() else {
            return;
        };
        let (sender, receiver) = oneshot::channel();
        let collective = MeshCollective::new(self.collective.clone());
        let engine = move || {
            // Nobody waits where the worker has ended.
            let _ = sender.send(run(start, collective, channels));
        };
        let spawned = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(engine);
        if let Err(error) = spawned {
            tracing::error!("the engine's thread cannot be started: {error}");
        }
        self.ended = Some(receiver);
    }

    /// Gives the engine a session to talk to. What an earlier session ordered and is not done yet is void.
    pub async fn attach(&self, line: CoordinatorLink) {
        self.newest_generation
            .store(NO_GENERATION, Ordering::SeqCst);
        self.collective.close();
        // A closed channel means that the engine has ended, which is noticed elsewhere.
        let _ = self.orders.send(Order::Attach(line)).await;
    }

    /// Waits for the thread to end.
    pub async fn ended(&mut self) -> Result<(), EngineThreadError> {
        match &mut self.ended {
            Some(ended) => match ended.await {
                Ok(result) => result.map_err(EngineThreadError::Run),
                Err(_) => Err(EngineThreadError::Panicked),
            },
            None => std::future::pending().await,
        }
    }

    /// Ends the thread after the slot in hand. A model that is still loading is not waited for.
    ///
    /// # Errors
    ///
    /// Where the thread hangs. It cannot be ended from outside, so the process must end.
    pub async fn finish(self) -> Result<(), EngineThreadError> {
        self.finish_within(ENDING).await
    }

    async fn finish_within(mut self, limit: Duration) -> Result<(), EngineThreadError> {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.orders.try_send(Order::Stop);
        if self.ready.load(Ordering::SeqCst) {
            let ended = tokio::time::timeout(limit, self.ended()).await;
            // However it ended, what it did is of no more use.
            let _ = ended.map_err(|_| EngineThreadError::Hangs {
                seconds: limit.as_secs(),
            })?;
        }
        Ok(())
    }

    /// Ends the thread as [`finish`](Self::finish) does, and first the exchange that it may be waiting in.
    pub async fn abandon(self) -> Result<(), EngineThreadError> {
        self.collective.close();
        self.finish().await
    }
}

/// Loads the model and works until told to stop. Waits block this thread: nothing else runs on it.
fn run(start: Start, collective: MeshCollective, channels: StepChannels) -> Result<(), RunError> {
    let status = start.status.clone();
    status.set(Doing::Loading);
    let trainer = load(&start)?;
    status.reached(trainer.step());
    let identity = StateIdentity {
        format: weights_format(&start.job, start.model.path(), &trainer.layout())?,
        job_digest: start.job_digest.clone(),
    };
    // What was fetched for the start alone is of no more use.
    drop(start);
    let step = StepLoop::new(trainer, collective, identity, channels, status);
    futures::executor::block_on(step.work())
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    #[tokio::test]
    async fn an_engine_that_hangs_is_not_waited_for_without_end() {
        let collective = Collective::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
        let mut engine = EngineThread::new(String::new(), String::new(), Arc::new(collective));
        let (_never, ended) = oneshot::channel();
        engine.ended = Some(ended);
        engine.ready.store(true, Ordering::SeqCst);
        let error = engine.finish_within(Duration::ZERO).await.unwrap_err();
        assert!(
            error.to_string().contains("did not end within 0 s"),
            "{error}"
        );
    }
}
