//! The job of all scenes, the quick start shortened, and what must come out of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde_json::Value;

/// What a run leaves behind, but for speed and membership.
pub struct Outcome {
    pub weights_digest: String,
    /// Step, loss and digest of each line, in order.
    pub steps: Vec<[Value; 3]>,
    pub evaluations: Vec<[Value; 2]>,
}

impl Outcome {
    /// The first thing that differs from the quiet run, for people.
    pub fn difference(&self, quiet: &Self) -> Option<String> {
        let numbers = |outcome: &Self| -> Vec<Value> {
            let steps = outcome.steps.iter().map(|[step, ..]| step.clone());
            steps.collect()
        };
        if numbers(self) != numbers(quiet) {
            let found = numbers(self);
            return Some(format!("the metrics have not every step once: {found:?}"));
        }
        let (found, expected) = (self.steps.iter(), quiet.steps.iter());
        if let Some((found, expected)) = found.zip(expected).find(|(a, b)| a != b) {
            return Some(format!("a step differs: {found:?} instead of {expected:?}"));
        }
        if self.evaluations != quiet.evaluations {
            let Self { evaluations, .. } = self;
            return Some(format!("the evaluations differ: {evaluations:?}"));
        }
        (self.weights_digest != quiet.weights_digest).then(|| "the weights differ".to_owned())
    }
}

/// The same job with one worker that nobody disturbs. Run once for each number of steps.
pub fn quiet(steps: u64) -> Arc<Outcome> {
    static QUIET: Mutex<BTreeMap<u64, Arc<Outcome>>> = Mutex::new(BTreeMap::new());
    let mut quiet = QUIET.lock().unwrap_or_else(PoisonError::into_inner);
    quiet
        .entry(steps)
        .or_insert_with(|| Arc::new(run_quietly(steps)))
        .clone()
}

fn run_quietly(steps: u64) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("quiet");
    let mut command = start_command(&output, steps);
    let run = command
        .args(["--single-node", "--threads", "1"])
        .env_remove("MUSTER_FAILPOINT")
        .output();
    let run = run.unwrap();
    assert!(run.status.success(), "{run:?}");
    let quiet = outcome(&output);
    assert_eq!(quiet.steps.len() as u64, steps);
    quiet
}

/// The quick start, shortened; eight slots in a step, so that all workers find work.
pub fn start_command(output: &Path, steps: u64) -> Command {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root = ROOT.get_or_init(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
    command
        .current_dir(root)
        .args(["start", "examples/quickstart.yaml", "--output-dir"])
        .arg(output)
        .args(["--max-steps", &steps.to_string()]);
    for field in [
        "micro_batch_size=1",
        "test_prompts=[]",
        "logging_steps=1",
        "val_set_size=4",
        "eval_steps=10",
        "save_steps=8",
        "save_total_limit=2",
    ] {
        command.args(["--set", field]);
    }
    command
}

/// What is on record in the output folder of a finished run.
pub fn outcome(output: &Path) -> Outcome {
    let record: Value =
        serde_json::from_slice(&std::fs::read(output.join("run.json")).unwrap()).unwrap();
    assert_eq!(record["state"], "done", "{record}");
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let field = |line: &Value, name: &str| line.get(name).cloned().unwrap_or_default();
    let is_step = |line: &&Value| line.get("loss").is_some();
    Outcome {
        weights_digest: record["weights_digest"].as_str().unwrap().to_owned(),
        steps: lines
            .iter()
            .filter(is_step)
            .map(|line| ["step", "loss", "weights_digest"].map(|name| field(line, name)))
            .collect(),
        evaluations: lines
            .iter()
            .filter(|line| !is_step(line))
            .map(|line| ["step", "eval_loss"].map(|name| field(line, name)))
            .collect(),
    }
}
