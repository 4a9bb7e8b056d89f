//! Watches how files become durable below a folder, and finds what a power cut could tear.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::files::checkpoint::MANIFEST;
use common::files::durable::{Operation, Watch, watch};
use common::files::file_digest;

/// What is known to be on disk, and what went wrong.
#[derive(Default)]
struct Disk {
    /// Content of durable files by digest.
    files: BTreeMap<PathBuf, String>,
    /// Names in a folder when it was last made durable.
    folders: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
    /// Folders with a new name that is not durable yet.
    unsynced: BTreeSet<PathBuf>,
    operations: Vec<Operation>,
    faults: Vec<String>,
    /// The operation that fails.
    fails_at: Option<usize>,
}

/// A folder whose disk is watched.
pub struct Witness {
    disk: Arc<Mutex<Disk>>,
    _watch: Watch,
}

impl Witness {
    /// The operation of number `fails_at` fails; none does without.
    pub fn of(folder: &Path, fails_at: Option<usize>) -> Self {
        let disk = Arc::new(Mutex::new(Disk {
            fails_at,
            ..Disk::default()
        }));
        let seen = disk.clone();
        let watch = watch(folder, move |operation| seen.lock().unwrap().see(operation));
        Self {
            disk,
            _watch: watch,
        }
    }

    pub fn operations(&self) -> Vec<Operation> {
        self.disk.lock().unwrap().operations.clone()
    }

    /// Everything was durable before it got a name that counts, and so are the names.
    pub fn check(&self) {
        let disk = self.disk.lock().unwrap();
        let log = &disk.operations;
        assert!(disk.faults.is_empty(), "{:#?}\n{log:#?}", disk.faults);
        assert!(
            disk.unsynced.is_empty(),
            "names not durable: {:?}\n{log:#?}",
            disk.unsynced
        );
    }
}

impl Disk {
    fn see(&mut self, operation: &Operation) -> io::Result<()> {
        self.operations.push(operation.clone());
        if self.fails_at == Some(self.operations.len() - 1) {
            return Err(io::Error::other("the disk failed"));
        }
        match operation {
            Operation::SyncFile(path) => {
                if name(path) == MANIFEST {
                    self.expect_durable_beside(path);
                }
                self.files.insert(path.clone(), file_digest(path).unwrap());
            }
            Operation::SyncFolder(path) => {
                self.unsynced.remove(path);
                self.folders.insert(path.clone(), names(path));
            }
            Operation::Rename { from, to } => self.rename(from, to),
        }
        Ok(())
    }

    fn rename(&mut self, from: &Path, to: &Path) {
        // What is on its way out, or hidden, counts for nothing.
        if !name(to).starts_with('.') && !is_unnamed(parent(to)) {
            match from.is_dir() {
                true => self.expect_durable_folder(from),
                false => self.expect_durable_file(from),
            }
        }
        let moved = |path: &PathBuf| match path.strip_prefix(from) {
            Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
            Ok(rest) => to.join(rest),
            Err(_) => path.clone(),
        };
        let files = std::mem::take(&mut self.files).into_iter();
        self.files = files.map(|(path, digest)| (moved(&path), digest)).collect();
        if !is_unnamed(parent(to)) {
            self.unsynced.insert(parent(to).to_owned());
        }
    }

    /// The manifest vouches for the others.
    fn expect_durable_beside(&mut self, manifest: &Path) {
        let others = names(parent(manifest));
        for path in others.iter().filter(|path| *path != manifest) {
            self.expect_durable_file(path);
        }
    }

    fn expect_durable_file(&mut self, path: &Path) {
        if self.files.get(path) != Some(&file_digest(path).unwrap()) {
            self.faults
                .push(format!("{} is named before it is durable", path.display()));
        }
    }

    fn expect_durable_folder(&mut self, path: &Path) {
        let inside = names(path);
        if self.folders.get(path) != Some(&inside) {
            self.faults.push(format!(
                "{} is named before its names are durable",
                path.display()
            ));
        }
        for path in inside {
            match path.is_dir() {
                true => self.expect_durable_folder(&path),
                false => self.expect_durable_file(&path),
            }
        }
    }
}

fn names(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// It becomes durable before it takes its name, and all that is in it does.
fn is_unnamed(folder: &Path) -> bool {
    name(folder).contains(".muster-tmp-")
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap()
}
