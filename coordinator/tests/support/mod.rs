//! A tiny model, a tiny dataset, and the coordinator and workers as real processes.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than any run here, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);
/// The environment variable that turns this test binary into a worker.
pub const JOIN: &str = "MUSTER_TEST_JOIN";

/// Fields of the job, as `name=value`. Eight blocks a step in eight slots, so that several workers find work.
const JOB: &[&str] = &[
    "sequence_len=32",
    "global_batch_size=8",
    "micro_batch_size=1",
    "learning_rate=0.01",
    "max_steps=6",
    "logging_steps=1",
    "val_set_size=4",
    "eval_steps=3",
];

/// A folder with everything a run needs.
pub struct Site {
    pub folder: TempDir,
}

impl Site {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let site = Self { folder };
        copy(model(), &site.path("model"));
        write_dataset(&site.path("data.jsonl"));
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `coordinator start` of a LoRA job into the folder `output`.
    pub fn start(&self, output: &str, options: &[&str]) -> Command {
        // One field may have one value only.
        let is_given = |field: &str| {
            let (name, _) = field.split_once('=').unwrap();
            let flag = format!("--{}", name.replace('_', "-"));
            let set = format!("{name}=");
            let gives = |option: &&str| **option == flag || option.starts_with(&set);
            options.iter().any(gives)
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        command
            .current_dir(self.folder.path())
            .args(["start", "--dataset", "data.jsonl"])
            .args(["--output-dir", output])
            .args(
                JOB.iter()
                    .filter(|field| !is_given(field))
                    .flat_map(|field| ["--set", field]),
            );
        if !options
            .iter()
            .any(|option| option.starts_with("base_model="))
        {
            command.args(["--base-model", "model"]);
        }
        if !options.contains(&"full") {
            command.args(["--adapter", "lora"]);
            if !is_given("lora_r=4") {
                command.args(["--lora-r", "4"]);
            }
        }
        command.args(options.iter().filter(|option| **option != "full"));
        command
    }

    /// A run in one process that is expected to succeed; gives back the digest of its weights.
    pub fn train(&self, output: &str, options: &[&str]) -> String {
        let options = [&["--single-node"], options].concat();
        let run = Run::of(&mut self.start(output, &options)).end();
        assert!(run.status.success(), "{run:?}");
        self.digest(output)
    }

    /// Where a worker writes what happens to it.
    pub fn log_of(&self, name: &str) -> PathBuf {
        self.path(&format!("worker-{name}.log"))
    }

    /// A worker in a process of its own, which has no model but what it fetches.
    pub fn join(&self, name: &str, port: u16) -> Process {
        self.join_with(name, port, "")
    }

    /// The same, with a failpoint for those that arm it.
    pub fn join_with(&self, name: &str, port: u16, failpoint: &str) -> Process {
        self.join_in(name, port, ("MUSTER_FAILPOINT", failpoint))
    }

    /// The same, with a variable of its environment.
    pub fn join_in(&self, name: &str, port: u16, variable: (&str, &str)) -> Process {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "worker_process", "--ignored", "--nocapture"])
            .current_dir(std::env::temp_dir())
            .env(JOIN, format!("127.0.0.1:{port}"))
            .env(variable.0, variable.1)
            .env("MUSTER_CACHE_DIR", self.path(&format!("cache-{name}")))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.log_of(name)).unwrap())
            .spawn()
            .unwrap();
        Process(child)
    }

    pub fn digest(&self, output: &str) -> String {
        let record = self.json(&format!("{output}/run.json"));
        assert_eq!(record["state"], "done", "{record}");
        record["weights_digest"].as_str().unwrap().to_owned()
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// The lines of `metrics.jsonl` that are steps.
    pub fn steps(&self, output: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(&format!("{output}/metrics.jsonl"))).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines
            .filter(|line: &Value| line.get("loss").is_some())
            .collect()
    }
}

/// The life of a worker, in a process that [`Site::join`] started; nothing in any other.
pub fn work() {
    let Ok(address) = std::env::var(JOIN) else {
        return;
    };
    // As the program does.
    tracing_subscriber::fmt()
        .with_env_filter("info")
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let mut options = worker::JoinOptions::new(address);
    options.threads = Some(1);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let shutdown = tokio_util::sync::CancellationToken::new();
    runtime.block_on(worker::join(options, shutdown)).unwrap();
}

/// A worker in this process, until its job is done or SIGTERM asks it to leave.
#[cfg(unix)]
pub fn join_until_terminated(
    options: worker::JoinOptions,
) -> Result<worker::Finished, worker::WorkerError> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let shutdown = tokio_util::sync::CancellationToken::new();
        let asked = shutdown.clone();
        let mut terminated = signal(SignalKind::terminate()).unwrap();
        tokio::spawn(async move {
            terminated.recv().await;
            asked.cancel();
        });
        worker::join(options, shutdown).await
    })
}

/// A child that does not outlive the test.
pub struct Process(pub Child);

impl Process {
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        let id = self.0.id().to_string();
        let status = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(status.success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < DEADLINE, "the process does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A coordinator at work; its lines are read as they come.
pub struct Run {
    pub process: Process,
    lines: BufReader<std::process::ChildStdout>,
    seen: String,
}

/// A coordinator that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn of(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self {
            process: Process(child),
            lines,
            seen: String::new(),
        }
    }

    /// Reads up to the next line that contains these words.
    pub fn until(&mut self, words: &str) -> &mut Self {
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line).unwrap();
            self.seen += &line;
            if line.contains(words) {
                return self;
            }
            assert!(read > 0, "it ended before {words:?}: {}", self.seen);
        }
    }

    /// Reads on until so many more steps are done.
    pub fn steps(&mut self, count: usize) -> &mut Self {
        for _ in 0..count {
            self.until("  loss ");
        }
        self
    }

    pub fn end(mut self) -> Finished {
        std::io::Read::read_to_string(&mut self.lines, &mut self.seen).unwrap();
        let mut stderr = String::new();
        let mut pipe = self.process.0.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut pipe, &mut stderr).unwrap();
        Finished {
            status: self.process.wait(),
            stdout: self.seen,
            stderr,
        }
    }
}

/// The file of this name somewhere below the folder.
pub fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.into_iter().find_map(|path| match path.is_dir() {
        true => find(&path, name),
        false => (path.file_name()? == name).then_some(path),
    })
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn tokenizer_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

fn write_dataset(path: &Path) {
    let rows = (0..48).map(|row| {
        let question = format!("What is number {row}?");
        let answer = format!("Number {row} comes after number {}.", row + 47);
        let messages = json!([
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]);
        json!({ "messages": messages }).to_string()
    });
    std::fs::write(path, rows.collect::<Vec<_>>().join("\n")).unwrap();
}

/// Two small layers with weights drawn at random by a first run of the program itself. Made once.
fn model() -> &'static Path {
    static MODEL: OnceLock<TempDir> = OnceLock::new();
    let folder = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let source = tokenizer_folder();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let to = folder.path().join(name);
            std::fs::create_dir_all(folder.path()).unwrap();
            std::fs::copy(source.join(name), to).unwrap();
        }
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
        for (field, value) in [
            ("hidden_size", 32),
            ("intermediate_size", 64),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("head_dim", 8),
        ] {
            config[field] = value.into();
        }
        // Of no use with fewer layers than it lists.
        config.as_object_mut().unwrap().remove("layer_types");
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        write_dataset(&folder.path().join("data.jsonl"));
        let run = Run::of(
            Command::new(env!("CARGO_BIN_EXE_coordinator"))
                .current_dir(folder.path())
                .args(["start", "--base-model", ".", "--dataset", "data.jsonl"])
                .args(["--output-dir", "made", "--single-node", "--max-steps", "1"])
                .args(["--set", "init_weights=random", "--set", "sequence_len=32"]),
        );
        let run = run.end();
        assert!(run.status.success(), "{run:?}");
        let weights = "model.safetensors";
        std::fs::rename(
            folder.path().join("made").join(weights),
            folder.path().join(weights),
        )
        .unwrap();
        folder
    });
    folder.path()
}
