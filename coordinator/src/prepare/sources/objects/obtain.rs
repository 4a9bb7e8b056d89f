//! A dataset in an object store becomes files on this disk: an object, a folder with its splits and its card, or a pattern.

use std::collections::{BTreeSet, HashMap};

use common::data::paths::matching_paths;
use common::data::splits::Splits;
use common::hub::WebFile;
use common::job::{DatasetSpec, TRAIN, front_matter};
use serde_json::Value;

use super::super::access::Sources;
use super::super::folder::{CARD, MAX_CARD_BYTES, Unfound, files_of};
use super::super::list::List;
use super::super::splits::{check_splits, choose_split, not_of_here};
use super::address::Address;
use super::fetched::Fetched;
use super::locate::{Kind, Located, locate};

const STALE: &str = "its store could not be asked, and the copy in the hub's cache is used";

/// Fetches the files of a dataset whose path is an address in an object store.
pub fn obtain(
    sources: &Sources<'_>,
    entry: (List, usize),
    dataset: &mut DatasetSpec,
) -> Result<Option<String>, String> {
    let address = Address::parse(&dataset.path.to_string_lossy())?;
    let located = locate(sources, entry, &address)?;
    check_fields(dataset, located.kind)?;
    let mut pinned: Vec<(String, String)> = Vec::new();
    let mut splits = match located.kind {
        Kind::Object => vec![(TRAIN.to_owned(), located.names.clone())],
        Kind::Pattern => vec![(TRAIN.to_owned(), matched(&located, &address)?)],
        Kind::Folder => files_of_folder(&located, dataset, &mut pinned)?,
    };
    choose_split(entry.0, dataset, &splits);
    check_splits(dataset, &splits)?;
    let asked = dataset.rows().map_err(|reason| format!("split {reason}"))?;
    let all: Vec<String> = splits.iter().flat_map(|(_, names)| names.clone()).collect();
    splits.retain(|(name, _)| asked.reads(name));
    let (files, is_stale) = fetch(&located, &splits, &mut pinned)?;
    pinned.extend(unread(&located, &all, &files));
    dataset.files = splits
        .into_iter()
        .map(|(split, names)| {
            let files = names.iter().filter_map(|name| files.get(name));
            (split, files.map(|file| file.path.clone()).collect())
        })
        .collect();
    dataset.pinned = pinned;
    let stale = is_stale.then(|| format!("{}: {STALE}", dataset.shown()));
    let passed_over = not_of_here(dataset, located.kind == Kind::Object);
    let notices: Vec<String> = stale.into_iter().chain(passed_over).collect();
    Ok((!notices.is_empty()).then(|| notices.join("; ")))
}

/// Fetches the object, or those of the pattern, that `data_files` names by its address.
pub fn fetch_named(
    sources: &Sources<'_>,
    entry: (List, usize),
    text: &str,
) -> Result<Vec<Fetched>, String> {
    let about = |reason: String| format!("{text}: {reason}");
    let address = Address::parse(text)?;
    let located = locate(sources, entry, &address).map_err(about)?;
    let names = match located.kind {
        Kind::Object => located.names.clone(),
        Kind::Pattern => matched(&located, &address).map_err(about)?,
        Kind::Folder => {
            return Err(about(
                "is a folder: name it under path, or the files in it (`*` stands for all)"
                    .to_owned(),
            ));
        }
    };
    let files = located.fetch(&names).map_err(about)?;
    let fetched = names.iter().zip(files).map(|(name, file)| Fetched {
        name: located.address_of(name),
        path: file.path,
        version: file.version,
        notice: file.is_stale.then(|| STALE.to_owned()),
    });
    Ok(fetched.collect())
}

/// Refuses fields that only a folder has.
fn check_fields(dataset: &DatasetSpec, kind: Kind) -> Result<(), String> {
    let what = match kind {
        Kind::Folder => return Ok(()),
        Kind::Object => "is one object, and no folder",
        Kind::Pattern => "is a pattern, and no folder",
    };
    for (field, is_given) in [
        ("name", dataset.name.is_some() && kind == Kind::Pattern),
        ("data_dir", dataset.data_dir.is_some()),
        ("data_files", !dataset.named_files().is_empty()),
    ] {
        if is_given {
            return Err(format!(
                "{what} that has {field} in it: remove {field}, or name the folder"
            ));
        }
    }
    Ok(())
}

fn matched(located: &Located<'_>, address: &Address) -> Result<Vec<String>, String> {
    matching_paths(located.pattern(address), &names_of(located))
}

fn names_of<'a>(located: &'a Located<'_>) -> Vec<&'a str> {
    located.names.iter().map(String::as_str).collect()
}

/// The files of a folder, which may be a copy of a dataset of the hub, with its card.
fn files_of_folder(
    located: &Located<'_>,
    dataset: &DatasetSpec,
    pinned: &mut Vec<(String, String)>,
) -> Result<Splits<String>, String> {
    let names = names_of(located);
    let mut card = Value::Null;
    if names.contains(&CARD) && located.size(CARD) <= MAX_CARD_BYTES {
        let name = [CARD.to_owned()];
        for file in located.fetch(&name)? {
            let bytes = std::fs::read(&file.path).map_err(|error| format!("{CARD}: {error}"))?;
            card = front_matter(&String::from_utf8_lossy(&bytes))
                .map_err(|reason| format!("{CARD}: {reason}"))?;
            pinned.push((located.address_of(CARD), file.version));
        }
    }
    files_of(dataset, &names, &card).map_err(|unfound| {
        let (Unfound::NoData(reason) | Unfound::Told(reason)) = unfound;
        format!("is a folder that {reason}")
    })
}

/// The addresses of files that nobody reads, without a version: what names them is not to miss them when the run goes on.
fn unread(
    located: &Located<'_>,
    all: &[String],
    read: &HashMap<String, WebFile>,
) -> BTreeSet<(String, String)> {
    let names = all.iter().filter(|name| !read.contains_key(*name));
    names
        .map(|name| (located.address_of(name), String::new()))
        .collect()
}

/// Fetches the files of the splits. Also says whether a store could not be asked.
fn fetch(
    located: &Located<'_>,
    splits: &Splits<String>,
    pinned: &mut Vec<(String, String)>,
) -> Result<(HashMap<String, WebFile>, bool), String> {
    let mut names: Vec<String> = splits.iter().flat_map(|(_, names)| names.clone()).collect();
    names.sort_unstable();
    names.dedup();
    let files = located.fetch(&names)?;
    let is_stale = files.iter().any(|file| file.is_stale);
    for (name, file) in names.iter().zip(&files) {
        pinned.push((located.address_of(name), file.version.clone()));
    }
    Ok((names.into_iter().zip(files).collect(), is_stale))
}
