//! Folders and files that nobody else may read, or prepare before us: in `/tmp` anybody may make anything.
//!
//! In: a place and a name. Out: a folder that this process has made itself, or one that is proven to be this user's.

use std::collections::hash_map::RandomState;
use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::BuildHasher;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Most names that are tried, should they be taken already.
const MAX_ATTEMPTS: u32 = 16;

/// Makes a folder in `parent`, under a name that nobody can foresee.
pub fn create_folder(parent: &Path, prefix: &str) -> io::Result<PathBuf> {
    for _ in 0..MAX_ATTEMPTS {
        let path = parent.join(random_name(prefix));
        match builder().create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

/// Makes a file that only this user may read, where nothing is yet.
pub fn create_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Makes the folder where it is not there yet; one that is there must be this user's alone. An error says what it is.
pub fn own_folder(path: &Path) -> io::Result<()> {
    match builder().create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => check_own(path),
        created => created,
    }
}

/// The number of the user that this process is of.
#[cfg(unix)]
pub fn user_id() -> u32 {
    // SAFETY: the call has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

/// A name of `prefix` and hex digits that nobody can foresee.
fn random_name(prefix: &str) -> String {
    // Every one has keys of its own, from the system's randomness.
    format!(
        "{prefix}{:016x}",
        RandomState::new().hash_one(std::process::id())
    )
}

#[cfg(unix)]
fn builder() -> DirBuilder {
    let mut builder = DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
}

#[cfg(not(unix))]
fn builder() -> DirBuilder {
    DirBuilder::new()
}

#[cfg(unix)]
fn check_own(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    // Of the name itself, not of what a link leads to.
    let found = path.symlink_metadata()?;
    let reason = if !found.is_dir() {
        "it is no folder"
    } else if found.uid() != user_id() {
        "it is another user's"
    } else if found.mode() & 0o022 != 0 {
        "others may write into it"
    } else {
        return Ok(());
    };
    Err(io::Error::new(ErrorKind::PermissionDenied, reason))
}

#[cfg(not(unix))]
fn check_own(path: &Path) -> io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => Ok(()),
        false => Err(io::Error::new(ErrorKind::AlreadyExists, "it is no folder")),
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_made_is_new_and_nobody_elses() {
        let parent = tempfile::tempdir().unwrap();
        let [first, second] = [(); 2].map(|()| create_folder(parent.path(), "x-").unwrap());
        assert_ne!(first, second);
        assert_eq!(mode(&first), 0o700);
        let file = first.join("file");
        create_file(&file).unwrap();
        assert_eq!(mode(&file), 0o600);
        create_file(&file).unwrap_err();
    }

    #[test]
    fn a_folder_that_another_prepared_is_not_taken() {
        let parent = tempfile::tempdir().unwrap();
        let own = parent.path().join("own");
        own_folder(&own).unwrap();
        own_folder(&own).unwrap();
        assert_eq!(mode(&own), 0o700);
        std::fs::set_permissions(&own, PermissionsExt::from_mode(0o777)).unwrap();
        let message = own_folder(&own).unwrap_err().to_string();
        assert!(message.contains("others may write"), "{message}");
        let link = parent.path().join("link");
        symlink(parent.path(), &link).unwrap();
        own_folder(&link).unwrap_err();
    }
}
