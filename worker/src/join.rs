//! A worker's life: connect, join, get what the run starts from, work, and leave in good order.
//!
//! A lost session is no end: the worker comes back as a newcomer, and what it had computed for the step in progress is
//! computed again, to the same bits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::failpoint;
use common::wire::up;
use proto::v1;
use proto::v1::worker_message::Message as Up;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::blocks::{Blocks, BlocksError};
use crate::collective::{Collective, CollectiveError};
use crate::connect::{Client, connect, retry_delays};
use crate::fetch::{Fetcher, default_cache};
use crate::run::{Links, RunError, Start, run};
use crate::session::{Admission, FAREWELL_LIMIT, Forwarder, Order, Session, SessionEnd, open};
use crate::upload::{UploadError, Uploads};
use crate::{Finished, JoinOptions, WorkerError};

/// Orders that may wait for the engine: a few for each generation that comes and goes during one slot.
const MAX_ORDERS: usize = 1024;
/// Candle walks its graph by recursion.
const ENGINE_STACK_BYTES: usize = 64 << 20;
/// Sessions lost one after the other, without an update between them, after which a worker gives up.
const MAX_LOSSES: u32 = 8;
/// How long a state may take to be handed over when everything else is done.
const UPLOAD_LIMIT: Duration = Duration::from_secs(120);

/// Joins the coordinator and works until the job is done or `shutdown` is cancelled.
pub async fn join(
    options: JoinOptions,
    shutdown: CancellationToken,
) -> Result<Finished, WorkerError> {
    let mut losses = 0;
    let mut welcomed = false;
    let mut delays = retry_delays(MAX_LOSSES as usize);
    loop {
        let client = tokio::select! {
            client = connect(&options) => client?,
            () = shutdown.cancelled() => return Ok(Finished::Left),
        };
        let updates = Arc::new(AtomicU64::new(0));
        let reason = match attend(&options, client, &shutdown, &updates, &mut welcomed).await? {
            Attended::Finished(finished) => return Ok(finished),
            Attended::Lost(reason) => reason,
        };
        if updates.load(Ordering::SeqCst) > 0 {
            losses = 0;
            delays = retry_delays(MAX_LOSSES as usize);
        }
        losses += 1;
        let Some(delay) = delays.next() else {
            return Err(WorkerError::Lost {
                times: losses,
                reason,
            });
        };
        tracing::warn!("the session with the coordinator was lost ({reason}); joining again");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = shutdown.cancelled() => return Ok(Finished::Left),
        }
    }
}

enum Attended {
    Finished(Finished),
    Lost(String),
}

/// One session from Join to its end.
async fn attend(
    options: &JoinOptions,
    client: Client,
    shutdown: &CancellationToken,
    updates: &Arc<AtomicU64>,
    welcomed: &mut bool,
) -> Result<Attended, WorkerError> {
    let place = ExchangePlace::choose(options).await;
    let collective = Arc::new(place.bind()?);
    let threads = options.threads.unwrap_or_else(all_cores);
    let join = v1::Join {
        version: common::VERSION.to_owned(),
        name: options.name.clone().unwrap_or_else(default_name),
        exchange_port: collective.port().into(),
        exchange_host: place.announced,
        numerics_class: crate::numerics_class(),
        threads: threads as u32,
        device: options.device.resolve().to_owned(),
        job_digest: String::new(),
        run: String::new(),
    };
    let session = tokio::select! {
        session = open(&client, join) => session,
        () = shutdown.cancelled() => return Ok(Attended::Finished(Finished::Left)),
    };
    let session = match session {
        Ok(session) => session,
        Err(SessionEnd::Foreign(_)) if !*welcomed => {
            return Err(WorkerError::NoCoordinator {
                address: options.address.clone(),
            });
        }
        Err(end) => return ended(end),
    };
    *welcomed = true;
    failpoint::reached("join");
    tracing::info!("joined {}", options.address);
    let (worker, preparation) = assemble(options, client, session, collective, threads, updates);
    worker.work(preparation, shutdown).await
}

fn ended(end: SessionEnd) -> Result<Attended, WorkerError> {
    match end {
        SessionEnd::Finished {
            failed: false,
            reason,
        } => Ok(Attended::Finished(Finished::Job { reason })),
        SessionEnd::Finished { reason, .. } => Err(WorkerError::JobFailed { reason }),
        SessionEnd::Refused(reason) => Err(WorkerError::Refused { reason }),
        SessionEnd::Unusable(reason) => Err(WorkerError::Coordinator { reason }),
        SessionEnd::Foreign(reason) | SessionEnd::Lost(reason) => Ok(Attended::Lost(reason)),
    }
}

/// A worker that has been welcomed.
struct Worker {
    up: mpsc::Sender<v1::WorkerMessage>,
    orders: mpsc::Sender<Order>,
    collective: Arc<Collective>,
    blocks: Arc<Blocks>,
    uploads: Uploads,
    upload_failures: mpsc::Receiver<UploadError>,
    stop: Arc<AtomicBool>,
    ready: Arc<AtomicBool>,
    forwarding: tokio::task::JoinHandle<SessionEnd>,
}

/// What the engine needs to start.
struct Preparation {
    admission: Admission,
    fetcher: Fetcher,
    threads: usize,
    links: Links,
}

/// What came first.
enum Happened {
    Session(SessionEnd),
    Worked(Result<(), WorkerError>),
    UploadFailed(UploadError),
    AskedToStop,
}

/// Connects the parts of a welcomed worker with each other.
fn assemble(
    options: &JoinOptions,
    client: Client,
    session: Session,
    collective: Arc<Collective>,
    threads: usize,
    updates: &Arc<AtomicU64>,
) -> (Worker, Preparation) {
    let Session {
        admission,
        up,
        down,
    } = session;
    let cache = options.cache_dir.clone().unwrap_or_else(default_cache);
    let (orders, waiting_orders) = mpsc::channel(MAX_ORDERS);
    let newest_generation = Arc::new(AtomicU64::new(0));
    let (stop, ready) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let (failures, upload_failures) = mpsc::channel(1);
    let uploads = Uploads::new(client.clone(), admission.worker, cache.clone(), failures);
    let blocks = Arc::new(Blocks::new(
        client.clone(),
        admission.job.clone(),
        admission.blocks.clone(),
    ));
    let forwarder = Forwarder {
        orders: orders.clone(),
        up: up.clone(),
        collective: collective.clone(),
        blocks: blocks.clone(),
        newest_generation: newest_generation.clone(),
        run_id: *blake3::hash(admission.job_digest.as_bytes()).as_bytes(),
    };
    let links = Links {
        orders: waiting_orders,
        up: up.clone(),
        collective: collective.clone(),
        uploads: uploads.clone(),
        newest_generation,
        stop: stop.clone(),
        ready: ready.clone(),
        updates: updates.clone(),
    };
    let worker = Worker {
        up,
        orders,
        collective,
        blocks,
        uploads,
        upload_failures,
        stop,
        ready,
        forwarding: tokio::spawn(forwarder.forward(down)),
    };
    let preparation = Preparation {
        admission,
        fetcher: Fetcher { client, cache },
        threads,
        links,
    };
    (worker, preparation)
}

impl Worker {
    async fn work(
        mut self,
        preparation: Preparation,
        shutdown: &CancellationToken,
    ) -> Result<Attended, WorkerError> {
        let working = prepare_and_run(preparation);
        tokio::pin!(working);
        let happened = tokio::select! {
            end = &mut self.forwarding => Happened::Session(end.unwrap_or_else(broken)),
            worked = &mut working => Happened::Worked(worked),
            Some(error) = self.upload_failures.recv() => Happened::UploadFailed(error),
            () = shutdown.cancelled() => Happened::AskedToStop,
        };
        if !matches!(happened, Happened::Worked(_)) {
            self.stop.store(true, Ordering::SeqCst);
            let _ = self.orders.try_send(Order::Stop);
        }
        match happened {
            Happened::Session(end) => {
                // Ends what the engine may be waiting in. A model that is still loading is not waited for.
                self.collective.close();
                self.blocks.close();
                if self.ready.load(Ordering::SeqCst) {
                    let _ = working.await;
                }
                if matches!(end, SessionEnd::Finished { .. }) {
                    self.uploads.finish(UPLOAD_LIMIT).await;
                }
                ended(end)
            }
            Happened::AskedToStop => {
                if self.ready.load(Ordering::SeqCst) {
                    tracing::info!("finishing the slot in hand, then leaving");
                    let _ = working.await;
                }
                self.uploads.finish(UPLOAD_LIMIT).await;
                self.leave(false, "it was asked to stop").await;
                Ok(Attended::Finished(Finished::Left))
            }
            // So that another worker is asked for the state.
            Happened::UploadFailed(error) => {
                self.leave(true, &error.to_string()).await;
                Err(error.into())
            }
            // The session knows why nobody took the engine's reports.
            Happened::Worked(Ok(()) | Err(WorkerError::Run(RunError::SessionOver))) => {
                ended((&mut self.forwarding).await.unwrap_or_else(broken))
            }
            // The network's fault, like a lost session.
            Happened::Worked(Err(WorkerError::Run(RunError::Blocks(BlocksError::Broken {
                reason,
            })))) => {
                self.leave(false, &reason).await;
                Ok(Attended::Lost(reason))
            }
            Happened::Worked(Err(error)) => {
                self.leave(true, &error.to_string()).await;
                Err(error)
            }
        }
    }

    /// Says goodbye and waits until it is heard.
    async fn leave(self, failed: bool, reason: &str) {
        let leaving = v1::Leaving {
            reason: reason.to_owned(),
            failed,
        };
        let farewell = async {
            let _ = self.up.send(up(Up::Leaving(leaving))).await;
            let _ = self.forwarding.await;
        };
        let _ = tokio::time::timeout(FAREWELL_LIMIT, farewell).await;
    }
}

fn broken(_: tokio::task::JoinError) -> SessionEnd {
    SessionEnd::Lost("the session broke off".to_owned())
}

/// Gets model and state, then works on the engine's own thread until that ends.
async fn prepare_and_run(preparation: Preparation) -> Result<(), WorkerError> {
    let Preparation {
        admission,
        fetcher,
        threads,
        links,
    } = preparation;
    let (model_files, model_dir) = (&admission.model_files, &admission.model_dir);
    let (state_files, state_dir) = (&admission.state_files, &admission.state_dir);
    let start = Start {
        model: fetcher.model(model_files, model_dir).await?,
        state: fetcher.state(state_files, state_dir).await?,
        start_step: admission.start_step,
        job: admission.job,
        job_digest: admission.job_digest,
        threads,
    };
    start_engine(start, links)
        .await
        .unwrap_or(Err(WorkerError::EnginePanicked))
}

fn start_engine(start: Start, links: Links) -> oneshot::Receiver<Result<(), WorkerError>> {
    let (sender, receiver) = oneshot::channel();
    let engine = move || {
        // Nobody waits where the session has ended.
        let _ = sender.send(run(start, links).map_err(WorkerError::Run));
    };
    let spawned = std::thread::Builder::new()
        .name("engine".to_owned())
        .stack_size(ENGINE_STACK_BYTES)
        .spawn(engine);
    if let Err(error) = spawned {
        tracing::error!("the engine's thread cannot be started: {error}");
    }
    receiver
}

/// Where this worker's peers reach it.
struct ExchangePlace {
    hosts: Vec<IpAddr>,
    announced: String,
}

impl ExchangePlace {
    /// The loopback where the coordinator is on it, so that nothing is open to a network that needs it not; else all
    /// addresses.
    async fn choose(options: &JoinOptions) -> Self {
        let everywhere = vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
        let Some(host) = &options.exchange_host else {
            let resolved = tokio::net::lookup_host(&options.address).await;
            let resolved: Vec<_> = resolved.into_iter().flatten().collect();
            let here = |address: &SocketAddr| address.ip().is_loopback();
            if !resolved.is_empty() && resolved.iter().all(here) {
                let host = Ipv4Addr::LOCALHOST;
                return Self {
                    hosts: vec![host.into()],
                    announced: host.to_string(),
                };
            }
            return Self {
                hosts: everywhere,
                announced: String::new(),
            };
        };
        Self {
            hosts: everywhere,
            announced: host.clone(),
        }
    }

    /// Listens on the first of the hosts that this machine has.
    fn bind(&self) -> Result<Collective, CollectiveError> {
        let mut bound = Collective::bind(self.hosts[0]);
        for host in &self.hosts[1..] {
            bound = bound.or_else(|_| Collective::bind(*host));
        }
        bound
    }
}

fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn default_name() -> String {
    let host = std::fs::read_to_string(PathBuf::from("/proc/sys/kernel/hostname"))
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .unwrap_or_else(|| "worker".to_owned());
    format!("{}:{}", host.trim(), std::process::id())
}
