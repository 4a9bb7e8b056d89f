//! What makes written files outlast a power cut: fsync of a file, of a folder, and the rename between them.
//!
//! In: files that were written. Out: the system's word that they are on disk, or its error, which is final: after a failed
//! fsync the kernel may have dropped the data and would report success the second time, so nothing here tries again.
//! Tests can watch the operations below a folder, to see their order and to let one of them fail.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::FileError;

const MAX_SYNCS_AT_A_TIME: usize = 8;

/// An operation that makes something durable, about to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    SyncFile(PathBuf),
    SyncFolder(PathBuf),
    Rename { from: PathBuf, to: PathBuf },
}

impl Operation {
    fn path(&self) -> &Path {
        match self {
            Self::SyncFile(path) | Self::SyncFolder(path) | Self::Rename { from: path, .. } => path,
        }
    }
}

/// A function that sees an operation before it is done; its error takes the operation's place.
type Watcher = Arc<dyn Fn(&Operation) -> io::Result<()> + Send + Sync>;

struct Watching {
    number: usize,
    folder: PathBuf,
    watcher: Watcher,
}

static WATCHERS: Mutex<Vec<Watching>> = Mutex::new(Vec::new());
/// Number of watchers so far: while it is 0, nobody looks at the list.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Makes the content of an open file durable; `path` is its name.
pub fn sync_file(file: &File, path: &Path) -> io::Result<()> {
    tell(|| Operation::SyncFile(path.to_owned()))?;
    file.sync_all()
}

/// Makes the content of an open file durable, but not its times and the like; `path` is its name.
pub fn sync_data(file: &File, path: &Path) -> io::Result<()> {
    tell(|| Operation::SyncFile(path.to_owned()))?;
    file.sync_data()
}

/// Makes the content of a file durable that another process or function wrote.
pub fn sync_path(path: &Path) -> io::Result<()> {
    sync_file(&File::open(path)?, path)
}

/// Makes many files durable, several at a time: a slow disk or network takes as long for all as for a few. After a failure
/// nothing else is begun.
pub fn sync_paths(paths: &[PathBuf]) -> Result<(), FileError> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let sync_some = || {
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::SeqCst)) {
            if failed.load(Ordering::SeqCst) {
                break;
            }
            sync_path(path).map_err(|error| {
                failed.store(true, Ordering::SeqCst);
                FileError::io("make durable", path)(error)
            })?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others = 1..paths.len().min(MAX_SYNCS_AT_A_TIME);
        let threads: Vec<_> = others.map(|_| scope.spawn(sync_some)).collect();
        let own = sync_some();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.fold(own, |all, result| all.and(result))
    })
}

/// Makes the names in a folder durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    tell(|| Operation::SyncFolder(folder.to_owned()))?;
    // Folders cannot be opened as files elsewhere, and need not be made durable there.
    match cfg!(unix) {
        true => File::open(folder)?.sync_all(),
        false => Ok(()),
    }
}

/// Renames a file or folder. The new name is durable once its folder is synced.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    tell(|| Operation::Rename {
        from: from.to_owned(),
        to: to.to_owned(),
    })?;
    fs::rename(from, to)
}

/// Shows `watcher` every operation on what is inside `folder` (and on itself), from any thread, until the result is
/// dropped.
pub fn watch(
    folder: &Path,
    watcher: impl Fn(&Operation) -> io::Result<()> + Send + Sync + 'static,
) -> Watch {
    let number = COUNT.fetch_add(1, Ordering::SeqCst);
    watchers().push(Watching {
        number,
        folder: folder.to_owned(),
        watcher: Arc::new(watcher),
    });
    Watch(number)
}

/// Keeps a watcher until it is dropped.
#[must_use]
pub struct Watch(usize);

impl Drop for Watch {
    fn drop(&mut self) {
        watchers().retain(|watching| watching.number != self.0);
    }
}

fn watchers() -> std::sync::MutexGuard<'static, Vec<Watching>> {
    WATCHERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tell(operation: impl FnOnce() -> Operation) -> io::Result<()> {
    if COUNT.load(Ordering::SeqCst) == 0 {
        return Ok(());
    }
    let operation = operation();
    let concerned: Vec<Watcher> = watchers()
        .iter()
        .filter(|watching| operation.path().starts_with(&watching.folder))
        .map(|watching| watching.watcher.clone())
        .collect();
    concerned.iter().try_for_each(|watcher| watcher(&operation))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The system refuses to sync these, so that a sync that is not done shows.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_is_really_asked() {
        let null = Path::new("/dev/null");
        sync_path(null).unwrap_err();
        sync_data(&File::open(null).unwrap(), null).unwrap_err();
        sync_folder(Path::new("/proc/self")).unwrap_err();
    }

    #[test]
    fn a_watcher_sees_its_own_folder_and_may_refuse() {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let recorder = seen.clone();
        let watch = watch(folders[0].path(), move |operation| {
            recorder.lock().unwrap().push(operation.clone());
            match operation {
                Operation::SyncFolder(_) => Err(io::Error::other("refused")),
                _ => Ok(()),
            }
        });
        for folder in &folders {
            let file = folder.path().join("a");
            fs::write(&file, "content").unwrap();
            sync_path(&file).unwrap();
        }
        sync_folder(folders[0].path()).unwrap_err();
        drop(watch);
        sync_folder(folders[0].path()).unwrap();
        let file = Operation::SyncFile(folders[0].path().join("a"));
        let folder = Operation::SyncFolder(folders[0].path().to_owned());
        assert_eq!(*seen.lock().unwrap(), [file, folder]);
    }
}
