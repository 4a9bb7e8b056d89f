//! Which files of a folder or a repository are the rows of a dataset: as the job names them, as the card lists them, or as their
//! names tell.
//!
//! Enters: the paths in it, and the front matter of its card. Leaves: those of data by split. Reads no file.

use common::data::card::{configs_of, matching};
use common::data::splits::{Splits, split_files};
use common::job::DatasetSpec;
use serde_json::Value;

/// The card of a folder or a repository.
pub const CARD: &str = "README.md";
pub const MAX_CARD_BYTES: u64 = 4 << 20;

/// Name of the configuration of a dataset that lists none.
const DEFAULT: &str = "default";

/// Why there are no files to read.
pub enum Unfound {
    /// No file of the repository is one of rows.
    NoData(String),
    Told(String),
}

/// The data files of a repository, by split: as the job names them, as its card lists them, or as their names tell.
pub fn files_of(
    dataset: &DatasetSpec,
    paths: &[&str],
    card: &Value,
) -> Result<Splits<String>, Unfound> {
    let inside = |folder: &str| -> Vec<&str> {
        let folder = format!("{}/", folder.trim_matches('/'));
        let all = paths.iter().copied();
        all.filter(|path| path.starts_with(&folder)).collect()
    };
    let paths = match &dataset.data_dir {
        Some(folder) => inside(folder),
        None => paths.to_vec(),
    };
    let configs = configs_of(card)
        .map_err(|reason| Unfound::Told(format!("has a {CARD} that cannot be used: {reason}")))?;
    let names: Vec<&str> = configs.iter().map(|config| config.name.as_str()).collect();
    let config = match &dataset.name {
        Some(name) => configs.iter().find(|config| config.name == *name),
        None => configs.iter().find(|config| config.is_default),
    };
    let is_known = dataset.name.as_deref().is_none_or(|name| name == DEFAULT) || config.is_some();
    let named = dataset.named_files();
    if !named.is_empty() && is_known {
        let folder = dataset.data_dir.as_deref().unwrap_or_default();
        let folder = match folder.trim_matches('/') {
            "" => String::new(),
            folder => format!("{folder}/"),
        };
        let within = |file: String| format!("{folder}{file}");
        let asked = named.into_iter();
        let asked = asked.map(|(split, files)| (split, files.into_iter().map(within).collect()));
        return matching(&asked.collect(), &paths).map_err(Unfound::Told);
    }
    match (config, &dataset.name) {
        (Some(config), _) => config.files(&paths).map_err(Unfound::NoData),
        (None, Some(name)) if !names.is_empty() => Err(Unfound::Told(format!(
            "has no configuration `{name}`, but {}",
            names.join(", ")
        ))),
        (None, None) if !names.is_empty() => Err(Unfound::Told(format!(
            "has several configurations, and none is the default: say with name which is meant, of {}",
            names.join(", ")
        ))),
        // What every dataset without configurations is called.
        (None, Some(name)) if name == DEFAULT => split_files(&paths).map_err(Unfound::NoData),
        // Without a card that lists them, a configuration may be a folder.
        (None, Some(name)) => match inside(name).as_slice() {
            [] => Err(Unfound::NoData(format!(
                "has no configurations, and no folder `{name}`"
            ))),
            files => split_files(files).map_err(Unfound::NoData),
        },
        (None, None) => split_files(&paths).map_err(Unfound::NoData),
    }
}
