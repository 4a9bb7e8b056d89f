//! One session from Join to its end: the parts of a worker are connected with each other, and whatever happens first
//! decides how it goes on.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::failpoint;
use common::host::host_name;
use common::wire::up;
use proto::v1;
use proto::v1::worker_message::Message as Up;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::collective::{self, Collective};
use crate::rpc::blocks::Blocks;
use crate::rpc::connect::{Client, ConnectError};
use crate::rpc::fetch::{Fetcher, default_cache};
use crate::rpc::hub_cache;
use crate::rpc::peers::Peers;
use crate::rpc::upload::{UploadError, Uploads};
use crate::run::engine_thread::{EngineThread, EngineThreadError};
use crate::run::leases::Leases;
use crate::run::on_engine::Start;
use crate::run::orders::CoordinatorLink;
use crate::session::context::WorkerContext;
use crate::session::exchange_address::ExchangeEndpoint;
use crate::session::stream::{
    Admission, Forwarder, LAST_MESSAGE_TIMEOUT, Session, SessionEnd, decline, open,
};
use crate::session::waits::Waits;
use crate::status::{Doing, Status};
use crate::{ComputeDevice, Finished, WorkerError};

/// How long a state may take to be handed over when everything else is done.
const UPLOAD_LIMIT: Duration = Duration::from_secs(120);

/// How a session ended, where the worker did not fail.
pub enum SessionOutcome {
    Finished(Finished),
    /// The session was lost; the worker may come back, with its state if its [`WorkerContext`] still has the engine.
    Lost(String),
    /// The coordinator runs the job with this digest, and the state held here is of another.
    OtherJob(String),
}

/// Pause between two attempts to join a coordinator that prepares.
const PREPARING_PAUSE: Duration = Duration::from_millis(100);

const ASKED_TO_STOP: &str = "it was asked to stop";

/// The first thing to happen that ends a session.
enum Happened {
    Session(SessionEnd),
    Worked(Result<(), WorkerError>),
    GivenUp(String),
    UploadFailed(UploadError),
    /// The worker was asked to stop, and was not let go in time or has nothing to hand over.
    AskedToStop,
    /// The worker was asked to stop, and the coordinator let it go.
    LetGo(String),
}

impl Happened {
    fn of(end: SessionEnd, was_asked_to_stop: bool) -> Self {
        match end {
            SessionEnd::Finished {
                failed: false,
                reason,
            } if was_asked_to_stop => Self::LetGo(reason),
            end => Self::Session(end),
        }
    }
}

/// What may end a session beside its work and the coordinator.
struct Ends {
    /// Whether there is a state to hand over.
    is_ready: Arc<AtomicBool>,
    /// Why the engine gave up.
    reasons: mpsc::Receiver<String>,
    upload_failures: mpsc::Receiver<UploadError>,
    shutdown: CancellationToken,
    /// How long the coordinator may take to let a worker go that was asked to stop.
    draining_timeout: Duration,
}

impl Ends {
    /// Waits for the first thing to happen that ends the session, `serving` among them.
    async fn first(
        &mut self,
        serving: impl Future<Output = Result<(), WorkerError>>,
        tie: &mut SessionTasks,
    ) -> Happened {
        let mut serving = pin!(serving);
        let mut patience_ends = None;
        loop {
            tokio::select! {
                end = &mut tie.forwarding => {
                    let end = end.unwrap_or_else(broken);
                    return Happened::of(end, patience_ends.is_some());
                }
                worked = &mut serving => return Happened::Worked(worked),
                Some(reason) = self.reasons.recv() => return Happened::GivenUp(reason),
                Some(error) = self.upload_failures.recv() => return Happened::UploadFailed(error),
                () = self.shutdown.cancelled(), if patience_ends.is_none() => {
                    // What is still loading leaves nothing behind.
                    if !self.is_ready.load(Ordering::SeqCst) {
                        return Happened::AskedToStop;
                    }
                    patience_ends = Some(Instant::now() + self.draining_timeout);
                    tie.say_draining(self.draining_timeout).await;
                }
                () = until(patience_ends) => return Happened::AskedToStop,
            }
        }
    }
}

impl WorkerContext {
    /// Joins with the state that is held, and works until the session ends.
    /// Where the worker is not welcomed within `limit`, the session is lost.
    pub async fn attend(
        &mut self,
        client: Client,
        limit: Duration,
    ) -> Result<SessionOutcome, WorkerError> {
        let (collective, announced) = self.exchange().await?;
        let join = self.introduction(collective.port(), announced);
        let session = tokio::select! {
            session = open_when_prepared(&client, join, limit, &mut self.waits) => session,
            () = self.shutdown.cancelled() => {
                self.waits.end();
                return Ok(SessionOutcome::Finished(Finished::Left));
            }
        };
        let session = match session {
            Ok(session) => session,
            Err(SessionEnd::Foreign(_)) if !self.was_welcomed => {
                let address = self.options.address.clone();
                return Err(ConnectError::NoCoordinator { address }.into());
            }
            Err(end) => return self.conclude(end).await,
        };
        let session = match self.check_job(session).await? {
            Ok(session) => session,
            Err(outcome) => return Ok(outcome),
        };
        self.was_welcomed = true;
        let admission = &session.admission;
        collective.identify(admission.exchange_id(), admission.worker);
        failpoint::reached("join");
        let address = &self.options.address;
        match &self.engine {
            Some(_) => tracing::info!("joined {address} again, with the state that is held here"),
            None => tracing::info!("joined {address}"),
        }
        self.work(client, session, collective).await
    }

    async fn exchange(&mut self) -> Result<(Arc<Collective>, String), WorkerError> {
        if let Some(exchange) = &self.exchange {
            return Ok(exchange.clone());
        }
        let place = ExchangeEndpoint::choose(&self.options).await;
        let collective = Arc::new(place.bind()?);
        Ok(self.exchange.insert((collective, place.announced)).clone())
    }

    fn introduction(&self, exchange_port: u16, exchange_host: String) -> v1::Join {
        let options = &self.options;
        let held = self.engine.as_ref();
        v1::Join {
            version: crate::VERSION.to_owned(),
            name: options.name.clone().unwrap_or_else(default_name),
            exchange_port: exchange_port.into(),
            exchange_host,
            numerics_class: self.device.numerics_class(),
            threads: self.threads() as u32,
            device: self.device.to_string(),
            peak_flops: self.device.published_peak().unwrap_or(0.0),
            job_digest: held.map_or_else(String::new, |engine| engine.job_digest.clone()),
            run: held.map_or_else(String::new, |engine| engine.run.clone()),
            gpu: collective::introduce(&self.device),
        }
    }

    fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.options.threads.unwrap_or_else(all)
    }

    /// Checks that the state held is of the job and the run that the coordinator named.
    async fn check_job(
        &mut self,
        session: Session,
    ) -> Result<Result<Session, SessionOutcome>, WorkerError> {
        let Some(engine) = &self.engine else {
            return Ok(Ok(session));
        };
        let admission = &session.admission;
        if admission.job_digest != engine.job_digest {
            let (held, found) = (&engine.job_digest, admission.job_digest.clone());
            let reason = format!("it holds the state of job {held}, and this one is {found}");
            decline(session.up, session.down, &reason).await;
            return Ok(Err(SessionOutcome::OtherJob(found)));
        }
        if admission.run == engine.run {
            return Ok(Ok(session));
        }
        let reason = "it runs this job anew, and the state that is held is of an earlier run";
        decline(session.up, session.down, reason).await;
        self.drop_state().await?;
        Ok(Err(SessionOutcome::Lost(reason.to_owned())))
    }

    async fn work(
        &mut self,
        client: Client,
        session: Session,
        collective: Arc<Collective>,
    ) -> Result<SessionOutcome, WorkerError> {
        let fetcher = self.fetcher(client.clone(), &session, &collective)?;
        let Session {
            admission,
            up,
            down,
        } = session;
        let power = (self.device.clone(), self.threads());
        let (failures, upload_failures) = mpsc::channel(1);
        let (given_up, reasons) = mpsc::channel(1);
        let uploads = Uploads::new(client.clone(), admission.worker, failures);
        let blocks = Arc::new(Blocks::new(
            client,
            admission.job.clone(),
            admission.blocks.clone(),
        ));
        let leases = Arc::<Leases>::default();
        let engine = self.engine.get_or_insert_with(|| {
            let (job_digest, run) = (admission.job_digest.clone(), admission.run.clone());
            EngineThread::new(job_digest, run, collective.clone())
        });
        let forwarder = Forwarder {
            orders: engine.orders.clone(),
            up: up.clone(),
            collective,
            blocks: blocks.clone(),
            leases: leases.clone(),
            newest_generation: engine.newest_generation.clone(),
            run_id: admission.exchange_id(),
            worker: admission.worker,
            device: self.device.clone(),
            told: Mutex::default(),
            status: self.options.status.clone(),
        };
        let line = CoordinatorLink {
            up: up.downgrade(),
            upload: Box::new({
                let uploads = uploads.clone();
                move |state| uploads.start(state)
            }),
            leases,
            recorded: admission.recorded,
            given_up,
        };
        let mut tie = SessionTasks {
            up,
            blocks,
            uploads,
            forwarding: tokio::spawn(forwarder.forward(down)),
        };
        let mut ends = Ends {
            is_ready: engine.ready_flag(),
            reasons,
            upload_failures,
            shutdown: self.shutdown.clone(),
            draining_timeout: self.options.draining_timeout,
        };
        let status = self.options.status.clone();
        status.joined(admission.total_steps);
        let serving = serve(engine, line, admission, fetcher, power, status);
        let happened = ends.first(serving, &mut tie).await;
        self.decide(happened, tie).await
    }

    /// What gets the files of the model, from where they are nearest.
    fn fetcher(
        &self,
        client: Client,
        session: &Session,
        collective: &Collective,
    ) -> Result<Fetcher, WorkerError> {
        let admission = &session.admission;
        let cache = match &self.options.cache_dir {
            Some(cache) => cache.clone(),
            None => default_cache()?,
        };
        let peers = Peers {
            shared: collective.shared_files().clone(),
            up: session.up.downgrade(),
            run_id: admission.exchange_id(),
            worker: admission.worker,
            unusable: Mutex::default(),
        };
        Ok(Fetcher {
            client,
            cache,
            peers,
            snapshots: hub_cache::snapshots(self.options.hub_cache.as_deref(), &admission.job),
        })
    }

    async fn decide(
        &mut self,
        happened: Happened,
        tie: SessionTasks,
    ) -> Result<SessionOutcome, WorkerError> {
        match happened {
            Happened::Session(end) => {
                tie.blocks.close();
                match end {
                    SessionEnd::Finished { .. } => {
                        self.drop_state().await?;
                        tie.uploads.finish(UPLOAD_LIMIT).await;
                    }
                    _ => tie.uploads.abandon(),
                }
                self.conclude(end).await
            }
            Happened::LetGo(reason) => {
                tie.blocks.close();
                self.drop_state().await?;
                tie.uploads.finish(UPLOAD_LIMIT).await;
                tracing::info!("left as it was asked to: {reason}");
                Ok(SessionOutcome::Finished(Finished::Left))
            }
            Happened::AskedToStop => {
                if let Some(engine) = self.engine.take() {
                    tracing::info!(
                        "leaving after the slot in hand: others compute what was not counted yet"
                    );
                    // Its exchange is not waited for: a peer may be silent for long.
                    engine.abandon().await?;
                }
                tie.uploads.finish(UPLOAD_LIMIT).await;
                tie.leave(false, ASKED_TO_STOP).await;
                Ok(SessionOutcome::Finished(Finished::Left))
            }
            // The network's fault, like a lost session.
            Happened::GivenUp(reason) => {
                tie.blocks.close();
                tie.uploads.abandon();
                tie.leave(false, &reason).await;
                Ok(SessionOutcome::Lost(reason))
            }
            // So that another worker is asked for the state.
            Happened::UploadFailed(error) => {
                tie.leave(true, &error.to_string()).await;
                Err(error.into())
            }
            Happened::Worked(worked) => {
                let error = worked.err().unwrap_or(EngineThreadError::Panicked.into());
                tie.leave(true, &error.to_string()).await;
                Err(error)
            }
        }
    }

    /// Decides what the end of a session means for the worker.
    async fn conclude(&mut self, end: SessionEnd) -> Result<SessionOutcome, WorkerError> {
        match end {
            SessionEnd::Finished {
                failed: false,
                reason,
            } => Ok(SessionOutcome::Finished(Finished::Job { reason })),
            SessionEnd::Finished { reason, .. } => Err(WorkerError::JobFailed { reason }),
            SessionEnd::Refused { reason, job } => {
                let held = self.engine.as_ref().map(|engine| &engine.job_digest);
                match job {
                    Some(found) if held.is_some_and(|held| *held != found) => {
                        Ok(SessionOutcome::OtherJob(found))
                    }
                    _ => Err(WorkerError::Refused {
                        address: self.options.address.clone(),
                        reason,
                    }),
                }
            }
            SessionEnd::Unusable(reason) => Err(WorkerError::Coordinator { reason }),
            SessionEnd::Expelled(reason) => {
                self.drop_state().await?;
                Ok(SessionOutcome::Lost(reason))
            }
            SessionEnd::Interrupted(reason)
            | SessionEnd::Preparing(reason)
            | SessionEnd::Foreign(reason)
            | SessionEnd::Lost(reason) => {
                // What was only on its way here is no state yet.
                self.engine.take_if(|engine| !engine.has_started());
                Ok(SessionOutcome::Lost(reason))
            }
        }
    }

    async fn drop_state(&mut self) -> Result<(), WorkerError> {
        if let Some(engine) = self.engine.take() {
            engine.abandon().await?;
        }
        Ok(())
    }
}

/// Joins, asking again as long as the coordinator prepares its run, however long that takes; `limit` is for each answer.
async fn open_when_prepared(
    client: &Client,
    join: v1::Join,
    limit: Duration,
    waits: &mut Waits,
) -> Result<Session, SessionEnd> {
    loop {
        match open(client, join.clone(), limit).await {
            Err(SessionEnd::Preparing(moment)) => waits.show(&moment),
            opened => {
                waits.end();
                return opened;
            }
        }
        // The coordinator holds a call back for a while; one that does not is not asked all the time.
        tokio::time::sleep(PREPARING_PAUSE).await;
    }
}

/// The tasks beside the engine in a session: messages up, blocks, uploads, and what forwards the coordinator's messages.
struct SessionTasks {
    up: mpsc::Sender<v1::WorkerMessage>,
    blocks: Arc<Blocks>,
    uploads: Uploads,
    forwarding: JoinHandle<SessionEnd>,
}

impl SessionTasks {
    async fn say_draining(&self, patience: Duration) {
        tracing::info!(
            "asked to stop: handing over, for {} s at most; a second signal stops at once",
            patience.as_secs()
        );
        let reason = ASKED_TO_STOP.to_owned();
        let draining = up(Up::Draining(v1::Draining { reason }));
        // Where it cannot be said, the session is over.
        let _ = tokio::time::timeout(LAST_MESSAGE_TIMEOUT, self.up.send(draining)).await;
    }

    /// Says goodbye and waits until the coordinator has heard it.
    async fn leave(mut self, failed: bool, reason: &str) {
        let leaving = v1::Leaving {
            reason: reason.to_owned(),
            failed,
        };
        let farewell = async {
            let _ = self.up.send(up(Up::Leaving(leaving))).await;
            let _ = (&mut self.forwarding).await;
        };
        let _ = tokio::time::timeout(LAST_MESSAGE_TIMEOUT, farewell).await;
    }
}

impl Drop for SessionTasks {
    fn drop(&mut self) {
        // What it still has would mix with what the next session brings.
        self.forwarding.abort();
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn broken(_: tokio::task::JoinError) -> SessionEnd {
    SessionEnd::Lost("the session broke off".to_owned())
}

/// Gets model and state where the engine has none, gives it the session, and waits for the engine's end.
async fn serve(
    engine: &mut EngineThread,
    line: CoordinatorLink,
    admission: Admission,
    fetcher: Fetcher,
    (device, threads): (ComputeDevice, usize),
    status: Status,
) -> Result<(), WorkerError> {
    if engine.has_started() {
        fetcher.peers.announce().await;
    } else {
        status.set(Doing::Fetching);
        let (model_files, model_dir) = (&admission.model_files, &admission.model_dir);
        let (state_files, state_dir) = (&admission.state_files, &admission.state_dir);
        engine.start(Start {
            model: fetcher.model(model_files, model_dir).await?,
            state: fetcher.state(state_files, state_dir).await?,
            start_step: admission.start_step,
            job: admission.job,
            job_digest: admission.job_digest,
            threads,
            device,
            status,
        });
    }
    engine.attach(line).await;
    Ok(engine.ended().await?)
}

fn default_name() -> String {
    let host = host_name()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .unwrap_or_else(|| "worker".to_owned());
    format!("{}:{}", host.trim(), std::process::id())
}
