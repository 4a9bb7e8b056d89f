//! Folders for what nobody keeps: gone when they are dropped, when a signal ends the process, or at a later start.
//!
//! Enters: the system's folder for temporary files. Leaves: a folder in it of this process alone. Of the folders of others only
//! those are removed that are this user's, that nobody holds any more, and that are not new.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use common::files::lock::{self, Attempt};
use common::files::private;

const PREFIX: &str = "muster-check-";
/// File in each folder that its process holds.
const LOCK: &str = "lock";
/// Most names in the system's folder that are looked at.
const MAX_ENTRIES: usize = 10_000;
/// Age from which a folder that nobody holds is left over: it is held a moment after it was made.
const MIN_AGE: Duration = Duration::from_secs(60);

/// Those of this process.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A folder of its own for block files that nobody keeps; gone when dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// Held as long as the folder is needed. None: the file system has no locks.
    lock: Option<File>,
}

impl Scratch {
    /// Makes one, and removes those that were left over.
    pub fn new() -> io::Result<Self> {
        Self::in_folder(&std::env::temp_dir())
    }

    fn in_folder(parent: &Path) -> io::Result<Self> {
        remove_leftovers(parent);
        let path = private::create_folder(parent, PREFIX)?;
        live().push(path.clone());
        // From here on it is removed whatever fails.
        let mut scratch = Self { path, lock: None };
        let file = lock::open(&scratch.path.join(LOCK))?;
        if let Attempt::Held = lock::attempt(&file)? {
            scratch.lock = Some(file);
        }
        Ok(scratch)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        live().retain(|path| *path != self.path);
        // Some systems remove no file that is open.
        drop(self.lock.take());
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the folders of this process, which is about to end without dropping anything.
pub fn remove_all() {
    for path in std::mem::take(&mut *live()) {
        let _ = fs::remove_dir_all(path);
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what processes left that had no time to. What cannot be removed only takes up room.
fn remove_leftovers(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries.take(MAX_ENTRIES) {
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if is_ours && is_left_over(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_left_over(path: &Path) -> bool {
    // Of the name itself, not of what a link leads to.
    let Ok(found) = path.symlink_metadata() else {
        return false;
    };
    let age = found
        .modified()
        .ok()
        .and_then(|time| SystemTime::now().duration_since(time).ok());
    if !found.is_dir() || !is_this_users(&found) || age.is_none_or(|age| age < MIN_AGE) {
        return false;
    }
    let file = path.join(LOCK);
    match file.exists() {
        true => matches!(
            lock::open(&file).and_then(|file| lock::attempt(&file)),
            Ok(Attempt::Held)
        ),
        // Its process ended before it held anything, or was of an earlier version.
        false => true,
    }
}

#[cfg(unix)]
fn is_this_users(found: &fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::uid(found) == private::user_id()
}

#[cfg(not(unix))]
fn is_this_users(_: &fs::Metadata) -> bool {
    true
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Makes a folder as old as one that was left over.
    fn age(path: &Path) {
        let long_ago = SystemTime::now() - 2 * MIN_AGE;
        File::open(path).unwrap().set_modified(long_ago).unwrap();
    }

    #[test]
    fn what_was_left_over_is_removed_and_what_is_held_or_anothers_stays() {
        let parent = tempfile::tempdir().unwrap();
        let held = Scratch::in_folder(parent.path()).unwrap();
        let make = |name: &str| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let [killed, young, other] = ["muster-check-1", "muster-check-2", "else"].map(make);
        fs::write(killed.join(LOCK), "").unwrap();
        fs::write(killed.join("blocks.bin"), "left").unwrap();
        let link = parent.path().join("muster-check-3");
        std::os::unix::fs::symlink(&other, &link).unwrap();
        for path in [held.path(), &killed, &other] {
            age(path);
        }
        drop(Scratch::in_folder(parent.path()).unwrap());
        assert!(!killed.exists());
        for path in [held.path(), &young, &other, &link] {
            assert!(path.exists(), "{}", path.display());
        }
        let path = held.path().to_owned();
        drop(held);
        assert!(!path.exists());
    }
}
