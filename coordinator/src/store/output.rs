//! The files that a run leaves for people and tools in `output_dir`: `run.json` (what ran), `metrics.jsonl` (a line a
//! step) and `trainer_state.json` (what Transformers leaves). Run events enter; nothing here decides about the run.
//!
//! `metrics.jsonl` is the one record that grows: it is cut back to the step a run resumes from, and the history in
//! `trainer_state.json` is made from it, so the two never disagree.

mod best;
mod error;
mod line;
mod longer;
mod metrics;
mod other_job;
mod run_record;
mod totals;
mod trainer_state;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use common::files::atomic;
use common::job::{JobSpec, Method};
use common::plan::BestSoFar;
use common::timestamp;

pub use run_record::{RunRecord, RunState};
pub use totals::WorkerRecord;
pub use trainer_state::{RunPlan, TrainerState};

use super::layout::{METRICS, RUN, TRAINER_STATE};
use crate::cluster::run_event::{RunEnd, RunEvent};
use best::BestRecord;
pub use error::OutputError;
pub use line::Line;
use metrics::Metrics;
use totals::Totals;
use trainer_state::Cadence;

/// The job, data and model of a run. A digest that is not known yet is `None` and not compared.
#[derive(Clone, Debug)]
pub struct RunIdentity {
    pub job: JobSpec,
    /// Digest of the block file.
    pub data_digest: Option<String>,
    pub base_model_digest: Option<String>,
    /// Number of steps, once the data is known.
    pub total_steps: Option<u64>,
}

impl RunIdentity {
    /// That of a job of which nothing else is known yet, without what may be a key in its addresses.
    pub fn of(job: &JobSpec) -> Self {
        let mut job = job.clone();
        job.hide_keys();
        Self {
            job,
            data_digest: None,
            base_model_digest: None,
            total_steps: None,
        }
    }
}

/// Refuses an output folder that belongs to another job, or that the job reads from. Writes nothing.
///
/// Gives back what an earlier run of the same job recorded there.
pub fn check_output_dir(identity: &RunIdentity) -> Result<Option<RunRecord>, OutputError> {
    let dir = &identity.job.output_dir;
    if dir.exists() && !dir.is_dir() {
        return Err(OutputError::NotAFolder { dir: dir.clone() });
    }
    refuse_inputs(&identity.job)?;
    let Some(record) = RunRecord::read(dir)? else {
        return Ok(None);
    };
    record.refuse_other(identity)?;
    Ok(Some(record))
}

/// Renames the `run.json` of another job to `run.json.old`, so that it does not count any more.
pub fn set_record_aside(dir: &Path) -> Result<(), OutputError> {
    let path = dir.join(RUN);
    let aside = path.with_extension("json.old");
    fs::rename(&path, &aside).map_err(OutputError::io("rename", &path))
}

fn refuse_inputs(job: &JobSpec) -> Result<(), OutputError> {
    let dir = &job.output_dir;
    let is_output = |path: &Path| match (path.canonicalize(), dir.canonicalize()) {
        (Ok(input), Ok(output)) => input == output,
        _ => path == dir,
    };
    let refuse = |what| {
        Err(OutputError::Input {
            dir: dir.clone(),
            what,
        })
    };
    if is_output(&job.base_model) {
        return refuse("base_model");
    }
    match &job.method {
        Method::Lora(lora) if lora.model_dir.as_deref().is_some_and(is_output) => {
            refuse("lora_model_dir")
        }
        _ => Ok(()),
    }
}

/// Most kinds of devices that the record names.
const MAX_DEVICES: usize = 64;

/// The files of one run, from its first step to its end.
pub struct RunFiles {
    dir: PathBuf,
    record: RunRecord,
    metrics: Metrics,
    state: TrainerState,
    totals: Totals,
    began: Instant,
}

impl RunFiles {
    /// Takes the output folder for a run of which `resumed_step` updates are on record: later lines of `metrics.jsonl` are cut
    /// off, because those steps run again. `known` are lines that it should have, in order; those that a crash cost it are
    /// written again.
    pub fn open<'a>(
        identity: &RunIdentity,
        plan: RunPlan,
        resumed_step: u64,
        known: impl IntoIterator<Item = &'a Line>,
    ) -> Result<Self, OutputError> {
        let earlier = match check_output_dir(identity) {
            Ok(record) => record,
            // Whoever opens the files has made sure that it is this job's all the same.
            Err(OutputError::BrokenRecord { .. }) => None,
            Err(error) => return Err(error),
        };
        let dir = identity.job.output_dir.clone();
        fs::create_dir_all(&dir).map_err(OutputError::io("create", &dir))?;
        atomic::remove_leftovers(&dir)?;
        let mut state = TrainerState::new(
            Cadence::of(&identity.job),
            plan,
            BestRecord::of(&identity.job),
        );
        let mut totals = Totals::default();
        let (mut newest, mut first_time) = (None, None);
        // Of a run that begins anew only the journal knows what was before its first step.
        let last_step = Some(resumed_step).filter(|step| *step > 0);
        let mut metrics = Metrics::open(&dir.join(METRICS), last_step, |line| {
            newest = metrics::place(line);
            first_time.get_or_insert_with(|| line.get("time").cloned());
            state.add_line(line);
            totals.add_line(line);
        })?;
        for line in known {
            let place = metrics::place(line);
            if place > newest && place.is_some_and(|(step, _)| step <= resumed_step) {
                metrics.append(line)?;
                state.add_line(line);
                totals.add_line(line);
            }
        }
        metrics.make_durable()?;
        let mut record = RunRecord::new(identity, plan.total_steps, resumed_step, earlier.as_ref());
        let earlier = earlier.filter(|_| resumed_step > 0);
        for worker in earlier.iter().flat_map(|earlier| &earlier.workers) {
            totals.note_device(&worker.name, &worker.device);
        }
        // Where the record was lost, the first line is the oldest time that is known.
        let first_time = first_time.flatten();
        let first_time = first_time.and_then(|time| Some(time.as_str()?.to_owned()));
        let started = earlier.and_then(|earlier| earlier.started).or(first_time);
        state.begin_after(resumed_step);
        record.take_best(&state, u64::MAX);
        record.started = started.or_else(|| Some(timestamp::seconds(SystemTime::now())));
        let mut files = Self {
            record,
            dir,
            metrics,
            state,
            totals,
            began: Instant::now(),
        };
        files.write_record()?;
        Ok(files)
    }

    /// Records the command line of this start, without what is secret.
    pub fn with_command(mut self, command: Vec<String>) -> Self {
        self.record.command = command;
        self
    }

    /// Records the numerics class, which is known once a worker has joined.
    pub fn set_numerics_class(&mut self, class: &str) -> Result<(), OutputError> {
        if self.record.numerics_class.as_deref() != Some(class) {
            self.record.numerics_class = Some(class.to_owned());
            self.write_record()?;
        }
        Ok(())
    }

    /// Writes down what an event says. Events of no interest to files pass by.
    pub fn observe(&mut self, event: &RunEvent) -> Result<(), OutputError> {
        match event {
            RunEvent::WorkerJoined { name, device, .. } => {
                self.note_device(device);
                self.totals.note_device(name, device);
            }
            RunEvent::StepCommitted(step) => {
                self.record.step = step.step;
                let peak = step.peak_memory_bytes;
                self.record.peak_memory_bytes = self.record.peak_memory_bytes.max(peak);
                if let Some(digest) = &step.weights_digest {
                    self.record.weights_digest = Some(digest.clone());
                }
            }
            RunEvent::CheckpointSaved { .. } => self.write_all()?,
            RunEvent::Ended(end) => self.end(end)?,
            _ => {}
        }
        if let Some(line) = line_of(event, SystemTime::now()) {
            self.state.add_line(&line);
            self.totals.add_line(&line);
            self.metrics.append(&line)?;
        }
        if let RunEvent::Evaluated(_) = event {
            self.record.take_best(&self.state, u64::MAX);
        }
        Ok(())
    }

    fn note_device(&mut self, device: &str) {
        let devices = &mut self.record.devices;
        let is_new = !device.is_empty() && !devices.iter().any(|known| known == device);
        if is_new && devices.len() < MAX_DEVICES {
            devices.push(device.to_owned());
        }
    }

    /// Whether the event is one that the files must have.
    pub fn concerns(event: &RunEvent) -> bool {
        let is_milestone = matches!(event, RunEvent::CheckpointSaved { .. } | RunEvent::Ended(_));
        let has_line = matches!(event, RunEvent::StepCommitted(_) | RunEvent::Evaluated(_));
        is_milestone || has_line
    }

    /// `trainer_state.json` as it is after `step` updates, for a checkpoint of that step.
    pub fn trainer_state_at(&self, step: u64) -> String {
        self.state.json_at(step)
    }

    /// Updates that the newest evaluated weights have seen, in this term or an earlier one.
    pub fn last_evaluated(&self) -> Option<u64> {
        self.state.last_evaluated()
    }

    /// What the evaluations on record amount to, where the job goes by them.
    pub fn best(&self) -> Option<BestSoFar> {
        self.state.best_at(u64::MAX)
    }

    /// What `run.json` says by now.
    pub fn record(&self) -> &RunRecord {
        &self.record
    }

    /// Records how the run ended. A run that is done stays done, whatever is said of it later.
    fn end(&mut self, end: &RunEnd) -> Result<(), OutputError> {
        if self.record.state == RunState::Done {
            return Ok(());
        }
        match end {
            RunEnd::Done {
                step,
                weights_digest,
            } => {
                self.record.state = RunState::Done;
                self.record.step = *step;
                self.record.weights_digest = Some(weights_digest.clone());
                self.state.finish(self.began.elapsed());
            }
            RunEnd::Stopped { step, reason } => {
                self.record.state = RunState::Stopped;
                self.record.step = *step;
                self.record.reason = Some(reason.clone());
            }
            RunEnd::Failed { reason } => {
                self.record.state = RunState::Failed;
                self.record.reason = Some(reason.clone());
            }
        }
        self.record.ended = Some(timestamp::seconds(SystemTime::now()));
        let written = self.write_all();
        if written.is_err() {
            self.record.state = RunState::Running;
            self.record.ended = None;
        }
        written
    }

    fn write_all(&mut self) -> Result<(), OutputError> {
        match self.metrics.make_durable() {
            // What can be written is.
            Err(OutputError::Removed { .. }) => {}
            durable => durable?,
        }
        self.write_state()?;
        self.write_record()
    }

    fn write_state(&self) -> Result<(), OutputError> {
        let path = self.dir.join(TRAINER_STATE);
        Ok(atomic::write(
            &path,
            self.state.json_at(u64::MAX).as_bytes(),
        )?)
    }

    fn write_record(&mut self) -> Result<(), OutputError> {
        self.record.take_totals(&self.totals);
        Ok(atomic::write(
            &self.dir.join(RUN),
            self.record.to_json().as_bytes(),
        )?)
    }
}

/// The line that an event adds to `metrics.jsonl`, recorded `at` this time; None for most events.
pub fn line_of(event: &RunEvent, at: SystemTime) -> Option<Line> {
    match event {
        RunEvent::StepCommitted(step) => Some(metrics::step_line(step, at)),
        RunEvent::Evaluated(eval) => Some(metrics::eval_line(eval, at)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
