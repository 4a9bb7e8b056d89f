//! Whose an output folder is. `run.json` says it; where that cannot be read, the journal or the checkpoints do: it is a
//! report, and a damaged one costs no run.
//!
//! In: what a run is of. Out: what an earlier run recorded there, or why the folder is another's. It writes nothing.

use common::files::checkpoint;
use common::job::JobSpec;

use crate::journal;
use crate::output::{self, OutputError, RunIdentity, RunRecord};

/// What an output folder says of the runs before.
#[derive(Debug, Default)]
pub struct Claim {
    pub record: Option<RunRecord>,
    /// What the user should know.
    pub notice: Option<String>,
}

/// Refuses an output folder that belongs to another job, or whose record cannot be read and nothing else says whose it is.
pub fn claim(identity: &RunIdentity) -> Result<Claim, OutputError> {
    match output::check_output_dir(identity) {
        Ok(record) => Ok(Claim {
            record,
            notice: None,
        }),
        Err(OutputError::BrokenRecord { path, reason }) if is_of(&identity.job) => Ok(Claim {
            record: None,
            notice: Some(format!(
                "{} is damaged ({reason}) and is written anew: the journal and the checkpoints beside it are of this job",
                path.display()
            )),
        }),
        Err(error) => Err(error),
    }
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
