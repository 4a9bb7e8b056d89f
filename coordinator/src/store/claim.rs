//! Which job an output folder belongs to. `run.json` says it; where that cannot be read, the journal or the checkpoints do: it
//! is a report, and a damaged one costs no run.
//!
//! In: what a run is of. Out: what an earlier run recorded there, or why the folder is another's. It writes nothing. A
//! folder in which nothing was done yet is nobody's, and `resume: never` takes what it finds.

use std::path::Path;

use common::files::checkpoint;
use common::job::{JobSpec, Resume};

use crate::store::journal;
use crate::store::output;
use crate::store::output::{OutputError, RunIdentity, RunRecord, RunState};

/// What an output folder says of the runs before.
#[derive(Debug, Default)]
pub struct Claim {
    /// What an earlier run of this job recorded there.
    pub record: Option<RunRecord>,
    /// A line that the user should know, if there is one.
    pub notice: Option<String>,
    /// Whether the record there is another job's and counts no more ([`output::set_record_aside`]).
    pub replaces: bool,
}

/// Refuses an output folder that belongs to another job, or whose record cannot be read and nothing else says whose it is.
pub fn claim(identity: &RunIdentity) -> Result<Claim, OutputError> {
    match output::check_output_dir(identity) {
        Ok(record) => Ok(Claim {
            record,
            ..Claim::default()
        }),
        // Whose the folder is can be said once the job is: it is asked again when the data is known.
        Err(OutputError::BrokenRecord { .. }) if identity.job.reading.left_to_data.anything() => {
            Ok(Claim::default())
        }
        Err(OutputError::BrokenRecord { path, reason }) if is_of(&identity.job) => Ok(Claim {
            notice: Some(format!(
                "{} is damaged ({reason}) and is written anew: the journal and the checkpoints beside it are of this job",
                path.display()
            )),
            ..Claim::default()
        }),
        Err(OutputError::OtherJob {
            dir, differences, ..
        }) if identity.job.resume == Resume::Never => Ok(Claim::replacing(format!(
            "output_dir {} held another job{differences}: it is replaced, as `resume: never` asks",
            dir.display()
        ))),
        Err(OutputError::OtherJob {
            dir, differences, ..
        }) if is_untouched(&dir) => Ok(Claim::replacing(format!(
            "output_dir {} held another job{differences}, of which no step was done: it is begun anew",
            dir.display()
        ))),
        Err(error) => Err(error),
    }
}

impl Claim {
    /// Digests of the jobs whose checkpoints are this run's: its own as it is, or was with another number of steps.
    pub fn jobs(&self) -> Vec<String> {
        self.record
            .as_ref()
            .map(RunRecord::jobs)
            .unwrap_or_default()
    }

    fn replacing(notice: String) -> Self {
        Self {
            notice: Some(notice),
            replaces: true,
            ..Self::default()
        }
    }
}

/// Whether no step of the run before is on record anywhere. What cannot be read may hold one.
fn is_untouched(output_dir: &Path) -> bool {
    let is_new = |record: &RunRecord| record.step == 0 && record.state != RunState::Done;
    let is_empty =
        |found: &journal::Found| found.notices.is_empty() && found.history.recorded() == 0;
    RunRecord::read(output_dir).is_ok_and(|record| record.as_ref().is_none_or(is_new))
        && journal::read(output_dir).is_ok_and(|found| is_empty(&found))
        && checkpoint::list(output_dir).is_ok_and(|checkpoints| checkpoints.is_empty())
}

fn is_of(job: &JobSpec) -> bool {
    let digest = job.digest();
    let journal = journal::read(&job.output_dir).unwrap_or_default();
    if let Some(term) = journal.history.term() {
        return term.identity.job_digest == digest;
    }
    let found = checkpoint::newest_valid(&job.output_dir);
    let newest = found.ok().and_then(|found| found.newest);
    newest.is_some_and(|(_, manifest)| manifest.job_digest == digest)
}
