//! The configurations of a dataset, as the front matter of its README.md has them under `configs`.
//!
//! Enters: the front matter, parsed, and the paths of a repository. Leaves: the configurations with the files of their splits. Reads no
//! file.

use glob::{MatchOptions, Pattern};
use serde_json::Value as Json;

use super::splits::{Splits, is_data, is_split_name, is_visible, of_one_format, split_files};
use crate::job::TRAIN;

/// Most configurations of a dataset, and most patterns of one.
const MAX_ENTRIES: usize = 1 << 12;

/// A configuration of a dataset: files that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardConfig {
    pub name: String,
    /// Whether it is the one that is meant where none is named.
    pub is_default: bool,
    /// Folder within the repository in which its files are.
    pub data_dir: Option<String>,
    /// Patterns of the files of each split; None where the names of the files tell the splits.
    pub data_files: Option<Splits<String>>,
}

/// The configurations that a card lists; none where it lists none. An error says what of them is wrong.
pub fn configs_of(card: &Json) -> Result<Vec<CardConfig>, String> {
    let listed = match card.get("configs") {
        None | Some(Json::Null) => return Ok(Vec::new()),
        Some(Json::Array(listed)) if listed.len() <= MAX_ENTRIES => listed,
        Some(_) => return Err("`configs` must be a list of configurations".to_owned()),
    };
    let mut configs: Vec<CardConfig> = Vec::new();
    for (index, config) in listed.iter().enumerate() {
        let Some(name) = config.get("config_name").and_then(Json::as_str) else {
            return Err(format!("`configs[{index}]` has no `config_name`"));
        };
        let is_marked = config.get("default").and_then(Json::as_bool) == Some(true);
        let data_dir = text_of(config, "data_dir", name)?;
        // The later of two with one name counts, as there.
        configs.retain(|known| known.name != name);
        configs.push(CardConfig {
            name: name.to_owned(),
            is_default: name == "default" || is_marked,
            data_dir,
            data_files: match config.get("data_files") {
                None | Some(Json::Null) => None,
                Some(files) => Some(patterns(files).map_err(|reason| {
                    format!("`data_files` of the configuration `{name}` {reason}")
                })?),
            },
        });
    }
    if let [only] = configs.as_mut_slice() {
        only.is_default = true;
    }
    let mut defaults = configs.iter().filter(|config| config.is_default);
    if let (Some(one), Some(other)) = (defaults.next(), defaults.next()) {
        return Err(format!(
            "`configs` has two that are the default, `{}` and `{}`",
            one.name, other.name
        ));
    }
    Ok(configs)
}

fn text_of(config: &Json, key: &str, name: &str) -> Result<Option<String>, String> {
    match config.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!(
            "`{key}` of the configuration `{name}` must be a text"
        )),
    }
}

/// The patterns of each split: a text, a list of texts, or a list of splits with their paths.
pub fn patterns(files: &Json) -> Result<Splits<String>, String> {
    let texts = |files: &Json| -> Option<Vec<String>> {
        match files {
            Json::String(text) => Some(vec![text.clone()]),
            Json::Array(items) if items.len() <= MAX_ENTRIES => {
                let items = items.iter().map(|item| item.as_str().map(str::to_owned));
                items.collect()
            }
            _ => None,
        }
    };
    if let Some(texts) = texts(files) {
        return Ok(vec![(TRAIN.to_owned(), texts)]);
    }
    let mut splits: Splits<String> = Vec::new();
    for item in files.as_array().into_iter().flatten().take(MAX_ENTRIES) {
        let split = item.get("split").and_then(Json::as_str);
        let paths = item.get("path").and_then(texts);
        let (Some(split), Some(paths)) = (split, paths) else {
            return Err("must be paths, or a list of `split` and `path`".to_owned());
        };
        if !is_split_name(split) {
            return Err(format!(
                "names the split `{split}`, which is no name of one: use letters, digits, `_` and `.`"
            ));
        }
        if splits.iter().any(|(known, _)| known == split) {
            return Err(format!("names the split `{split}` twice"));
        }
        splits.push((split.to_owned(), paths));
    }
    match splits.is_empty() {
        true => Err("must be paths, or a list of `split` and `path`".to_owned()),
        false => Ok(splits),
    }
}

impl CardConfig {
    /// The files of its splits among the paths of a repository.
    pub fn files(&self, paths: &[&str]) -> Result<Splits<String>, String> {
        let folder = self.data_dir.as_deref().unwrap_or("").trim_matches('/');
        let folder = match folder.trim_start_matches("./") {
            "" | "." => String::new(),
            folder => format!("{folder}/"),
        };
        let within: Vec<&str> = paths
            .iter()
            .filter_map(|path| path.strip_prefix(&folder))
            .collect();
        let splits = match &self.data_files {
            None => split_files(&within)?,
            Some(patterns) => matching(patterns, &within)?,
        };
        let with_folder = splits.into_iter().map(|(split, files)| {
            let files = files.into_iter().map(|file| format!("{folder}{file}"));
            (split, files.collect())
        });
        Ok(with_folder.collect())
    }
}

/// The files that patterns match, in the order of the patterns, then of their names.
pub fn matching(patterns: &Splits<String>, paths: &[&str]) -> Result<Splits<String>, String> {
    let options = MatchOptions {
        require_literal_separator: true,
        ..MatchOptions::new()
    };
    let mut sorted = paths.to_vec();
    sorted.sort_unstable();
    let mut splits = Vec::new();
    for (split, patterns) in patterns {
        let mut files: Vec<String> = Vec::new();
        for pattern in patterns {
            let text = pattern.trim_start_matches("./");
            let parsed = Pattern::new(text)
                .map_err(|error| format!("the pattern `{pattern}` is broken: {}", error.msg))?;
            let mut found = sorted.iter().filter(|path| {
                parsed.matches_with(path, options) && is_visible(path, text) && is_data(path)
            });
            let before = files.len();
            for path in found.by_ref() {
                if !files.iter().any(|file| file == path) {
                    files.push((*path).to_owned());
                }
            }
            let is_plain = !text.contains(['*', '?', '[']);
            if is_plain && files.len() == before && !files.iter().any(|file| file == text) {
                return Err(format!(
                    "names the file `{pattern}`, which is not there or no data file"
                ));
            }
        }
        splits.push((split.clone(), files));
    }
    of_one_format(splits)
}
