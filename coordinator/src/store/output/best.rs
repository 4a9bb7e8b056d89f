//! The best weights as the files of a run name them: Transformers' `best_metric`, `best_global_step`, `best_model_checkpoint`.
//!
//! Lines of `metrics.jsonl` in, what they amount to by the job's rule out.

use std::path::PathBuf;

use common::files::checkpoint::checkpoint_dir;
use common::job::{BestModel, JobSpec};
use common::plan::BestSoFar;
use serde_json::{Value, json};

use super::line::Line;

/// The job's rule, and where its checkpoints are.
#[derive(Clone, Debug)]
pub(super) struct BestRecord {
    rule: Option<BestModel>,
    output_dir: PathBuf,
    /// Step of best weights that no checkpoint has any more.
    lost: Option<u64>,
}

impl BestRecord {
    pub fn of(job: &JobSpec) -> Self {
        Self {
            rule: job.best_model,
            output_dir: job.output_dir.clone(),
            lost: None,
        }
    }

    /// Notes that the run goes on after `step` updates: best weights of before then that no checkpoint has are gone.
    pub fn pass_over(&mut self, step: u64, so_far: &BestSoFar) {
        let best = so_far.best().map(|best| best.step);
        let is_gone =
            |best: &u64| *best < step && !checkpoint_dir(&self.output_dir, *best).is_dir();
        self.lost = best.filter(is_gone);
    }

    /// What the evaluations among these lines amount to.
    pub fn after<'a>(&self, lines: impl Iterator<Item = &'a Line>) -> Option<BestSoFar> {
        let evaluations = lines.filter_map(|line| {
            let loss = line.get("eval_loss")?;
            // JSON has no word for what is no number.
            Some((
                line.get("step")?.as_u64()?,
                loss.as_f64().unwrap_or(f64::NAN),
            ))
        });
        Some(BestSoFar::after(self.rule?, evaluations))
    }

    /// Folder of the checkpoint of the best weights, where the job has one saved.
    pub fn checkpoint(&self, so_far: &BestSoFar) -> Option<String> {
        let best = so_far.best().filter(|_| so_far.rule().saves())?;
        if self.lost == Some(best.step) {
            return None;
        }
        let folder = checkpoint_dir(&self.output_dir, best.step);
        Some(folder.display().to_string())
    }
}

/// The state of Transformers' callback, as `trainer_state.json` has it.
pub(super) fn callbacks(so_far: Option<&BestSoFar>) -> Value {
    let stopping = so_far.and_then(|so_far| Some((so_far.rule().early_stopping?, so_far)));
    match stopping {
        Some((stopping, so_far)) => json!({
            "EarlyStoppingCallback": {
                "args": {
                    "early_stopping_patience": stopping.patience,
                    "early_stopping_threshold": stopping.threshold,
                },
                "attributes": {
                    "early_stopping_patience_counter": so_far.without_improvement(),
                },
            }
        }),
        None => json!({}),
    }
}
