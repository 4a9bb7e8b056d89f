//! A repository's files in the cache: fetched where they are not there, several at once, all of one commit.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::all_at_once::all_at_once;
use super::cache::RepoCache;
use super::download::Downloads;
use super::failure::Subject;
use super::{Hub, HubError, Listing, RemoteFile, RepoId};
use crate::progress::Progress;

/// Files of a repository on this disk.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub repo: RepoId,
    /// The commit that all files are of.
    pub commit: String,
    /// The folder in which they have their paths.
    pub folder: PathBuf,
    /// Those that were wanted.
    pub files: Vec<RemoteFile>,
    /// The hub's own list of files was not to be had: `files` are those of the cache, and others may be missing.
    pub is_partial: bool,
}

impl Hub {
    /// Brings the wanted files of a revision into the cache.
    pub fn snapshot(
        &self,
        repo: &RepoId,
        revision: &str,
        wanted: &dyn Fn(&str) -> bool,
        progress: &Progress,
    ) -> Result<Snapshot, HubError> {
        let listing = self.listing(repo, revision, progress)?;
        self.fetch(&listing, wanted, progress)
    }

    /// Brings the wanted files of a listing into the cache, and notes the revision's commit there.
    ///
    /// Files that are there cost no request. A wanted file whose name leads elsewhere is an error before anything is
    /// fetched.
    pub fn fetch(
        &self,
        listing: &Listing,
        wanted: &dyn Fn(&str) -> bool,
        progress: &Progress,
    ) -> Result<Snapshot, HubError> {
        let files: Vec<RemoteFile> = listing
            .files
            .iter()
            .filter(|file| wanted(&file.path))
            .cloned()
            .collect();
        for file in &files {
            HubError::check_path(&listing.repo, &file.path)?;
        }
        self.bring(listing, &files, progress)?;
        let cache = self.cache(&listing.repo);
        if !listing.is_partial {
            // A cache that may only be read serves as well.
            if let Err(error) = cache.write_ref(&listing.revision, &listing.commit) {
                tracing::warn!("{}: the revision is not noted: {error}", listing.repo);
            }
        }
        Ok(Snapshot {
            repo: listing.repo.clone(),
            commit: listing.commit.clone(),
            folder: cache.snapshot(&listing.commit),
            files,
            is_partial: listing.is_partial,
        })
    }

    /// Reads one file of at most `limit` bytes, through the cache.
    pub fn read(
        &self,
        listing: &Listing,
        path: &str,
        limit: u64,
        progress: &Progress,
    ) -> Result<Vec<u8>, HubError> {
        HubError::check_path(&listing.repo, path)?;
        let file = listing.files.iter().find(|file| file.path == path);
        let file = file.ok_or_else(|| HubError::EntryNotFound {
            repo: listing.repo.clone(),
            revision: listing.commit.clone(),
            path: path.to_owned(),
        })?;
        if file.size > limit {
            return Err(HubError::Malformed {
                subject: listing.repo.to_string(),
                url: path.to_owned(),
                reason: format!("it has {} bytes, and may have {limit}", file.size),
            });
        }
        self.bring(listing, std::slice::from_ref(file), progress)?;
        let path = self
            .cache(&listing.repo)
            .snapshot(&listing.commit)
            .join(path);
        let bytes = std::fs::read(&path).map_err(HubError::io("read", &path))?;
        Ok(bytes)
    }

    /// Fetches those of the files that are not in the cache.
    fn bring(
        &self,
        listing: &Listing,
        files: &[RemoteFile],
        progress: &Progress,
    ) -> Result<(), HubError> {
        let cache = self.cache(&listing.repo);
        let missing: Vec<&RemoteFile> = files
            .iter()
            .filter(|file| !cache.has(&listing.commit, file))
            .collect();
        let Some(first) = missing.first() else {
            return Ok(());
        };
        let subject = Subject::of(&listing.repo).path(&first.path);
        // Blobs of another commit may still be the files' content.
        let is_fetched = |file: &&RemoteFile| {
            let digest = file.digest.as_ref();
            digest.is_some_and(|digest| cache.has_blob(digest, file.size))
        };
        if !missing.iter().all(is_fetched) {
            let remedy = format!("put the file into {} first", cache.folder().display());
            self.0.check_online(&subject, &remedy)?;
        }
        cache.prepare(&listing.commit)?;
        check_room(&cache, &missing)?;
        // The sizes are the hub's word, and may be too much for a number.
        let total = missing
            .iter()
            .fold(0_u64, |total, file| total.saturating_add(file.size));
        progress.begin("downloading from the hub", total);
        let is_stopped = AtomicBool::new(false);
        let downloads = Downloads {
            client: &self.0,
            cache: &cache,
            listing,
            progress,
            is_stopped: &is_stopped,
        };
        all_at_once(&missing, &is_stopped, |file| downloads.fetch(file))
    }
}

/// Refuses files for which the disk has no room, before any of them is fetched.
fn check_room(cache: &RepoCache, missing: &[&RemoteFile]) -> Result<(), HubError> {
    let needed = missing.iter().filter_map(|file| {
        let digest = file.digest.as_ref()?;
        (!cache.has_blob(digest, file.size))
            .then(|| file.size.saturating_sub(cache.part_bytes(digest)))
    });
    let needed = needed.fold(0_u64, u64::saturating_add);
    let folder = cache.blobs();
    match free_bytes(&folder) {
        Some(free) if needed > free => Err(HubError::NoRoom {
            path: folder,
            needed,
            free,
        }),
        // Where the system cannot say, the write will.
        _ => Ok(()),
    }
}

/// Bytes that this user may still write on the folder's disk; None where the system does not say.
#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the name ends with a NUL, and the structure is read only where the system says that it has filled it.
    let found = unsafe {
        match libc::statvfs(name.as_ptr(), found.as_mut_ptr()) {
            0 => found.assume_init(),
            _ => return None,
        }
    };
    Some((found.f_bavail as u64).saturating_mul(found.f_frsize as u64))
}

#[cfg(not(unix))]
fn free_bytes(_folder: &Path) -> Option<u64> {
    None
}
