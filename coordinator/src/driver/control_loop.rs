//! The driver: one task owns the cluster and carries out its commands.
//!
//! In: what the calls, the clock and the user say ([`Input`]). Out: messages to workers, stored states, run events, and
//! the outcome. It decides nothing; it only turns commands into deeds and failures of deeds into events.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::failpoint;
use common::files::FileEntry;
use common::wire::{JOB_KEY, down};
use proto::v1::{self, coordinator_message::Message as Down};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::cluster::run_event::RunEvent;
use crate::cluster::{Cluster, Command, Event, Outcome, WorkerId};
use crate::driver::transfers::{Expected, Transfers};
use crate::store::checkpoints::{Facts, NotMade, Received, State, Store};
use crate::store::journal::Journal;

/// Most workers that are connected at a time.
const MAX_SESSIONS: usize = 4096;
/// Bytes that a state may have beyond 16 for each trainable scalar: configuration and headers.
const STATE_OVERHEAD_BYTES: u64 = 64 << 20;

/// How long the run waits for the record of an evaluation that decides how it goes on. A disk that takes longer is told anyway.
const EVALUATION_RECORD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the end of the run waits for checkpoints that are being written: all of them, and none over `save_total_limit`, are
/// there when the process ends, unless the disk takes longer.
const STORES_TIMEOUT: Duration = Duration::from_secs(30);

/// An entry of the queue of messages to one worker.
pub enum Outgoing {
    Message(Box<v1::CoordinatorMessage>),
    /// A generation, shared by all members until it is sent: a thousand copies of a thousand members would be large.
    Generation {
        rank: u32,
        generation: Arc<v1::Generation>,
    },
    /// Ends the session.
    End(Status),
}

impl Outgoing {
    /// The message as it goes over the wire; an error ends the session.
    pub fn into_message(self) -> Result<v1::CoordinatorMessage, Status> {
        match self {
            Self::Message(message) => Ok(*message),
            Self::Generation { rank, generation } => Ok(down(Down::Generation(v1::Generation {
                rank,
                ..(*generation).clone()
            }))),
            Self::End(status) => Err(status),
        }
    }
}

/// What reaches the driver.
pub enum Input {
    /// A session was opened. The driver answers with the worker's number.
    Opened {
        join: v1::Join,
        /// Where peers reach the worker's exchange.
        address: String,
        outbox: mpsc::Sender<Outgoing>,
        closed: CancellationToken,
        answer: oneshot::Sender<Result<WorkerId, Status>>,
    },
    /// Something that the cluster has to know.
    Happened(Event),
    /// The user asked the run to stop.
    Stop(StopRequest),
    /// A state that was asked for has arrived and its files have the digests they should have.
    Uploaded(Received),
    /// A checkpoint is on disk.
    Stored(State),
}

/// Why the run is to stop, and how.
pub struct StopRequest {
    pub reason: String,
    /// Whether the run is to be started again, so that its workers wait for that.
    pub resumable: bool,
    /// What the user can do to end the process at once, in words.
    pub again: &'static str,
}

/// What every worker is told when it joins: the run, its job, the model's files.
#[derive(Clone, Debug)]
pub struct WelcomeTemplate {
    /// Number of the term: the first coordinator of a run has 1.
    pub term: u64,
    /// Random identifier of the run, drawn when it began; the same in every term of it.
    pub run: String,
    /// The resolved job as JSON.
    pub job: Vec<u8>,
    pub job_digest: String,
    pub model_dir: PathBuf,
    pub model_files: Vec<FileEntry>,
    pub total_steps: u64,
}

struct Session {
    outbox: mpsc::Sender<Outgoing>,
    closed: CancellationToken,
}

/// The owner of the cluster: feeds it events and carries out its commands.
pub struct Driver {
    cluster: Cluster,
    greeting: WelcomeTemplate,
    /// The state that newcomers start from.
    newest: State,
    store: Arc<Store>,
    shelf: Arc<Transfers>,
    observer: mpsc::Sender<RunEvent>,
    journal: Option<Journal>,
    /// The driver's own input queue, for tasks that answer later.
    inputs: mpsc::Sender<Input>,
    sessions: HashMap<WorkerId, Session>,
    next_worker: u64,
    /// The step whose state is the result.
    last_step: Option<u64>,
    /// Events to be handled next: what came in, then the failures of commands that followed from it.
    pending: VecDeque<Event>,
    /// States that arrived before it was settled which weights their step has.
    uploads_awaiting_digest: Vec<Received>,
    /// A clone is held while a state is written; nothing is ever sent.
    writing: mpsc::Sender<Infallible>,
    /// Ends when nobody holds the other end.
    written: mpsc::Receiver<Infallible>,
}

impl Driver {
    /// A driver of `cluster`. `newest` is what newcomers start from; `inputs` sends to the queue that [`Self::drive`] reads.
    pub fn new(
        cluster: Cluster,
        greeting: WelcomeTemplate,
        newest: State,
        store: Arc<Store>,
        shelf: Arc<Transfers>,
        observer: mpsc::Sender<RunEvent>,
        inputs: mpsc::Sender<Input>,
    ) -> Self {
        let (writing, written) = mpsc::channel(1);
        Self {
            cluster,
            greeting,
            newest,
            store,
            shelf,
            observer,
            journal: None,
            inputs,
            sessions: HashMap::new(),
            next_worker: 1,
            last_step: None,
            pending: VecDeque::new(),
            uploads_awaiting_digest: Vec::new(),
            writing,
            written,
        }
    }

    /// Writes the run's events to `journal`, so that a next coordinator can go on with it.
    pub fn with_journal(mut self, journal: Journal) -> Self {
        self.journal = Some(journal);
        self
    }

    /// Runs until the cluster ends. Sessions end with the driver, after what is queued for them.
    pub async fn drive(mut self, mut arrivals: mpsc::Receiver<Input>) -> Outcome {
        self.pending.push_back(Event::Ticked);
        loop {
            while let Some(event) = self.pending.pop_front() {
                if let Some(outcome) = self.apply(event).await {
                    self.close_journal(&outcome).await;
                    drop(self.writing);
                    // Nothing comes but the end.
                    if timeout(STORES_TIMEOUT, self.written.recv()).await.is_err() {
                        tracing::warn!("a checkpoint is still being written: its disk is slow");
                    }
                    return outcome;
                }
                self.store_proven();
            }
            let wakes_at = self.cluster.wakes_at();
            let event = tokio::select! {
                // What has arrived counts before the time does: a heartbeat that waits here was sent in time.
                biased;
                Some(input) = arrivals.recv() => self.take(input),
                () = sleep_until(wakes_at) => Some(Event::Ticked),
            };
            self.pending.extend(event);
        }
    }

    async fn close_journal(&mut self, outcome: &Outcome) {
        if let Some(journal) = self.journal.take() {
            let outcome = outcome.clone();
            let _ = tokio::task::spawn_blocking(move || journal.end(&outcome)).await;
        }
    }

    /// Handles what is not the cluster's business, and returns the event that it has to know.
    fn take(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Opened { answer, .. } if self.sessions.len() >= MAX_SESSIONS => {
                let full = Status::unavailable("the coordinator has all the workers it can serve");
                let _ = answer.send(Err(full));
                None
            }
            Input::Opened {
                join,
                address,
                outbox,
                closed,
                answer,
            } => {
                let worker = WorkerId(self.next_worker);
                self.next_worker += 1;
                self.sessions.insert(worker, Session { outbox, closed });
                // Where the call is gone already, its session breaks and is noticed there.
                let _ = answer.send(Ok(worker));
                Some(Event::WorkerJoined {
                    worker,
                    join,
                    address,
                })
            }
            Input::Happened(event) => {
                if let Event::WorkerLost { worker, .. } = &event {
                    self.sessions.remove(worker);
                    self.shelf.forget(*worker);
                }
                Some(event)
            }
            Input::Stop(request) => {
                let saved = match self.cluster.unsaved_step() {
                    Some(step) => format!(" after a checkpoint of step {step}"),
                    None => String::new(),
                };
                let notice = RunEvent::Notice(format!("stopping{saved}; {}", request.again));
                // Where the queue is full, nobody reads that fast.
                drop(self.observer.try_send(notice));
                let StopRequest {
                    reason, resumable, ..
                } = request;
                Some(Event::StopRequested { reason, resumable })
            }
            Input::Uploaded(received) => {
                let (worker, step) = (received.worker, received.step);
                self.uploads_awaiting_digest.push(received);
                self.store_proven();
                Some(Event::StateArrived { worker, step })
            }
            Input::Stored(state) => {
                if let Some(folder) = &state.folder {
                    self.shelf.offer(folder, &state.files);
                }
                let stored = Event::StateStored {
                    step: state.step,
                    path: state.folder.clone().unwrap_or_default(),
                    weights_digest: state.weights_digest.clone().unwrap_or_default(),
                    is_result: state.files.is_empty(),
                };
                // The result has no optimizer's state, so nobody starts from it.
                if state.step >= self.newest.step && !state.files.is_empty() {
                    self.newest = state;
                }
                Some(stored)
            }
        }
    }

    async fn apply(&mut self, event: Event) -> Option<Outcome> {
        let mut commands = Vec::new();
        let now = Instant::now().into_std();
        self.cluster.handle(now, event, &mut commands);
        for command in commands {
            match command {
                Command::Emit(event) => {
                    match &event {
                        RunEvent::StepCommitted(_) => failpoint::reached("commit"),
                        RunEvent::Evaluated(_) => failpoint::reached("evaluate"),
                        _ => {}
                    }
                    if let Some(journal) = &self.journal {
                        journal.observe(&event);
                        // What follows from it comes after: no crash may make another decision of what is found again.
                        if matches!(event, RunEvent::Evaluated(_))
                            && self.cluster.goes_by_evaluations()
                        {
                            wait_for(journal.durable(EVALUATION_RECORD_TIMEOUT)).await;
                            failpoint::reached("evaluation-recorded");
                        }
                    }
                    // An observer that is gone needs no events.
                    drop(self.observer.send(event).await);
                }
                Command::End(outcome) => return Some(outcome),
                command => self.carry_out(command),
            }
        }
        None
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Welcome { worker } => {
                let welcome = self.welcome(worker);
                self.send(worker, Down::Welcome(welcome));
            }
            Command::SendGeneration {
                worker,
                rank,
                generation,
            } => self.queue(worker, Outgoing::Generation { rank, generation }),
            Command::SendNcclId { worker, nccl_id } => self.send(worker, Down::NcclId(nccl_id)),
            Command::SendProbe { worker, probe } => self.send(worker, Down::Probe(probe)),
            Command::SendAside { worker, aside } => self.send(worker, Down::Aside(aside)),
            Command::SendFollow { worker, follow } => self.send(worker, Down::Follow(follow)),
            Command::SendFeed { worker, feed } => self.send(worker, Down::Feed(feed)),
            Command::SendPlan { worker, plan } => self.send(worker, Down::Plan(plan)),
            Command::SendLease { worker, lease } => self.send(worker, Down::Lease(lease)),
            Command::SendWithdraw { worker, withdraw } => {
                self.send(worker, Down::Withdraw(withdraw));
            }
            Command::SendExchange { worker, exchange } => {
                self.send(worker, Down::Exchange(exchange));
            }
            Command::SendFinish { worker, finish } => self.send(worker, Down::Finish(finish)),
            Command::RequestState { worker, step, last } => self.request(worker, step, last),
            Command::StoreBest { best, step } => self.store_best(best, step),
            Command::Refuse { worker, reason } => {
                let mut status = Status::failed_precondition(reason);
                if let Ok(digest) = self.greeting.job_digest.parse() {
                    status.metadata_mut().insert(JOB_KEY, digest);
                }
                self.close(worker, status);
            }
            Command::Expel { worker, reason } => self.close(worker, Status::aborted(reason)),
            Command::Emit(_) | Command::End(_) => {}
        }
    }

    fn send(&mut self, worker: WorkerId, message: Down) {
        self.queue(worker, Outgoing::Message(Box::new(down(message))));
    }

    fn queue(&mut self, worker: WorkerId, outgoing: Outgoing) {
        let Some(session) = self.sessions.get(&worker) else {
            return;
        };
        if session.outbox.try_send(outgoing).is_err() {
            let reason = "it does not read what it is sent".to_owned();
            self.close(worker, Status::aborted(reason.clone()));
            self.pending.push_back(Event::WorkerLost { worker, reason });
        }
    }

    fn close(&mut self, worker: WorkerId, status: Status) {
        if let Some(session) = self.sessions.remove(&worker) {
            // A full queue loses the status; the stream ends all the same.
            let _ = session.outbox.try_send(Outgoing::End(status));
            session.closed.cancel();
        }
        self.shelf.forget(worker);
    }

    fn welcome(&self, worker: WorkerId) -> v1::Welcome {
        let WelcomeTemplate {
            term,
            run,
            job,
            job_digest,
            model_dir,
            model_files,
            total_steps,
        } = &self.greeting;
        let blocks = &self.shelf.blocks;
        let folder = self.newest.folder.as_deref();
        v1::Welcome {
            worker: worker.0,
            term: *term,
            job: job.clone().into(),
            job_digest: job_digest.clone(),
            model_files: entries(model_files),
            model_dir: model_dir.display().to_string(),
            start_step: self.newest.step,
            state_files: entries(&self.newest.files),
            state_dir: folder.map_or_else(String::new, |folder| folder.display().to_string()),
            blocks: Some(v1::BlockSet {
                digest: blocks.digest().to_owned(),
                train_blocks: blocks.train_blocks(),
                eval_blocks: blocks.eval_blocks(),
                sequence_len: blocks.sequence_len() as u32,
            }),
            total_steps: *total_steps,
            run: run.clone(),
            recorded: self.cluster.recorded(),
        }
    }

    fn request(&mut self, worker: WorkerId, step: u64, last: bool) {
        match self.store.begin(step) {
            Ok(folder) => {
                let scalars = self.cluster.trainable_scalars();
                let max_bytes = scalars * 16 + self.cluster.frozen_bytes() + STATE_OVERHEAD_BYTES;
                let expected = Expected { folder, max_bytes };
                self.shelf.expect(worker, step, expected);
                self.last_step = last.then_some(step);
                let save = v1::SaveState {
                    step,
                    r#final: last,
                };
                self.send(worker, Down::SaveState(save));
            }
            Err(error) => self.pending.push_back(Event::StateFailed {
                worker,
                step,
                reason: error.to_string(),
                disk: true,
            }),
        }
    }

    /// Stores received states that need not wait any more for their step to be settled: it is, their worker is gone, or the run
    /// stops.
    fn store_proven(&mut self) {
        let waits = |received: &Received| {
            let is_here = self.sessions.contains_key(&received.worker);
            is_here && self.cluster.awaits_digest(received.step)
        };
        let uploads_awaiting_digest = std::mem::take(&mut self.uploads_awaiting_digest).into_iter();
        let (waiting, proven): (Vec<_>, Vec<_>) = uploads_awaiting_digest.partition(waits);
        self.uploads_awaiting_digest = waiting;
        for received in proven {
            let refused = self.store(received);
            self.pending.extend(refused);
        }
    }

    /// Begins to commit a received state on another thread. Refuses one whose weights are not those of its step.
    fn store(&mut self, received: Received) -> Option<Event> {
        let (worker, step) = (received.worker, received.step);
        let known = self.cluster.weights_digest(step);
        if known.is_some_and(|digest| digest != received.weights_digest) {
            let reason = "the state that arrived has other weights than the step".to_owned();
            return Some(Event::StateFailed {
                worker,
                step,
                reason,
                disk: false,
            });
        }
        let facts = Facts {
            layout_digest: self.cluster.layout_digest().to_owned(),
            numerics_class: self.cluster.numerics_class().unwrap_or_default().to_owned(),
            best_step: self.cluster.best_step(),
        };
        let last = self.last_step == Some(step);
        let (store, inputs) = (self.store.clone(), self.inputs.clone());
        let writing = self.writing.clone();
        tokio::spawn(async move {
            let commit = move || {
                let stored = match last {
                    true => store.commit_last(received),
                    false => store.commit(received, &facts),
                };
                drop(writing);
                stored
            };
            let input = match tokio::task::spawn_blocking(commit).await {
                Ok(Ok(state)) => Input::Stored(state),
                Ok(Err(error)) => failed(worker, step, error.to_string(), true),
                Err(error) => failed(worker, step, error.to_string(), false),
            };
            // The driver is gone only when the run is over.
            let _ = inputs.send(input).await;
        });
        None
    }
}

impl Driver {
    /// Begins to make a checkpoint the result, on another thread.
    fn store_best(&self, best: u64, step: u64) {
        let (store, inputs) = (self.store.clone(), self.inputs.clone());
        let writing = self.writing.clone();
        tokio::spawn(async move {
            let commit = move || {
                let stored = store.commit_best(best, step);
                drop(writing);
                stored
            };
            let failed =
                |reason, is_damaged| Input::Happened(Event::ResultFailed { reason, is_damaged });
            let input = match tokio::task::spawn_blocking(commit).await {
                Ok(Ok(state)) => Input::Stored(state),
                Ok(Err(NotMade::Checkpoint(error))) => failed(error.to_string(), true),
                Ok(Err(NotMade::Disk(error))) => failed(error.to_string(), false),
                Err(error) => failed(error.to_string(), false),
            };
            // The driver is gone only when the run is over.
            let _ = inputs.send(input).await;
        });
    }
}

async fn sleep_until(moment: Option<std::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(Instant::from_std(moment)).await,
        None => std::future::pending().await,
    }
}

fn failed(worker: WorkerId, step: u64, reason: String, disk: bool) -> Input {
    Input::Happened(Event::StateFailed {
        worker,
        step,
        reason,
        disk,
    })
}

fn entries(files: &[FileEntry]) -> Vec<v1::FileEntry> {
    let entry = |file: &FileEntry| v1::FileEntry {
        path: file.path.clone(),
        size: file.size,
        digest: file.digest.clone(),
    };
    files.iter().map(entry).collect()
}

/// Waits for the disk beside the runtime's threads. Where there is one alone, on that: what others do meanwhile would depend on the
/// disk, and a simulation would not run twice in the same way.
async fn wait_for(durable: impl FnOnce() + Send + 'static) {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => durable(),
        _ => drop(tokio::task::spawn_blocking(durable).await),
    }
}
