//! File entries: files by name, size and digest.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::FileError;
use crate::progress::Progress;

/// Name, size and digest of a file in a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path in the folder: relative, forward slashes, no `..`.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of the content, hex.
    pub digest: String,
}

impl FileEntry {
    /// The entry of `folder/path`. Reads the whole file.
    pub fn of(folder: &Path, path: &str) -> Result<Self, FileError> {
        Self::of_watched(folder, path, &Progress::default())
    }

    /// [`of`](Self::of) with progress: counts the bytes that are read, and stops with an error once `progress` is cancelled.
    pub fn of_watched(folder: &Path, path: &str, progress: &Progress) -> Result<Self, FileError> {
        let full = inside(folder, path)?;
        let size = std::fs::metadata(&full)
            .map_err(FileError::io("read", &full))?
            .len();
        Ok(Self {
            path: path.to_owned(),
            size,
            digest: file_digest_watched(&full, progress)?,
        })
    }

    /// Compares `folder/path` with this entry: first the size, then the digest.
    pub fn verify(&self, folder: &Path) -> Result<(), FileError> {
        let path = inside(folder, &self.path)?;
        let found = std::fs::metadata(&path)
            .map_err(FileError::io("read", &path))?
            .len();
        if found != self.size {
            return Err(FileError::Size {
                path,
                expected: self.size,
                found,
            });
        }
        if file_digest(&path)? != self.digest {
            return Err(FileError::Digest {
                path,
                expected: self.digest.clone(),
            });
        }
        Ok(())
    }
}

/// BLAKE3 of a list of files, in the order given: their names, sizes and digests.
pub fn entries_digest(entries: &[FileEntry]) -> String {
    let mut hasher = blake3::Hasher::new();
    for entry in entries {
        hasher.update(&(entry.path.len() as u64).to_le_bytes());
        hasher.update(entry.path.as_bytes());
        hasher.update(&entry.size.to_le_bytes());
        hasher.update(entry.digest.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// BLAKE3 of a file's content, hex.
pub fn file_digest(path: &Path) -> Result<String, FileError> {
    file_digest_watched(path, &Progress::default())
}

/// [`file_digest`] with progress: counts the bytes that are read, and stops with an error once `progress` is cancelled.
pub fn file_digest_watched(path: &Path, progress: &Progress) -> Result<String, FileError> {
    /// Large enough for all cores to share in hashing it.
    const CHUNK_BYTES: usize = 8 << 20;
    /// Below this, spreading work over threads costs more than it saves.
    const PARALLEL_BYTES: usize = 256 << 10;
    let mut file = File::open(path).map_err(FileError::io("read", path))?;
    let length = file.metadata().map_err(FileError::io("read", path))?.len();
    let mut buffer = vec![0; CHUNK_BYTES.min(length as usize + 1)];
    let mut hasher = blake3::Hasher::new();
    loop {
        let wanted = progress.check();
        wanted.map_err(|cancelled| FileError::io("read", path)(cancelled.into()))?;
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FileError::io("read", path)(error)),
            }
        }
        progress.advance(filled as u64);
        if filled >= PARALLEL_BYTES {
            hasher.update_rayon(&buffer[..filled]);
        } else {
            hasher.update(&buffer[..filled]);
        }
        if filled < buffer.len() {
            return Ok(hasher.finalize().to_hex().to_string());
        }
    }
}

/// `folder/path`, where `path` comes from a file or a peer: refused unless it is relative, plain and stays inside.
pub fn inside(folder: &Path, path: &str) -> Result<PathBuf, FileError> {
    let plain = !path.is_empty()
        && path.len() <= 4096
        && !path.contains(['\\', '\0'])
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    if plain {
        Ok(folder.join(path))
    } else {
        let reason = format!("the file name {path:?} leads out of the folder");
        Err(FileError::malformed(folder, reason))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_blake3_whatever_the_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for length in [0usize, 1, 300 << 10, 8 << 20, (8 << 20) + 1] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let expected = blake3::hash(&bytes).to_hex().to_string();
            assert_eq!(file_digest(&path).unwrap(), expected, "{length} bytes");
        }
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        let folder = Path::new("/data");
        for path in [
            "",
            "..",
            "../x",
            "a/../b",
            "/etc/passwd",
            "a//b",
            "./a",
            "a\\b",
            "a/",
        ] {
            assert!(inside(folder, path).is_err(), "{path:?}");
        }
        assert_eq!(inside(folder, "a/b").unwrap(), Path::new("/data/a/b"));
    }

    #[test]
    fn a_changed_file_does_not_verify() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), "content").unwrap();
        let entry = FileEntry::of(folder.path(), "a").unwrap();
        entry.verify(folder.path()).unwrap();
        std::fs::write(folder.path().join("a"), "Content").unwrap();
        let error = entry.verify(folder.path()).unwrap_err();
        assert!(matches!(error, FileError::Digest { .. }), "{error}");
        std::fs::write(folder.path().join("a"), "conten").unwrap();
        let error = entry.verify(folder.path()).unwrap_err();
        assert!(matches!(error, FileError::Size { .. }), "{error}");
    }
}
