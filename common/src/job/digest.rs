//! The job's digest: two jobs with equal digests, data and base model end in the same weights.

use serde_json::Value;

use super::{BestModel, JobSpec, Method};

/// Fields that do not decide what comes out, only where, when and by whom: [`JobSpec::digest`] leaves them out.
pub const NOT_PART_OF_THE_RESULT: &[&str] = &[
    "base_model",
    "base_model_id",
    "asked_revision",
    "model_revision",
    "gradient_checkpointing",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "eval_on_start",
    "logging_first_step",
    "save_first_step",
    "max_skipped_steps",
    "output_dir",
    "resume",
    "cluster",
    "test_prompts",
];

impl JobSpec {
    /// The job's digest: BLAKE3, in hex, over the canonical JSON (sorted keys, no spaces) of the fields that decide the result.
    ///
    /// Paths of model, adapter and data are left out: their contents have digests of their own.
    pub fn digest(&self) -> String {
        let mut job = self.clone();
        for dataset in job.datasets.iter_mut().chain(&mut job.test_datasets) {
            dataset.path.clear();
            dataset.data_files.clear();
            dataset.split_files.clear();
            dataset.data_dir = None;
            dataset.name = None;
            dataset.revision = None;
            dataset.hub = None;
            dataset.pinned.clear();
        }
        if let Method::Lora(lora) = &mut job.method
            && let Some(dir) = &mut lora.model_dir
        {
            dir.clear();
            lora.model_source = None;
        }
        // Where evaluations decide what comes out, so does when they are made; else the best weights are only kept.
        let decides = |best: &BestModel| best.decides();
        job.best_model = job.best_model.filter(decides);
        if let Some(best) = &mut job.best_model {
            best.save = false;
        }
        let mut json = serde_json::to_value(&job).expect("a job is plain data with string keys");
        if let Value::Object(fields) = &mut json {
            let is_left_out = |name: &&&str| **name != "eval_steps" || job.best_model.is_none();
            for name in NOT_PART_OF_THE_RESULT.iter().filter(is_left_out) {
                fields.shift_remove(*name);
            }
        }
        json.sort_all_objects();
        blake3::hash(json.to_string().as_bytes())
            .to_hex()
            .to_string()
    }
}
