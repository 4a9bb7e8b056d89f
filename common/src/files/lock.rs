//! Locks between processes: a file that one of them holds, until it ends, however it ends.
//!
//! In: the path of a lock. Out: the held file, or that another process has it. A file system without locks (NFS without
//! lockd, some FUSE) is no error here: the caller says so and goes on. What is in the file, or behind a link in its place,
//! is never touched.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::path::Path;

/// The outcome of an attempt to lock.
#[derive(Debug)]
pub enum Attempt {
    /// The lock is held, as long as the file is open.
    Held,
    /// Another process holds the lock.
    Taken,
    /// The file system has no locks, in the system's words: whoever else is at work there is not seen.
    Unsupported(io::Error),
}

/// Opens the file to lock, and makes it where there is none.
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW);
    options.open(path).map_err(|error| match is_link(path) {
        true => io::Error::new(
            error.kind(),
            "it is a link, which a lock may not be: remove it",
        ),
        false => error,
    })
}

/// Tries once to lock the file, and does not wait.
pub fn attempt(file: &File) -> io::Result<Attempt> {
    judge(file.try_lock())
}

fn judge(tried: Result<(), TryLockError>) -> io::Result<Attempt> {
    match tried {
        Ok(()) => Ok(Attempt::Held),
        Err(TryLockError::WouldBlock) => Ok(Attempt::Taken),
        Err(TryLockError::Error(error)) if is_without_locks(&error) => {
            Ok(Attempt::Unsupported(error))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether the error of a lock means that the file system has none.
fn is_without_locks(error: &io::Error) -> bool {
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::ENOLCK) {
        return true;
    }
    // EOPNOTSUPP, ENOTSUP and ENOSYS.
    error.kind() == ErrorKind::Unsupported
}

fn is_link(path: &Path) -> bool {
    path.symlink_metadata()
        .is_ok_and(|found| found.is_symlink())
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_locks_is_told_apart_from_one_that_fails() {
        for code in [libc::ENOLCK, libc::EOPNOTSUPP, libc::ENOTSUP, libc::ENOSYS] {
            let error = io::Error::from_raw_os_error(code);
            let judged = judge(Err(TryLockError::Error(error)));
            assert!(
                matches!(judged, Ok(Attempt::Unsupported(_))),
                "{code}: {judged:?}"
            );
        }
        let error = io::Error::from_raw_os_error(libc::EIO);
        judge(Err(TryLockError::Error(error))).unwrap_err();
    }

    #[test]
    fn a_lock_is_held_once_and_what_is_in_its_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        std::fs::write(&path, "content").unwrap();
        let (first, second) = (open(&path).unwrap(), open(&path).unwrap());
        assert!(matches!(attempt(&first), Ok(Attempt::Held)));
        assert!(matches!(attempt(&second), Ok(Attempt::Taken)));
        drop(first);
        assert!(matches!(attempt(&second), Ok(Attempt::Held)));
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
    }

    #[test]
    fn a_link_in_the_place_of_a_lock_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let (victim, link) = (folder.path().join("victim"), folder.path().join("lock"));
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let message = open(&link).unwrap_err().to_string();
        assert!(message.contains("is a link"), "{message}");
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    }
}
