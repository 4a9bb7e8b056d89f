//! What of a run was pushed, in its folder: so that after a crash no older state is pushed over a newer one.
//!
//! In: an output folder, and the run at work in it. Out: the newest step whose push has begun, and the newest that was pushed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use common::files::{FileError, atomic};
use serde::{Deserialize, Serialize};

use crate::store::layout::{PUSHED, WORK_FOLDER};

const MAX_BYTES: u64 = 64 << 10;

/// What of a run was pushed to a repository.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PushRecord {
    /// The run's identifier.
    pub run: String,
    /// The repository, as the job names it.
    pub repo: String,
    /// Step of the newest weights whose push has begun: they may be on the hub.
    pub begun: u64,
    /// Step of the newest weights that are on the hub.
    pub done: u64,
}

impl PushRecord {
    /// The record in this output folder; none where it is of another run or repository.
    pub fn of(output_dir: &Path, run: &str, repo: &str) -> Option<Self> {
        read(output_dir).filter(|record| record.run == run && record.repo == repo)
    }

    /// Writes it, durably and whole or not at all.
    pub fn write(&self, output_dir: &Path) -> Result<(), FileError> {
        let path = path(output_dir);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| FileError::malformed(&path, error.to_string()))?;
        atomic::write(&path, &text)
    }

    /// Puts down that a result went to this repository, where there is a record of it.
    pub fn note_result(output_dir: &Path, repo: &str, step: u64) -> Result<(), FileError> {
        let Some(mut record) = read(output_dir).filter(|record| record.repo == repo) else {
            return Ok(());
        };
        record.begun = record.begun.max(step);
        record.done = record.done.max(step);
        record.write(output_dir)
    }
}

fn path(output_dir: &Path) -> PathBuf {
    output_dir.join(WORK_FOLDER).join(PUSHED)
}

fn read(output_dir: &Path) -> Option<PushRecord> {
    let mut bytes = Vec::new();
    let file = File::open(path(output_dir)).ok()?;
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_for_its_own_run_and_repository() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        std::fs::create_dir(dir.join(WORK_FOLDER)).unwrap();
        PushRecord::note_result(dir, "me/a", 9).unwrap();
        assert_eq!(PushRecord::of(dir, "run", "me/a"), None);
        let record = PushRecord {
            run: "run".into(),
            repo: "me/a".into(),
            begun: 4,
            done: 2,
        };
        record.write(dir).unwrap();
        assert_eq!(PushRecord::of(dir, "run", "me/a"), Some(record));
        assert_eq!(PushRecord::of(dir, "other", "me/a"), None);
        assert_eq!(PushRecord::of(dir, "run", "me/b"), None);
        PushRecord::note_result(dir, "me/a", 9).unwrap();
        let after = PushRecord::of(dir, "run", "me/a").unwrap();
        assert_eq!((after.begun, after.done), (9, 9));
        std::fs::write(path(dir), "{").unwrap();
        assert_eq!(PushRecord::of(dir, "run", "me/a"), None);
    }
}
