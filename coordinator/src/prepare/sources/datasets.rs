//! The files of a dataset: of a folder or a pattern, or of a dataset on the hub.

use std::path::{Path, PathBuf};

use common::data::paths::{data_files, files_in, is_saved};
use common::data::splits::{Splits, is_data};
use common::hub::{HubError, Listing, RepoId, RepoKind};
use common::job::{DatasetSpec, HubSource, front_matter};
use serde_json::Value;

use super::access::{MAIN, Sources, hub_id};
use super::elsewhere::{from_addresses, from_stdin, has_addresses};
use super::folder::{CARD, MAX_CARD_BYTES, Unfound, files_of};
use super::list::List;
use super::objects;
use super::splits::{check_splits, choose_split, not_of_here};

/// Where the hub keeps the rows of every dataset as Parquet, by configuration and split.
const PARQUET: &str = "refs/convert/parquet";

/// Before the name of a split of which the hub has converted only a part.
const PARTIAL: &str = "partial-";

/// Finds the files of a dataset, and fetches them where they are on the hub. Returns a line for the user, if there is one.
pub(super) fn obtain(
    sources: &Sources<'_>,
    entry: (List, usize),
    dataset: &mut DatasetSpec,
) -> Result<Option<String>, String> {
    if dataset.is_stdin() {
        return from_stdin(sources, entry, dataset);
    }
    if objects::service_of(&dataset.path.to_string_lossy()).is_some() {
        return objects::obtain(sources, entry, dataset);
    }
    if has_addresses(dataset) {
        return from_addresses(sources, entry, dataset);
    }
    let path = &dataset.path;
    let is_pattern = path.to_string_lossy().contains(['*', '?', '[']);
    let is_here = path.exists() || path.is_symlink() || path.as_os_str().is_empty();
    let repo = match is_here || is_pattern {
        true => None,
        false => hub_id(RepoKind::Dataset, path).filter(|repo| !is_data(repo.name())),
    };
    let Some(repo) = repo else {
        let splits = local_files(dataset)?;
        choose_split(entry.0, dataset, &splits);
        check_splits(dataset, &splits)?;
        dataset.files = splits;
        return Ok(not_of_here(dataset, dataset.path.is_file()));
    };
    fetch(sources, entry, dataset, &repo)
}

/// The files at a path on this machine, by split.
fn local_files(dataset: &DatasetSpec) -> Result<Splits<PathBuf>, String> {
    let path = &dataset.path;
    if path.is_dir() && !is_saved(path) {
        return files_of_folder(path, dataset);
    }
    for (field, is_given) in [
        ("name", dataset.name.is_some() && !path.is_file()),
        ("data_dir", dataset.data_dir.is_some()),
        (
            "data_files",
            !dataset.named_files().is_empty() && !path.as_os_str().is_empty(),
        ),
    ] {
        if is_given {
            return Err(format!(
                "is no folder that has {field} in it: remove {field}, or name the folder"
            ));
        }
    }
    let named = dataset.named_files();
    if named.is_empty() {
        return data_files(path);
    }
    let found = named.into_iter().map(|(split, patterns)| {
        let mut files = Vec::new();
        for pattern in patterns {
            let path = Path::new(&pattern);
            let found =
                data_files(path).map_err(|reason| format!("{}: {reason}", path.display()))?;
            files.extend(found.into_iter().flat_map(|(_, paths)| paths));
        }
        Ok((split, files))
    });
    found.collect()
}

/// The files of a folder, which may be a copy of a dataset of the hub, with its card.
fn files_of_folder(folder: &Path, dataset: &DatasetSpec) -> Result<Splits<PathBuf>, String> {
    let paths = files_in(folder)?;
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let path = folder.join(CARD);
    let card = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() && metadata.len() <= MAX_CARD_BYTES => {
            let bytes = std::fs::read(&path).map_err(|error| format!("{CARD}: {error}"))?;
            front_matter(&String::from_utf8_lossy(&bytes))
                .map_err(|reason| format!("{CARD}: {reason}"))?
        }
        _ => Value::Null,
    };
    let splits = files_of(dataset, &paths, &card).map_err(|unfound| {
        let (Unfound::NoData(reason) | Unfound::Told(reason)) = unfound;
        format!("is a folder that {reason}")
    })?;
    let here = |files: Vec<String>| files.iter().map(|file| folder.join(file)).collect();
    Ok(splits
        .into_iter()
        .map(|(name, files)| (name, here(files)))
        .collect())
}

/// Fetches the files of the splits that the job reads.
fn fetch(
    sources: &Sources<'_>,
    entry: (List, usize),
    dataset: &mut DatasetSpec,
    repo: &RepoId,
) -> Result<Option<String>, String> {
    // Whoever mistyped a path has to see that it was taken for an id.
    let told =
        |error: HubError| format!("there is no such file or folder, and on the hub: {error}");
    let hub = sources.hub()?;
    let earlier = earlier_source(sources.earlier(), entry, dataset);
    let asked = dataset.revision.as_deref().unwrap_or(MAIN);
    let is_converted = earlier.as_ref().is_some_and(|earlier| earlier.is_converted);
    let revision = earlier.map_or_else(|| asked.to_owned(), |earlier| earlier.commit);
    let mut listing = hub
        .listing(repo, &revision, sources.progress)
        .map_err(told)?;
    let mut source = HubSource {
        id: listing.canonical.id().to_owned(),
        commit: listing.commit.clone(),
        is_converted,
    };
    let mut notices = Vec::new();
    let found = match is_converted {
        true => converted_files(dataset, &listing).map_err(Unfound::Told),
        false => card(sources, &listing)
            .map_err(Unfound::Told)
            .and_then(|card| files_of(dataset, &paths_of(&listing), &card)),
    };
    let mut splits = match found {
        Ok(splits) => splits,
        // A dataset that only a program of its own makes rows of: the hub has made them.
        Err(Unfound::NoData(reason)) if asked == MAIN => {
            let converted = hub.listing(repo, PARQUET, sources.progress);
            listing = converted.map_err(|error| {
                format!("{repo} on the hub {reason}, and its own conversion to Parquet cannot be had: {error}")
            })?;
            source.commit.clone_from(&listing.commit);
            source.is_converted = true;
            converted_files(dataset, &listing)?
        }
        Err(Unfound::NoData(reason) | Unfound::Told(reason)) => {
            return Err(format!("{repo} on the hub {reason}"));
        }
    };
    if source.is_converted {
        notices.push("its rows are those of the hub's own conversion to Parquet".to_owned());
    }
    choose_split(entry.0, dataset, &splits);
    check_splits(dataset, &splits)?;
    let asked = dataset.rows().map_err(|reason| format!("split {reason}"))?;
    splits.retain(|(name, _)| asked.reads(name));
    let wanted = |path: &str| {
        let mut files = splits.iter().flat_map(|(_, files)| files);
        files.any(|file| file == path)
    };
    if source.is_converted
        && listing
            .files
            .iter()
            .any(|file| wanted(&file.path) && file.path.contains(PARTIAL))
    {
        notices.push("the hub has converted only a part of a split".to_owned());
    }
    let snapshot = hub
        .fetch(&listing, &wanted, sources.progress)
        .map_err(told)?;
    let here = |file: String| snapshot.folder.join(file);
    dataset.files = splits
        .into_iter()
        .map(|(name, files)| (name, files.into_iter().map(here).collect()))
        .collect();
    source.commit = snapshot.commit;
    dataset.hub = Some(source);
    if snapshot.is_partial {
        notices.push("the hub could not be asked, and what its cache has is used".to_owned());
    }
    let path = dataset.path.display();
    Ok((!notices.is_empty()).then(|| format!("{path}: {}", notices.join("; "))))
}

fn paths_of(listing: &Listing) -> Vec<&str> {
    let files = listing.files.iter();
    files.map(|file| file.path.as_str()).collect()
}

/// The front matter of the dataset's card; empty where there is none.
fn card(sources: &Sources<'_>, listing: &Listing) -> Result<Value, String> {
    if !listing.files.iter().any(|file| file.path == CARD) {
        return Ok(Value::Null);
    }
    let unreadable = |reason: String| format!("has a {CARD} that cannot be read: {reason}");
    let hub = sources.hub()?;
    let bytes = hub
        .read(listing, CARD, MAX_CARD_BYTES, sources.progress)
        .map_err(|error| unreadable(error.to_string()))?;
    front_matter(&String::from_utf8_lossy(&bytes)).map_err(unreadable)
}

/// The files that the hub has made of a dataset: `CONFIGURATION/SPLIT/0000.parquet`.
fn converted_files(dataset: &DatasetSpec, listing: &Listing) -> Result<Splits<String>, String> {
    let mut configs: Vec<(&str, Splits<String>)> = Vec::new();
    for file in &listing.files {
        let parts: Vec<&str> = file.path.split('/').collect();
        let [config, split, name] = parts[..] else {
            continue;
        };
        if !name.ends_with(".parquet") {
            continue;
        }
        let split = split.strip_prefix(PARTIAL).unwrap_or(split);
        let index = configs.iter().position(|(known, _)| *known == config);
        let index = index.unwrap_or_else(|| {
            configs.push((config, Vec::new()));
            configs.len() - 1
        });
        let splits = &mut configs[index].1;
        match splits.iter_mut().find(|(known, _)| known == split) {
            Some((_, files)) => files.push(file.path.clone()),
            None => splits.push((split.to_owned(), vec![file.path.clone()])),
        }
    }
    let names: Vec<&str> = configs.iter().map(|(name, _)| *name).collect();
    let wanted = match (&dataset.name, names.as_slice()) {
        (Some(name), _) => name.as_str(),
        (None, [only]) => only,
        (None, _) => "default",
    };
    let found = configs.iter().find(|(name, _)| *name == wanted);
    found
        .map(|(_, splits)| splits.clone())
        .ok_or_else(|| match names.is_empty() {
            true => "the hub has made no Parquet files of it".to_owned(),
            false => format!(
                "say with name which of its configurations is meant: {}",
                names.join(", ")
            ),
        })
}

/// Where the run in the output folder had this dataset from, if it asked for the same dataset and revision.
fn earlier_source(
    earlier: Option<&Value>,
    (list, index): (List, usize),
    dataset: &DatasetSpec,
) -> Option<HubSource> {
    let known = earlier?.get(list.name())?.get(index)?;
    let is_same = known["path"].as_str() == dataset.path.to_str()
        && known["revision"].as_str() == dataset.revision.as_deref();
    let source = serde_json::from_value(known["hub"].clone()).ok();
    source.filter(|_| is_same)
}
