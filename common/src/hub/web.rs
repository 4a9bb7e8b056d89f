//! A file at a web address, kept in the hub's cache by its address and version.
//!
//! In: an `http` or `https` address. Out: a whole file on this disk, and which version it is: what the server calls it by
//! (ETag, else the time of its last change). A download that breaks off goes on where it broke, as long as the version is the
//! same. The token is shown to the hub alone, as in every call.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

use ureq::http::{HeaderMap, header};

use super::call::{Call, without_query};
use super::client::Answer;
use super::failure::{Failure, Subject};
use super::retries::Retries;
use super::versions::{Fetching, Versions, content_digest, version_digest};
use super::{Hub, HubError, WebFile};
use crate::progress::Progress;

/// Largest file.
const MAX_FILE_BYTES: u64 = 1 << 42;
const READ_BYTES: usize = 1 << 20;

/// What is being fetched.
struct Download<'a> {
    hub: &'a Hub,
    url: &'a str,
    versions: Versions,
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
        let download = Download {
            hub: self,
            url,
            versions: self.versions(url, last_part(url)),
            progress,
        };
        let versions = &download.versions;
        if let Some(known) = pinned.and_then(|version| versions.kept(version)) {
            return Ok(known);
        }
        if let Err(offline) = self.check_online_for(url) {
            return versions.newest().ok_or(offline);
        }
        match download.run() {
            Err(error) if error.is_unreachable() => versions.newest().ok_or(error),
            other => other,
        }
    }

    /// Refuses where the environment forbids to fetch the file at an address.
    pub fn check_online_for(&self, url: &str) -> Result<(), HubError> {
        let remedy = "name a file on this machine";
        self.0.check_online(&subject(url), remedy)
    }
}

impl Download<'_> {
    fn run(&self) -> Result<WebFile, HubError> {
        let fetching = self.versions.begin(self.hub, self.progress)?;
        let mut known = fetching.begun();
        let mut retries = Retries::default();
        loop {
            self.progress.check()?;
            let length = |known: &Option<String>| {
                let part = known.as_ref().map(|known| fetching.part(known));
                part.map_or(0, |part| length_of(&part))
            };
            let before = length(&known);
            match self.attempt(&mut known, &fetching) {
                Ok(file) => return Ok(file),
                Err(failure) => {
                    if length(&known) > before {
                        retries.progressed();
                    }
                    self.hub.0.wait(&mut retries, failure, self.progress)?;
                }
            }
        }
    }

    /// Asks for what is missing of the version that is `known`, and writes what comes.
    fn attempt(
        &self,
        known: &mut Option<String>,
        fetching: &Fetching<'_>,
    ) -> Result<WebFile, Failure> {
        let begun = known.as_ref().map(|known| fetching.part(known));
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
        let kept = version
            .digest
            .as_deref()
            .and_then(|it| self.versions.kept(it));
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
        let part = fetching.part(version.digest.as_deref().unwrap_or("unnamed"));
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
        Ok(fetching.keep(&part, &digest)?)
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
            digest: tag.map(version_digest),
        }
    }
}

fn subject(url: &str) -> Subject {
    Subject::default().path(&without_query(url))
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

/// The last part of an address, which may say what the file holds.
fn last_part(url: &str) -> &str {
    let address = url.split(['?', '#']).next().unwrap_or_default();
    address.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::versions::plain_name;
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
            assert_eq!(plain_name(last_part(url)), name, "{url}");
        }
        let long = format!("https://host/{}.jsonl", "x".repeat(300));
        let name = plain_name(last_part(&long));
        assert!(name.len() == 100 && name.ends_with(".jsonl"), "{name}");
    }
}
