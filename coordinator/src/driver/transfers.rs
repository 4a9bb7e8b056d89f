//! What workers may fetch and what they were asked to bring: blocks by number, files by digest (from here, or from a worker that
//! has them), uploads by worker and step. Nothing else can be named over the wire.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::data::blockfile::BlockFile;
use common::files::FileEntry;
use common::files::atomic::AtomicDir;
use proto::v1;
use tokio::sync::Notify;

use crate::cluster::WorkerId;
use crate::driver::sharing::{Caller, Number, Sharing, Source};

/// How often those who wait for a file look whether the sendings they wait for still move.
const WAIT_CHECK: Duration = Duration::from_secs(1);

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
    sharing: Mutex<Sharing>,
    /// Told whenever somebody may be able to send again.
    freed: Notify,
    expected: Mutex<HashMap<(WorkerId, u64), Expected>>,
}

impl Transfers {
    pub fn new(blocks: BlockFile) -> Self {
        Self {
            blocks,
            files: Mutex::default(),
            sharing: Mutex::default(),
            freed: Notify::new(),
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

    /// A worker has those of these files that the run offers, and passes them on.
    pub fn hold(&self, holder: &v1::Member, digests: &[String]) {
        let offered = digests.iter().filter(|digest| self.find(digest).is_some());
        let offered: Vec<&String> = offered.collect();
        let mut sharing = lock(&self.sharing);
        for digest in offered {
            sharing.hold(holder, digest);
        }
        drop(sharing);
        self.freed.notify_waiters();
    }

    /// Who sends a file to the caller now; None where others are served first.
    pub fn turn(self: &Arc<Self>, digest: &str, caller: &Caller) -> Option<(Source, Turn)> {
        let (source, number) = lock(&self.sharing).begin(digest, caller, Instant::now())?;
        let turn = Turn {
            transfers: self.clone(),
            number,
        };
        Some((source, turn))
    }

    /// Waits for the caller's turn, which comes at the latest when it has waited long.
    pub async fn wait_for_turn(
        self: &Arc<Self>,
        digest: &str,
        mut caller: Caller,
    ) -> (Source, Turn) {
        let began = Instant::now();
        loop {
            caller.waited = began.elapsed();
            let mut freed = std::pin::pin!(self.freed.notified());
            // From here on nothing is missed.
            freed.as_mut().enable();
            if let Some(turn) = self.turn(digest, &caller) {
                return turn;
            }
            let _ = tokio::time::timeout(WAIT_CHECK, freed).await;
        }
    }

    /// Accepts one upload of the state after `step` updates from this worker.
    pub fn expect(&self, worker: WorkerId, step: u64, expected: Expected) {
        lock(&self.expected).insert((worker, step), expected);
    }

    /// Takes the upload that was asked for, as each is accepted once; None where it was not.
    pub fn claim(&self, worker: WorkerId, step: u64) -> Option<Expected> {
        lock(&self.expected).remove(&(worker, step))
    }

    /// The worker is gone: nothing is expected of it any more, and nobody is sent to it.
    pub fn forget(&self, worker: WorkerId) {
        lock(&self.sharing).forget(worker);
        lock(&self.expected).retain(|(expected, _), _| *expected != worker);
    }
}

/// A file's sending to one caller, as long as it lasts.
pub struct Turn {
    transfers: Arc<Transfers>,
    number: Number,
}

impl Turn {
    /// So many bytes more are on their way.
    pub fn moved(&self, bytes: u64) {
        lock(&self.transfers.sharing).moved(self.number, bytes, Instant::now());
    }

    /// All was sent.
    pub fn sent(&self) {
        lock(&self.transfers.sharing).sent(self.number, Instant::now());
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.transfers.sharing).end(self.number);
        self.transfers.freed.notify_waiters();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
