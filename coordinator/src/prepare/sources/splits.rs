//! What a dataset asks for that its files do not have.

use common::data::splits::Splits;
use common::job::{DatasetSpec, TRAIN};

use super::list::List;

/// Splits that are meant where an entry of `test_datasets` names none, the first that is there; else the only one.
const TEST_SPLITS: [&str; 2] = ["test", "validation"];

/// Says which split is meant of data to evaluate that names none, where it has one for that.
pub(super) fn choose_split<P>(list: List, dataset: &mut DatasetSpec, splits: &Splits<P>) {
    if list == List::Evaluated && dataset.split.is_none() {
        let has = |name: &&str| splits.iter().any(|(known, _)| known == name);
        dataset.split = TEST_SPLITS.iter().copied().find(has).map(str::to_owned);
    }
}

/// Refuses a split that is not there, and says which are.
pub fn check_splits<P>(dataset: &DatasetSpec, splits: &Splits<P>) -> Result<(), String> {
    let names: Vec<&str> = splits.iter().map(|(name, _)| name.as_str()).collect();
    let asked = dataset.rows().map_err(|reason| format!("split {reason}"))?;
    let asked = asked.among(&names);
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

/// A line on what only a dataset on the hub has, of one elsewhere. `is_file`: it is one file, so that it has no configurations.
pub fn not_of_here(dataset: &DatasetSpec, is_file: bool) -> Option<String> {
    let told: Vec<String> = [
        dataset
            .revision
            .as_ref()
            .map(|revision| format!("revision {revision}")),
        dataset
            .name
            .as_ref()
            .filter(|_| is_file)
            .map(|name| format!("name {name}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!told.is_empty()).then(|| {
        format!(
            "{}: read as it is, and not from the hub, so this asks for nothing: {}",
            dataset.shown(),
            told.join(", ")
        )
    })
}
