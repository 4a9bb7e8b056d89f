//! What can go wrong with the hub: one clear line each, with what to do next. No message ever holds a token.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::RepoId;
use super::path;
use crate::files::FileError;
use crate::progress::Cancelled;

/// Most characters of a text of the server's in a message.
const MAX_TEXT_CHARACTERS: usize = 300;

/// Why the hub, or the cache of its files, did not give what was asked for.
#[derive(Debug, Error)]
pub enum HubError {
    #[error("`{id}` is no id on the hub: {reason}")]
    InvalidId { id: String, reason: String },
    #[error("`{revision}` is no revision on the hub: {reason}")]
    InvalidRevision {
        revision: String,
        reason: &'static str,
    },
    #[error("environment variable {variable}: {reason}")]
    InvalidVariable {
        variable: &'static str,
        reason: String,
    },
    #[error("{repo}: the file name {path:?} is not taken: {reason}")]
    UnsafePath {
        repo: RepoId,
        path: String,
        reason: &'static str,
    },
    #[error(
        "{subject}: there is no such repository, or it is private or gated: check the id, and for one that is not public log in with `hf auth login` or set HF_TOKEN{withheld}"
    )]
    NoToken {
        subject: String,
        /// Why a token that is there was not sent; else empty.
        withheld: &'static str,
    },
    #[error(
        "the hub refuses the token from {origin}: make a new one at {endpoint}/settings/tokens, then log in with `hf auth login` or set HF_TOKEN"
    )]
    TokenRefused { origin: String, endpoint: String },
    #[error("{repo} is gated: accept its conditions at {url}, {account}{message}")]
    Gated {
        repo: RepoId,
        url: String,
        account: &'static str,
        message: String,
    },
    #[error(
        "{subject}: the hub forbids it{message}: use a token of an account that may, with write access for an upload"
    )]
    Forbidden { subject: String, message: String },
    #[error(
        "the {kind} {repo} is not on the hub: it is private or misspelled: check the id at {url}, and for a private one that the token's account may read it"
    )]
    RepoNotFound {
        kind: &'static str,
        repo: RepoId,
        url: String,
    },
    #[error("{repo} has no revision `{revision}`: its branches and tags are at {url}")]
    RevisionNotFound {
        repo: RepoId,
        revision: String,
        url: String,
    },
    #[error("{repo} has no file {path} in {revision}")]
    EntryNotFound {
        repo: RepoId,
        revision: String,
        path: String,
    },
    #[error(
        "{subject}: too many requests, and the hub asks to wait {seconds} s more: try again later, or log in with `hf auth login` for a higher limit"
    )]
    RateLimited { subject: String, seconds: u64 },
    #[error("{subject}: the hub answered {status}{message}: {remedy}")]
    Status {
        subject: String,
        status: u16,
        message: String,
        remedy: &'static str,
    },
    #[error("{subject}: {host} cannot be reached: {reason}: check the network, {variables}")]
    Unreachable {
        subject: String,
        host: String,
        reason: String,
        /// The variables that decide the way there.
        variables: String,
    },
    #[error("{subject}: the answer of {host} broke off: {reason}: try again")]
    Broken {
        subject: String,
        host: String,
        reason: String,
    },
    #[error("{subject}: the hub was not asked, because {variable} is set: unset it, or {remedy}")]
    Offline {
        subject: String,
        variable: &'static str,
        remedy: String,
    },
    #[error("{subject}: {url} sends from one address to the next without end")]
    TooManyRedirects { subject: String, url: String },
    #[error("{subject}: the redirect to {url} is not followed: {reason}")]
    BadRedirect {
        subject: String,
        url: String,
        reason: &'static str,
    },
    #[error("{subject}: the answer of {url} cannot be used: {reason}")]
    Malformed {
        subject: String,
        url: String,
        reason: String,
    },
    #[error(
        "{repo}: {path} came with another {what} than the hub lists ({found} for {expected}): the part is removed; try again, and look for a proxy in between if it stays so"
    )]
    Mismatch {
        repo: RepoId,
        path: String,
        what: &'static str,
        expected: String,
        found: String,
    },
    #[error(
        "{path} needs {needed} bytes, but its disk has {free} free: make room, or set HF_HUB_CACHE to another disk"
    )]
    NoRoom {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error(
        "{path}: the disk is full: make room, or set HF_HUB_CACHE to another disk; what is there is kept"
    )]
    DiskFull { path: PathBuf },
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{path}: another process has held this lock for long without a byte of progress: end it, or remove the file"
    )]
    LockHeld { path: PathBuf },
    #[error("{repo}: nothing was committed: {reason}")]
    Upload { repo: RepoId, reason: String },
    #[error(transparent)]
    File(Box<FileError>),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl HubError {
    /// Makes the error of an operation of the system on `path`; `action` is a verb.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| {
            if source
                .get_ref()
                .is_some_and(|inner| inner.is::<Cancelled>())
            {
                return Self::Cancelled(Cancelled);
            }
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Self::DiskFull { path }
                }
                _ => Self::Io {
                    action,
                    path,
                    source,
                },
            }
        }
    }

    /// Checks the name of a file in a repository.
    pub(super) fn check_path(repo: &RepoId, path: &str) -> Result<(), Self> {
        match path::fault(path) {
            None => Ok(()),
            Some(reason) => Err(Self::UnsafePath {
                repo: repo.clone(),
                path: path.to_owned(),
                reason,
            }),
        }
    }

    /// Whether the hub was not reached at all, so that what is in the cache may serve.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

impl From<FileError> for HubError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io {
                action,
                path,
                source,
            } => Self::io(action, &path)(source),
            other => Self::File(Box::new(other)),
        }
    }
}

/// A text of the server's, in one bounded line and without what a terminal would obey.
pub(super) fn quoted(text: &str) -> String {
    let line = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    line.take(MAX_TEXT_CHARACTERS)
        .collect::<String>()
        .trim()
        .to_owned()
}
