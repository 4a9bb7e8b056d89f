//! Datasets that are no files on this machine and on no hub: standard input, and addresses.

use std::path::{Path, PathBuf};

use common::data::paths::data_files;
use common::data::splits::Splits;
use common::job::{DatasetSpec, STDIN, TRAIN, shown_address};

use super::access::Sources;
use super::address::{self, is_address};
use super::list::List;
use super::objects;
use super::splits::{check_splits, choose_split, not_of_here};
use super::stdin;

/// Takes the rows that come through standard input.
pub fn from_stdin(
    sources: &Sources<'_>,
    entry: (List, usize),
    dataset: &mut DatasetSpec,
) -> Result<Option<String>, String> {
    if sources.count_of_stdin() > 1 {
        return Err("standard input is read once: name it for one dataset alone".to_owned());
    }
    if !dataset.named_files().is_empty() || dataset.data_dir.is_some() {
        return Err("standard input has no files in it: remove data_files and data_dir".to_owned());
    }
    let known = sources.pinned(entry, STDIN);
    let (path, digest) = stdin::obtain(sources.folder, known.as_deref(), sources.progress)?;
    let splits = vec![(TRAIN.to_owned(), vec![path])];
    check_splits(dataset, &splits)?;
    dataset.files = splits;
    dataset.pinned = vec![(STDIN.to_owned(), digest)];
    Ok(not_of_here(dataset, true))
}

/// Whether the dataset names files by their addresses.
pub fn has_addresses(dataset: &DatasetSpec) -> bool {
    let named = dataset.named_files();
    let mut files = named.iter().flat_map(|(_, files)| files);
    is_address(&dataset.path.to_string_lossy())
        || dataset.path.as_os_str().is_empty() && files.any(|file| is_address(file))
}

/// The name by which the version of a file is kept: its address, and where that has more than is shown, a digest of that.
fn pinned_name(address: &str) -> String {
    let shown = shown_address(address);
    match address == shown {
        true => shown,
        false => format!(
            "{shown}#{}",
            &blake3::hash(address.as_bytes()).to_hex()[..16]
        ),
    }
}

/// Fetches the files that are named by their addresses; the others are found beside them.
pub fn from_addresses(
    sources: &Sources<'_>,
    entry: (List, usize),
    dataset: &mut DatasetSpec,
) -> Result<Option<String>, String> {
    let path = dataset.path.to_string_lossy().into_owned();
    let named = match (path.is_empty(), dataset.named_files()) {
        (true, named) => named,
        (false, named) if named.is_empty() && dataset.data_dir.is_none() => {
            vec![(TRAIN.to_owned(), vec![path])]
        }
        _ => {
            return Err("is the address of one file: give the addresses of the others under data_files, without path".to_owned());
        }
    };
    let mut notices: Vec<String> = not_of_here(dataset, true).into_iter().collect();
    let mut splits: Splits<PathBuf> = Vec::new();
    let mut pinned = Vec::new();
    for (split, files) in named {
        let mut paths = Vec::new();
        for file in files {
            if !is_address(&file) {
                let found = data_files(Path::new(&file));
                let found = found.map_err(|reason| format!("{file}: {reason}"))?;
                paths.extend(found.into_iter().flat_map(|(_, paths)| paths));
                continue;
            }
            if objects::service_of(&file).is_some() {
                for object in objects::fetch_named(sources, entry, &file)? {
                    notices.extend(object.notice.map(|notice| format!("{file}: {notice}")));
                    pinned.push((object.name, object.version));
                    paths.push(object.path);
                }
                continue;
            }
            let shown = shown_address(&file);
            let name = pinned_name(&file);
            let known = sources.pinned(entry, &name);
            let fetched = address::fetch(sources, &file, known.as_deref())?;
            notices.extend(fetched.notice.map(|notice| format!("{shown}: {notice}")));
            pinned.push((name, fetched.version));
            paths.push(fetched.path);
        }
        splits.push((split, paths));
    }
    choose_split(entry.0, dataset, &splits);
    check_splits(dataset, &splits)?;
    dataset.files = splits;
    dataset.pinned = pinned;
    Ok((!notices.is_empty()).then(|| notices.join("; ")))
}
