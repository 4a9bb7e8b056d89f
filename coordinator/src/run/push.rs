//! Pushes a result to the hub: the adapter or model, its tokenizer, and a card, in one commit. In training, checkpoints too.
//!
//! Enters: an output folder whose run is done. Leaves: a commit on the hub, or why there is none; the result is as it was
//! either way.

mod card;
mod files;
mod held;
mod in_training;
mod queue;
mod record;

use std::path::{Path, PathBuf};

use common::files::FileError;
use common::hub::{CommitInfo, Created, Environment, Hub, HubError, RepoId, RepoKind};
use common::job::PushSpec;
use common::progress::{Cancelled, Progress};
use thiserror::Error;

use crate::store::output::{OutputError, RunRecord, RunState};
use files::of_result;
use record::PushRecord;

pub use in_training::CheckpointPushes;

const BRANCH: &str = "main";
const TEMPLATES: &str = "additional_chat_templates";
/// Why a result was not pushed.
#[derive(Debug, Error)]
pub enum PushError {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(
        "{folder}: there is neither an adapter_config.json nor a config.json: name the output_dir of a run that is done"
    )]
    NoResult { folder: PathBuf },
    #[error(
        "{folder}: the run there is not done, and its result is not there yet: let it go on to its end"
    )]
    NotDone { folder: PathBuf },
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("{folder} was removed before its turn came (save_total_limit)")]
    Gone { folder: PathBuf },
    #[error(transparent)]
    Damaged(FileError),
    #[error(transparent)]
    Disk(#[from] FileError),
    #[error(transparent)]
    Stopped(Cancelled),
}

/// What was pushed, and where it is.
#[derive(Debug)]
pub struct Pushed {
    pub repo: RepoId,
    pub commit: CommitInfo,
    pub files: usize,
    /// Whether the repository was made for it.
    pub is_new: bool,
}

/// The repository that a result goes to, checked with the hub: whether there is a token, and whose it is.
pub fn destination(push: &PushSpec, progress: &Progress) -> Result<(Hub, RepoId), PushError> {
    let mut environment = Environment::of_process()?;
    if let Some(token) = &push.token {
        environment = environment.with_token(token.reveal(), "hub_token")?;
    }
    let hub = Hub::new(environment)?;
    let written = RepoId::parse(RepoKind::Model, &push.repo)?;
    // Without a right token the run would end in vain.
    hub.check_upload(&written)?;
    let account = hub.whoami(progress)?;
    let repo = match written.owner() {
        Some(_) => written,
        None => RepoId::parse(RepoKind::Model, &format!("{account}/{}", push.repo))?,
    };
    Ok((hub, repo))
}

/// Pushes the result in this folder.
pub fn push(folder: &Path, push: &PushSpec, progress: &Progress) -> Result<Pushed, PushError> {
    let record = RunRecord::read(folder)?;
    let is_done = |record: &RunRecord| record.state == RunState::Done;
    if record.as_ref().is_some_and(|record| !is_done(record)) {
        let folder = folder.to_owned();
        return Err(PushError::NotDone { folder });
    }
    let uploads = of_result(folder, folder, record.as_ref())?;
    let (hub, repo) = destination(push, progress)?;
    let created = hub.create_repo(&repo, push.is_private, progress)?;
    let files = uploads.len();
    let summary = "Upload the result of a run";
    let commit = hub.commit(&repo, BRANCH, summary, &uploads, progress)?;
    if let Some(record) = record
        && let Err(error) = PushRecord::note_result(folder, &push.repo, record.step)
    {
        tracing::warn!("that the result was pushed is not on record: {error}");
    }
    Ok(Pushed {
        repo,
        commit,
        files,
        is_new: created == Created::Created,
    })
}
