//! The adapter that a job starts from, where it is an id on the hub. It is fetched while the job is read, because its
//! `adapter_config.json` gives defaults of the job.

use common::files::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use common::files::model::CONFIG;
use common::hub::{Environment, Hub, Listing, RepoId, RepoKind};
use common::job::{AdapterRequest, FoundAdapter};
use common::progress::Progress;

use super::access::{MAIN, hub_id};
use crate::store::output::RunRecord;

/// Endings of the files that are read beside the adapter's own: those of a tokenizer with tokens of its own.
const ENDINGS: [&str; 4] = [".json", ".jinja", ".model", ".txt"];

/// Fetches the adapter; None where it is no id.
pub fn obtain(
    request: &AdapterRequest<'_>,
    progress: &Progress,
) -> Result<Option<FoundAdapter>, String> {
    let Some(repo) = hub_id(RepoKind::Model, request.written) else {
        return Ok(None);
    };
    let told =
        |error: &dyn std::fmt::Display| format!("there is no such folder, and on the hub: {error}");
    let environment = Environment::of_process().map_err(|error| told(&error))?;
    let hub = Hub::new(environment).map_err(|error| told(&error))?;
    let revision = earlier_commit(request, &repo).unwrap_or_else(|| MAIN.to_owned());
    let listing = hub.listing(&repo, &revision, progress);
    let listing = listing.map_err(|error| told(&error))?;
    is_adapter(&listing).map_err(|reason| told(&format!("{repo} {reason}")))?;
    let wanted = |path: &str| {
        let is_beside = ENDINGS.iter().any(|ending| path.ends_with(ending));
        path == ADAPTER_WEIGHTS || is_beside && !path.contains('/')
    };
    let snapshot = hub.fetch(&listing, &wanted, progress);
    let snapshot = snapshot.map_err(|error| told(&error))?;
    Ok(Some(FoundAdapter {
        folder: snapshot.folder,
        id: listing.canonical.id().to_owned(),
        commit: snapshot.commit,
        notice: snapshot.is_partial.then(|| {
            format!(
                "lora_model_dir {repo}: the hub could not be asked, and what its cache has is used"
            )
        }),
    }))
}

/// Whether a repository is an adapter that can be read; the error goes after its name.
fn is_adapter(listing: &Listing) -> Result<(), String> {
    let has = |name: &str| listing.files.iter().any(|file| file.path == name);
    if !has(ADAPTER_CONFIG) {
        return Err(match has(CONFIG) {
            true => format!(
                "has no {ADAPTER_CONFIG}: it is a whole model, not an adapter; name it as base_model"
            ),
            false => format!("has no {ADAPTER_CONFIG}: it is no adapter of PEFT"),
        });
    }
    match has(ADAPTER_WEIGHTS) {
        true => Ok(()),
        false => Err(format!(
            "has no {ADAPTER_WEIGHTS}: load it with PEFT and save it again, which writes that"
        )),
    }
}

/// The commit that the run in the output folder began with, if it started from the same adapter.
fn earlier_commit(request: &AdapterRequest<'_>, repo: &RepoId) -> Option<String> {
    if request.begins_anew {
        return None;
    }
    // What is wrong with the record is told when the folder is taken.
    let record = RunRecord::read(request.output_dir).ok().flatten()?;
    let source = &record.job["method"]["lora"]["model_source"];
    let is_same = source["id"]
        .as_str()
        .is_some_and(|id| id.eq_ignore_ascii_case(repo.id()));
    let commit = source["commit"].as_str().filter(|_| is_same)?;
    Some(commit.to_owned())
}
