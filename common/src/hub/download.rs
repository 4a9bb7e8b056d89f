//! One file from the hub into the cache: continued where it broke off, checked by length and digest.
//!
//! In: a file of a listing. Out: its blob in the cache, whole and durable, or an error that leaves no wrong bytes behind. A
//! part that broke off stays as `<digest>.incomplete` for the next time.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use ureq::http::header;

use super::cache::{RepoCache, next_number};
use super::call::Call;
use super::client::{Answer, Client};
use super::digest::Hasher;
use super::failure::{Failure, Subject};
use super::path::encode_path;
use super::retries::Retries;
use super::{Digest, HubError, Listing, RemoteFile, lock};
use crate::files::durable;
use crate::progress::{Cancelled, Progress};

const READ_BYTES: usize = 1 << 20;

/// What the downloads of one snapshot share.
pub(super) struct Downloads<'a> {
    pub client: &'a Client,
    pub cache: &'a RepoCache,
    pub listing: &'a Listing,
    pub progress: &'a Progress,
    /// Another of the downloads has failed: the rest is not wanted any more.
    pub is_stopped: &'a AtomicBool,
}

/// The part of a file that is on this disk.
struct Part {
    path: PathBuf,
    file: File,
    length: u64,
    hasher: Hasher,
    /// How much of it the progress was told.
    counted: u64,
    /// It was begun by an earlier attempt, whose bytes are not known to be right.
    is_continued: bool,
    /// Removed unless another attempt can go on with it.
    is_shared: bool,
}

impl Downloads<'_> {
    /// Brings the file into the cache, and gives it its name in the snapshot.
    pub fn fetch(&self, file: &RemoteFile) -> Result<(), HubError> {
        let Some(digest) = &file.digest else {
            return Err(self.mismatch(file, "digest", "one", "none"));
        };
        if !self.cache.has_blob(digest, file.size) {
            let lock = lock::acquire(
                self.client,
                &self.cache.lock(digest),
                &self.cache.blobs(),
                digest.hex(),
                self.progress,
            )?;
            // Who held the lock before may have fetched it.
            if self.cache.has_blob(digest, file.size) {
                self.progress.advance(file.size);
            } else {
                self.fetch_blob(file, digest, lock.is_exclusive)?;
            }
        } else {
            self.progress.advance(file.size);
        }
        self.cache.link(&self.listing.commit, file, digest)
    }

    fn fetch_blob(
        &self,
        file: &RemoteFile,
        digest: &Digest,
        is_exclusive: bool,
    ) -> Result<(), HubError> {
        let blob = self.cache.blob(digest);
        let path = match is_exclusive {
            true => self.cache.part(digest),
            // Two that wrote the same file would ruin it.
            false => blob.with_file_name(format!(
                "{}.{}-{}.incomplete",
                digest.hex(),
                std::process::id(),
                next_number()
            )),
        };
        let mut part = self.open_part(&path, file, digest, is_exclusive)?;
        let result = self.fill(&mut part, file, digest);
        if let Err(error) = result {
            let is_wrong = matches!(error, HubError::Mismatch { .. });
            if is_wrong || !part.is_shared {
                let _ = fs::remove_file(&part.path);
            }
            return Err(error);
        }
        durable::sync_data(&part.file, &part.path)
            .map_err(HubError::io("make durable", &part.path))?;
        durable::rename(&part.path, &blob).map_err(HubError::io("name", &blob))?;
        durable::sync_folder(&self.cache.blobs()).map_err(HubError::io("make durable", &blob))
    }

    /// Fetches until the part is the whole file, and checks it.
    fn fill(&self, part: &mut Part, file: &RemoteFile, digest: &Digest) -> Result<(), HubError> {
        let mut retries = Retries::default();
        loop {
            let before = part.length;
            if part.length < file.size {
                let attempt = self.attempt(part, file, digest);
                if part.length > before {
                    retries.progressed();
                }
                if let Err(failure) = attempt {
                    self.client.wait(&mut retries, failure, self.progress)?;
                    continue;
                }
            }
            let hasher = std::mem::replace(&mut part.hasher, digest.hasher(file.size));
            let found = hasher.finish();
            if found == digest.hex() {
                return Ok(());
            }
            if !part.is_continued {
                return Err(self.mismatch(file, digest.word(), digest.hex(), &found));
            }
            tracing::warn!(
                "{}: {}: the part of an earlier download was wrong; fetching the whole file",
                self.listing.repo,
                file.path
            );
            part.restart(file, digest)?;
        }
    }

    /// Asks for what is missing, and writes what comes.
    fn attempt(&self, part: &mut Part, file: &RemoteFile, digest: &Digest) -> Result<(), Failure> {
        let call = self.call(file, part.length);
        let mut answer = self.client.exchange(&call, self.progress)?;
        self.check_etag(file, digest, &answer)?;
        if answer.status == 416 {
            part.restart(file, digest)?;
            return Err(self.passing(file, "length", "no bytes after the part"));
        }
        if part.length > 0 && !continues_at(&answer, part.length) {
            part.restart(file, digest)?;
            if answer.status == 206 {
                return Err(self.passing(file, "range", "other bytes than asked for"));
            }
        }
        let mut reader = answer.body.as_reader();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            self.check()?;
            let count = reader.read(&mut buffer).map_err(|error| {
                Failure::of_transport(self.client, &call, &answer.url, error.into())
            })?;
            if count == 0 {
                break;
            }
            if part.length + count as u64 > file.size {
                let found = format!("more than {}", file.size);
                return Err(self
                    .mismatch(file, "length", &file.size.to_string(), &found)
                    .into());
            }
            part.write(&buffer[..count], self.progress)?;
        }
        match part.length == file.size {
            true => Ok(()),
            false => Err(self.passing(file, "length", &part.length.to_string())),
        }
    }

    fn call(&self, file: &RemoteFile, offset: u64) -> Call<'static> {
        let listing = self.listing;
        let subject = Subject::of(&listing.repo)
            .revision(&listing.commit)
            .path(&file.path);
        let url = self.client.url(&format!(
            "{}/resolve/{}/{}",
            listing.canonical.web_path(),
            listing.commit,
            encode_path(&file.path)
        ));
        // Compressed, it would have another length.
        let call = Call::get(url, subject).header("accept-encoding", "identity");
        match offset {
            0 => call,
            offset => call.header("range", format!("bytes={offset}-")),
        }
    }

    /// Refuses a content that the hub itself names otherwise, before gigabytes of it are fetched.
    fn check_etag(
        &self,
        file: &RemoteFile,
        digest: &Digest,
        answer: &Answer,
    ) -> Result<(), HubError> {
        let named = answer.etag.as_deref().and_then(Digest::from_hex);
        match named {
            Some(named) if named != *digest && named.word() == digest.word() => {
                Err(self.mismatch(file, "etag", digest.hex(), named.hex()))
            }
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), Cancelled> {
        self.progress.check()?;
        match self.is_stopped.load(Ordering::Relaxed) {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }

    fn passing(&self, file: &RemoteFile, what: &'static str, found: &str) -> Failure {
        let expected = file.size.to_string();
        Failure::Passing {
            error: Box::new(self.mismatch(file, what, &expected, found)),
            after: None,
        }
    }

    fn mismatch(
        &self,
        file: &RemoteFile,
        what: &'static str,
        expected: &str,
        found: &str,
    ) -> HubError {
        HubError::Mismatch {
            repo: self.listing.repo.clone(),
            path: file.path.clone(),
            what,
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    fn open_part(
        &self,
        path: &Path,
        file: &RemoteFile,
        digest: &Digest,
        is_shared: bool,
    ) -> Result<Part, HubError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW);
        let opened = options.open(path).map_err(HubError::io("open", path))?;
        let length = opened.metadata().map_err(HubError::io("read", path))?.len();
        let mut part = Part {
            path: path.to_owned(),
            file: opened,
            length,
            hasher: digest.hasher(file.size),
            counted: 0,
            is_continued: length > 0,
            is_shared,
        };
        if length > file.size {
            part.restart(file, digest)?;
        }
        part.hasher
            .take(&mut part.file, part.length, self.progress)
            .map_err(HubError::io("read", path))?;
        part.count(self.progress);
        Ok(part)
    }
}

impl Part {
    fn restart(&mut self, file: &RemoteFile, digest: &Digest) -> Result<(), HubError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(HubError::io("write", &self.path))?;
        self.length = 0;
        self.hasher = digest.hasher(file.size);
        self.is_continued = false;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], progress: &Progress) -> Result<(), HubError> {
        self.file
            .write_all(bytes)
            .map_err(HubError::io("write", &self.path))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        self.count(progress);
        Ok(())
    }

    /// Tells the progress of bytes that it was not told of: after a restart they come a second time.
    fn count(&mut self, progress: &Progress) {
        progress.advance(self.length.saturating_sub(self.counted));
        self.counted = self.counted.max(self.length);
    }
}

/// Whether the answer is what follows the part.
fn continues_at(answer: &Answer, offset: u64) -> bool {
    let range = answer.headers.get(header::CONTENT_RANGE);
    let range = range.and_then(|value| value.to_str().ok()).unwrap_or("");
    answer.status == 206 && range.starts_with(&format!("bytes {offset}-"))
}
