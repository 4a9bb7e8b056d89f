//! `run.json`: which job ran here on which data and model, how far it came, and what came out.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use common::job::JobSpec;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::OutputError;
use super::longer::goes_on;
use super::totals::Totals;
use super::{RunIdentity, WorkerRecord};
use crate::store::layout::RUN;

const MAX_RECORD_BYTES: u64 = 4 << 20;
/// Most fields that are named in which two jobs differ.
const MAX_DIFFERENCES: usize = 3;

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
            mean_step_seconds: None,
            step_seconds: 0.0,
            waiting_seconds: 0.0,
            workers: Vec::new(),
            continues,
            job: serde_json::to_value(&identity.job).unwrap_or(Value::Null),
        }
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

    /// Refuses a run of another job, data or model than this record's.
    pub(super) fn refuse_other(&self, identity: &RunIdentity) -> Result<(), OutputError> {
        let job_digest = self.as_recorded(&identity.job).digest();
        let other = |what: &str, found: &str, expected: &str, differences, length| {
            Err(OutputError::OtherJob {
                dir: identity.job.output_dir.clone(),
                digests: format!(
                    "{what} {} there, {} here",
                    shorten(found),
                    shorten(expected)
                ),
                differences,
                length,
            })
        };
        let length = match self.job_digest == job_digest {
            true => Ok(true),
            false => goes_on(self, &self.as_recorded(&identity.job), identity.total_steps),
        };
        if length != Ok(true) {
            let why = |reason| format!(", and it cannot go on as this one: {reason}");
            let length = length.err().map(why).unwrap_or_default();
            let differences = self.differences(identity);
            return other(
                "job digest",
                &self.job_digest,
                &job_digest,
                differences,
                length,
            );
        }
        for (what, found, expected) in [
            (
                "base model digest",
                &self.base_model_digest,
                &identity.base_model_digest,
            ),
            ("data digest", &self.data_digest, &identity.data_digest),
        ] {
            if let (Some(found), Some(expected)) = (found, expected)
                && found != expected
            {
                return other(what, found, expected, String::new(), String::new());
            }
        }
        Ok(())
    }

    /// `job` with the fields that it still leaves to the data set as they were decided in this record: until the data is known,
    /// it may be the same job.
    fn as_recorded(&self, job: &JobSpec) -> JobSpec {
        let mut recorded = job.clone();
        let left = std::mem::take(&mut recorded.reading.left_to_data);
        if left.sequence_len {
            self.take("sequence_len", &mut recorded.sequence_len);
        }
        if left.global_batch_size {
            self.take("global_batch_size", &mut recorded.global_batch_size);
        }
        if left.num_epochs {
            self.take("num_epochs", &mut recorded.num_epochs);
        }
        if left.warmup {
            self.take("warmup", &mut recorded.warmup);
        }
        recorded
    }

    /// Sets `value` to a field of the recorded job, if the record has one that can be read.
    pub(super) fn take<T: serde::de::DeserializeOwned>(&self, field: &str, value: &mut T) {
        if let Ok(found) = serde_json::from_value(self.job[field].clone()) {
            *value = found;
        }
    }

    /// Which fields of the job differ, as in ` (learning_rate 0.0001 there, 0.001 here)`.
    fn differences(&self, identity: &RunIdentity) -> String {
        let (Value::Object(there), Ok(Value::Object(here))) = (
            &self.job,
            serde_json::to_value(self.as_recorded(&identity.job)),
        ) else {
            return String::new();
        };
        let decides = |name: &str| !common::job::NOT_PART_OF_THE_RESULT.contains(&name);
        let mut differences: Vec<String> = here
            .iter()
            .filter(|(name, value)| decides(name) && there.get(*name) != Some(value))
            .map(|(name, value)| {
                let found = there.get(name).unwrap_or(&Value::Null);
                format!("{name} {} there, {} here", brief(found), brief(value))
            })
            .collect();
        let more = differences.len().saturating_sub(MAX_DIFFERENCES);
        differences.truncate(MAX_DIFFERENCES);
        if more > 0 {
            differences.push(format!("{more} more"));
        }
        match differences.is_empty() {
            true => String::new(),
            false => format!(" ({})", differences.join("; ")),
        }
    }
}

/// Enough of a digest to tell two apart.
fn shorten(digest: &str) -> String {
    let short: String = digest.chars().take(12).collect();
    match short.len() < digest.len() {
        true => format!("{short}…"),
        false => short,
    }
}

fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.chars().count() > 60 {
        true => format!("{}…", text.chars().take(60).collect::<String>()),
        false => text,
    }
}
