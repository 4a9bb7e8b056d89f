//! The versions of a file from outside the hub, kept in the hub's cache by its address and what tells each from the others.
//!
//! In: an address, and a digest of a version. Out: its place, whole and durable, or the place where it grows until then. Nothing
//! here asks the network.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::lock::{self, BlobLock};
use super::{Hub, HubError};
use crate::files::durable;
use crate::progress::Progress;

/// Folder of the cache with what is on no hub.
const FOLDER: &str = "muster-urls";
/// End of the name of a file that is not whole.
const PART: &str = ".incomplete";
/// Characters of a digest in the name of a folder.
const NAME_DIGITS: usize = 32;
/// Longest name of a file.
const MAX_NAME_BYTES: usize = 100;

/// A file from the web or an object store, on this disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebFile {
    pub path: PathBuf,
    /// What tells this version of it from others.
    pub version: String,
    /// Whether the server could not be asked, and an earlier version is used.
    pub is_stale: bool,
}

/// All versions of one file in the cache.
pub struct Versions {
    folder: PathBuf,
    name: String,
}

/// The right to fetch versions of a file, until it is dropped.
pub struct Fetching<'a> {
    versions: &'a Versions,
    lock: BlobLock,
}

impl Hub {
    /// The versions of the file at an address; its name says what it holds.
    pub fn versions(&self, address: &str, name: &str) -> Versions {
        let cache = self.environment().cache();
        Versions {
            folder: cache.join(FOLDER).join(version_digest(address)),
            name: plain_name(name),
        }
    }
}

impl Versions {
    /// Waits until nobody else fetches the file, as long as that comes along.
    pub fn begin(&self, hub: &Hub, progress: &Progress) -> Result<Fetching<'_>, HubError> {
        fs::create_dir_all(&self.folder).map_err(HubError::io("create", &self.folder))?;
        let lock = lock::acquire(
            &hub.0,
            &self.folder.join("lock"),
            &self.folder,
            // Whatever is in the folder shows that its holder is at work.
            "",
            progress,
        )?;
        let versions = self;
        Ok(Fetching { versions, lock })
    }

    /// The version of this digest, where it is in the cache.
    pub fn kept(&self, digest: &str) -> Option<WebFile> {
        let path = self.folder.join(digest).join(&self.name);
        (is_digest(digest) && path.is_file()).then(|| WebFile {
            path,
            version: digest.to_owned(),
            is_stale: false,
        })
    }

    /// The version that was fetched last.
    pub fn newest(&self) -> Option<WebFile> {
        let entries = fs::read_dir(&self.folder).ok()?.flatten();
        let versions = entries.filter_map(|entry| self.kept(entry.file_name().to_str()?));
        let time = |file: &WebFile| file.path.metadata().and_then(|it| it.modified()).ok();
        let newest = versions.max_by_key(time)?;
        Some(WebFile {
            is_stale: true,
            ..newest
        })
    }
}

impl Fetching<'_> {
    /// Where a version grows until it is whole.
    pub fn part(&self, version: &str) -> PathBuf {
        let own = self.own();
        self.versions.folder.join(format!("{version}{own}{PART}"))
    }

    /// The version that an earlier run began to fetch.
    pub fn begun(&self) -> Option<String> {
        let entries = fs::read_dir(&self.versions.folder).ok()?.flatten();
        let end = format!("{}{PART}", self.own());
        let versions = entries.filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_suffix(&end).map(str::to_owned)
        });
        versions.into_iter().find(|version| is_digest(version))
    }

    /// Gives a part that is whole its place among the versions, durably.
    pub fn keep(&self, part: &Path, digest: &str) -> Result<WebFile, HubError> {
        let folder = self.versions.folder.join(digest);
        let path = folder.join(&self.versions.name);
        fs::create_dir_all(&folder).map_err(HubError::io("create", &folder))?;
        let file = File::open(part).map_err(HubError::io("read", part))?;
        durable::sync_data(&file, part).map_err(HubError::io("make durable", part))?;
        durable::rename(part, &path).map_err(HubError::io("name", &path))?;
        durable::sync_folder(&folder).map_err(HubError::io("make durable", &folder))?;
        Ok(WebFile {
            path,
            version: digest.to_owned(),
            is_stale: false,
        })
    }

    /// What tells our parts from others': two that wrote the same file would ruin it.
    fn own(&self) -> String {
        match self.lock.is_exclusive {
            true => String::new(),
            false => format!("-{}", std::process::id()),
        }
    }
}

/// The digest of what a server calls a version by.
pub fn version_digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..NAME_DIGITS].to_owned()
}

/// The digest of a file's content, for versions that have no name.
pub(super) fn content_digest(path: &Path) -> Result<String, HubError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(HubError::io("read", path))?;
    hasher
        .update_reader(file)
        .map_err(HubError::io("read", path))?;
    Ok(hasher.finalize().to_hex()[..NAME_DIGITS].to_owned())
}

/// A name that any disk takes, and that leads nowhere else.
pub(super) fn plain_name(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let plain = |c: char| if is_plain(c) { c } else { '_' };
    let name: String = name.chars().map(plain).collect();
    // The end says what it holds.
    let name = &name[name.len().saturating_sub(MAX_NAME_BYTES)..];
    match name.trim_start_matches('.') {
        "" => "data".to_owned(),
        name => name.to_owned(),
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == NAME_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
