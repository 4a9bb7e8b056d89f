//! `run.json`: which job ran here on which data and model, how far it came, and what came out.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::OutputError;
use super::totals::Totals;
use super::trainer_state::TrainerState;
use super::{RunIdentity, WorkerRecord};
use crate::store::layout::RUN;

const MAX_RECORD_BYTES: u64 = 4 << 20;

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// The run goes on, or was killed before it could say otherwise.
    Running,
    Done,
    Stopped,
    Failed,
}

/// The content of `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub muster_version: String,
    pub state: RunState,
    /// When the run began, in UTC, however often it was resumed since.
    #[serde(default)]
    pub started: Option<String>,
    /// When the run was done, stopped or failed, in UTC.
    #[serde(default)]
    pub ended: Option<String>,
    /// The command line of its newest start, without what may be secret.
    #[serde(default)]
    pub command: Vec<String>,
    /// Why the run stopped or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Number of optimizer updates made.
    pub step: u64,
    pub total_steps: u64,
    pub job_digest: String,
    #[serde(default)]
    pub data_digest: Option<String>,
    #[serde(default)]
    pub base_model_digest: Option<String>,
    #[serde(default)]
    pub numerics_class: Option<String>,
    /// What workers computed on, each kind once, in the order in which they came.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Peak memory of the worker that took the most. None: the workers do not say.
    #[serde(default)]
    pub peak_memory_bytes: Option<u64>,
    /// Digest of the weights after `step` updates; where not every step's digest is asked for, of the newest that was.
    #[serde(default)]
    pub weights_digest: Option<String>,
    /// Loss of the best evaluation, and the step of its weights, where the job asks for the best ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_metric: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_global_step: Option<u64>,
    /// Folder of the checkpoint of the best weights, where the job has one saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_model_checkpoint: Option<String>,
    /// Whether the run ends before its last step, because evaluations have not improved for too long.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped_early: bool,
    /// Mean duration of the steps on record.
    #[serde(default)]
    pub mean_step_seconds: Option<f64>,
    /// Total duration of all steps on record.
    #[serde(default)]
    pub step_seconds: f64,
    /// Time in which nothing could be computed, because too few workers were ready.
    #[serde(default)]
    pub waiting_seconds: f64,
    #[serde(default)]
    pub workers: Vec<WorkerRecord>,
    /// Digests of the jobs that differ in nothing but their number of steps, whose steps this one went on from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continues: Vec<String>,
    /// The resolved job. Kept as JSON, because another version may have other fields.
    pub job: Value,
}

impl RunRecord {
    /// The record of a run that begins or goes on after `step` updates. `earlier` is what the same run, perhaps of another
    /// length, had recorded.
    pub(super) fn new(
        identity: &RunIdentity,
        total_steps: u64,
        step: u64,
        earlier: Option<&Self>,
    ) -> Self {
        let job_digest = identity.job.digest();
        let mut continues = earlier.map(Self::jobs).unwrap_or_default();
        continues.retain(|digest| *digest != job_digest);
        Self {
            muster_version: common::VERSION.to_owned(),
            state: RunState::Running,
            started: None,
            ended: None,
            command: Vec::new(),
            reason: None,
            step,
            total_steps,
            job_digest,
            data_digest: identity.data_digest.clone(),
            base_model_digest: identity.base_model_digest.clone(),
            numerics_class: None,
            devices: Vec::new(),
            peak_memory_bytes: None,
            weights_digest: None,
            best_metric: None,
            best_global_step: None,
            best_model_checkpoint: None,
            stopped_early: false,
            mean_step_seconds: None,
            step_seconds: 0.0,
            waiting_seconds: 0.0,
            workers: Vec::new(),
            continues,
            job: serde_json::to_value(&identity.job).unwrap_or(Value::Null),
        }
    }

    /// Takes over what the evaluations up to `step` amount to.
    pub(super) fn take_best(&mut self, state: &TrainerState, step: u64) {
        let Some(so_far) = state.best_at(step) else {
            return;
        };
        self.best_metric = so_far.best().map(|best| best.metric);
        self.best_global_step = so_far.best().map(|best| best.step);
        self.best_model_checkpoint = state.best_checkpoint(&so_far);
        self.stopped_early = so_far.stops_at().is_some();
    }

    pub(super) fn take_totals(&mut self, totals: &Totals) {
        self.mean_step_seconds = totals.mean_step_seconds();
        self.step_seconds = totals.step_seconds;
        self.waiting_seconds = totals.waiting_seconds;
        self.workers = totals.workers();
    }

    /// Digests of all jobs whose steps are this run's.
    pub fn jobs(&self) -> Vec<String> {
        let mut jobs = self.continues.clone();
        jobs.push(self.job_digest.clone());
        jobs
    }

    /// The record in this folder, if there is one.
    pub fn read(dir: &Path) -> Result<Option<Self>, OutputError> {
        let path = dir.join(RUN);
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(file) => file
                .take(MAX_RECORD_BYTES)
                .read_to_end(&mut bytes)
                .map_err(OutputError::io("read", &path))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(OutputError::io("read", &path)(error)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| OutputError::BrokenRecord {
                path,
                reason: error.to_string(),
            })
    }

    pub(super) fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Sets `value` to a field of the recorded job, if the record has one that can be read.
    pub(super) fn take<T: serde::de::DeserializeOwned>(&self, field: &str, value: &mut T) {
        if let Ok(found) = serde_json::from_value(self.job[field].clone()) {
            *value = found;
        }
    }
}
