//! The coordinator's side: the real driver, cluster, service and store over the simulated network, and its death and
//! return from the newest checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::data::blockfile::{self, BlockFile};
use common::files::atomic;
use common::files::checkpoint;
use common::files::model::ModelFolder;
use common::job::InitWeights;
use common::plan::BestSoFar;
use coordinator::cluster::run_event::RunEvent;
use coordinator::cluster::{BlockTokens, Cluster, Outcome, PreviousTerms, RunSchedule, Settings};
use coordinator::driver::control_loop::{Driver, WelcomeTemplate};
use coordinator::driver::transfers::Transfers;
use coordinator::rpc::service::Service;
use coordinator::store::checkpoints::{State, Store};
use coordinator::store::journal;
use coordinator::store::journal::{Identity, Journal, Term};
use coordinator::store::layout::WORK_FOLDER;
use coordinator::store::output::Line;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle, JoinSet};

use crate::net::COORDINATOR;
use crate::rpc::serve;
use crate::truth::{EVAL_BLOCKS, SEQUENCE_LEN, TRAIN_BLOCKS, blocks};
use crate::world::World;

const INPUTS: usize = 1024;
const EVENTS: usize = 4096;

/// A coordinator process.
pub struct Site {
    driving: JoinHandle<Outcome>,
    /// Bytes of the journal that were durable before the term began.
    journal_head: u64,
    /// Ended with the process.
    _tasks: JoinSet<()>,
}

impl Site {
    /// Starts a coordinator in the run's folder, from the newest checkpoint there.
    pub fn start(world: &Arc<World>) -> Self {
        let calls = world.net.start(COORDINATOR);
        let start = newest(&world.folder);
        let past = journal::read(&world.folder).unwrap();
        let earlier = past.history.earlier();
        world
            .net
            .note(|| format!("C  starts from step {}, {earlier:?}", start.step));
        let last_evaluated = past.history.lines().filter_map(evaluated).max();
        world
            .oracle
            .restarted(earlier.recorded, last_evaluated, start.step);
        let (inputs, arrivals) = mpsc::channel(INPUTS);
        let (observer, mut events) = mpsc::channel::<RunEvent>(EVENTS);
        let best = best(world, past.history.lines());
        let settings = Settings {
            last_evaluated,
            best_saved: best.as_ref().and_then(|best| saved(world, best)),
            best,
            ..settings(world, &start, earlier)
        };
        let term = Term {
            term: past.history.term().map_or(0, |term| term.term) + 1,
            identity: Identity {
                job_digest: settings.job_digest.clone(),
                base_model_digest: "model".into(),
                data_digest: "data".into(),
            },
            run: settings.run.clone(),
            version: common::VERSION.to_owned(),
        };
        let number = term.term;
        let (folder, telling) = (&world.folder, observer.clone());
        let journal = Journal::begin(folder, past.history, term, 0, telling).unwrap();
        // It was written anew.
        world.durable_journal.store(0, Ordering::Relaxed);
        let shelf = Arc::new(Transfers::new(world.scratch.blocks()));
        if let Some(folder) = &start.folder {
            shelf.offer(folder, &start.files);
        }
        let job_digest = settings.job_digest.clone();
        let greeting = WelcomeTemplate {
            term: number,
            run: settings.run.clone(),
            job: serde_json::to_vec(&*world.job).unwrap(),
            job_digest: job_digest.clone(),
            model_dir: "/model".into(),
            model_files: Vec::new(),
            total_steps: world.job.max_steps.unwrap_or_default(),
        };
        let driver = Driver::new(
            cluster(world, settings),
            greeting,
            start,
            Arc::new(store(world, job_digest)),
            shelf.clone(),
            observer,
            inputs.clone(),
        )
        .with_journal(journal);
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(Service::new(inputs, shelf, None), calls));
        let observing = world.clone();
        tasks.spawn(async move {
            while let Some(event) = events.recv().await {
                observing.observe(&event);
            }
        });
        Self {
            journal_head: journal_length(&world.folder),
            driving: tokio::spawn(driver.drive(arrivals)),
            _tasks: tasks,
        }
    }

    /// Waits for the end of the run.
    pub async fn outcome(&mut self) -> Result<Outcome, JoinError> {
        (&mut self.driving).await
    }
}

impl Site {
    /// The process dies. Of what it wrote last, the disk may have less than the file system showed.
    pub async fn crash(mut self, world: &World) {
        self.driving.abort();
        // Gone with it: the journal and its thread.
        let _ = (&mut self.driving).await;
        let path = journal_path(&world.folder);
        let length = journal_length(&world.folder);
        let lost = match world.dice.chance(50, &[31, length]) {
            true => world.dice.below(400, &[32, length]),
            false => 0,
        };
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let durable = world.durable_journal.load(Ordering::Relaxed);
        let kept = length
            .saturating_sub(lost)
            .max(self.journal_head)
            .max(durable);
        file.set_len(kept).unwrap();
        world
            .net
            .note(|| format!("C  its journal keeps {kept} of {length} bytes"));
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.driving.abort();
    }
}

fn newest(folder: &Path) -> State {
    atomic::remove_leftovers(folder).unwrap();
    let found = checkpoint::newest_valid(folder).unwrap();
    assert!(found.damaged.is_empty(), "{:?}", found.damaged);
    let Some((path, manifest)) = found.newest else {
        return State::default();
    };
    State {
        step: manifest.step,
        folder: Some(path),
        files: manifest.files,
        weights_digest: Some(manifest.weights_digest),
    }
}

fn journal_path(folder: &Path) -> PathBuf {
    folder.join(WORK_FOLDER).join("journal")
}

pub fn journal_length(folder: &Path) -> u64 {
    std::fs::metadata(journal_path(folder)).unwrap().len()
}

/// What the evaluations on record amount to, where the run keeps its best weights.
fn best<'a>(world: &World, lines: impl Iterator<Item = &'a Line>) -> Option<BestSoFar> {
    let evaluations =
        lines.filter_map(|line| Some((evaluated(line)?, line["eval_loss"].as_f64()?)));
    Some(BestSoFar::after(world.job.best_model?, evaluations))
}

/// Step of the best weights, where a checkpoint has them.
fn saved(world: &World, best: &BestSoFar) -> Option<u64> {
    let step = best.best()?.step;
    let folder = checkpoint::checkpoint_dir(&world.folder, step);
    checkpoint::verify(&folder)
        .ok()
        .map(|manifest| manifest.step)
}

/// The step of an evaluation on record.
fn evaluated(line: &serde_json::Map<String, serde_json::Value>) -> Option<u64> {
    line.get("eval_loss").and(line.get("step"))?.as_u64()
}

fn settings(world: &World, start: &State, earlier: PreviousTerms) -> Settings {
    let job = &world.job;
    Settings {
        version: common::VERSION.to_owned(),
        job_digest: job.digest(),
        run: "run".into(),
        earlier,
        start_step: start.step,
        start_weights_digest: start.weights_digest.clone(),
        start_numerics_class: None,
        last_evaluated: None,
        best: None,
        best_saved: None,
        min_workers: job.cluster.min_workers,
        max_workers: job.cluster.max_workers,
        max_skipped_steps: job.max_skipped_steps,
        frozen_bytes: 0,
        flop_per_token: None,
    }
}

fn cluster(world: &World, settings: Settings) -> Cluster {
    let tokens = |block: common::data::block::Block| BlockTokens {
        used: block.used_len() as u32,
        trained: block.trained_tokens() as u32,
    };
    let blocks = blocks().into_iter().map(tokens).collect();
    let course = RunSchedule::new(world.job.clone(), TRAIN_BLOCKS, blocks);
    Cluster::new(settings, course)
}

fn store(world: &World, job_digest: String) -> Store {
    Store {
        output_dir: world.folder.clone(),
        model: world.scratch.model.clone(),
        job_digest,
        base_model_digest: "model".into(),
        save_total_limit: Some(2),
        write_trainer_state: Box::new(|_, _| Ok(())),
        template: None,
        eos_token: None,
        tokens: Vec::new(),
        renamed_tokens: Default::default(),
        end_tokens: Vec::new(),
        record_result: Box::new(|_, _| Ok(())),
        saved: Box::new(|_| ()),
    }
}

/// What all runs share, in a folder of its own.
pub struct Scratch {
    folder: TempDir,
    model: ModelFolder,
    runs: AtomicU64,
}

impl Scratch {
    /// In memory where the system has such a place, because every checkpoint is made durable.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => tempfile::tempdir_in(memory).unwrap(),
            false => tempfile::tempdir().unwrap(),
        };
        let path = folder.path().join("blocks");
        let counts = (TRAIN_BLOCKS, EVAL_BLOCKS);
        let blocks = blocks().into_iter();
        blockfile::write(&path, SEQUENCE_LEN, counts, [0; 32], b"", blocks).unwrap();
        let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}"#;
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        Self {
            model: ModelFolder::open(folder.path(), InitWeights::Random).unwrap(),
            folder,
            runs: AtomicU64::new(0),
        }
    }

    /// An output folder. All have names of one length, because they travel in messages.
    pub fn output_dir(&self) -> PathBuf {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let folder = self.folder.path().join(format!("run-{number:012}"));
        std::fs::create_dir(&folder).unwrap();
        folder
    }

    fn blocks(&self) -> BlockFile {
        BlockFile::open(&self.folder.path().join("blocks")).unwrap()
    }
}
