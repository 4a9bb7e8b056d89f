//! The files of a dataset: of a folder or a pattern, or of a dataset on the hub.

use std::path::{Path, PathBuf};

use common::data::card::{configs_of, matching, patterns};
use common::data::paths::data_files;
use common::data::splits::{Splits, split_files};
use common::hub::{Listing, RepoId, RepoKind};
use common::job::{DatasetSpec, TRAIN, front_matter};
use serde_json::{Value, json};

use super::access::Sources;

const MAIN: &str = "main";
/// Where the hub keeps the rows of every dataset as Parquet, by configuration and split.
const PARQUET: &str = "refs/convert/parquet";

const CARD: &str = "README.md";
const MAX_CARD_BYTES: u64 = 4 << 20;

/// Endings of names that are files rather than datasets on the hub.
const FILES: [&str; 14] = [
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz", ".zst", ".xz",
    ".bz2", ".zip", ".tar",
];

/// Finds the files of a dataset, and fetches them where they are on the hub. Returns a line for the user, if there is one.
pub(super) fn obtain(
    sources: &Sources<'_>,
    index: usize,
    dataset: &mut DatasetSpec,
) -> Result<Option<String>, String> {
    let path = &dataset.path;
    let is_pattern = path.to_string_lossy().contains(['*', '?', '[']);
    let is_here = path.is_dir() || path.exists() || path.as_os_str().is_empty();
    let local = is_here || path.is_symlink() || is_pattern;
    let repo = match local {
        true => None,
        false => hub_id(path),
    };
    let Some(repo) = repo else {
        let splits = local_files(dataset)?;
        check_splits(dataset, &splits)?;
        dataset.files = splits;
        return Ok(None);
    };
    fetch(sources, index, dataset, &repo)
        .map_err(|reason| format!("there is no such file or folder, and on the hub: {reason}"))
}

/// The dataset on the hub that a path may name.
fn hub_id(path: &Path) -> Option<RepoId> {
    let repo = RepoId::of_path(RepoKind::Dataset, path)?;
    let name = repo.name().to_lowercase();
    let is_file = FILES.iter().any(|ending| name.ends_with(ending));
    (repo.owner().is_some() && !is_file).then_some(repo)
}

/// The files at a path on this machine, by split.
fn local_files(dataset: &DatasetSpec) -> Result<Splits<PathBuf>, String> {
    let inside = |path: &Path| match &dataset.data_dir {
        Some(folder) => path.join(folder),
        None => path.to_owned(),
    };
    let base = inside(&dataset.path);
    if dataset.data_files.is_empty() {
        return data_files(&base);
    }
    if base.is_file() {
        return Err("is a file, which has no data_files in it: remove one of them".to_owned());
    }
    let mut files = Vec::new();
    for pattern in &dataset.data_files {
        let path = base.join(pattern);
        let found = data_files(&path).map_err(|reason| format!("{}: {reason}", path.display()))?;
        files.extend(found.into_iter().flat_map(|(_, paths)| paths));
    }
    Ok(vec![(TRAIN.to_owned(), files)])
}

/// Refuses a split that is not there, and says which are.
fn check_splits<P>(dataset: &DatasetSpec, splits: &Splits<P>) -> Result<(), String> {
    let asked = dataset.rows().map_err(|reason| format!("split {reason}"))?;
    let names: Vec<&str> = splits.iter().map(|(name, _)| name.as_str()).collect();
    let missing = asked
        .slices()
        .iter()
        .find(|slice| !names.contains(&slice.name()));
    let Some(missing) = missing else {
        return Ok(());
    };
    Err(match names.as_slice() {
        [TRAIN] => format!(
            "split {} is not there: a file, a pattern, or files that do not name their split are the split train; name the files of the rows that are meant under path or data_files",
            missing.name()
        ),
        names => format!(
            "split {} is not there; it has {}: say which with split",
            missing.name(),
            names.join(", ")
        ),
    })
}

/// Fetches the files of the splits that the job reads.
fn fetch(
    sources: &Sources<'_>,
    index: usize,
    dataset: &mut DatasetSpec,
    repo: &RepoId,
) -> Result<Option<String>, String> {
    let told = |error: common::hub::HubError| error.to_string();
    let hub = sources.hub()?;
    let revision = dataset
        .revision
        .clone()
        .or_else(|| earlier_commit(sources.earlier, index, dataset))
        .unwrap_or_else(|| MAIN.to_owned());
    let mut listing = hub
        .listing(repo, &revision, sources.progress)
        .map_err(told)?;
    let mut splits = match files_of(sources, dataset, &listing) {
        Ok(splits) => splits,
        // A dataset that only a program of its own makes rows of: the hub has made them.
        Err(Unfound::NoData(reason)) if revision == MAIN => {
            let converted = hub.listing(repo, PARQUET, sources.progress);
            listing = converted.map_err(|_| reason.clone())?;
            converted_files(dataset, &listing).map_err(|other| format!("{reason}; {other}"))?
        }
        Err(Unfound::NoData(reason) | Unfound::Told(reason)) => return Err(reason),
    };
    check_splits(dataset, &splits)?;
    let asked = dataset.rows().map_err(|reason| format!("split {reason}"))?;
    splits.retain(|(name, _)| asked.slices().iter().any(|slice| slice.name() == name));
    let wanted = |path: &str| {
        splits
            .iter()
            .any(|(_, files)| files.iter().any(|file| file == path))
    };
    let snapshot = hub
        .fetch(&listing, &wanted, sources.progress)
        .map_err(told)?;
    let here = |file: String| snapshot.folder.join(file);
    dataset.files = splits
        .into_iter()
        .map(|(name, files)| (name, files.into_iter().map(here).collect()))
        .collect();
    dataset.revision = Some(snapshot.commit);
    Ok(snapshot.is_partial.then(|| {
        format!(
            "{}: the hub could not be asked, and what its cache has is used",
            dataset.path.display()
        )
    }))
}

/// Why there are no files to read.
enum Unfound {
    /// No file of the repository is one of rows.
    NoData(String),
    Told(String),
}

/// The data files of a repository, by split: as the job names them, as its card lists them, or as their names tell.
fn files_of(
    sources: &Sources<'_>,
    dataset: &DatasetSpec,
    listing: &Listing,
) -> Result<Splits<String>, Unfound> {
    let paths: Vec<&str> = listing
        .files
        .iter()
        .map(|file| file.path.as_str())
        .collect();
    let inside = |folder: &str| -> Vec<&str> {
        let folder = format!("{}/", folder.trim_matches('/'));
        let all = paths.iter().copied();
        all.filter(|path| path.starts_with(&folder)).collect()
    };
    let paths = match &dataset.data_dir {
        Some(folder) => inside(folder),
        None => paths.clone(),
    };
    if !dataset.data_files.is_empty() {
        let folder = dataset
            .data_dir
            .as_deref()
            .map(|folder| folder.trim_matches('/'));
        let files: Vec<String> = dataset
            .data_files
            .iter()
            .map(|file| folder.map_or_else(|| file.clone(), |folder| format!("{folder}/{file}")))
            .collect();
        let asked = patterns(&json!(files)).map_err(Unfound::Told)?;
        return matching(&asked, &paths).map_err(Unfound::Told);
    }
    let configs = card(sources, listing)
        .and_then(|card| configs_of(&card).map_err(|reason| format!("{CARD}: {reason}")))
        .map_err(Unfound::Told)?;
    let names: Vec<&str> = configs.iter().map(|config| config.name.as_str()).collect();
    let config = match &dataset.name {
        Some(name) => configs.iter().find(|config| config.name == *name),
        None => configs.iter().find(|config| config.is_default),
    };
    match (config, &dataset.name) {
        (Some(config), _) => config.files(&paths).map_err(Unfound::NoData),
        (None, Some(name)) if !names.is_empty() => Err(Unfound::Told(format!(
            "it has no configuration `{name}`, but {}",
            names.join(", ")
        ))),
        (None, None) if !names.is_empty() => Err(Unfound::Told(format!(
            "say with name which of its configurations is meant: {}",
            names.join(", ")
        ))),
        // Without a card that lists them, a configuration may be a folder.
        (None, Some(name)) => match inside(name).as_slice() {
            [] => Err(Unfound::NoData(format!(
                "it has no configurations, and no folder `{name}`"
            ))),
            files => split_files(files).map_err(Unfound::NoData),
        },
        (None, None) => split_files(&paths).map_err(Unfound::NoData),
    }
}

/// The front matter of the dataset's card; empty where there is none.
fn card(sources: &Sources<'_>, listing: &Listing) -> Result<Value, String> {
    if !listing.files.iter().any(|file| file.path == CARD) {
        return Ok(Value::Null);
    }
    let hub = sources.hub()?;
    let bytes = hub
        .read(listing, CARD, MAX_CARD_BYTES, sources.progress)
        .map_err(|error| error.to_string())?;
    front_matter(&String::from_utf8_lossy(&bytes)).map_err(|reason| format!("{CARD}: {reason}"))
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
        let split = split.strip_prefix("partial-").unwrap_or(split);
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

/// The commit that the run in the output folder began with, if its dataset was this one.
fn earlier_commit(earlier: Option<&Value>, index: usize, dataset: &DatasetSpec) -> Option<String> {
    let known = earlier?.get("datasets")?.get(index)?;
    let is_same = known["path"].as_str() == dataset.path.to_str();
    let commit = known["revision"].as_str()?;
    is_same.then(|| commit.to_owned())
}
