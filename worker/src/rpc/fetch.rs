//! Folders that a run starts from (base model, checkpoint or adapter): found on this machine, in the hub's cache too, or
//! fetched from the coordinator or from another worker that it names, and verified file by file either way.
//!
//! In: the list of files from Welcome. Out: a local folder that holds exactly those bytes. A fetch goes on where an
//! earlier one stopped, and a model appears in the cache only when it is complete.

mod file;

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use common::files::lock::{self, Attempt};
use common::files::manifest::{entries_digest, inside};
use common::files::names::SINGLE;
use common::files::private;
use common::files::{FileEntry, FileError};
use thiserror::Error;

use self::file::{Origin, Sender};
use super::hub_cache::candidates;
use super::peers::Peers;
use super::tally::Tally;
use super::temporary::TemporaryFolder;
use crate::rpc::connect::Client;

/// How long another process may hold the lock of a folder in the cache without a byte more in it. To verify a large model
/// takes minutes.
const FETCH_LOCK_TIMEOUT: Duration = Duration::from_secs(600);
const FETCH_LOCK_RETRY: Duration = Duration::from_millis(200);
/// How often a file of the right name and size is copied that may prove to be another.
const MAX_COPIES: usize = 2;
/// Time between two log lines about a lock that another process holds.
const LOCK_REMINDER: Duration = Duration::from_secs(60);

/// Why a folder that a run starts from could not be fetched.
#[derive(Debug, Error)]
pub enum FetchError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot write {path}: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "no space is left for {path} ({size} bytes); free some, or name another folder with --cache-dir"
    )]
    NoSpace { path: PathBuf, size: u64 },
    #[error(
        "{path} is locked by another process, which has fetched nothing for {seconds} s; end that process, or name another \
         folder with --cache-dir"
    )]
    Locked { path: PathBuf, seconds: u64 },
    #[error(
        "{path} cannot be the cache, for want of a home folder: {source}; name one with --cache-dir or MUSTER_CACHE_DIR"
    )]
    NoCache {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("fetching {path} failed: {reason}")]
    Broken { path: String, reason: String },
    #[error(
        "{path} as fetched from the coordinator has not the digest {digest} that was announced"
    )]
    Digest { path: String, digest: String },
}

/// Gets folders from one coordinator into one cache.
pub struct Fetcher {
    pub client: Client,
    /// Where fetched folders are kept: `~/.cache/muster`, or what the user chose.
    pub cache: PathBuf,
    /// Folders of this machine that may have files of the model, likeliest first: snapshots in the hub's cache.
    pub snapshots: Vec<PathBuf>,
    /// Workers that have files of the model, and what this one passes on.
    pub peers: Peers,
}

/// A folder that a run starts from.
#[derive(Debug)]
pub enum Folder {
    /// A folder that is on this machine already, or is kept in the cache.
    Kept(PathBuf),
    /// A folder that is removed after use.
    Temporary(TemporaryFolder),
}

impl Folder {
    pub fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }
}

impl Fetcher {
    /// The base model: `at_coordinator` itself where it is on this machine too, else kept in the cache. It is passed on to other
    /// workers from there.
    pub async fn model(
        &self,
        entries: &[FileEntry],
        at_coordinator: &Path,
    ) -> Result<Folder, FetchError> {
        let folder = self.own_model(entries, at_coordinator).await?;
        self.peers.share(folder.path(), entries).await;
        Ok(folder)
    }

    async fn own_model(
        &self,
        entries: &[FileEntry],
        at_coordinator: &Path,
    ) -> Result<Folder, FetchError> {
        if is_the_model(at_coordinator, entries).await {
            let path = at_coordinator.display();
            tracing::info!("the model is on this machine, where the coordinator has it: {path}");
            return Ok(Folder::Kept(at_coordinator.to_owned()));
        }
        for snapshot in &self.snapshots {
            if is_the_model(snapshot, entries).await {
                let path = snapshot.display();
                tracing::info!("the model is in the hub's cache on this machine: {path}");
                return Ok(Folder::Kept(snapshot.clone()));
            }
        }
        let parent = self.cache.join("models");
        std::fs::create_dir_all(&parent).map_err(write_error(&parent, 0))?;
        let name = entries_digest(entries);
        let target = parent.join(&name);
        let partial = parent.join(format!("{name}.partial"));
        let lock_path = parent.join(format!("{name}.lock"));
        let _lock = lock(&lock_path, &partial, FETCH_LOCK_TIMEOUT).await?;
        if holds(&target, entries).await {
            tracing::info!("the model was fetched before: {}", target.display());
            return Ok(Folder::Kept(target));
        }
        // A damaged folder is mended: its good files need not travel again.
        if target.is_dir() && !partial.exists() {
            std::fs::rename(&target, &partial).map_err(write_error(&partial, 0))?;
        }
        let tally = self.files(&partial, entries, Kept::ForOthers).await?;
        if target.exists() {
            common::files::atomic::remove_dir(&target)?;
        }
        std::fs::rename(&partial, &target).map_err(write_error(&target, 0))?;
        // At once: others ask for what was announced.
        self.peers.share_from(&target, entries);
        sync_folder(&parent)?;
        tracing::info!("the model is in {}: {tally}", target.display());
        Ok(Folder::Kept(target))
    }

    /// The checkpoint or adapter to start from; None where there is none.
    pub async fn state(
        &self,
        entries: &[FileEntry],
        at_coordinator: &Path,
    ) -> Result<Option<Folder>, FetchError> {
        if entries.is_empty() {
            return Ok(None);
        }
        if holds(at_coordinator, entries).await {
            return Ok(Some(Folder::Kept(at_coordinator.to_owned())));
        }
        let parent = self.cache.join("states");
        let folder = TemporaryFolder::create(&parent).map_err(write_error(&parent, 0))?;
        self.files(folder.path(), entries, Kept::ForThisRun).await?;
        Ok(Some(Folder::Temporary(folder)))
    }

    /// Completes the files of a folder. Of a model, those that are in one of the snapshots do not travel, and each is passed on as
    /// soon as it is here.
    async fn files(
        &self,
        folder: &Path,
        entries: &[FileEntry],
        kept: Kept,
    ) -> Result<Tally, FetchError> {
        let mut tally = Tally::default();
        let (snapshots, first, sender) = match kept {
            // Workers that come at once begin with different files, and get the others from one another.
            Kept::ForOthers => (
                &self.snapshots[..],
                self.peers.worker as usize % entries.len().max(1),
                Sender::Any,
            ),
            Kept::ForThisRun => (&[][..], 0, Sender::Coordinator),
        };
        let (last, entries) = entries.split_at(first);
        for entry in entries.iter().chain(last) {
            // Its call ends after the file was shared.
            let fetched;
            let path = inside(folder, &entry.path)?;
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(write_error(parent, 0))?;
            }
            let (files, bytes) = if holds(folder, std::slice::from_ref(entry)).await {
                &mut tally.here
            } else if copy_from(snapshots, entry, folder).await? {
                &mut tally.snapshots
            } else {
                fetched = self.file(folder, &path, entry, sender).await?;
                match fetched.origin {
                    Origin::Coordinator => &mut tally.coordinator,
                    Origin::Worker { .. } => &mut tally.workers,
                }
            };
            *files += 1;
            *bytes += entry.size;
            if matches!(kept, Kept::ForOthers) {
                self.peers.share(folder, std::slice::from_ref(entry)).await;
            }
        }
        Ok(tally)
    }
}

/// What becomes of a fetched folder.
#[derive(Clone, Copy)]
enum Kept {
    /// It stays in the cache, and its files are passed on.
    ForOthers,
    ForThisRun,
}

/// Copies a file that one of the snapshots has, where its content is the right one. Nothing of another content stays.
async fn copy_from(
    snapshots: &[PathBuf],
    entry: &FileEntry,
    folder: &Path,
) -> Result<bool, FetchError> {
    let to = inside(folder, &entry.path)?;
    // What of it was fetched before stays until the copy is proven.
    let mut copy = to.clone().into_os_string();
    copy.push(".copy");
    let copy = PathBuf::from(copy);
    // One that was cut short has no place in the model's folder.
    let remove = || match std::fs::remove_file(&copy) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(write_error(&copy, 0)(error)),
        _ => Ok(()),
    };
    remove()?;
    for from in candidates(snapshots, entry)?.into_iter().take(MAX_COPIES) {
        match tokio::fs::copy(&from, &copy).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => {
                remove()?;
                return Err(write_error(&to, entry.size)(error));
            }
            // It is gone, or may not be read: then it is fetched.
            Err(error) => {
                tracing::debug!("{} is not copied: {error}", from.display());
                remove()?;
                continue;
            }
        }
        if is_content(&copy, entry).await {
            let file = File::open(&copy).and_then(|file| file.sync_all());
            file.map_err(write_error(&copy, entry.size))?;
            std::fs::rename(&copy, &to).map_err(write_error(&to, entry.size))?;
            return Ok(true);
        }
        remove()?;
    }
    Ok(false)
}

/// Whether a file, whatever its name is, has the entry's size and digest.
async fn is_content(path: &Path, entry: &FileEntry) -> bool {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return false;
    };
    let named = FileEntry {
        path: name.to_string_lossy().into_owned(),
        ..entry.clone()
    };
    holds(folder, &[named]).await
}

/// Returns whether a folder of somebody else's has the model's files, and no weights beside them: a single file would be loaded
/// instead of those that an index names.
async fn is_the_model(folder: &Path, entries: &[FileEntry]) -> bool {
    let is_listed = entries.iter().any(|entry| entry.path == SINGLE);
    (is_listed || !folder.join(SINGLE).exists()) && holds(folder, entries).await
}

/// Returns whether every file is there with its size and digest.
async fn holds(folder: &Path, entries: &[FileEntry]) -> bool {
    let (folder, entries) = (folder.to_owned(), entries.to_vec());
    let check = move || {
        let size = |entry: &FileEntry| {
            let path = inside(&folder, &entry.path).ok()?;
            Some(std::fs::metadata(path).ok()?.len())
        };
        // Sizes first: they cost nothing.
        entries.iter().all(|entry| size(entry) == Some(entry.size))
            && entries.iter().all(|entry| entry.verify(&folder).is_ok())
    };
    tokio::task::spawn_blocking(check).await.unwrap_or(false)
}

/// Waits until no other worker of this machine fetches the same folder, as long as more of it arrives, or its turn to fetch more is
/// waited for, within `timeout`.
async fn lock(path: &Path, partial: &Path, timeout: Duration) -> Result<File, FetchError> {
    let file = lock::open(path).map_err(write_error(path, 0))?;
    let (mut told, mut trace, mut grew) = (None, (0, None), Instant::now());
    loop {
        match lock::attempt(&file).map_err(write_error(path, 0))? {
            Attempt::Held => return Ok(file),
            Attempt::Unsupported(error) => {
                tracing::warn!(
                    "the file system of {} has no locks ({error}): workers that share it may fetch the same files twice",
                    path.display()
                );
                return Ok(file);
            }
            Attempt::Taken => {}
        }
        let now = trace_of(partial);
        if std::mem::replace(&mut trace, now) != now {
            grew = Instant::now();
        }
        if grew.elapsed() >= timeout {
            return Err(FetchError::Locked {
                path: path.to_owned(),
                seconds: timeout.as_secs(),
            });
        }
        if told.is_none_or(|told: Instant| told.elapsed() >= LOCK_REMINDER) {
            told = Some(Instant::now());
            tracing::info!(
                "another process on this machine fetches the same files and holds {}: waiting for it",
                path.display()
            );
        }
        tokio::time::sleep(FETCH_LOCK_RETRY).await;
    }
}

/// Bytes of the files in a folder and when the last of them was touched, as far as the system tells: whoever fetches them changes
/// the one, and whoever waits for its turn the other.
fn trace_of(folder: &Path) -> (u64, Option<SystemTime>) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok());
    files.fold((0, None), |(bytes, touched), file| {
        (bytes + file.len(), touched.max(file.modified().ok()))
    })
}

fn sync_folder(folder: &Path) -> Result<(), FetchError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(write_error(folder, 0))
}

fn write_error(path: &Path, size: u64) -> impl FnOnce(std::io::Error) -> FetchError {
    let path = path.to_owned();
    move |source| match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FetchError::NoSpace { path, size },
        _ => FetchError::Write { path, source },
    }
}

/// Where fetched folders are kept unless the user names a place.
pub fn default_cache() -> Result<PathBuf, FetchError> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let named = set("MUSTER_CACHE_DIR").map(PathBuf::from);
    let named = named
        .or_else(|| set("XDG_CACHE_HOME").map(|path| Path::new(&path).join("muster")))
        .or_else(|| set("HOME").map(|path| Path::new(&path).join(".cache/muster")));
    match named {
        Some(path) => Ok(path),
        None => own_cache(&std::env::temp_dir()),
    }
}

/// Cache folder of this user alone, in a place where anybody may have prepared one of that name.
fn own_cache(shared: &Path) -> Result<PathBuf, FetchError> {
    #[cfg(unix)]
    let path = shared.join(format!("muster-cache-{}", private::user_id()));
    #[cfg(not(unix))]
    let path = shared.join("muster-cache");
    match private::own_folder(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(FetchError::NoCache { path, source }),
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_that_another_holds_for_nothing_is_named_and_waited_for_a_bounded_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.lock");
        let partial = folder.path().join("model.partial");
        let other = lock::open(&path).unwrap();
        lock::attempt(&other).unwrap();
        let timeout = Duration::from_millis(1);
        let error = lock(&path, &partial, timeout).await.unwrap_err();
        let message = error.to_string();
        assert!(
            message.starts_with(&path.display().to_string()),
            "{message}"
        );
        drop(other);
        lock(&path, &partial, timeout).await.unwrap();
    }

    #[test]
    fn who_waits_for_its_turn_to_fetch_leaves_a_trace() {
        let partial = tempfile::tempdir().unwrap();
        let file = File::create(partial.path().join("weights")).unwrap();
        let before = trace_of(partial.path());
        file.set_modified(SystemTime::now() + Duration::from_secs(10))
            .unwrap();
        assert_ne!(trace_of(partial.path()), before);
    }

    #[test]
    fn a_cache_that_another_prepared_is_not_used() {
        let shared = tempfile::tempdir().unwrap();
        let own = own_cache(shared.path()).unwrap();
        std::fs::remove_dir(&own).unwrap();
        std::os::unix::fs::symlink("/etc", &own).unwrap();
        let message = own_cache(shared.path()).unwrap_err().to_string();
        assert!(message.contains("--cache-dir"), "{message}");
    }
}
