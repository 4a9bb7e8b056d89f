//! The data files that a path stands for: a file, the files of a folder by split, or those that a pattern matches.
//!
//! Enters: a path on this machine. Leaves: files by split, in the order in which they are read. Never reads data, follows no link to a
//! folder, and looks at a bounded number of files.

use std::borrow::Cow;
use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern, PatternError, glob_with};
use serde_json::Value as Json;

use super::splits::{Splits, is_data, split_files};
use crate::job::TRAIN;

/// Most entries of a folder and those in it.
const MAX_ENTRIES: usize = 1 << 17;

/// Deepest folder in a folder.
const MAX_DEPTH: usize = 32;

/// Largest file of `datasets` about what a folder holds.
const MAX_STATE_BYTES: u64 = 16 << 20;

/// The files at a path by split. A file, or what a pattern matches, is the split `train`.
pub fn data_files(path: &Path) -> Result<Splits<PathBuf>, String> {
    if path.is_dir() {
        return folder(path);
    }
    let text = path.to_string_lossy();
    if path.exists() || !text.contains(['*', '?', '[']) {
        return Ok(vec![(TRAIN.to_owned(), vec![path.to_owned()])]);
    }
    Ok(vec![(TRAIN.to_owned(), matching(&text)?)])
}

/// The files that a pattern matches, sorted by name: `*`, `?` and `[...]` within a name, `**` for any folders.
fn matching(pattern: &str) -> Result<Vec<PathBuf>, String> {
    let found = glob_with(pattern, options()).map_err(broken)?;
    let mut files = Vec::new();
    for path in found.take(MAX_ENTRIES) {
        let path = path.map_err(|error| error.to_string())?;
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort_unstable();
    // A link to a folder above leads to the same files again and again.
    let mut seen = HashSet::new();
    files.retain(|file| seen.insert(file.canonicalize().unwrap_or_else(|_| file.clone())));
    only_data(files, |file| {
        file.to_string_lossy().replace('\\', "/").into()
    })
}

/// Those of the paths that a pattern matches, as on this machine: where they are elsewhere, relative and with `/`.
pub fn matching_paths(pattern: &str, paths: &[&str]) -> Result<Vec<String>, String> {
    let pattern = Pattern::new(pattern).map_err(broken)?;
    let mut files: Vec<String> = Vec::new();
    for path in paths {
        if pattern.matches_with(path, options()) {
            files.push((*path).to_owned());
        }
    }
    files.sort_unstable();
    only_data(files, |file| file.into())
}

/// Leaves out what only a pattern of everything matches, such as a README.
fn only_data<P>(mut files: Vec<P>, name: impl Fn(&P) -> Cow<'_, str>) -> Result<Vec<P>, String> {
    if files.len() > 1 {
        files.retain(|file| is_data(&name(file)));
    }
    match files.is_empty() {
        true => Err("is a pattern that no data file matches".to_owned()),
        false => Ok(files),
    }
}

fn options() -> MatchOptions {
    MatchOptions {
        require_literal_separator: true,
        require_literal_leading_dot: true,
        ..MatchOptions::new()
    }
}

fn broken(error: PatternError) -> String {
    format!(
        "is a pattern that is broken at character {}: {}",
        error.pos + 1,
        error.msg
    )
}

fn folder(folder: &Path) -> Result<Splits<PathBuf>, String> {
    if let Some(splits) = saved_splits(folder)? {
        return Ok(splits);
    }
    if let Some(files) = saved_files(folder)? {
        return Ok(vec![(TRAIN.to_owned(), files)]);
    }
    let paths = files_in(folder)?;
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let splits = split_files(&paths).map_err(|reason| format!("is a folder that {reason}"))?;
    let splits = splits.into_iter().map(|(split, files)| {
        let files = files.iter().map(|file| folder.join(file));
        (split, files.collect())
    });
    Ok(splits.collect())
}

/// The paths of all files in a folder, relative to it and with `/`; hidden ones are left out.
pub fn files_in(folder: &Path) -> Result<Vec<String>, String> {
    let mut paths = Vec::new();
    walk(folder, "", 0, &mut paths)?;
    paths.sort_unstable();
    Ok(paths)
}

/// Whether a folder is what `save_to_disk` of the library `datasets` writes.
pub fn is_saved(folder: &Path) -> bool {
    ["dataset_dict.json", "state.json"]
        .iter()
        .any(|name| folder.join(name).is_file())
}

fn walk(root: &Path, within: &str, depth: usize, paths: &mut Vec<String>) -> Result<(), String> {
    let shown = root.join(within);
    let entries = std::fs::read_dir(&shown).map_err(|error| error.to_string())?;
    for entry in entries {
        let entry = entry.map_err(|error| error.to_string())?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            continue;
        };
        if name.starts_with('.') {
            continue;
        }
        let path = match within.is_empty() {
            true => name.to_owned(),
            false => format!("{within}/{name}"),
        };
        let kind = entry.file_type().map_err(|error| error.to_string())?;
        if kind.is_dir() && depth < MAX_DEPTH {
            walk(root, &path, depth + 1, paths)?;
        } else if kind.is_file() || (kind.is_symlink() && entry.path().is_file()) {
            paths.push(path);
        }
        if paths.len() > MAX_ENTRIES {
            return Err(format!(
                "is a folder with more than {MAX_ENTRIES} files: name those that are meant"
            ));
        }
    }
    Ok(())
}

/// The splits of a `DatasetDict` that was saved to disk.
fn saved_splits(folder: &Path) -> Result<Option<Splits<PathBuf>>, String> {
    let Some(state) = read_state(&folder.join("dataset_dict.json"))? else {
        return Ok(None);
    };
    let names = state.get("splits").and_then(Json::as_array);
    let mut splits = Vec::new();
    for name in names.into_iter().flatten().filter_map(Json::as_str) {
        if let Some(files) = saved_files(&folder.join(plain(name)?))? {
            splits.push((name.to_owned(), files));
        }
    }
    Ok(Some(splits).filter(|splits| !splits.is_empty()))
}

/// The files of a `Dataset` that was saved to disk.
fn saved_files(folder: &Path) -> Result<Option<Vec<PathBuf>>, String> {
    let Some(state) = read_state(&folder.join("state.json"))? else {
        return Ok(None);
    };
    let Some(files) = state.get("_data_files").and_then(Json::as_array) else {
        return Ok(None);
    };
    let names = files
        .iter()
        .filter_map(|file| file.get("filename")?.as_str());
    let files = names.map(|name| Ok(folder.join(plain(name)?)));
    files.collect::<Result<_, String>>().map(Some)
}

/// A name that leads nowhere else.
fn plain(name: &str) -> Result<&str, String> {
    let is_plain = !name.is_empty() && name != ".." && !name.contains(['/', '\\']);
    is_plain
        .then_some(name)
        .ok_or_else(|| format!("names the file `{name}` outside of its folder"))
}

fn read_state(path: &Path) -> Result<Option<Json>, String> {
    let Ok(file) = std::fs::File::open(path) else {
        return Ok(None);
    };
    let mut text = String::new();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    file.take(MAX_STATE_BYTES)
        .read_to_string(&mut text)
        .map_err(|error| format!("its `{name}`: {error}"))?;
    Ok(serde_json::from_str(&text).ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The files that a path stands for in a folder with these files.
    fn found(files: &[(&str, &str)], path: &str) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        let splits = data_files(&folder.path().join(path))?;
        let mut shown = Vec::new();
        for (split, files) in &splits {
            for file in files {
                let file = file.strip_prefix(folder.path()).unwrap();
                shown.push(format!("{split} {}", file.display()));
            }
        }
        Ok(shown)
    }

    const SOME: [(&str, &str); 5] = [
        ("b.jsonl", ""),
        ("a.jsonl", ""),
        ("in/c10.jsonl", ""),
        ("in/.hidden.jsonl", ""),
        ("README.md", ""),
    ];

    #[test]
    fn a_folder_is_its_data_files_by_split() {
        let all = ["train a.jsonl", "train b.jsonl", "train in/c10.jsonl"];
        assert_eq!(found(&SOME, "").unwrap(), all);
        let named = [("set/test.csv", ""), ("set/train.csv", "")];
        assert_eq!(
            found(&named, "").unwrap(),
            ["train set/train.csv", "test set/test.csv"]
        );
        let reason = found(&[("x.py", "")], "").unwrap_err();
        assert!(
            reason.starts_with("is a folder that has no data files"),
            "{reason}"
        );
    }

    #[test]
    fn a_pattern_is_the_files_that_it_matches_by_name() {
        let check = |pattern, expected: &[&str]| {
            assert_eq!(found(&SOME, pattern).unwrap(), expected, "{pattern}");
        };
        check("*.jsonl", &["train a.jsonl", "train b.jsonl"]);
        check("*", &["train a.jsonl", "train b.jsonl"]);
        check("[b-z]*.jsonl", &["train b.jsonl"]);
        check("**/?10.jsonl", &["train in/c10.jsonl"]);
        check(
            "**/*.jsonl",
            &["train a.jsonl", "train b.jsonl", "train in/c10.jsonl"],
        );
        assert!(
            found(&SOME, "*.csv")
                .unwrap_err()
                .contains("no data file matches")
        );
        assert!(found(&SOME, "[a").unwrap_err().contains("broken"));
    }

    #[test]
    fn a_pattern_matches_paths_elsewhere_as_it_does_files_here() {
        let paths: Vec<&str> = SOME.iter().map(|(path, _)| *path).collect();
        let here = |pattern: &str| {
            let found = found(&SOME, pattern)?;
            let plain = found.iter().map(|line| line.replacen("train ", "", 1));
            Ok::<_, String>(plain.collect::<Vec<_>>())
        };
        for pattern in [
            "*.jsonl",
            "*",
            "[b-z]*.jsonl",
            "**/?10.jsonl",
            "**/*.jsonl",
            "*.csv",
        ] {
            assert_eq!(matching_paths(pattern, &paths), here(pattern), "{pattern}");
        }
        assert!(matching_paths("[a", &paths).unwrap_err().contains("broken"));
    }

    #[test]
    fn a_dataset_saved_to_disk_is_read_in_its_own_order() {
        let state = r#"{"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}"#;
        let files = [
            ("dataset_dict.json", r#"{"splits": ["test"]}"#),
            ("test/state.json", state),
            ("test/dataset_info.json", "{}"),
            ("test/a.arrow", ""),
        ];
        assert_eq!(
            found(&files, "").unwrap(),
            ["test test/b.arrow", "test test/a.arrow"]
        );
        assert_eq!(
            found(&files, "test").unwrap(),
            ["train test/b.arrow", "train test/a.arrow"]
        );
        let outside = r#"{"_data_files": [{"filename": "../a.arrow"}]}"#;
        let reason = found(&[("state.json", outside)], "").unwrap_err();
        assert!(reason.contains("outside of its folder"), "{reason}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_folder_above_does_not_repeat_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("x");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("a.jsonl"), "{}").unwrap();
        std::os::unix::fs::symlink("..", inner.join("up")).unwrap();
        let splits = data_files(&folder.path().join("**/*.jsonl")).unwrap();
        assert_eq!(splits.len(), 1);
        assert_eq!(splits[0].1, [inner.join("a.jsonl")]);
    }
}
