//! Where a run starts: a checkpoint, the adapter that the job names, or the base model as it is; and what the journal says
//! of its earlier terms.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use common::files::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use common::files::atomic::AtomicDir;
use common::files::checkpoint::{self, MANIFEST, Manifest};
use common::files::{FileEntry, FileError};
use common::job::{BestModel, Method, Resume};
use common::plan::BestSoFar;
use common::text::short_digest;
use serde_json::Value;
use thiserror::Error;

use crate::prepare::Prepared;
use crate::store::checkpoints::State;
use crate::store::journal;
use crate::store::journal::{Found, History, Identity, Term};
use crate::store::layout::TRAINER_STATE;
use crate::store::output::Line;

/// Why a run cannot start from the checkpoint that it should resume.
#[derive(Debug, Error)]
pub enum ResumeError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "checkpoint {path} is of {what} {found} but this run is of {expected}; set `resume: never`, or name another output_dir"
    )]
    Other {
        path: PathBuf,
        what: &'static str,
        found: String,
        expected: String,
    },
}

/// What a run starts from.
#[derive(Debug, Default)]
pub struct Start {
    /// The state that workers load: a checkpoint, a starting adapter, or nothing beside the base model.
    pub state: State,
    /// Numerics class of the workers that computed the checkpoint; None when not resuming, or not known.
    pub numerics_class: Option<String>,
    /// What the user should know, a line each.
    pub notices: Vec<String>,
}

impl Start {
    /// Chooses the state to start from, by the job's `resume`. Needs the lock of the output folder: where the run begins anew,
    /// its checkpoints are set aside. `jobs` are digests of jobs whose checkpoints will do besides those of this one.
    pub fn choose(prepared: &Prepared, jobs: &[String]) -> Result<Self, ResumeError> {
        let job = &prepared.job;
        let mut notices = Vec::new();
        let found = match &job.resume {
            Resume::Never => {
                notices.extend(set_checkpoints_aside(&job.output_dir)?);
                None
            }
            Resume::Path(path) => Some((path.clone(), checkpoint::verify(path)?)),
            Resume::Auto => {
                let found = checkpoint::newest_valid(&job.output_dir)?;
                for damaged in found.damaged {
                    notices.push(format!(
                        "checkpoint {} is passed over: {}",
                        damaged.path.display(),
                        damaged.reason
                    ));
                }
                found.newest
            }
        };
        let Some((path, manifest)) = found else {
            return Ok(Self {
                state: initial(&job.method)?,
                numerics_class: None,
                notices,
            });
        };
        check(&path, &manifest, prepared, jobs)?;
        if manifest.job_digest != prepared.job_digest {
            notices.push(format!(
                "the run here has {} steps now: it goes on after step {}, from {}",
                prepared.total_steps(),
                manifest.step,
                path.display()
            ));
        }
        Ok(Self {
            state: State {
                step: manifest.step,
                folder: Some(path),
                files: manifest.files,
                weights_digest: Some(manifest.weights_digest),
            },
            numerics_class: Some(manifest.numerics_class).filter(|class| !class.is_empty()),
            notices,
        })
    }
}

/// Renames the checkpoints of the run before, so that no later command goes on from them. Returns a line for the user, if there
/// were any.
fn set_checkpoints_aside(output_dir: &Path) -> Result<Option<String>, FileError> {
    let aside = checkpoint::set_aside(output_dir)?;
    let names: Vec<String> = aside
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let told = || format!("the run before is set aside: {}", names.join(", "));
    Ok((!names.is_empty()).then(told))
}

/// What the run's earlier terms left in their journal.
#[derive(Debug)]
pub struct Past {
    /// History of the earlier terms; empty where the run begins anew.
    pub history: History,
    /// The term that begins now.
    pub term: Term,
    /// What the user should know, a line each.
    pub notices: Vec<String>,
}

impl Past {
    /// Reads the journal of the earlier terms, by the job's `resume`: only a run that goes on by itself goes on from its journal.
    ///
    /// The journal of one of `jobs` is of the same run with another number of steps, which begins a new one.
    pub fn find(prepared: &Prepared, start: &Start, jobs: &[String]) -> Result<Self, FileError> {
        let identity = Identity {
            job_digest: prepared.job_digest.clone(),
            base_model_digest: prepared.model_digest.clone(),
            data_digest: prepared.data.file.digest().to_owned(),
        };
        let Found {
            mut history,
            mut notices,
        } = match prepared.job.resume {
            Resume::Auto => journal::read(&prepared.job.output_dir)?,
            Resume::Never | Resume::Path(_) => Found::default(),
        };
        let before = history.term().cloned();
        let (term, run) = match before {
            Some(before) if before.identity == identity => {
                notices.extend(missing_checkpoint(&history, start));
                (before.term + 1, before.run)
            }
            Some(other) => {
                let is_earlier = jobs.contains(&other.identity.job_digest);
                notices.extend((!is_earlier).then(|| {
                    format!(
                        "the journal in output_dir is of job {}, this is job {}: it is begun anew",
                        short_digest(&other.identity.job_digest),
                        short_digest(&identity.job_digest)
                    )
                }));
                history = History::default();
                (1, journal::draw_run())
            }
            None => (1, journal::draw_run()),
        };
        Ok(Self {
            history,
            term: Term {
                term,
                identity,
                run,
                version: common::VERSION.to_owned(),
            },
            notices,
        })
    }

    /// Number of updates on record, in the journal or in what the run starts from.
    pub fn recorded(&self, start: &Start) -> u64 {
        self.history.recorded().max(start.state.step)
    }
}

/// Longest `trainer_state.json` that is read.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// The evaluations that the checkpoint of another folder knows of, as lines of `metrics.jsonl`: what the run goes by has to be known
/// here, too. The manifest has vouched for the file; a checkpoint without one knows of none.
pub fn evaluations_of(prepared: &Prepared, start: &Start) -> Vec<Line> {
    let folder = match (&prepared.job.resume, &start.state.folder) {
        (Resume::Path(_), Some(folder)) if prepared.job.best_model.is_some() => folder,
        _ => return Vec::new(),
    };
    let mut bytes = Vec::new();
    let read = File::open(folder.join(TRAINER_STATE))
        .and_then(|file| file.take(MAX_STATE_BYTES).read_to_end(&mut bytes));
    let state = read.ok().and_then(|_| serde_json::from_slice(&bytes).ok());
    let Some(Value::Array(history)) =
        state.and_then(|state: Value| state.get("log_history").cloned())
    else {
        return Vec::new();
    };
    let evaluation = |entry: Value| match entry {
        Value::Object(line) if line.contains_key("eval_loss") => Some(line),
        _ => None,
    };
    history.into_iter().filter_map(evaluation).collect()
}

/// Copies the checkpoint of the best weights so far into the output folder, where the run goes on from one beside it in another
/// folder. Returns a line for the user, if there was one to copy.
pub fn bring_best(prepared: &Prepared, start: &Start, evaluations: &[Line]) -> Option<String> {
    let job = &prepared.job;
    let (Resume::Path(_), Some(folder)) = (&job.resume, &start.state.folder) else {
        return None;
    };
    let rule = job.best_model.filter(BestModel::saves)?;
    let losses = evaluations.iter().filter_map(|line| {
        let loss = line.get("eval_loss")?.as_f64().unwrap_or(f64::NAN);
        Some((line.get("step")?.as_u64()?, loss))
    });
    let best = BestSoFar::after(rule, losses).best()?.step;
    let from = checkpoint::checkpoint_dir(folder.parent()?, best);
    let to = checkpoint::checkpoint_dir(&job.output_dir, best);
    // The run's own first state is saved by its workers.
    if best >= start.state.step || to.exists() || !from.is_dir() {
        return None;
    }
    let what = format!("the weights after step {best}, the best so far,");
    Some(match copy_checkpoint(&from, &to, prepared) {
        Ok(()) => format!("{what} are copied from {}", from.display()),
        Err(reason) => format!("{what} cannot be taken from {}: {reason}", from.display()),
    })
}

/// Copies a checkpoint of this job and base model, whole or not at all.
fn copy_checkpoint(from: &Path, to: &Path, prepared: &Prepared) -> Result<(), FileError> {
    let manifest = checkpoint::verify(from)?;
    let is_ours = manifest.base_model_digest == prepared.model_digest
        && manifest.job_digest == prepared.job_digest;
    if !is_ours {
        let reason = "is of another job or base model";
        return Err(FileError::malformed(&from.join(MANIFEST), reason));
    }
    let copy = AtomicDir::create(to)?;
    let files = manifest.files.iter().map(|file| file.path.as_str());
    for name in files.chain([MANIFEST]) {
        let target = copy.path().join(name);
        std::fs::copy(from.join(name), &target).map_err(FileError::io("write", &target))?;
    }
    copy.commit_with_last(MANIFEST)
}

/// A line for the user where the best weights so far have no checkpoint any more and cannot come back.
pub fn best_is_gone(
    start: &Start,
    so_far: Option<&BestSoFar>,
    saved: Option<u64>,
) -> Option<String> {
    let so_far = so_far.filter(|so_far| so_far.rule().saves())?;
    let step = so_far.best()?.step;
    (saved.is_none() && step < start.state.step).then(|| {
        format!(
            "the weights after step {step} are the best so far, but output_dir has no sound checkpoint of them: unless later ones are \
             better, the last ones are the result"
        )
    })
}

/// Step of the best weights so far, where a checkpoint of this run has them. It is read to its end only where the run does not begin
/// with it, which was read already.
pub fn best_on_disk(prepared: &Prepared, start: &Start, so_far: Option<&BestSoFar>) -> Option<u64> {
    let step = so_far?.best()?.step;
    let folder = checkpoint::checkpoint_dir(&prepared.job.output_dir, step);
    if start.state.folder.as_deref() == Some(&*folder) {
        return Some(step);
    }
    let manifest = checkpoint::verify(&folder).ok()?;
    let is_ours = manifest.base_model_digest == prepared.model_digest;
    (is_ours && manifest.step == step).then_some(step)
}

fn missing_checkpoint(history: &History, start: &Start) -> Option<String> {
    let stored = history.checkpoint_step()?;
    (stored > start.state.step).then(|| {
        format!("checkpoint-{stored} is on record as stored, but is not there any more, or damaged")
    })
}

fn check(
    path: &Path,
    manifest: &Manifest,
    prepared: &Prepared,
    jobs: &[String],
) -> Result<(), ResumeError> {
    let pairs = [
        ("job", &manifest.job_digest, &prepared.job_digest),
        (
            "base model",
            &manifest.base_model_digest,
            &prepared.model_digest,
        ),
    ];
    for (what, found, expected) in pairs {
        let is_earlier = what == "job" && jobs.contains(found);
        if found != expected && !is_earlier {
            return Err(ResumeError::Other {
                path: path.to_owned(),
                what,
                found: short_digest(found),
                expected: short_digest(expected),
            });
        }
    }
    Ok(())
}

/// The state of a run that does not resume: empty, or the adapter of `lora_model_dir`.
fn initial(method: &Method) -> Result<State, FileError> {
    let Method::Lora(lora) = method else {
        return Ok(State::default());
    };
    let Some(dir) = &lora.model_dir else {
        return Ok(State::default());
    };
    let dir = std::path::absolute(dir).map_err(FileError::io("find", dir))?;
    Ok(State {
        step: 0,
        files: vec![
            FileEntry::of(&dir, ADAPTER_CONFIG)?,
            FileEntry::of(&dir, ADAPTER_WEIGHTS)?,
        ],
        folder: Some(dir),
        weights_digest: None,
    })
}
