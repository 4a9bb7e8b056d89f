//! The lock of the output folder: one coordinator at a time is at work in it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::files::FileError;
use common::files::lock::{self, Attempt};
use thiserror::Error;

use super::layout::WORK_FOLDER;

/// How long a coordinator waits for another to leave the output folder: one that is told to stop saves a checkpoint first, and
/// its replacement may be there already.
pub const OUTPUT_LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const OUTPUT_LOCK_RETRY: Duration = Duration::from_millis(200);

/// Why the output folder cannot be locked.
#[derive(Debug, Error)]
pub enum LockError {
    #[error(transparent)]
    File(FileError),
    #[error("another coordinator is at work in output_dir {dir}")]
    InUse { dir: PathBuf },
}

/// An output folder that only this process writes into. Held until the process ends, however it ends.
pub struct Lock {
    _file: File,
    /// Whether another coordinator held it first, and may have changed what is in the folder.
    pub waited: bool,
}

/// Locks the output folder. Waits up to `timeout` for another coordinator to leave it, and says so once.
pub fn lock(
    output_dir: &Path,
    timeout: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Lock, LockError> {
    lock_by(lock::attempt, output_dir, timeout, say)
}

fn lock_by(
    attempt: impl Fn(&File) -> std::io::Result<Attempt>,
    output_dir: &Path,
    timeout: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Lock, LockError> {
    let folder = output_dir.join(WORK_FOLDER);
    let path = folder.join("lock");
    let failed = |error| LockError::File(FileError::io("lock", &path)(error));
    // Where the data was prepared elsewhere, nobody has made it yet.
    std::fs::create_dir_all(&folder).map_err(failed)?;
    let file = lock::open(&path).map_err(failed)?;
    let began = Instant::now();
    let mut waited = false;
    loop {
        match attempt(&file).map_err(failed)? {
            Attempt::Held => break,
            Attempt::Unsupported(error) => {
                say(&format!(
                    "the file system of output_dir {} has no locks ({error}): see to it that no second coordinator is at \
                     work in it",
                    output_dir.display()
                ));
                break;
            }
            Attempt::Taken if began.elapsed() >= timeout => {
                return Err(LockError::InUse {
                    dir: output_dir.to_owned(),
                });
            }
            Attempt::Taken => {}
        }
        if !waited {
            say(&format!(
                "another coordinator is at work in output_dir {}: waiting up to {} s for it to end",
                output_dir.display(),
                timeout.as_secs()
            ));
        }
        waited = true;
        std::thread::sleep(OUTPUT_LOCK_RETRY.min(timeout));
    }
    Ok(Lock {
        _file: file,
        waited,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_folder_is_waited_for_and_then_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(WORK_FOLDER)).unwrap();
        let mut said = Vec::new();
        let mut take = |timeout: u64| {
            let timeout = Duration::from_millis(timeout);
            lock(folder.path(), timeout, &mut |line| {
                said.push(line.to_owned())
            })
        };
        let first = take(0).unwrap();
        assert!(!first.waited);
        assert!(matches!(take(50), Err(LockError::InUse { .. })));
        let leaving = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
        });
        assert!(take(10_000).unwrap().waited);
        leaving.join().unwrap();
        assert_eq!(said.len(), 2, "once each time: {said:?}");
    }

    #[test]
    fn a_folder_without_locks_is_used_with_a_word_about_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(WORK_FOLDER)).unwrap();
        let mut said = Vec::new();
        let unsupported =
            |_: &File| Ok(Attempt::Unsupported(std::io::ErrorKind::Unsupported.into()));
        let mut say = |line: &str| said.push(line.to_owned());
        lock_by(unsupported, folder.path(), OUTPUT_LOCK_TIMEOUT, &mut say).unwrap();
        let names = |line: &String| {
            line.contains("has no locks") && line.contains(&folder.path().display().to_string())
        };
        assert!(said.len() == 1 && names(&said[0]), "{said:?}");
        let broken = |_: &File| Err(std::io::ErrorKind::Other.into());
        let error = lock_by(broken, folder.path(), OUTPUT_LOCK_TIMEOUT, &mut |_| ())
            .err()
            .unwrap();
        assert!(error.to_string().contains("lock"), "{error}");
    }
}
