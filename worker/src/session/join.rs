//! A worker's life: connect, join, work, and leave in good order.
//!
//! A lost session is no end. The engine keeps what it holds, the worker waits for the coordinator or the one after it, and
//! goes on where it was; a coordinator of another job that has its place meanwhile changes nothing about that. Only whoever
//! is sent away drops its state, and comes back as a newcomer.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::net::address;
use crate::rpc::connect::{ConnectError, connect, retry_delays};
use crate::session::context::WorkerContext;
use crate::session::waits::Waits;
use crate::session::worker_session::SessionOutcome;
use crate::status::Doing;
use crate::{Finished, JoinOptions, WorkerError};

/// Sessions that a worker without a state may lose in a row before it gives up.
const MAX_LOSSES: usize = 8;
/// Longest pause between two attempts of a worker that holds a state; longer where another coordinator is in the way.
const LONGEST_SESSION_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_STRANGER_PAUSE: Duration = Duration::from_secs(5);
/// Least time that a coordinator gets to answer once it was reached.
const SHORTEST_ANSWER: Duration = Duration::from_secs(2);

/// Joins the coordinator and works until the job is done or `shutdown` is cancelled.
pub async fn join(
    mut options: JoinOptions,
    shutdown: CancellationToken,
) -> Result<Finished, WorkerError> {
    options.address = address::coordinator(&options.address)?;
    if let Some(host) = &mut options.exchange_host {
        *host = address::exchange_host(host)?;
    }
    let device = options.device.open()?;
    let status = options.status.clone();
    let mut worker = WorkerContext {
        options,
        device,
        shutdown,
        exchange: None,
        engine: None,
        was_welcomed: false,
        waits: Waits::new(status),
    };
    let mut reconnection = Reconnection::new();
    loop {
        worker.options.status.set(Doing::Connecting);
        let left = reconnection.left(&worker);
        let (address, token) = (&worker.options.address, worker.options.token.as_deref());
        let client = tokio::select! {
            client = connect(address, token, left, worker.was_welcomed) => client?,
            () = worker.shutdown.cancelled() => return Ok(Finished::Left),
        };
        let updates = worker.updates();
        let limit = reconnection.left(&worker).max(SHORTEST_ANSWER);
        let outcome = worker.attend(client, limit).await?;
        if worker.updates() > updates || worker.waits.take_waited() {
            reconnection = Reconnection::new();
        }
        let pause = match reconnection.next(&worker, outcome)? {
            Next::End(finished) => return Ok(finished),
            Next::Again(pause) => pause,
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = worker.shutdown.cancelled() => return Ok(Finished::Left),
        }
    }
}

/// What a worker does behind a session.
enum Next {
    End(Finished),
    /// It joins again, after this pause.
    Again(Duration),
}

/// How long a worker tries to come back: with a state, or before it was ever welcomed, by the clock; else by the number of
/// attempts.
struct Reconnection {
    began: Instant,
    losses: u32,
    lost_at: Option<Instant>,
    /// Digest of the job of another coordinator in the place of this worker's own, once that was told.
    stranger: Option<String>,
    delays: Box<dyn Iterator<Item = Duration> + Send>,
}

impl Reconnection {
    /// Decides what follows a session, and says so.
    ///
    /// # Errors
    /// Where the worker gives up.
    fn next(
        &mut self,
        worker: &WorkerContext,
        outcome: SessionOutcome,
    ) -> Result<Next, WorkerError> {
        let pause = self.pause(worker, &outcome);
        let left = self.left(worker).as_secs_f64().ceil();
        match (outcome, &worker.engine, pause) {
            (SessionOutcome::Finished(finished), ..) => return Ok(Next::End(finished)),
            (SessionOutcome::OtherJob(found), held, None) => {
                let held = held.as_ref().map(|engine| engine.job_digest.clone());
                return Err(WorkerError::OtherJob {
                    address: worker.options.address.clone(),
                    held: held.unwrap_or_default(),
                    found,
                    seconds: worker.options.reconnect_timeout.as_secs(),
                });
            }
            (SessionOutcome::OtherJob(found), held, Some(_)) => {
                if self.stranger.as_ref() != Some(&found) {
                    let address = &worker.options.address;
                    let held = held.as_ref().map_or("", |engine| &engine.job_digest);
                    tracing::warn!(
                        "coordinator {address} runs job {found}, but this worker holds the state of job {held}; keeping it \
                         and waiting up to {left} s for its own coordinator"
                    );
                    self.stranger = Some(found);
                }
            }
            (SessionOutcome::Lost(reason), _, None) if !worker.was_welcomed => {
                return Err(ConnectError::Unreachable {
                    address: worker.options.address.clone(),
                    reason,
                    seconds: worker.options.connect_timeout.as_secs(),
                }
                .into());
            }
            (SessionOutcome::Lost(reason), _, None) => {
                let times = self.losses;
                return Err(WorkerError::Lost { times, reason });
            }
            (SessionOutcome::Lost(reason), Some(_), Some(_)) => tracing::warn!(
                "the coordinator was lost ({reason}); keeping the state and waiting up to {left} s for it"
            ),
            (SessionOutcome::Lost(reason), None, Some(_)) => tracing::warn!(
                "the session with the coordinator was lost ({reason}); joining again"
            ),
        }
        Ok(Next::Again(pause.unwrap_or_default()))
    }

    fn new() -> Self {
        Self {
            began: Instant::now(),
            losses: 0,
            lost_at: None,
            stranger: None,
            delays: Box::new(retry_delays(MAX_LOSSES)),
        }
    }

    /// How long an attempt to connect may take.
    fn left(&self, worker: &WorkerContext) -> Duration {
        let options = &worker.options;
        match self.lost_at {
            Some(lost_at) if worker.engine.is_some() => {
                options.reconnect_timeout.saturating_sub(lost_at.elapsed())
            }
            _ if worker.was_welcomed => options.reconnect_timeout,
            _ => options.connect_timeout.saturating_sub(self.began.elapsed()),
        }
    }

    /// Counts a loss. Gives back the pause before the next attempt, or nothing where it is time to give up.
    fn pause(&mut self, worker: &WorkerContext, outcome: &SessionOutcome) -> Option<Duration> {
        self.losses += 1;
        self.lost_at.get_or_insert_with(Instant::now);
        let pause = self.delays.next();
        if worker.engine.is_none() && worker.was_welcomed {
            return pause;
        }
        let longest = match outcome {
            SessionOutcome::OtherJob(_) => LONGEST_STRANGER_PAUSE,
            _ => LONGEST_SESSION_PAUSE,
        };
        let left = self.left(worker);
        (!left.is_zero()).then(|| pause.unwrap_or(longest).min(longest).min(left))
    }
}
