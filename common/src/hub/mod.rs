//! A client of the Hugging Face hub, which shares Python's cache of files.
//!
//! In: ids, revisions and what is wanted of them; files to commit. Out: folders in the cache whose content is checked, or
//! commits. It never shows the token to another host than the hub, never writes a file that the hub names outside the cache,
//! and waits for nothing without a bound.

mod all_at_once;
mod cache;
mod call;
mod certificates;
mod client;
mod digest;
mod download;
mod elsewhere;
mod environment;
mod error;
mod failure;
mod id;
mod kept;
mod lfs;
mod listing;
mod lock;
mod path;
mod proxy;
mod repository;
mod retries;
mod snapshot;
mod token;
mod upload;
mod variables;
mod versions;
mod web;

use std::sync::Arc;
use std::time::Duration;

pub use all_at_once::all_at_once;
pub use digest::{Digest, git_hex, sha256_hex};
pub use elsewhere::{AnswerBody, SendError};
pub use environment::Environment;
pub use error::HubError;
pub use id::{RepoId, RepoKind, no_such_folder};
pub use kept::model_snapshots;
pub use listing::{Listing, RemoteFile};
pub use repository::Created;
pub use retries::Retries;
pub use snapshot::Snapshot;
pub use upload::{CommitInfo, Source, Upload};
pub use versions::{Fetching, Versions, WebFile, version_digest};

use client::Client;

/// The hub as this process sees it; clones share their connections.
#[derive(Clone)]
pub struct Hub(Arc<Client>);

impl Hub {
    pub fn new(environment: Environment) -> Result<Self, HubError> {
        Self::with_sleep(environment, std::thread::sleep)
    }

    /// A hub whose waits are done by `sleep`, so that tests need not wait.
    pub fn with_sleep(
        environment: Environment,
        sleep: impl Fn(Duration) + Send + Sync + 'static,
    ) -> Result<Self, HubError> {
        Client::new(environment, Arc::new(sleep)).map(|client| Self(Arc::new(client)))
    }

    /// What was read of the environment.
    pub fn environment(&self) -> &Environment {
        self.0.environment()
    }
}
