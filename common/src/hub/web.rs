//! A file at a web address, kept in the hub's cache by its address and version.
//!
//! In: an `http` or `https` address. Out: a whole file on this disk, and which version it is: what the server calls it by
//! (ETag, else the time of its last change). A download that breaks off goes on where it broke, as long as the version is the
//! same. The token is shown to the hub alone, as in every call.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use ureq::http::{HeaderMap, header};

use super::call::{Call, without_query};
use super::client::Answer;
use super::failure::{Failure, Subject};
use super::retries::Retries;
use super::{Hub, HubError, lock};
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
/// Largest file.
const MAX_FILE_BYTES: u64 = 1 << 42;
const READ_BYTES: usize = 1 << 20;

/// A file from the web, on this disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebFile {
    pub path: PathBuf,
    /// What tells this version of it from others.
    pub version: String,
    /// Whether the server could not be asked, and an earlier version is used.
    pub is_stale: bool,
}

/// What is being fetched.
struct Download<'a> {
    hub: &'a Hub,
    url: &'a str,
    /// Folder of all versions of the file.
    folder: PathBuf,
    name: String,
    progress: &'a Progress,
}

/// What a server says of a file.
struct Version {
    /// Digest of what it calls this version. None where it has no word for it, so that the next answer may be of another one.
    digest: Option<String>,
}

impl Hub {
    /// Fetches a file, unless its version is in the cache; one that is `pinned` is taken from there without a question.
    pub fn fetch_url(
        &self,
        url: &str,
        pinned: Option<&str>,
        progress: &Progress,
    ) -> Result<WebFile, HubError> {
        let cache = self.environment().cache();
        let download = Download {
            hub: self,
            url,
            folder: cache.join(FOLDER).join(short_digest(url)),
            name: file_name(url),
            progress,
        };
        if let Some(known) = pinned.and_then(|version| download.kept(version)) {
            return Ok(known);
        }
        let subject = subject(url);
        if let Err(offline) = self.0.check_online(&subject, "name a file on this machine") {
            return download.newest().ok_or(offline);
        }
        match download.run() {
            Err(error) if error.is_unreachable() => download.newest().ok_or(error),
            other => other,
        }
    }
}

impl Download<'_> {
    fn run(&self) -> Result<WebFile, HubError> {
        fs::create_dir_all(&self.folder).map_err(HubError::io("create", &self.folder))?;
        let client = &self.hub.0;
        let lock = lock::acquire(
            client,
            &self.folder.join("lock"),
            &self.folder,
            // Whatever is in the folder shows that its holder is at work.
            "",
            self.progress,
        )?;
        // Two that wrote the same file would ruin it.
        let own = match lock.is_exclusive {
            true => String::new(),
            false => format!("-{}", std::process::id()),
        };
        let mut known = self.begun(&own);
        let mut retries = Retries::default();
        loop {
            self.progress.check()?;
            let length = |known: &Option<String>| {
                let part = known.as_ref().map(|known| self.part(known, &own));
                part.map_or(0, |part| length_of(&part))
            };
            let before = length(&known);
            match self.attempt(&mut known, &own) {
                Ok(file) => return Ok(file),
                Err(failure) => {
                    if length(&known) > before {
                        retries.progressed();
                    }
                    client.wait(&mut retries, failure, self.progress)?;
                }
            }
        }
    }

    /// Where a version grows until it is whole.
    fn part(&self, version: &str, own: &str) -> PathBuf {
        self.folder.join(format!("{version}{own}{PART}"))
    }

    /// The version that an earlier run began to fetch.
    fn begun(&self, own: &str) -> Option<String> {
        let entries = fs::read_dir(&self.folder).ok()?.flatten();
        let end = format!("{own}{PART}");
        let versions = entries.filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_suffix(&end).map(str::to_owned)
        });
        versions.into_iter().find(|version| is_digest(version))
    }

    /// Asks for what is missing of the version that is `known`, and writes what comes.
    fn attempt(&self, known: &mut Option<String>, own: &str) -> Result<WebFile, Failure> {
        let begun = known.as_ref().map(|known| self.part(known, own));
        let offset = begun.as_deref().map_or(0, length_of);
        // Compressed on the way, it would have another length.
        let call =
            Call::get(self.url.to_owned(), subject(self.url)).header("accept-encoding", "identity");
        let call = match offset {
            0 => call,
            offset => call.header("range", format!("bytes={offset}-")),
        };
        let mut answer = self.hub.0.exchange(&call, self.progress)?;
        let version = Version::of(&answer.headers);
        let is_same = *known == version.digest;
        let goes_on = offset > 0 && is_same && continues_at(&answer, offset);
        if let (false, Some(begun)) = (goes_on, begun) {
            let _ = fs::remove_file(begun);
            *known = None;
            if offset > 0 && answer.status != 200 {
                return Err(self.passing("the rest of it is of another version"));
            }
        }
        let kept = version.digest.as_deref().and_then(|it| self.kept(it));
        if let Some(kept) = kept {
            return Ok(kept);
        }
        let offset = if goes_on { offset } else { 0 };
        let left = length(&answer.headers);
        if offset == 0 {
            self.progress
                .begin("downloading the data", left.unwrap_or(0));
        }
        known.clone_from(&version.digest);
        let part = self.part(version.digest.as_deref().unwrap_or("unnamed"), own);
        if !goes_on {
            truncate(&part)?;
        }
        let total = left.map(|left| left.saturating_add(offset));
        self.write(&part, &call, &mut answer, total)?;
        let written = length_of(&part);
        if total.is_some_and(|total| total != written) {
            return Err(self.passing(&format!(
                "it ends after {written} of {} bytes",
                total.unwrap_or_default()
            )));
        }
        // What has no version of its own is known by its content.
        let digest = match version.digest {
            Some(digest) => digest,
            None => content_digest(&part)?,
        };
        Ok(self.keep(&part, &digest)?)
    }

    fn write(
        &self,
        part: &Path,
        call: &Call,
        answer: &mut Answer,
        total: Option<u64>,
    ) -> Result<(), Failure> {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(part)
            .map_err(HubError::io("write", part))?;
        let most = total.unwrap_or(MAX_FILE_BYTES).min(MAX_FILE_BYTES);
        let mut written = length_of(part);
        let url = answer.url.clone();
        let mut reader = answer.body.as_reader();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            self.progress.check()?;
            let count = reader
                .read(&mut buffer)
                .map_err(|error| Failure::of_transport(&self.hub.0, call, &url, error.into()))?;
            if count == 0 {
                return Ok(());
            }
            written += count as u64;
            if written > most {
                return Err(Failure::Final(
                    self.malformed(&format!("it has more than {most} bytes")),
                ));
            }
            file.write_all(&buffer[..count])
                .map_err(HubError::io("write", part))?;
            self.progress.advance(count as u64);
        }
    }

    /// Gives the part its place among the versions, durably.
    fn keep(&self, part: &Path, digest: &str) -> Result<WebFile, HubError> {
        let folder = self.folder.join(digest);
        let path = folder.join(&self.name);
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

    /// The version of this digest, where it is in the cache.
    fn kept(&self, digest: &str) -> Option<WebFile> {
        let path = self.folder.join(digest).join(&self.name);
        (is_digest(digest) && path.is_file()).then(|| WebFile {
            path,
            version: digest.to_owned(),
            is_stale: false,
        })
    }

    /// The version that was fetched last.
    fn newest(&self) -> Option<WebFile> {
        let entries = fs::read_dir(&self.folder).ok()?.flatten();
        let versions = entries.filter_map(|entry| self.kept(entry.file_name().to_str()?));
        let time = |file: &WebFile| file.path.metadata().and_then(|it| it.modified()).ok();
        let newest = versions.max_by_key(time)?;
        Some(WebFile {
            is_stale: true,
            ..newest
        })
    }

    fn malformed(&self, reason: &str) -> HubError {
        HubError::Malformed {
            subject: subject(self.url).to_string(),
            url: without_query(self.url),
            reason: reason.to_owned(),
        }
    }

    fn passing(&self, reason: &str) -> Failure {
        Failure::Passing {
            error: Box::new(self.malformed(reason)),
            after: None,
        }
    }
}

impl Version {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let tag = text(header::ETAG).or_else(|| text(header::LAST_MODIFIED));
        Self {
            digest: tag.map(short_digest),
        }
    }
}

fn subject(url: &str) -> Subject {
    Subject::default().path(&without_query(url))
}

fn short_digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..NAME_DIGITS].to_owned()
}

fn content_digest(path: &Path) -> Result<String, HubError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(HubError::io("read", path))?;
    hasher
        .update_reader(file)
        .map_err(HubError::io("read", path))?;
    Ok(hasher.finalize().to_hex()[..NAME_DIGITS].to_owned())
}

/// The last part of an address as a name of a file: it may say what the file holds.
fn file_name(url: &str) -> String {
    let address = url.split(['?', '#']).next().unwrap_or_default();
    let last = address.rsplit('/').next().unwrap_or_default();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let plain = |c: char| if is_plain(c) { c } else { '_' };
    let name: String = last.chars().map(plain).collect();
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

fn length_of(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn truncate(path: &Path) -> Result<(), HubError> {
    File::create(path)
        .map(drop)
        .map_err(HubError::io("write", path))
}

/// Whether the answer is what follows so many bytes.
fn continues_at(answer: &Answer, offset: u64) -> bool {
    let range = answer.headers.get(header::CONTENT_RANGE);
    let range = range.and_then(|value| value.to_str().ok()).unwrap_or("");
    answer.status == 206 && range.starts_with(&format!("bytes {offset}-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_called_as_its_address_ends_and_never_leaves_its_folder() {
        for (url, name) in [
            (
                "https://host/a/train.jsonl.gz?download=true",
                "train.jsonl.gz",
            ),
            ("https://host/a/b c%2F..csv#x", "b_c_2F..csv"),
            ("https://host/", "data"),
            ("https://host/a/..", "data"),
        ] {
            assert_eq!(file_name(url), name, "{url}");
        }
        let long = format!("https://host/{}.jsonl", "x".repeat(300));
        assert!(file_name(&long).len() == MAX_NAME_BYTES && file_name(&long).ends_with(".jsonl"));
    }
}
