//! What workers may fetch and what they were asked to bring: blocks by number, files by digest, uploads by worker and
//! step. Nothing else can be named over the wire.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::data::blockfile::BlockFile;
use common::files::FileEntry;
use common::files::atomic::AtomicDir;

use crate::cluster::WorkerId;

/// A state that a worker was asked for.
pub struct Expected {
    /// Folder that its files are written to; it is removed unless it is committed.
    pub folder: AtomicDir,
    /// Most bytes of all its files together.
    pub max_bytes: u64,
}

/// The blocks, files and uploads that calls may name. Shared by all calls; its locks are held for single operations only.
pub struct Transfers {
    pub blocks: BlockFile,
    files: Mutex<HashMap<String, (PathBuf, u64)>>,
    expected: Mutex<HashMap<(WorkerId, u64), Expected>>,
}

impl Transfers {
    pub fn new(blocks: BlockFile) -> Self {
        Self {
            blocks,
            files: Mutex::default(),
            expected: Mutex::default(),
        }
    }

    /// Offers the files of a folder.
    pub fn offer(&self, folder: &Path, entries: &[FileEntry]) {
        let mut files = lock(&self.files);
        for entry in entries {
            let file = (folder.join(&entry.path), entry.size);
            files.insert(entry.digest.clone(), file);
        }
    }

    /// Path and size of the file with this digest.
    pub fn find(&self, digest: &str) -> Option<(PathBuf, u64)> {
        lock(&self.files).get(digest).cloned()
    }

    /// Accepts one upload of the state after `step` updates from this worker.
    pub fn expect(&self, worker: WorkerId, step: u64, expected: Expected) {
        lock(&self.expected).insert((worker, step), expected);
    }

    /// Takes the upload that was asked for, as each is accepted once; None where it was not.
    pub fn claim(&self, worker: WorkerId, step: u64) -> Option<Expected> {
        lock(&self.expected).remove(&(worker, step))
    }

    /// The worker is gone: nothing is expected of it any more.
    pub fn forget(&self, worker: WorkerId) {
        lock(&self.expected).retain(|(expected, _), _| *expected != worker);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
