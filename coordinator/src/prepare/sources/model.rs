//! The base model: a folder, or a model on the hub.

use common::files::model::CONFIG;
use common::hub::{RepoId, RepoKind};
use common::job::{InitWeights, JobSpec};
use serde_json::Value;

use super::access::{MAIN, Sources, hub_id};

/// Folder of a model's further chat templates.
const TEMPLATES: &str = "additional_chat_templates/";

/// Endings of the files that make up a model beside its weights: configuration, tokenizer, templates.
const ENDINGS: [&str; 6] = [".json", ".jinja", ".model", ".txt", ".tiktoken", ".v3"];

/// Fetches the base model where it is an id on the hub.
pub(super) fn obtain(sources: &Sources<'_>, job: &mut JobSpec) -> Result<(), String> {
    if job.base_model.exists() || job.base_model.is_symlink() {
        return Ok(());
    }
    let Some(repo) = hub_id(RepoKind::Model, &job.base_model) else {
        return Ok(());
    };
    let asked = job.model_revision.as_deref();
    let revision = earlier_commit(sources.earlier(), &repo, asked)
        .or_else(|| job.model_revision.clone())
        .unwrap_or_else(|| MAIN.to_owned());
    let told = |error: &dyn std::fmt::Display| {
        format!("base_model {repo}: there is no such folder, and on the hub: {error}")
    };
    let hub = sources.hub().map_err(|error| told(&error))?;
    let listing = hub.listing(&repo, &revision, sources.progress);
    let listing = listing.map_err(|error| told(&error))?;
    let has_usual = listing
        .files
        .iter()
        .any(|file| is_weights(&file.path) && file.path.starts_with("model"));
    let reads_weights = job.init_weights == InitWeights::Pretrained;
    let wanted = |path: &str| {
        let is_inside = path.contains('/') && !path.starts_with(TEMPLATES);
        let is_needed = match is_weights(path) {
            // Some repositories have the weights a second time, under their maker's names.
            true => reads_weights && (path.starts_with("model") || !has_usual),
            false => ENDINGS.iter().any(|ending| path.ends_with(ending)),
        };
        is_needed && !is_inside
    };
    let has = |wanted: &dyn Fn(&str) -> bool| listing.files.iter().any(|file| wanted(&file.path));
    if !has(&|path| path == CONFIG) {
        return Err(told(&format!(
            "{repo} has no {CONFIG}: it is no model that Transformers loads"
        )));
    }
    if reads_weights && !has(&is_weights) {
        return Err(told(&format!("{repo} has no weights as safetensors")));
    }
    let snapshot = hub.fetch(&listing, &wanted, sources.progress);
    let snapshot = snapshot.map_err(|error| told(&error))?;
    if snapshot.is_partial {
        let notice = format!(
            "base_model {repo}: the hub could not be asked, and what its cache has is used"
        );
        job.reading.notices.push(notice);
    }
    job.base_model = snapshot.folder;
    job.base_model_id = Some(listing.canonical.id().to_owned());
    job.asked_revision = job.model_revision.replace(snapshot.commit);
    Ok(())
}

fn is_weights(path: &str) -> bool {
    path.ends_with(".safetensors")
}

/// The commit that the run in the output folder began with, if it asked for the same model and revision.
fn earlier_commit(earlier: Option<&Value>, repo: &RepoId, asked: Option<&str>) -> Option<String> {
    let earlier = earlier?;
    let is_same = earlier["base_model_id"]
        .as_str()
        .is_some_and(|id| id.eq_ignore_ascii_case(repo.id()));
    let commit = earlier["model_revision"].as_str()?;
    let is_asked = earlier["asked_revision"].as_str() == asked;
    (is_same && is_asked).then(|| commit.to_owned())
}
