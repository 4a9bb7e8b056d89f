//! How the rows of several datasets become what is trained on: which rows of each, how often, and in what order.

use serde::{Deserialize, Serialize};

/// Which rows of a dataset are read, behind its split, and how they count among those of the other datasets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// The rows are drawn into so many parts of equal size, of which one is read. Default: all rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<Shard>,
    /// Number of rows that are passed over first. Default: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skip: u64,
    /// The dataset's share of all rows, against those of the other datasets, above 0. Default: what it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// Number of times that every row comes in an epoch, at least 2. Default: once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeat: Option<u64>,
}

/// One of several parts of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Number of parts, at least 1.
    pub count: u64,
    /// Which of them, from 0.
    pub index: u64,
}

impl Selection {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What is made of the rows of all datasets together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MixtureSpec {
    /// Default: concat.
    #[serde(default, skip_serializing_if = "MixStrategy::is_concat")]
    pub strategy: MixStrategy,
    /// Probability with which the next row is one of each dataset; together 1. Default: none, the datasets take turns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probabilities: Vec<f64>,
    /// Whether the rows of each dataset are drawn into another order before they are joined. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shuffle_sets: bool,
    /// Fewest tokens of an example; shorter ones are left out. Default: 0.
    #[serde(default, skip_serializing_if = "is_none")]
    pub min_sample_len: usize,
    /// Whether a row whose tokens were there before is left out. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deduplicate: bool,
    /// Whether examples are packed in their order, each beside the one before if there is room. Default: off, best fit first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packs_in_order: bool,
}

impl MixtureSpec {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How the datasets are joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixStrategy {
    /// One after the other, all rows of each.
    #[default]
    Concat,
    /// By turns or at random, until the first of them has no more rows.
    InterleaveUnder,
    /// By turns or at random, until every row was there; datasets that are over begin again.
    InterleaveOver,
    /// By turns or at random, until every row was there once.
    InterleaveOnce,
}

impl MixStrategy {
    fn is_concat(&self) -> bool {
        *self == Self::Concat
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_none(number: &usize) -> bool {
    *number == 0
}
