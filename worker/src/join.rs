//! A worker's life: connect, join, work, and leave in good order.
//!
//! A lost session is no end. The engine keeps what it holds, the worker waits for the coordinator or the one after it, and
//! goes on where it was. Only whoever is sent away drops its state, and comes back as a newcomer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::attend::Attended;
use crate::collective::Collective;
use crate::connect::{connect, retry_delays};
use crate::engine_thread::EngineThread;
use crate::{Finished, JoinOptions, WorkerError};

/// Sessions lost one after the other by a worker that holds no state, after which it gives up.
const MAX_LOSSES: usize = 8;

/// Joins the coordinator and works until the job is done or `shutdown` is cancelled.
pub async fn join(
    options: JoinOptions,
    shutdown: CancellationToken,
) -> Result<Finished, WorkerError> {
    let mut life = Life {
        options,
        shutdown,
        exchange: None,
        engine: None,
        was_welcomed: false,
    };
    let mut patience = Patience::new();
    loop {
        let client = tokio::select! {
            client = connect(&life.options, patience.left(&life)) => client?,
            () = life.shutdown.cancelled() => return Ok(Finished::Left),
        };
        let updates = life.updates();
        let reason = match life.attend(client).await? {
            Attended::Finished(finished) => return Ok(finished),
            Attended::Lost(reason) => reason,
        };
        if life.updates() > updates {
            patience = Patience::new();
        }
        let Some(pause) = patience.pause(&life) else {
            return Err(WorkerError::Lost {
                times: patience.losses,
                reason,
            });
        };
        match life.engine {
            Some(_) => tracing::warn!(
                "the coordinator was lost ({reason}); keeping the state and waiting up to {} s for it",
                patience.left(&life).as_secs_f64().ceil()
            ),
            None => tracing::warn!(
                "the session with the coordinator was lost ({reason}); joining again"
            ),
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = life.shutdown.cancelled() => return Ok(Finished::Left),
        }
    }
}

/// What outlives a session.
pub struct Life {
    pub options: JoinOptions,
    pub shutdown: CancellationToken,
    /// This worker's end of the exchange, and the host that peers are told.
    pub exchange: Option<(Arc<Collective>, String)>,
    /// The state held, if any.
    pub engine: Option<EngineThread>,
    /// A coordinator has taken this worker once.
    pub was_welcomed: bool,
}

impl Life {
    fn updates(&self) -> u64 {
        self.engine.as_ref().map_or(0, EngineThread::updates)
    }
}

/// How long a worker tries to come back: with a state by the clock, without one by the number of attempts.
struct Patience {
    losses: u32,
    lost_at: Option<Instant>,
    delays: Box<dyn Iterator<Item = Duration> + Send>,
}

impl Patience {
    fn new() -> Self {
        Self {
            losses: 0,
            lost_at: None,
            delays: Box::new(retry_delays(MAX_LOSSES)),
        }
    }

    /// How long an attempt to connect may take.
    fn left(&self, life: &Life) -> Duration {
        let options = &life.options;
        match self.lost_at {
            Some(lost_at) if life.engine.is_some() => {
                options.reconnect_timeout.saturating_sub(lost_at.elapsed())
            }
            _ if life.was_welcomed => options.reconnect_timeout,
            _ => options.connect_timeout,
        }
    }

    /// Counts a loss. Gives back the pause before the next attempt, or nothing where it is time to give up.
    fn pause(&mut self, life: &Life) -> Option<Duration> {
        self.losses += 1;
        self.lost_at.get_or_insert_with(Instant::now);
        let pause = self.delays.next();
        if life.engine.is_none() {
            return pause;
        }
        let left = self.left(life);
        (!left.is_zero()).then(|| pause.unwrap_or(Duration::from_secs(2)).min(left))
    }
}
