//! Temporary folders: this user's alone, removed when dropped; where a process died with one, the next worker removes it.

use std::fs::File;
use std::path::{Path, PathBuf};

use common::files::lock::{self, Attempt};
use common::files::private;

/// A temporary folder that only this process uses.
#[derive(Debug)]
pub struct TemporaryFolder {
    path: PathBuf,
    /// Locked as long as the folder is in use, by whatever process.
    lock: File,
}

impl TemporaryFolder {
    /// Makes a temporary folder inside `parent`, and removes those whose processes are gone.
    pub fn create(parent: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(parent)?;
        sweep(parent)?;
        let path = private::create_folder(parent, "")?;
        let lock = private::create_file(&lock_path(&path))?;
        // Nobody else has this one. Where there are no locks, nobody sweeps.
        lock::attempt(&lock)?;
        Ok(Self { path, lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.path) {
            tracing::debug!("{} stays behind: {e}", self.path.display());
        }
        let _ = self.lock.unlock();
    }
}

fn lock_path(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        std::fs::remove_dir_all(path)?;
    }
    std::fs::remove_file(lock_path(path))
}

fn sweep(parent: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(parent)? {
        let lock = entry?.path();
        let is_lock = lock
            .extension()
            .is_some_and(|extension| extension == "lock");
        if is_lock && is_left(&lock) {
            // Another worker may sweep at the same moment.
            let _ = remove(&lock.with_extension(""));
        }
    }
    Ok(())
}

/// Returns whether no process holds the folder's lock any more.
fn is_left(lock: &Path) -> bool {
    let attempt = lock::open(lock).and_then(|file| lock::attempt(&file));
    matches!(attempt, Ok(Attempt::Held))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_left_is_swept_up_and_what_is_in_use_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let left = parent.path().join("4000000-0");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("model.safetensors"), "x").unwrap();
        File::create(lock_path(&left)).unwrap();
        let first = TemporaryFolder::create(parent.path()).unwrap();
        let second = TemporaryFolder::create(parent.path()).unwrap();
        assert!(!left.exists() && first.path().is_dir() && second.path().is_dir());
        drop((first, second));
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
