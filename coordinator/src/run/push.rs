//! Pushes a result to the hub: the adapter or model, its tokenizer, and a card, in one commit.
//!
//! Enters: an output folder whose run is done. Leaves: a commit on the hub, or why there is none; the folder is as it was
//! either way. What a run knows of its machines (`run.json`, `metrics.jsonl`) stays here.

mod card;

use std::fs;
use std::path::{Path, PathBuf};

use common::hub::{
    CommitInfo, Created, Environment, Hub, HubError, RepoId, RepoKind, Source, Upload,
};
use common::job::PushSpec;
use common::progress::Progress;
use thiserror::Error;

use crate::store::output::{OutputError, RunRecord, RunState};
use card::card;

const BRANCH: &str = "main";
const CARD: &str = "README.md";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const TEMPLATES: &str = "additional_chat_templates";
/// Most templates beside the default one.
const MAX_TEMPLATES: usize = 1000;

/// Files of a result that others can use, by name; a `*` stands for anything.
const PUSHED: [&str; 16] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "trainer_state.json",
];

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
    let uploads = uploads(folder, record.as_ref())?;
    let (hub, repo) = destination(push, progress)?;
    let created = hub.create_repo(&repo, push.is_private, progress)?;
    let files = uploads.len();
    let summary = "Upload the result of a run";
    let commit = hub.commit(&repo, BRANCH, summary, &uploads, progress)?;
    Ok(Pushed {
        repo,
        commit,
        files,
        is_new: created == Created::Created,
    })
}

/// The files of a result, and its card.
fn uploads(folder: &Path, record: Option<&RunRecord>) -> Result<Vec<Upload>, PushError> {
    let mut names = files_of(folder, is_pushed)?;
    if !["adapter_config.json", "config.json"]
        .iter()
        .any(|name| names.iter().any(|known| known == name))
    {
        let folder = folder.to_owned();
        return Err(PushError::NoResult { folder });
    }
    let templates = folder.join(TEMPLATES);
    if templates.is_dir() {
        let inside = files_of(&templates, |name| name.ends_with(".jinja"))?;
        let inside = inside.into_iter().take(MAX_TEMPLATES);
        names.extend(inside.map(|name| format!("{TEMPLATES}/{name}")));
    }
    let mut uploads: Vec<Upload> = names
        .into_iter()
        .map(|name| Upload {
            source: match name == ADAPTER_CONFIG {
                true => adapter_config(&folder.join(&name)),
                false => Source::File(folder.join(&name)),
            },
            path_in_repo: name,
        })
        .collect();
    let own = folder.join(CARD);
    let source = match own.is_file() {
        true => Source::File(own),
        false => Source::Bytes(card(folder, record).into_bytes()),
    };
    uploads.push(Upload {
        path_in_repo: CARD.to_owned(),
        source,
    });
    Ok(uploads)
}

/// The adapter's configuration; a base model that is a folder of this machine is named by the folder's name alone.
fn adapter_config(path: &Path) -> Source {
    let file = || Source::File(path.to_owned());
    let json = fs::read(path).ok();
    let json = json.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let Some(mut json) = json else {
        return file();
    };
    let base = json["base_model_name_or_path"].as_str().unwrap_or_default();
    let base = PathBuf::from(base);
    let is_here = base.is_absolute() || base.exists();
    match base.file_name().filter(|_| is_here) {
        None => file(),
        Some(name) => {
            json["base_model_name_or_path"] = name.to_string_lossy().into();
            Source::Bytes(format!("{json:#}\n").into_bytes())
        }
    }
}

/// Names of the files of a folder that are wanted, sorted.
fn files_of(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, PushError> {
    let failed = |error: std::io::Error| PushError::File {
        path: folder.to_owned(),
        reason: error.to_string(),
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if wanted(&name) && entry.path().is_file() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn is_pushed(name: &str) -> bool {
    PUSHED.iter().any(|pattern| match pattern.split_once('*') {
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
        None => name == *pattern,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_knows_of_its_machines_stays_here() {
        for name in [
            "adapter_model.safetensors",
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
        ] {
            assert!(is_pushed(name), "{name}");
        }
        for name in [
            "run.json",
            "metrics.jsonl",
            "optimizer.safetensors",
            "notes.json",
            ".env",
        ] {
            assert!(!is_pushed(name), "{name}");
        }
    }
}
