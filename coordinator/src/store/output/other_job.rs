//! Whether a record is of another job, data or model than a run, and in what they differ.

use common::job::JobSpec;
use common::text::short_digest;
use serde_json::{Map, Value};

use super::RunIdentity;
use super::error::OutputError;
use super::longer::goes_on;
use super::run_record::RunRecord;

/// Most fields that are named in which two jobs differ.
const MAX_DIFFERENCES: usize = 3;

impl RunRecord {
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
        if left.eval.is_some() {
            self.take("eval_steps", &mut recorded.eval_steps);
        }
        if left.warmup {
            self.take("warmup", &mut recorded.warmup);
        }
        recorded
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
        // A field that stands at its default is left out.
        let absent = here.keys().filter(|name| !there.contains_key(*name));
        let value =
            |job: &Map<String, Value>, name: &str| job.get(name).cloned().unwrap_or_default();
        let mut differences: Vec<String> = there
            .keys()
            .chain(absent)
            .filter(|name| decides(name))
            .map(|name| (name, value(there, name), value(&here, name)))
            .filter(|(_, there, here)| there != here)
            .map(|(name, there, here)| {
                format!("{name} {} there, {} here", brief(&there), brief(&here))
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

/// A digest for people, with a mark where it goes on.
fn shorten(digest: &str) -> String {
    let short = short_digest(digest);
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
