//! Files and folders that appear whole or not at all: written under a temporary name in the same folder, made durable,
//! renamed, and the folder made durable. A failed fsync is an error and is never tried again, because the kernel may
//! have dropped the data and would report success the second time.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{FileError, durable};

/// Mark in the names of temporary files, by which what a crashed attempt leaves behind is found.
const TEMPORARY: &str = ".muster-tmp-";
/// Mark in the name of a folder that is being replaced, for the moment between two renames.
const REPLACED: &str = ".muster-old-";

/// Replaces the content of `path`, durably and whole or not at all.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)
        .map_err(FileError::io("write", path))?;
    file.commit()
}

/// A file that takes its name on [`commit`](Self::commit); dropped before that, it is removed.
///
/// Inside an [`AtomicDir`] it becomes durable with that folder, whose name is the one that counts.
pub struct AtomicFile {
    /// The open file; None once committed.
    writer: Option<BufWriter<File>>,
    temporary: PathBuf,
    target: PathBuf,
}

impl AtomicFile {
    pub fn create(target: &Path) -> Result<Self, FileError> {
        let temporary = sibling(target, TEMPORARY)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(FileError::io("create", &temporary))?;
        Ok(Self {
            writer: Some(BufWriter::with_capacity(1 << 20, file)),
            temporary,
            target: target.to_owned(),
        })
    }

    /// [`commit`](Self::commit) under another name in the same folder, which only the content tells.
    pub fn commit_as(mut self, target: &Path) -> Result<(), FileError> {
        self.target = target.to_owned();
        self.commit()
    }

    /// Makes the content durable and gives it its name.
    pub fn commit(mut self) -> Result<(), FileError> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let is_part = is_unnamed(parent(&self.target));
        let result = writer
            .into_inner()
            .map_err(|error| FileError::io("write", &self.target)(error.into_error()))
            .and_then(|file| match is_part {
                true => Ok(()),
                false => durable::sync_file(&file, &self.temporary)
                    .map_err(FileError::io("make durable", &self.target)),
            })
            .and_then(|()| {
                durable::rename(&self.temporary, &self.target)
                    .map_err(FileError::io("write", &self.target))
            });
        if result.is_err() {
            let _ = fs::remove_file(&self.temporary);
        }
        result?;
        match is_part {
            true => Ok(()),
            false => sync_folder(parent(&self.target)),
        }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.writer {
            Some(writer) => writer.write(bytes),
            None => Err(io::Error::other("written after commit")),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// A file for what memory is not to hold, gone with the program: it loses its name at once where the system allows that, else
/// when it is dropped.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    path: PathBuf,
}

impl ScratchFile {
    /// Makes the folder, too, where it is not there.
    pub fn create(folder: &Path) -> Result<Self, FileError> {
        fs::create_dir_all(folder).map_err(FileError::io("create", folder))?;
        let path = sibling(&folder.join("scratch"), TEMPORARY)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(FileError::io("create", &path))?;
        let _ = fs::remove_file(&path);
        Ok(Self { file, path })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// The name that it had or has, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A folder that takes its name on [`commit`](Self::commit), with everything in it; dropped before that, it is removed.
pub struct AtomicDir {
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl AtomicDir {
    pub fn create(target: &Path) -> Result<Self, FileError> {
        fs::create_dir_all(parent(target)).map_err(FileError::io("create", parent(target)))?;
        let temporary = sibling(target, TEMPORARY)?;
        fs::create_dir(&temporary).map_err(FileError::io("create", &temporary))?;
        Ok(Self {
            temporary,
            target: target.to_owned(),
            committed: false,
        })
    }

    /// Temporary folder to write into until the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Makes every file but the one of this name durable, for whoever moves them elsewhere.
    pub fn sync_files(&self, but: &str) -> Result<(), FileError> {
        let (mut files, _) = content(&self.temporary)?;
        files.retain(|path| *path != self.temporary.join(but));
        durable::sync_paths(&files)
    }

    /// Makes the content durable and gives it its name, in place of a folder that had it before.
    pub fn commit(self) -> Result<(), FileError> {
        self.commit_with(None)
    }

    /// [`commit`](Self::commit), but the file `last` in it becomes durable after everything else.
    pub fn commit_with_last(self, last: &str) -> Result<(), FileError> {
        self.commit_with(Some(last))
    }

    fn commit_with(mut self, last: Option<&str>) -> Result<(), FileError> {
        sync_tree(&self.temporary, last)?;
        let replaced = if self.target.exists() {
            let replaced = sibling(&self.target, REPLACED)?;
            durable::rename(&self.target, &replaced)
                .map_err(FileError::io("replace", &self.target))?;
            Some(replaced)
        } else {
            None
        };
        if let Err(error) = durable::rename(&self.temporary, &self.target) {
            if let Some(replaced) = &replaced {
                // Where this fails too, `remove_leftovers` does it later.
                let _ = fs::rename(replaced, &self.target);
            }
            return Err(FileError::io("write", &self.target)(error));
        }
        self.committed = true;
        sync_folder(parent(&self.target))?;
        if let Some(replaced) = replaced {
            fs::remove_dir_all(&replaced).map_err(FileError::io("remove", &replaced))?;
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Removes a folder so that a crash leaves all of it or nothing under its name.
pub fn remove_dir(path: &Path) -> Result<(), FileError> {
    let hidden = sibling(path, TEMPORARY)?;
    durable::rename(path, &hidden).map_err(FileError::io("remove", path))?;
    sync_folder(parent(path))?;
    fs::remove_dir_all(&hidden).map_err(FileError::io("remove", &hidden))
}

/// Removes what crashed attempts left in `folder`, and gives a folder its name back that was being replaced. For the
/// owner of the folder, when nothing is being written into it.
pub fn remove_leftovers(folder: &Path) -> Result<(), FileError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(FileError::io("read", folder))?,
    };
    for entry in entries {
        let path = entry.map_err(FileError::io("read", folder))?.path();
        let Some(name) = path.file_name().and_then(OsStr::to_str) else {
            continue;
        };
        if !name.starts_with('.') {
            continue;
        }
        if let Some((original, _)) = name[1..].split_once(REPLACED) {
            let original = folder.join(original);
            if !original.exists() {
                fs::rename(&path, &original).map_err(FileError::io("restore", &original))?;
                continue;
            }
        } else if !name.contains(TEMPORARY) {
            continue;
        }
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(FileError::io("remove", &path))?;
    }
    Ok(())
}

/// A hidden name beside `target` that no other attempt has.
fn sibling(target: &Path, mark: &str) -> Result<PathBuf, FileError> {
    static ATTEMPT: AtomicU64 = AtomicU64::new(0);
    let name = target
        .file_name()
        .ok_or_else(|| FileError::malformed(target, "not a file name"))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    let attempt = ATTEMPT.fetch_add(1, Ordering::Relaxed);
    hidden.push(format!("{mark}{}-{attempt}", std::process::id()));
    Ok(target.with_file_name(hidden))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> Result<(), FileError> {
    durable::sync_folder(folder).map_err(FileError::io("make durable", folder))
}

/// Whether the folder is inside one that takes its name later.
fn is_unnamed(folder: &Path) -> bool {
    let mut parts = folder
        .components()
        .map(|part| part.as_os_str().to_string_lossy());
    parts.any(|part| part.starts_with('.') && part.contains(TEMPORARY))
}

/// Makes every file durable once, then `last`, then every folder from the innermost outwards.
fn sync_tree(folder: &Path, last: Option<&str>) -> Result<(), FileError> {
    let (mut files, folders) = content(folder)?;
    let last = last.map(|name| folder.join(name));
    files.retain(|path| Some(path) != last.as_ref());
    durable::sync_paths(&files)?;
    if let Some(last) = last {
        durable::sync_path(&last).map_err(FileError::io("make durable", &last))?;
    }
    folders
        .iter()
        .rev()
        .try_for_each(|folder| sync_folder(folder))
}

/// All files below a folder; and all folders, itself first.
fn content(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), FileError> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    let mut next = 0;
    while let Some(folder) = folders.get(next).cloned() {
        for entry in fs::read_dir(&folder).map_err(FileError::io("read", &folder))? {
            let path = entry.map_err(FileError::io("read", &folder))?.path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
        next += 1;
    }
    Ok((files, folders))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        write(&path, b"first").unwrap();
        write(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(folder.path()), ["run.json"]);
    }

    #[test]
    fn an_abandoned_file_or_folder_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(&folder.path().join("a")).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        let dir = AtomicDir::create(&folder.path().join("b")).unwrap();
        fs::write(dir.path().join("x"), "half").unwrap();
        drop(dir);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_folder_replaces_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("checkpoint-1");
        for content in ["first", "second"] {
            let dir = AtomicDir::create(&target).unwrap();
            fs::write(dir.path().join(content), content).unwrap();
            dir.commit().unwrap();
        }
        assert_eq!(names(&target), ["second"]);
        assert_eq!(names(folder.path()), ["checkpoint-1"]);
    }

    #[test]
    fn leftovers_of_a_crash_are_removed_and_a_replaced_folder_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir(path.join(".checkpoint-3.muster-tmp-7-0")).unwrap();
        fs::write(path.join(".run.json.muster-tmp-7-1"), "half").unwrap();
        fs::create_dir(path.join(".checkpoint-2.muster-old-7-2")).unwrap();
        fs::write(path.join(".hidden"), "the user's").unwrap();
        remove_leftovers(path).unwrap();
        assert_eq!(names(path), [".hidden", "checkpoint-2"]);
        remove_leftovers(&path.join("absent")).unwrap();
    }
}
