//! How the rows of several datasets become one set.

use super::super::fields::TEST_DATASETS;
use super::super::read::Reader;
use super::super::spec::{DatasetSpec, MixStrategy, MixtureSpec, Selection, Shard};

/// Most parts that a dataset is cut into, and times that it comes in an epoch.
const MAX_SHARDS: u64 = 1_000_000;
const MAX_REPEAT: u64 = 1000;

/// How far from 1 the sum of probabilities may be, for those that were rounded.
const ROUNDING: f64 = 1e-6;

const STRATEGIES: &[(&[&str], MixStrategy)] = &[
    (&["concat"], MixStrategy::Concat),
    (
        &["interleave_under", "first_exhausted"],
        MixStrategy::InterleaveUnder,
    ),
    (
        &["interleave_over", "all_exhausted"],
        MixStrategy::InterleaveOver,
    ),
    (
        &["interleave_once", "all_exhausted_without_replacement"],
        MixStrategy::InterleaveOnce,
    ),
];

/// Reads which rows of a dataset are read.
pub(super) fn selection(reader: &mut Reader<'_>, entry: &str) -> Selection {
    let name = |field: &str| format!("{entry}.{field}");
    Selection {
        shard: shard(reader, entry),
        skip: reader.whole(&name("skip"), 0..=u64::MAX).unwrap_or(0),
        fraction: reader.number(&name("fraction"), "a number above 0", |n| n > 0.0),
        repeat: reader
            .whole(&name("repeat"), 1..=MAX_REPEAT)
            .filter(|times| *times > 1),
    }
}

fn shard(reader: &mut Reader<'_>, entry: &str) -> Option<Shard> {
    let name = |field: &str| format!("{entry}.{field}");
    let count = reader.whole(&name("shards"), 1..=MAX_SHARDS);
    let part = reader.whole(&name("shards_idx"), 0..=MAX_SHARDS - 1);
    let Some(count) = count else {
        if let Some(given) = reader.given(&name("shards_idx"))
            && reader.given(&name("shards")).is_none()
        {
            let message = "needs shards, the number of parts that it is one of";
            reader.problem(given, message.to_owned());
        }
        return None;
    };
    let index = part.unwrap_or(0);
    if index >= count
        && let Some(given) = reader.given(&name("shards_idx"))
    {
        let message = format!("must be below shards, {count}: the parts are numbered from 0");
        reader.problem(given, message);
    }
    Some(Shard { count, index })
}

/// Reads how the datasets are joined, and which of their examples are left out.
pub(super) fn mixture(reader: &mut Reader<'_>, datasets: &[DatasetSpec]) -> MixtureSpec {
    let strategy = reader.choice("mix_strategy", STRATEGIES);
    let strategy = strategy.unwrap_or_default();
    let shuffle_sets = reader.switch("shuffle_before_merging_datasets") == Some(true);
    let packs_in_order = reader.switch("sample_packing_sequentially") == Some(true);
    check_fractions(reader, datasets);
    refuse_for_evaluation(reader);
    let probabilities = probabilities(reader, strategy, datasets.len());
    MixtureSpec {
        strategy,
        probabilities,
        // As Axolotl has it, which joins nothing where there is one dataset.
        shuffle_sets: shuffle_sets && datasets.len() > 1,
        min_sample_len: reader
            .size("min_sample_len", 0..=super::MAX_SEQUENCE_LEN as u64)
            .unwrap_or(0),
        deduplicate: reader.switch("dataset_exact_deduplication") == Some(true),
        packs_in_order: packs_in_order && reader.switch("sample_packing") != Some(false),
    }
}

/// Refuses what says how training data is joined in entries of `test_datasets`, whose rows are all evaluated once.
fn refuse_for_evaluation(reader: &mut Reader<'_>) {
    for index in 0..reader.merged.datasets(TEST_DATASETS) {
        for field in ["fraction", "weight", "repeat"] {
            if let Some(given) = reader.given(&format!("{TEST_DATASETS}.{index}.{field}")) {
                let message = "is for data to train on: of data to evaluate every row is taken once; give split or max_samples";
                reader.problem(given, message.to_owned());
            }
        }
    }
}

/// Checks that all datasets have a share of the rows, or none.
fn check_fractions(reader: &mut Reader<'_>, datasets: &[DatasetSpec]) {
    let with = |index: usize| reader.given(&format!("datasets.{index}.fraction"));
    let given: Vec<_> = (0..datasets.len()).filter_map(with).collect();
    let Some(first) = given.first() else {
        return;
    };
    if given.len() < datasets.len() {
        let message = "is the dataset's share of all rows, so give it for all datasets or for none; for a share of its own rows \
                       write split: 'train[:10%]'";
        reader.problem(first, message.to_owned());
    } else if datasets.len() == 1 {
        let notice = "fraction is a dataset's share of the rows of all datasets (as in TRL), and there is one: all of it is read; for a \
                      share of its rows write split: 'train[:10%]'";
        reader.notices.push(notice.to_owned());
    }
}

/// Reads how likely the next row is one of each dataset: all probabilities in one list, or a weight with each dataset.
fn probabilities(reader: &mut Reader<'_>, strategy: MixStrategy, datasets: usize) -> Vec<f64> {
    let listed = listed(reader, datasets);
    let weights = weights(reader, datasets);
    let name = match (listed.is_empty(), weights.is_empty()) {
        (true, true) => return Vec::new(),
        (false, _) => "interleave_probs",
        (true, false) => "datasets.0.weight",
    };
    let Some(given) = reader.given(name) else {
        return Vec::new();
    };
    if !listed.is_empty() && !weights.is_empty() {
        let message = "and the weight of a dataset both decide how often its rows come; remove one";
        reader.problem(given, message.to_owned());
    }
    let probabilities = if listed.is_empty() { weights } else { listed };
    if strategy == MixStrategy::Concat {
        let message = "asks for rows of the datasets at random: say until when, with mix_strategy: interleave_under (until one has \
                       no more), interleave_over (until all were there) or interleave_once";
        reader.problem(given, message.to_owned());
    } else if strategy != MixStrategy::InterleaveUnder && probabilities.contains(&0.0) {
        let message =
            "leaves a dataset out, and mix_strategy waits for its rows; remove that dataset";
        reader.problem(given, message.to_owned());
    }
    probabilities
}

fn listed(reader: &mut Reader<'_>, datasets: usize) -> Vec<f64> {
    let Some(texts) = reader.texts("interleave_probs", Some(',')) else {
        return Vec::new();
    };
    let Some(given) = reader.given("interleave_probs") else {
        return Vec::new();
    };
    // In quotes the commas are still there.
    let parts = texts.iter().flat_map(|text| text.split(','));
    let numbers: Option<Vec<f64>> = parts
        .map(|text| super::parse_number(text.trim()).filter(|n| (0.0..=1.0).contains(n)))
        .collect();
    let Some(numbers) = numbers else {
        reader.wrong(given, "a list of probabilities, from 0 to 1");
        return Vec::new();
    };
    let sum: f64 = numbers.iter().sum();
    if numbers.len() != datasets {
        let message = format!(
            "has {}, and there are {}: give one for each",
            crate::text::count(numbers.len() as u64, "number"),
            crate::text::count(datasets as u64, "dataset")
        );
        reader.problem(given, message);
    } else if (sum - 1.0).abs() > ROUNDING {
        reader.problem(given, format!("adds up to {sum}, and probabilities to 1"));
    }
    numbers
}

/// The weights of the datasets, as probabilities.
fn weights(reader: &mut Reader<'_>, datasets: usize) -> Vec<f64> {
    let mut weights = Vec::new();
    let mut first = None;
    for index in 0..datasets {
        let name = format!("datasets.{index}.weight");
        let weight = reader.number(&name, "a number, 0 or more", |n| n >= 0.0);
        first = first.or(reader.given(&name));
        weights.extend(weight);
    }
    let Some(first) = first else {
        return Vec::new();
    };
    let sum: f64 = weights.iter().sum();
    if weights.len() < datasets {
        reader.problem(
            first,
            "is given for some datasets only: give it for all of them".to_owned(),
        );
        return Vec::new();
    }
    if sum <= 0.0 || !sum.is_finite() {
        reader.problem(first, "leaves every dataset out".to_owned());
        return Vec::new();
    }
    weights.iter().map(|weight| weight / sum).collect()
}

/// Whether every epoch has its own order of blocks.
pub(super) fn shuffle(reader: &mut Reader<'_>) -> bool {
    let shuffle = reader.switch("shuffle");
    let in_order = reader.switch("curriculum_sampling") == Some(true);
    if in_order
        && shuffle == Some(true)
        && let Some(given) = reader.given("shuffle")
    {
        let message = "and curriculum_sampling both decide the order, and differ; remove one";
        reader.problem(given, message.to_owned());
    }
    !in_order && shuffle.unwrap_or(true)
}
