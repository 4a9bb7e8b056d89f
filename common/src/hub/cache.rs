//! The folder of the hub's files on this machine, in the layout that Python's `huggingface_hub` has, shared with it.
//!
//! For each repository: `refs/<revision>` with a commit, `blobs/<digest>`, `snapshots/<commit>/<path>` as a relative link to
//! a blob, and `trees/<commit>.json` with the listing. What is read here was written by anyone: it is checked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::id::{Revision, is_commit};
use super::{Digest, HubError, RemoteFile, RepoId, path};
use crate::files::{FileError, atomic};

/// Version of the listings' format.
const TREE_FORMAT_VERSION: u32 = 1;
const MAX_TREE_BYTES: u64 = 256 << 20;
const MAX_REF_BYTES: u64 = 256;
const MAX_SNAPSHOT_FILES: usize = 500_000;
const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache: backups may leave it out.\n";

/// The part of the cache that is one repository's.
pub(super) struct RepoCache {
    root: PathBuf,
    folder: PathBuf,
    locks: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Tree {
    format_version: u32,
    files: BTreeMap<String, TreeFile>,
}

#[derive(Serialize, Deserialize)]
struct TreeFile {
    size: u64,
    blob_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    xet_hash: Option<String>,
}

impl RepoCache {
    pub fn new(root: &Path, repo: &RepoId) -> Self {
        let name = repo.folder_name();
        Self {
            root: root.to_owned(),
            folder: root.join(&name),
            locks: root.join(".locks").join(&name),
        }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// What has come of a content that is not whole yet.
    pub fn part(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(format!("{}.incomplete", digest.hex()))
    }

    pub fn part_bytes(&self, digest: &Digest) -> u64 {
        let found = self.part(digest).metadata();
        found.map_or(0, |found| found.len())
    }

    pub fn lock(&self, digest: &Digest) -> PathBuf {
        self.locks.join(format!("{}.lock", digest.hex()))
    }

    /// Makes the folders that a download into the commit's snapshot needs.
    pub fn prepare(&self, commit: &str) -> Result<(), HubError> {
        for folder in [&self.blobs(), &self.locks, &self.snapshot(commit)] {
            fs::create_dir_all(folder).map_err(HubError::io("create", folder))?;
        }
        let tag = self.root.join("CACHEDIR.TAG");
        if !tag.exists() {
            // Only a word to backups.
            let _ = fs::write(tag, TAG);
        }
        Ok(())
    }

    /// Whether the file is in the commit's snapshot, whole by its length.
    pub fn has(&self, commit: &str, file: &RemoteFile) -> bool {
        path::fault(&file.path).is_none()
            && is_whole(&self.snapshot(commit).join(&file.path), file.size)
    }

    /// Whether the content is there, whole by its length.
    pub fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        is_whole(&self.blob(digest), size)
    }

    /// The commit that the revision last was, here.
    pub fn read_ref(&self, revision: &Revision) -> Option<String> {
        if let Some(commit) = revision.commit() {
            return Some(commit.to_owned());
        }
        let path = self.folder.join("refs").join(revision.as_str());
        let text = read_bounded(&path, MAX_REF_BYTES).ok()??;
        let text = String::from_utf8(text).ok()?;
        let commit = text.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    /// Notes which commit the revision is.
    pub fn write_ref(&self, revision: &Revision, commit: &str) -> Result<(), HubError> {
        if self.read_ref(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision.as_str());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
        }
        Ok(atomic::write(&path, commit.as_bytes())?)
    }

    /// The files of a commit, where they were listed before. A listing that cannot be used counts as none.
    pub fn read_tree(&self, commit: &str) -> Option<Vec<RemoteFile>> {
        let path = self.tree_path(commit);
        let bytes = match read_bounded(&path, MAX_TREE_BYTES) {
            Ok(bytes) => bytes?,
            Err(error) => {
                tracing::warn!("{error}; the hub is asked for the list of files instead");
                return None;
            }
        };
        let tree: Tree = serde_json::from_slice(&bytes).ok()?;
        if tree.format_version != TREE_FORMAT_VERSION {
            return None;
        }
        let files = tree.files.into_iter();
        files
            .map(|(path, file)| {
                let digest = Digest::from_hex(file.lfs_sha256.as_ref().unwrap_or(&file.blob_id))?;
                Some(RemoteFile {
                    path,
                    size: file.lfs_size.unwrap_or(file.size),
                    digest: Some(digest),
                    git_id: file.blob_id,
                    xet_hash: file.xet_hash,
                })
            })
            .collect()
    }

    /// Keeps the list of the commit's files, as Python does: a commit never changes.
    pub fn write_tree(&self, commit: &str, files: &[RemoteFile]) -> Result<(), HubError> {
        let files = files.iter().map(|file| {
            let sha256 = match &file.digest {
                Some(Digest::Sha256(hex)) => Some(hex.clone()),
                _ => None,
            };
            let tree_file = TreeFile {
                size: file.size,
                blob_id: file.git_id.clone(),
                lfs_size: sha256.is_some().then_some(file.size),
                lfs_sha256: sha256,
                xet_hash: file.xet_hash.clone(),
            };
            (file.path.clone(), tree_file)
        });
        let tree = Tree {
            format_version: TREE_FORMAT_VERSION,
            files: files.collect(),
        };
        let path = self.tree_path(commit);
        let folder = self.folder.join("trees");
        fs::create_dir_all(&folder).map_err(HubError::io("create", &folder))?;
        let bytes = serde_json::to_vec_pretty(&tree)
            .map_err(|error| HubError::io("write", &path)(error.into()))?;
        Ok(atomic::write(&path, &bytes)?)
    }

    /// The files that are in the commit's snapshot, where no list of them was kept.
    pub fn walk(&self, commit: &str) -> Result<Vec<RemoteFile>, HubError> {
        let (mut files, mut folders) = (Vec::new(), vec![String::new()]);
        let root = self.snapshot(commit);
        while let Some(prefix) = folders.pop() {
            let folder = root.join(&prefix);
            let entries = match fs::read_dir(&folder) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                entries => entries.map_err(HubError::io("read", &folder))?,
            };
            for entry in entries {
                let entry = entry.map_err(HubError::io("read", &folder))?;
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                let path = match prefix.as_str() {
                    "" => name,
                    prefix => format!("{prefix}/{name}"),
                };
                let kind = entry.file_type().map_err(HubError::io("read", &folder))?;
                if kind.is_dir() {
                    folders.push(path);
                } else if let Some(file) = found_file(&entry.path(), path) {
                    files.push(file);
                }
                if files.len() + folders.len() > MAX_SNAPSHOT_FILES {
                    return Err(FileError::malformed(&root, "it has too many files").into());
                }
            }
        }
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(files)
    }

    /// Gives the content its name in the commit's snapshot.
    pub fn link(&self, commit: &str, file: &RemoteFile, digest: &Digest) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(&file.path);
        if let Some(parent) = pointer.parent() {
            fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
        }
        let depth = file.path.matches('/').count();
        let target = format!("{}blobs/{}", "../".repeat(depth + 2), digest.hex());
        // Under another name first: whoever looks finds the file at all times.
        let temporary = pointer.with_file_name(format!(
            ".{}.muster-tmp-{}-{}",
            digest.hex(),
            std::process::id(),
            next_number()
        ));
        let made = make_link(&target, &self.blob(digest), &temporary);
        made.and_then(|()| fs::rename(&temporary, &pointer))
            .map_err(|error| {
                let _ = fs::remove_file(&temporary);
                HubError::io("link", &pointer)(error)
            })
    }

    fn tree_path(&self, commit: &str) -> PathBuf {
        self.folder.join("trees").join(format!("{commit}.json"))
    }
}

/// A number that no other thread of this process has.
pub(super) fn next_number() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

fn is_whole(path: &Path, size: u64) -> bool {
    path.metadata()
        .is_ok_and(|found| found.is_file() && found.len() == size)
}

/// A file in a snapshot; its digest is the name of the blob that it links to.
fn found_file(entry: &Path, path: String) -> Option<RemoteFile> {
    let found = entry.metadata().ok().filter(|found| found.is_file())?;
    let target = fs::read_link(entry).ok();
    let digest = target
        .as_deref()
        .and_then(Path::file_name)
        .and_then(|name| Digest::from_hex(name.to_str()?));
    Some(RemoteFile {
        path,
        size: found.len(),
        digest,
        git_id: String::new(),
        xet_hash: None,
    })
}

#[cfg(unix)]
fn make_link(target: &str, _blob: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn make_link(_target: &str, blob: &Path, link: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, link).or_else(|_| fs::copy(blob, link).map(drop))
}

/// The content of a file of at most `limit` bytes; None where there is none.
fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, HubError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(HubError::io("read", path))?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(HubError::io("read", path))?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}
