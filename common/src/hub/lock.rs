//! Locks on contents of the cache, shared with Python: whoever fetches a blob holds `.locks/<repository>/<digest>.lock`.
//!
//! In: the path of a lock and where its holder's part file grows. Out: the lock, or an error where its holder does nothing
//! for long.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubError;
use super::client::Client;
use crate::files::lock::{self, Attempt};
use crate::progress::Progress;

/// Most time for which the holder of a lock may show no progress.
const MAX_STALL: Duration = Duration::from_secs(600);

/// A held lock, until it is dropped.
pub(super) struct BlobLock {
    _file: File,
    /// Whether nobody else can be at work on the same content.
    pub is_exclusive: bool,
}

/// Waits for the lock, as long as its holder's part in `blobs` grows.
pub(super) fn acquire(
    client: &Client,
    path: &Path,
    blobs: &Path,
    digest: &str,
    progress: &Progress,
) -> Result<BlobLock, HubError> {
    let file = lock::open(path).map_err(HubError::io("open the lock", path))?;
    let (mut stalled, mut last) = (Duration::ZERO, None);
    loop {
        match lock::attempt(&file).map_err(HubError::io("lock", path))? {
            Attempt::Held => {
                return Ok(BlobLock {
                    _file: file,
                    is_exclusive: true,
                });
            }
            Attempt::Unsupported(error) => {
                tracing::warn!(
                    "{} has no locks ({error}): another process may fetch the same file",
                    path.display()
                );
                return Ok(BlobLock {
                    _file: file,
                    is_exclusive: false,
                });
            }
            Attempt::Taken => {}
        }
        let size = part_bytes(blobs, digest);
        if last != Some(size) {
            if last.is_none() {
                tracing::warn!(
                    "{}: another process is fetching the file, waiting",
                    path.display()
                );
            }
            (stalled, last) = (Duration::ZERO, Some(size));
        }
        if stalled >= MAX_STALL {
            let path = PathBuf::from(path);
            return Err(HubError::LockHeld { path });
        }
        stalled += client.sleep_a_moment(progress)?;
    }
}

/// Bytes of all parts of the content: ours, and Python's under names of its own.
fn part_bytes(blobs: &Path, digest: &str) -> u64 {
    let entries = fs::read_dir(blobs).into_iter().flatten().flatten();
    let parts = entries.filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with(digest) && name.ends_with(".incomplete")
    });
    parts
        .filter_map(|entry| entry.metadata().ok())
        .map(|found| found.len())
        .sum()
}
