//! Files from this machine into a repository, in one commit.
//!
//! In: a repository, a branch and files. Out: the commit. Files that the hub wants in git go into the commit itself, large
//! ones into its file storage before; what the hub has already is not sent. A failure before the commit leaves the
//! repository as it was.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;
use ureq::http::{HeaderMap, Method};

use super::call::{Call, Payload};
use super::digest::{file_sha256, git_hex, sha256_hex};
use super::failure::{Failure, Subject};
use super::id::Revision;
use super::lfs::{self, Object};
use super::listing::resolve;
use super::path::encode_part;
use super::repository::json_call;
use super::retries::Retries;
use super::{Hub, HubError, RepoId};
use crate::progress::Progress;

const SAMPLE_BYTES: u64 = 512;
/// Files that the hub is asked about in one call.
const FILES_PER_CALL: usize = 256;
const MAX_FILES: usize = 10_000;
/// Most bytes that go into the commit itself.
const MAX_INLINE_BYTES: u64 = 256 << 20;
/// Most time that the hub may take for a commit.
const COMMIT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(300);

/// A file for a repository.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Path in the repository, with slashes.
    pub path_in_repo: String,
    pub source: Source,
}

/// Where the content of a file is.
#[derive(Clone, Debug)]
pub enum Source {
    File(PathBuf),
    Bytes(Vec<u8>),
}

/// A commit on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitInfo {
    pub commit: String,
    /// Its page.
    pub url: String,
    /// False where the repository had all files already, so that this is the branch's last commit.
    pub is_new: bool,
}

#[derive(Deserialize)]
struct Modes {
    files: Vec<Mode>,
}

#[derive(Deserialize)]
struct Mode {
    path: String,
    #[serde(rename = "uploadMode")]
    mode: String,
    #[serde(default, rename = "shouldIgnore")]
    is_ignored: bool,
    oid: Option<String>,
}

#[derive(Deserialize)]
struct Committed {
    #[serde(rename = "commitOid")]
    commit: String,
    #[serde(rename = "commitUrl")]
    url: Option<String>,
}

/// A file and what the hub says of it.
struct Planned<'a> {
    upload: &'a Upload,
    mode: Mode,
    is_large: bool,
}

impl Hub {
    /// Commits the files to a branch, all or none.
    ///
    /// Where the answer to the commit is lost, the hub is asked again which files it has: what is there is not committed
    /// twice.
    pub fn commit(
        &self,
        repo: &RepoId,
        branch: &str,
        summary: &str,
        uploads: &[Upload],
        progress: &Progress,
    ) -> Result<CommitInfo, HubError> {
        let branch: Revision = branch.parse()?;
        self.check_upload(repo)?;
        if uploads.is_empty() || uploads.len() > MAX_FILES {
            return Err(upload_error(
                repo,
                format!("there are {} files, of 1 to {MAX_FILES}", uploads.len()),
            ));
        }
        for upload in uploads {
            HubError::check_path(repo, &upload.path_in_repo)?;
        }
        self.0.retried(Retries::default(), progress, || {
            let planned = self.plan(repo, &branch, uploads, progress)?;
            let objects = self.objects(repo, &planned, progress)?;
            let (body, count) = self.body(repo, summary, &planned, &objects, progress)?;
            if count == 0 {
                let (commit, _) = resolve(&self.0, repo, &branch, false, progress)?;
                let url = format!("{}/commit/{commit}", self.0.page(repo));
                return Ok(CommitInfo {
                    commit,
                    url,
                    is_new: false,
                });
            }
            let mut changed: Vec<Object> = objects.into_iter().flatten().collect();
            // The storage has contents, whatever their names.
            let mut sent = HashSet::new();
            changed.retain(|object| sent.insert(object.oid.clone()));
            lfs::upload(&self.0, repo, &branch, &changed, progress)?;
            self.post_commit(repo, &branch, &body, progress)
        })
    }

    /// Asks the hub where each file belongs, and whether it has it.
    fn plan<'a>(
        &self,
        repo: &RepoId,
        branch: &Revision,
        uploads: &'a [Upload],
        progress: &Progress,
    ) -> Result<Vec<Planned<'a>>, HubError> {
        let mut planned = Vec::with_capacity(uploads.len());
        for chunk in uploads.chunks(FILES_PER_CALL) {
            let files = chunk
                .iter()
                .map(|upload| {
                    let (size, sample) = upload.source.sample()?;
                    let sample = BASE64.encode(sample);
                    Ok(json!({"path": upload.path_in_repo, "size": size, "sample": sample}))
                })
                .collect::<Result<Vec<_>, HubError>>()?;
            let body = json!({ "files": files }).to_string();
            let url = self.api(repo, "preupload", branch);
            let subject = Subject::of(repo).revision(branch.as_str());
            let call = json_call(url, subject, body.as_bytes());
            let (modes, _): (Modes, HeaderMap) = self.0.json(&call, progress)?;
            let mut modes = modes.files;
            for upload in chunk {
                let path = &upload.path_in_repo;
                let index = modes.iter().position(|mode| mode.path == *path);
                let index = index.ok_or_else(|| {
                    upload_error(repo, format!("the hub does not say where {path} belongs"))
                })?;
                let mode = modes.swap_remove(index);
                if mode.is_ignored {
                    tracing::warn!(
                        "{repo}: {path} is not pushed: the repository's .gitignore names it"
                    );
                    continue;
                }
                // The storage of large files takes no empty ones.
                let is_large = mode.mode == "lfs" && upload.source.size()? > 0;
                planned.push(Planned {
                    upload,
                    mode,
                    is_large,
                });
            }
        }
        Ok(planned)
    }

    /// The large files with their digests; None in the place of one that is not large, or that the hub has.
    fn objects<'a>(
        &self,
        repo: &RepoId,
        planned: &[Planned<'a>],
        progress: &Progress,
    ) -> Result<Vec<Option<Object<'a>>>, HubError> {
        let large = planned.iter().filter(|planned| planned.is_large);
        let sizes = large.map(|planned| planned.upload.source.size());
        let total = sizes.sum::<Result<u64, HubError>>()?;
        progress.begin("reading what is pushed to the hub", total);
        // A file that goes to several places is read once.
        let mut read: HashMap<&Path, (u64, String)> = HashMap::new();
        let objects = planned.iter().map(|planned| {
            if !planned.is_large {
                return Ok(None);
            }
            let source = &planned.upload.source;
            let (size, oid) = match source {
                Source::Bytes(bytes) => (bytes.len() as u64, sha256_hex(bytes)),
                Source::File(path) => match read.get(path.as_path()) {
                    Some(known) => known.clone(),
                    None => {
                        let digest = file_sha256(path, progress);
                        let digest = digest.map_err(HubError::io("read", path))?;
                        read.insert(path, digest.clone());
                        digest
                    }
                },
            };
            tracing::debug!("{repo}: {} has sha256 {oid}", planned.upload.path_in_repo);
            progress.advance(size);
            let is_there = planned.mode.oid.as_deref() == Some(oid.as_str());
            Ok((!is_there).then_some(Object { source, size, oid }))
        });
        objects.collect()
    }

    /// The lines of the commit, and the number of files in it.
    fn body(
        &self,
        repo: &RepoId,
        summary: &str,
        planned: &[Planned],
        objects: &[Option<Object>],
        progress: &Progress,
    ) -> Result<(Vec<u8>, usize), HubError> {
        let header = json!({"key": "header", "value": {"summary": summary, "description": ""}});
        let mut lines = vec![header];
        let mut inline_bytes = 0;
        for (planned, object) in planned.iter().zip(objects) {
            progress.check()?;
            let path = &planned.upload.path_in_repo;
            if let Some(object) = object {
                lines.push(json!({"key": "lfsFile", "value": {
                    "path": path, "algo": "sha256", "oid": object.oid, "size": object.size,
                }}));
            }
            if planned.is_large {
                continue;
            }
            inline_bytes += planned.upload.source.size()?;
            if inline_bytes > MAX_INLINE_BYTES {
                let reason = format!(
                    "the hub wants more than {MAX_INLINE_BYTES} bytes in the commit itself, with {path}: push fewer files at a time"
                );
                return Err(upload_error(repo, reason));
            }
            let bytes = planned.upload.source.bytes()?;
            if planned.mode.oid.as_deref() != Some(git_hex(&bytes).as_str()) {
                lines.push(json!({"key": "file", "value": {
                    "path": path, "encoding": "base64", "content": BASE64.encode(&bytes),
                }}));
            }
        }
        let mut body = Vec::new();
        for line in &lines {
            body.extend_from_slice(line.to_string().as_bytes());
            body.push(b'\n');
        }
        Ok((body, lines.len() - 1))
    }

    fn post_commit(
        &self,
        repo: &RepoId,
        branch: &Revision,
        body: &[u8],
        progress: &Progress,
    ) -> Result<CommitInfo, Failure> {
        let subject = Subject::of(repo).revision(branch.as_str());
        let url = self.api(repo, "commit", branch);
        let call = Call::new(Method::POST, url.clone(), subject)
            .header("content-type", "application/x-ndjson")
            .payload(Payload::Bytes(body))
            .answer_timeout(COMMIT_TIMEOUT);
        let mut answer = self.0.exchange(&call, progress)?;
        let bytes = self.0.read(&call, &mut answer)?;
        let committed: Committed =
            serde_json::from_slice(&bytes).map_err(|error| HubError::Malformed {
                subject: repo.to_string(),
                url,
                reason: error.to_string(),
            })?;
        let page = format!("{}/commit/{}", self.0.page(repo), committed.commit);
        Ok(CommitInfo {
            url: committed.url.unwrap_or(page),
            commit: committed.commit,
            is_new: true,
        })
    }

    fn api(&self, repo: &RepoId, call: &str, branch: &Revision) -> String {
        let branch = encode_part(branch.as_str());
        self.0.url(&format!("{}/{call}/{branch}", repo.api_path()))
    }
}

impl Source {
    pub(super) fn size(&self) -> Result<u64, HubError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
            Self::File(path) => {
                let found = path.metadata().map_err(HubError::io("read", path))?;
                Ok(found.len())
            }
        }
    }

    fn bytes(&self) -> Result<Vec<u8>, HubError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::File(path) => std::fs::read(path).map_err(HubError::io("read", path)),
        }
    }

    /// Size and first bytes, from which the hub tells text from other things.
    fn sample(&self) -> Result<(u64, Vec<u8>), HubError> {
        let size = self.size()?;
        let sample = match self {
            Self::Bytes(bytes) => bytes[..bytes.len().min(SAMPLE_BYTES as usize)].to_vec(),
            Self::File(path) => {
                let mut sample = Vec::new();
                let file = File::open(path).map_err(HubError::io("read", path))?;
                file.take(SAMPLE_BYTES)
                    .read_to_end(&mut sample)
                    .map_err(HubError::io("read", path))?;
                sample
            }
        };
        Ok((size, sample))
    }
}

fn upload_error(repo: &RepoId, reason: String) -> HubError {
    HubError::Upload {
        repo: repo.clone(),
        reason,
    }
}
