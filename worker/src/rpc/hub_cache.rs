//! The hub's cache on this machine, in which a model may be already.
//!
//! In: the job, which names the model's repository and commit where it has one. Out: folders and files that may be the
//! model's; whether they are, their digests say.

use std::fs;
use std::path::{Path, PathBuf};

use common::files::manifest::inside;
use common::files::{FileEntry, FileError};
use common::hub::{Environment, RepoId, RepoKind, model_snapshots};
use common::job::JobSpec;

/// Folders that may have the model, likeliest first. `cache`: the folder of the hub's files, None where the environment says it.
pub fn snapshots(cache: Option<&Path>, job: &JobSpec) -> Vec<PathBuf> {
    let cache = match cache {
        Some(cache) => Some(cache.to_owned()),
        // Whoever has set it wrongly is told by what asks the hub.
        None => Environment::of_process()
            .ok()
            .map(|environment| environment.cache().to_owned()),
    };
    let id = job.base_model_id.as_deref();
    let repo = id.and_then(|id| RepoId::parse(RepoKind::Model, id).ok());
    let commit = job.model_revision.as_deref();
    cache.map_or_else(Vec::new, |cache| {
        model_snapshots(&cache, repo.as_ref(), commit)
    })
}

/// Files of an entry's name and size in the snapshots.
pub fn candidates(snapshots: &[PathBuf], entry: &FileEntry) -> Result<Vec<PathBuf>, FileError> {
    let mut found = Vec::new();
    for snapshot in snapshots {
        let path = inside(snapshot, &entry.path)?;
        let size = fs::metadata(&path).map(|found| found.len());
        if size.is_ok_and(|size| size == entry.size) {
            found.push(path);
        }
    }
    Ok(found)
}
