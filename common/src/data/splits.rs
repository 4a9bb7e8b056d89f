//! Which files of a folder or a hub repository belong to which split, by their names, as `datasets` finds them.
//!
//! Enters: paths within the folder. Leaves: the splits with their files, in order. Reads no file.
//!
//! First that rule counts that fits to any file: shards in `data/` that are named SPLIT-00000-of-00001; folders that are named like a
//! split; files that are named like one; else all files are `train`. A name is like a split if a word of it is one of its keywords,
//! where words are apart by anything but letters (`my-train_2.jsonl`).

use super::rows::{Format, NOT_DATA};
use crate::job::TRAIN;

/// The files of each split.
pub type Splits<P> = Vec<(String, Vec<P>)>;

const KEYWORDS: [(&str, &[&str]); 3] = [
    (TRAIN, &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Most names in a message.
const MAX_NAMES: usize = 8;

/// The splits of a folder, given all paths in it, which are relative to it and use `/`. All files of them are of one format: that of
/// most files. An error says why there are none.
pub fn split_files(paths: &[&str]) -> Result<Splits<String>, String> {
    let mut files: Vec<&str> = paths.to_vec();
    files.retain(|path| is_visible(path, "") && is_data(path));
    files.sort_unstable();
    files.dedup();
    let rules = [
        sharded(&files)?,
        by_keyword(&files, true),
        by_keyword(&files, false),
    ];
    let found = rules.into_iter().find(|splits| !splits.is_empty());
    let splits = found.unwrap_or_else(|| vec![(TRAIN.to_owned(), files)]);
    let owned = splits.into_iter().map(|(split, files)| {
        let files = files.into_iter().map(str::to_owned);
        (split, files.collect())
    });
    of_one_format(owned.collect())
}

/// The same splits with the files of the most common format alone. An error where there are none, or of several formats.
pub fn of_one_format(splits: Splits<String>) -> Result<Splits<String>, String> {
    let mut kept = Vec::new();
    let mut known: Option<(String, Option<Format>)> = None;
    for (split, mut files) in splits {
        let format = common_format(&files);
        files.retain(|file| formats(file).any(|found| Some(found) == format) || format.is_none());
        if files.is_empty() {
            continue;
        }
        match &known {
            Some((other, known)) if *known != format => {
                return Err(format!(
                    "its splits have files of different formats ({other}: {}, {split}: {}): name the files that are meant",
                    name(*known),
                    name(format)
                ));
            }
            Some(_) => {}
            None => known = Some((split.clone(), format)),
        }
        kept.push((split, files));
    }
    match kept.is_empty() {
        true => Err(
            "has no data files: their names must end in .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt".to_owned(),
        ),
        false => Ok(kept),
    }
}

fn name(format: Option<Format>) -> &'static str {
    format.map_or("archives", Format::name)
}

/// Whether a path is no hidden file, and in no hidden or special (`__pycache__`) folder, but for those that the pattern names.
pub fn is_visible(path: &str, pattern: &str) -> bool {
    let hidden = |path: &str| {
        let parts = path.split('/');
        let is_hidden = |part: &&str| part.starts_with('.') && !part.trim_matches('.').is_empty();
        parts.filter(is_hidden).count()
    };
    let special = |path: &str| {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        folder
            .split('/')
            .filter(|part| part.starts_with("__"))
            .count()
    };
    hidden(path) == hidden(pattern) && special(path) == special(pattern)
}

/// Whether the name of a file says that it has rows.
pub fn is_data(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    !NOT_DATA.contains(&name) && (formats(path).next().is_some() || is_archive(name))
}

fn is_archive(name: &str) -> bool {
    let name = name.to_lowercase();
    let endings = [
        ".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst",
    ];
    endings.iter().any(|ending| name.ends_with(ending))
}

/// The formats that the endings of a name stand for, which may be several (`a.jsonl.gz`).
fn formats(path: &str) -> impl Iterator<Item = Format> {
    endings(path).filter_map(Format::of_ending)
}

fn endings(path: &str) -> impl Iterator<Item = &str> {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').skip(1).filter(|ending| *ending != "md")
}

/// The format of the most common ending; of two that are equally common that which `datasets` prefers.
fn common_format(files: &[String]) -> Option<Format> {
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for ending in files.iter().flat_map(|file| endings(file)) {
        *counts.entry(ending.to_lowercase()).or_default() += 1;
    }
    let preferred = ["csv", "json", "jsonl", "arrow", "parquet"];
    let rank = |ending: &str| preferred.iter().position(|known| *known == ending);
    let known = counts.iter().filter_map(|(ending, count)| {
        let format = Format::of_ending(ending)?;
        Some(((*count, rank(ending), ending), format))
    });
    known.max_by_key(|(key, _)| *key).map(|(_, format)| format)
}

/// Shards `data/SPLIT-00000-of-00001*.*`, in which any split may be named.
fn sharded<'a>(files: &[&'a str]) -> Result<Splits<&'a str>, String> {
    let mut splits: Splits<&str> = Vec::new();
    for file in files {
        let Some(split) = file.strip_prefix("data/").and_then(shard_of) else {
            continue;
        };
        if !is_split_name(split) {
            return Err(format!(
                "`{file}` names the split `{split}`, which is no name of one: use letters, digits, `_` and `.`"
            ));
        }
        match splits.iter_mut().find(|(known, _)| known == split) {
            Some((_, files)) => files.push(file),
            None => splits.push((split.to_owned(), vec![file])),
        }
    }
    let rank = |split: &str| {
        let known = KEYWORDS.iter().position(|(known, _)| *known == split);
        known.unwrap_or(KEYWORDS.len())
    };
    splits.sort_by(|(one, _), (other, _)| (rank(one), one).cmp(&(rank(other), other)));
    Ok(splits)
}

/// The split of a shard, by its name.
fn shard_of(name: &str) -> Option<&str> {
    let is_digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if name.contains('/') {
        return None;
    }
    let (at, _) = name.rmatch_indices("-of-").find(|(at, _)| {
        let before = name.get(at.saturating_sub(6)..*at);
        let after = name.get(at + 4..at + 9);
        let is_index = before.is_some_and(|text| text.strip_prefix('-').is_some_and(is_digits));
        is_index && after.is_some_and(is_digits)
    })?;
    name.get(at + 9..)?.contains('.').then_some(&name[..at - 6])
}

/// Whether a text is a name of a split: words of letters, digits and `_`, with points between them.
pub fn is_split_name(name: &str) -> bool {
    let is_word =
        |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || c == '_');
    name.split('.').all(is_word)
}

/// Splits by a keyword in the name of a folder, or of the file.
fn by_keyword<'a>(files: &[&'a str], in_folders: bool) -> Splits<&'a str> {
    let mut splits = Vec::new();
    for (split, keywords) in KEYWORDS {
        // The place of what matched decides the order: the keyword, then how it stands in the name.
        let mut found: Vec<((usize, usize), &str)> = Vec::new();
        for file in files {
            let (folders, name) = file.rsplit_once('/').unwrap_or(("", file));
            let names: Vec<&str> = match in_folders {
                true => folders.split('/').collect(),
                false => vec![name],
            };
            let ranks = keywords.iter().enumerate().filter_map(|(index, keyword)| {
                let ranks = names
                    .iter()
                    .filter_map(|name| rank(name, keyword, in_folders));
                ranks.min().map(|rank| (index, rank))
            });
            found.extend(ranks.min().map(|rank| (rank, *file)));
        }
        found.sort_unstable();
        if !found.is_empty() {
            let files = found.into_iter().map(|(_, file)| file);
            splits.push((split.to_owned(), files.collect()));
        }
    }
    splits
}

/// How a keyword stands in a name as a word of its own: the lower, the earlier its files come. None where it does not.
fn rank(name: &str, keyword: &str, is_folder: bool) -> Option<usize> {
    let is_apart = |byte: Option<&u8>| byte.is_some_and(|byte| b"-._ 0123456789".contains(byte));
    let bytes = name.as_bytes();
    let ranks = name.match_indices(keyword).filter_map(|(at, _)| {
        let before = at.checked_sub(1).map(|before| &bytes[before]);
        let after = bytes.get(at + keyword.len());
        match (before, after) {
            (None, None) if is_folder => Some(0),
            (None, after) if is_apart(after) => Some(1),
            (before, None) if is_folder && is_apart(before) => Some(2),
            (before, after) if is_apart(before) && is_apart(after) => Some(3),
            _ => None,
        }
    });
    ranks.min()
}

/// The names of splits, for messages.
pub fn split_names<P>(splits: &Splits<P>) -> String {
    let names: Vec<&str> = splits.iter().map(|(split, _)| split.as_str()).collect();
    match names.len() > MAX_NAMES {
        true => format!("{}, ...", names[..MAX_NAMES].join(", ")),
        false => names.join(", "),
    }
}
