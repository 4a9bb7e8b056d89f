//! One run in one seed's world: a coordinator, some workers, and what happens to them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::job::{BestModel, JobSpec};
use coordinator::cluster::run_event::RunEvent;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::dice::Dice;
use crate::faults::{Fault, Plan};
use crate::net::{COORDINATOR, Net, Node};
use crate::oracle::Oracle;
use crate::rpc::Network;
use crate::site::{self, Scratch, Site};
use crate::truth::{Model, job};
use crate::worker;

/// What is kept is the result of no run here, so that all come to the same one.
const BEST: BestModel = BestModel {
    greater_is_better: false,
    load_at_end: false,
    save: true,
    early_stopping: None,
};

/// Simulated; no run may take longer.
const LIMIT: Duration = Duration::from_secs(900);
/// For the workers to hear that the run is over.
const FAREWELL_MS: u64 = 200_000;

/// What all machines of a run share.
pub struct World {
    pub net: Network,
    pub dice: Dice,
    pub model: Arc<Model>,
    pub oracle: Oracle,
    pub job: Arc<JobSpec>,
    pub scratch: Arc<Scratch>,
    /// The coordinator's output folder.
    pub folder: PathBuf,
    /// Bytes of the journal that no crash may cost, because the run waited for them.
    pub durable_journal: AtomicU64,
    /// This worker reports wrong digests from this step on, once.
    wrong: Mutex<Option<(Node, u64)>>,
    /// The state after this step is handed over with other weights, once.
    spoiled: Mutex<Option<u64>>,
    pub counts: Counts,
}

/// What happened so often that a test over many seeds may rely on it.
#[derive(Debug, Default)]
pub struct Counts {
    /// Slots that a worker gave back because it was asked to.
    pub withdrawn: AtomicU64,
    /// Workers that were asked to stop and were let go.
    pub let_go: AtomicU64,
    /// Times that a worker was sent away, or told that it takes no part, because of its connections.
    pub set_aside: AtomicU64,
    /// States that were not stored because of their weights.
    pub refused_states: AtomicU64,
    /// Times that steps on record were computed again.
    pub begun_again: AtomicU64,
}

/// How a run went.
#[derive(Debug)]
pub struct Report {
    pub violations: Vec<String>,
    /// Of the trace.
    pub digest: String,
    pub simulated_ms: u64,
    /// When the coordinator came to the end of the run; its workers may hear of it later.
    pub ended_ms: u64,
    pub generations: u64,
    pub expulsions: u64,
    pub withdrawn: u64,
    pub let_go: u64,
    pub set_aside: u64,
    pub refused_states: u64,
    pub begun_again: u64,
}

/// Runs one plan.
pub fn run(scratch: &Arc<Scratch>, plan: &Plan, readable: bool) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .max_blocking_threads(1)
        // What comes back from the disk waits until all else is done, however fast the disk is.
        .global_queue_interval(u32::MAX)
        .build()
        .unwrap();
    let folder = scratch.output_dir();
    let report = runtime.block_on(simulate(plan, scratch.clone(), folder.clone(), readable));
    drop(runtime);
    let _ = std::fs::remove_dir_all(&folder);
    report
}

async fn simulate(plan: &Plan, scratch: Arc<Scratch>, folder: PathBuf, readable: bool) -> Report {
    let dice = Dice::new(plan.seed);
    let mut job = job(plan.min_workers, plan.max_workers);
    // Every second run keeps its best weights: nobody goes on before a checkpoint has them, nor from an evaluation that may be lost.
    job.best_model = plan.seed.is_multiple_of(2).then_some(BEST);
    let job = Arc::new(job);
    let model = Model::new(&job, plan.not_finite.then_some(dice));
    let world = Arc::new(World {
        net: Net::new(dice, plan.uneven_lines, readable),
        dice,
        oracle: Oracle::new(model.quiet_run()),
        model,
        job,
        scratch,
        folder,
        durable_journal: AtomicU64::new(0),
        wrong: Mutex::new(plan.wrong),
        spoiled: Mutex::new(plan.spoiled),
        counts: Counts::default(),
    });
    world.net.note(|| format!("{plan:?}"));
    let net = tokio::spawn(world.net.clone().run());
    let mut machines = Machines::new(world.clone());
    if tokio::time::timeout(LIMIT, machines.work(plan))
        .await
        .is_err()
    {
        world.oracle.violation("the run does not end".into());
    }
    machines.stop();
    net.abort();
    let (generations, expulsions) = world.oracle.counts();
    let counted = |count: &AtomicU64| count.load(Ordering::Relaxed);
    Report {
        violations: world.oracle.violations(),
        digest: world.net.digest(),
        simulated_ms: world.net.now_ms(),
        ended_ms: machines.ended_ms,
        generations,
        expulsions,
        withdrawn: counted(&world.counts.withdrawn),
        let_go: counted(&world.counts.let_go),
        set_aside: counted(&world.counts.set_aside),
        refused_states: counted(&world.counts.refused_states),
        begun_again: counted(&world.counts.begun_again),
    }
}

impl World {
    pub fn observe(&self, event: &RunEvent) {
        self.net.note(|| match event {
            // Its folder's name holds the process's number.
            RunEvent::CheckpointSaved { step, .. } => format!("C  saved {step}"),
            event => format!("C  {event:?}"),
        });
        if let RunEvent::WorkerLost { reason, .. } = event
            && reason.contains("computes wrongly")
        {
            self.oracle.found_wrong();
        }
        if let RunEvent::WorkerLost { reason, .. } = event
            && reason.contains("cannot reach")
        {
            count(&self.counts.set_aside, 1);
        }
        if let RunEvent::Notice(text) = event
            && text.contains("has other weights than the step")
        {
            count(&self.counts.refused_states, 1);
        }
        if let RunEvent::Notice(text) = event
            && text.contains("computed again")
        {
            count(&self.counts.begun_again, 1);
        }
        if self.job.best_model.is_some() {
            if matches!(event, RunEvent::Evaluated(_)) {
                let length = site::journal_length(&self.folder);
                self.durable_journal.store(length, Ordering::Relaxed);
            }
            if let RunEvent::Notice(text) = event
                && (text.contains("evaluation after step")
                    || text.contains("the best so far, are gone"))
            {
                self.oracle
                    .violation(format!("in a run that keeps its best weights: {text}"));
            }
        }
        self.oracle.observe(event);
    }

    pub fn computes_wrongly(&self, node: Node, step: u64) -> bool {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let now = wrong.is_some_and(|(who, from)| who == node && step >= from);
        if now {
            *wrong = None;
        }
        now
    }
}

impl World {
    /// The state after `step` updates gets other weights on its way.
    pub fn spoils(&self, step: u64) -> bool {
        let mut spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
        spoiled.take_if(|of| *of == step).is_some()
    }
}

pub fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// A worker's process.
struct Process {
    life: JoinHandle<()>,
    /// As SIGTERM does.
    stop: CancellationToken,
}

/// The processes that run.
struct Machines {
    world: Arc<World>,
    site: Option<Site>,
    workers: BTreeMap<Node, Process>,
    ended_ms: u64,
}

impl Machines {
    fn new(world: Arc<World>) -> Self {
        Self {
            world,
            site: None,
            workers: BTreeMap::new(),
            ended_ms: 0,
        }
    }

    async fn work(&mut self, plan: &Plan) {
        self.site = Some(Site::start(&self.world));
        let mut happening = plan.faults.iter();
        let mut next = happening.next();
        let outcome = loop {
            let now = self.world.net.now_ms();
            let pause = next.map_or(u64::MAX / 2, |(at, _)| at.saturating_sub(now));
            let pausing = self.world.net.sleep(u32::MAX, pause);
            tokio::select! {
                biased;
                outcome = outcome(&mut self.site) => break outcome,
                () = pausing => {}
            }
            if let Some((_, fault)) = next {
                self.befall(*fault).await;
                next = happening.next();
            }
        };
        self.ended_ms = self.world.net.now_ms();
        match outcome {
            Ok(outcome) => self.world.oracle.ended(&outcome),
            Err(error) => {
                let text = format!("the coordinator panicked: {error}");
                return self.world.oracle.violation(text);
            }
        }
        // Whatever was cut off stays so no longer.
        for (_, fault) in happening.chain(next) {
            if fault.mends() {
                self.befall(*fault).await;
            }
        }
        self.wait_for_workers().await;
    }

    /// Every worker that was there hears of the end.
    async fn wait_for_workers(&mut self) {
        let deadline = self.world.net.now_ms() + FAREWELL_MS;
        for (node, worker) in &mut self.workers {
            let left = deadline.saturating_sub(self.world.net.now_ms());
            tokio::select! {
                biased;
                ended = &mut worker.life => {
                    if ended.is_err_and(|error| error.is_panic()) {
                        self.world.oracle.violation(format!("worker {node} panicked"));
                    }
                }
                () = self.world.net.sleep(u32::MAX, left) => {}
            }
        }
    }

    async fn befall(&mut self, fault: Fault) {
        let net = self.world.net.clone();
        match fault {
            Fault::Start(COORDINATOR) if self.site.is_none() => {
                self.site = Some(Site::start(&self.world));
            }
            Fault::Start(node) if node != COORDINATOR && !net.is_up(node) => {
                net.note(|| format!("-- w{node} starts"));
                let calls = net.start(node);
                let stop = CancellationToken::new();
                let life = worker::live(self.world.clone(), node, calls, stop.clone());
                let life = tokio::spawn(life);
                self.workers.insert(node, Process { life, stop });
            }
            Fault::Start(_) => {}
            Fault::Kill(COORDINATOR) => {
                if let Some(site) = self.site.take() {
                    net.kill(COORDINATOR);
                    site.crash(&self.world).await;
                }
            }
            Fault::Kill(node) => {
                if let Some(worker) = self.workers.remove(&node) {
                    worker.life.abort();
                    net.kill(node);
                }
            }
            Fault::Drain(node) => {
                if let Some(worker) = self.workers.get(&node) {
                    net.note(|| format!("-- w{node} is asked to stop"));
                    worker.stop.cancel();
                }
            }
            Fault::Freeze(node) => net.freeze(node),
            Fault::Thaw(node) => net.thaw(node),
            Fault::Cut(a, b) => net.cut(a, b),
            Fault::Heal(a, b) => net.heal(a, b),
            Fault::Reset(a, b) => net.reset(a, b),
            Fault::Slow(node) => net.slow(node, true),
            Fault::Fast(node) => net.slow(node, false),
        }
    }

    fn stop(&mut self) {
        self.site = None;
        for worker in self.workers.values() {
            worker.life.abort();
        }
    }
}

async fn outcome(
    site: &mut Option<Site>,
) -> Result<coordinator::cluster::Outcome, tokio::task::JoinError> {
    match site {
        Some(site) => site.outcome().await,
        None => std::future::pending().await,
    }
}
