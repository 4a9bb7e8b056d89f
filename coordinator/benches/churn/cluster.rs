//! A coordinator and workers as real processes on this machine, and when they commit.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{JOIN, Process};

/// For anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(180);
/// How exactly a commit is timed.
const TICK: Duration = Duration::from_millis(1);

/// What the cluster trains.
#[derive(Clone)]
pub enum Job {
    /// LoRA on the tiny model.
    Quickstart,
    /// All weights of a model made for the occasion, of about so many scalars.
    Full { scalars: usize },
}

pub struct Cluster {
    folder: TempDir,
    job: Job,
    options: Vec<String>,
    port: u16,
    coordinator: Option<Process>,
    pub workers: Vec<Option<Process>>,
    started: usize,
    /// The newest line of the metrics: step and workers.
    seen: (u64, u64),
    /// Trained or not, up to there.
    num_tokens: u64,
    length: u64,
}

impl Cluster {
    /// Starts a run with so many workers and waits until all of them are in and have made so many steps. `options` are
    /// fields, `name=value`.
    pub fn start(job: &Job, workers: usize, options: &[&str], steps: u64) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut cluster = Self {
            folder: tempfile::tempdir().unwrap(),
            job: job.clone(),
            options: options.iter().map(ToString::to_string).collect(),
            port,
            coordinator: None,
            workers: (0..workers).map(|_| None).collect(),
            started: 0,
            seen: (0, 0),
            num_tokens: 0,
            length: 0,
        };
        if let Job::Full { scalars } = job {
            make_model(&cluster.folder.path().join("model"), *scalars);
        }
        cluster.start_coordinator();
        (0..workers).for_each(|seat| cluster.start_worker(seat));
        cluster.settle_for(steps);
        cluster
    }

    pub fn start_coordinator(&mut self) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        command.current_dir(root).arg("start");
        let mut fields = vec!["max_steps=100000", "micro_batch_size=1"];
        match self.job {
            Job::Quickstart => {
                command.arg("examples/quickstart.yaml");
                fields.extend(["test_prompts=[]", "val_set_size=0"]);
            }
            Job::Full { .. } => {
                command.args([
                    "--dataset",
                    "examples/data/captain-pip.jsonl",
                    "--base-model",
                ]);
                command.arg(self.folder.path().join("model"));
                fields.push("init_weights=random");
                let given = |field: &&str| {
                    let name = field.split('=').next();
                    self.options
                        .iter()
                        .any(|option| option.split('=').next() == name)
                };
                let usual = ["global_batch_size=8", "sequence_len=32"];
                fields.extend(usual.into_iter().filter(|field| !given(field)));
            }
        }
        command.arg("--output-dir").arg(self.output());
        command.args(["--listen", &format!("127.0.0.1:{}", self.port)]);
        for field in fields
            .into_iter()
            .chain(self.options.iter().map(String::as_str))
        {
            command.args(["--set", field]);
        }
        let name = format!("coordinator-{}", self.started);
        self.started += 1;
        self.coordinator = Some(Process::start(name, command, "", self.folder.path()));
    }

    pub fn start_worker(&mut self, seat: usize) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(JOIN, format!("127.0.0.1:{}", self.port));
        command.env("MUSTER_CACHE_DIR", self.folder.path().join("cache"));
        let name = format!("worker-{}", self.started);
        self.started += 1;
        self.workers[seat] = Some(Process::start(name, command, "", self.folder.path()));
    }

    pub fn worker(&self, seat: usize) -> &Process {
        self.workers[seat].as_ref().unwrap()
    }

    pub fn kill_coordinator(&mut self) {
        self.coordinator = None;
    }

    /// Waits until all workers are in and have made a few steps.
    pub fn settle(&mut self) {
        self.settle_for(5);
    }

    fn settle_for(&mut self, steps: u64) {
        let workers = self.workers.iter().flatten().count() as u64;
        self.wait_for("all workers", |(_, found)| found == workers);
        let (step, _) = self.seen;
        self.wait_for("steps", |(found, _)| found >= step + steps);
    }

    /// Seconds of processor that coordinator and workers have taken so far.
    fn processor_seconds(&self) -> f64 {
        let processes = self.coordinator.iter().chain(self.workers.iter().flatten());
        processes
            .map(|process| processor_seconds(process.id()))
            .sum()
    }

    /// The step committed last.
    pub fn step(&mut self) -> u64 {
        self.look();
        self.seen.0
    }

    /// The moment at which more than `step` was committed.
    pub fn wait_beyond(&mut self, step: u64) -> Instant {
        self.wait_for("a step", |(found, _)| found > step)
    }

    /// When `step` was committed at last, and the seconds of processor taken by then.
    pub fn reach(&mut self, step: u64) -> (Instant, f64) {
        let at = self.wait_for("a step", |(found, _)| found >= step);
        (at, self.processor_seconds())
    }

    /// Tokens a second over at least so long, from commit to commit.
    pub fn tokens_per_second(&mut self, least: Duration) -> f64 {
        let step = self.step();
        let began = self.wait_beyond(step);
        let before = self.num_tokens;
        loop {
            let step = self.seen.0;
            let elapsed = self.wait_beyond(step) - began;
            if elapsed >= least {
                return (self.num_tokens - before) as f64 / elapsed.as_secs_f64();
            }
        }
    }

    /// Times between commits from now on, until `done` says so of step and workers.
    pub fn gaps(&mut self, mut done: impl FnMut(u64, u64) -> bool) -> Vec<Duration> {
        let mut gaps = Vec::new();
        let step = self.step();
        let mut last = self.wait_beyond(step);
        while !done(self.seen.0, self.seen.1) {
            let committed = self.wait_beyond(self.seen.0);
            gaps.push(committed - last);
            last = committed;
        }
        gaps
    }

    fn wait_for(&mut self, what: &str, is_there: impl Fn((u64, u64)) -> bool) -> Instant {
        let began = Instant::now();
        loop {
            self.look();
            if is_there(self.seen) {
                return Instant::now();
            }
            if began.elapsed() > PATIENCE {
                let processes = self.coordinator.iter().chain(self.workers.iter().flatten());
                let logs: String = processes.map(Process::story).collect();
                panic!("waited in vain for {what}\n{logs}");
            }
            std::thread::sleep(TICK);
        }
    }

    /// Reads the last line of the metrics, where there is a new one.
    fn look(&mut self) {
        const TAIL: u64 = 4096;
        let Ok(mut file) = std::fs::File::open(self.output().join("metrics.jsonl")) else {
            return;
        };
        let length = file.metadata().unwrap().len();
        if length == self.length {
            return;
        }
        self.length = length;
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))
            .unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let line = whole.lines().next_back().unwrap_or_default();
        let line: Value = serde_json::from_str(line).unwrap_or_default();
        let field = |name: &str| line[name].as_u64().unwrap_or(0);
        self.seen = (field("step"), field("workers"));
        self.num_tokens = field("num_tokens");
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }
}

fn processor_seconds(process: u32) -> f64 {
    /// As Linux counts for programs, whatever it counts for itself.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name, in brackets, may hold anything; `utime` and `stime` are the 12th and 13th field after it.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let ticks = fields.split(' ').skip(11).take(2);
    ticks
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum::<f64>()
        / TICKS_PER_SECOND
}

/// The tiny model's configuration with other sizes; its weights are drawn by the run.
fn make_model(folder: &Path, scalars: usize) {
    /// Of a layer with the sizes below.
    const LAYER_SCALARS: usize = 983_680;
    std::fs::create_dir_all(folder).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(name), folder.join(name)).unwrap();
    }
    let text = std::fs::read(source.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    let layers = (scalars / LAYER_SCALARS).max(1);
    for (field, value) in [
        ("hidden_size", 256),
        ("intermediate_size", 1024),
        ("num_hidden_layers", layers),
        ("max_window_layers", layers),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 64),
    ] {
        config[field] = value.into();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}
