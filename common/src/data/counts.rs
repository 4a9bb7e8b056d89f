//! Counts over the data of a job.

use serde::{Deserialize, Serialize};

use crate::plan::DataSize;
use crate::text::count;

/// Counts of rows, examples, blocks and tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataCounts {
    pub rows: u64,
    /// Number of tokenised texts, training and validation.
    pub examples: u64,
    pub eval_examples: u64,
    /// Number of blocks to train on.
    pub blocks: u64,
    pub eval_blocks: u64,
    /// Tokens in all blocks, without padding. The token at which an example is cut is in both pieces.
    pub tokens: u64,
    pub trained_tokens: u64,
    pub padding_tokens: u64,
    /// Sum of the squared lengths, in tokens, of all examples in blocks, or of their pieces.
    pub squared_tokens: u64,
    /// Tokens of the longest example.
    pub longest: u64,
    /// Number of examples longer than a block, which were cut into pieces.
    pub split_examples: u64,
    /// Number of examples longer than a block that were left out, or cut off behind their first tokens; and what they lost.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped_examples: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub truncated_examples: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub excess_tokens: u64,
    /// Number of pieces and examples left out because nothing in them is learned.
    pub untrained_pieces: u64,
    pub untrained_tokens: u64,
    /// Number of examples to which EOS was added, because the template ends no turn with a special token.
    pub added_eos: u64,
    /// Whether the template prints the date, so that another day gives other tokens.
    pub dated_template: bool,
    /// Number of rows that became several examples, since the template shows an answer otherwise once the conversation goes on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub divided_rows: u64,
    /// Number of examples left out because they are shorter than the job wants, and of rows that were there before.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub short_examples: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub duplicate_rows: u64,
    /// What each dataset gives to an epoch, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<SetCounts>,
    /// What of the rows was passed over, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What a dataset gives to an epoch of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetCounts {
    /// Number of its rows that could be used.
    pub rows_read: u64,
    /// Number of rows in an epoch: fewer where only some are taken, more where they come again.
    pub rows: u64,
    pub tokens: u64,
    pub trained_tokens: u64,
}

impl DataCounts {
    /// Adds a piece of an example of the set.
    pub(super) fn add(&mut self, set: usize, tokens: usize, learned: usize) {
        let (tokens, learned) = (tokens as u64, learned as u64);
        self.tokens += tokens;
        self.squared_tokens += tokens * tokens;
        self.trained_tokens += learned;
        self.sets[set].tokens += tokens;
        self.sets[set].trained_tokens += learned;
    }

    /// What a user should know of rows that the job wanted to be left out, in one line.
    pub fn filter_notice(&self, min_sample_len: usize) -> Option<String> {
        let short = (self.short_examples > 0).then(|| {
            format!(
                "left out, because they are shorter than min_sample_len {min_sample_len}: {}",
                count(self.short_examples, "example")
            )
        });
        let duplicates = (self.duplicate_rows > 0).then(|| {
            format!(
                "left out, because the same tokens were there before (dataset_exact_deduplication): {}",
                count(self.duplicate_rows, "row")
            )
        });
        let told: Vec<String> = short.into_iter().chain(duplicates).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// Size of the data, which defaults follow. Where no example was cut, it is the same for blocks of any length.
    pub(super) fn size(&self, model_positions: Option<usize>) -> DataSize {
        DataSize {
            examples: self.examples,
            longest: self.longest,
            tokens: self.tokens + self.untrained_tokens + self.excess_tokens,
            model_positions,
        }
    }

    /// Length of the text that a token attends in, in tokens, on average over all tokens.
    pub fn mean_context(&self) -> f64 {
        self.squared_tokens as f64 / self.tokens.max(1) as f64
    }

    /// What a user should know of examples that were cut or left out, in one line.
    pub fn cut_notice(&self, sequence_len: usize) -> Option<String> {
        let cut = (self.split_examples > 0).then(|| {
            format!(
                "cut into pieces of sequence_len {sequence_len}, with every token to learn kept: {}",
                count(self.split_examples, "example")
            )
        });
        let left_out = (self.untrained_pieces > 0).then(|| {
            format!(
                "left out, because nothing in them is learned: {} ({})",
                count(self.untrained_pieces, "piece"),
                count(self.untrained_tokens, "token")
            )
        });
        let longer = |examples: u64, what: &str| {
            (examples > 0).then(|| {
                format!(
                    "{what} sequence_len {sequence_len}: {} ({} lost)",
                    count(examples, "example"),
                    count(self.excess_tokens, "token")
                )
            })
        };
        let dropped = longer(
            self.dropped_examples,
            "left out, because they are longer than",
        );
        let truncated = longer(self.truncated_examples, "cut off behind");
        let told = [cut, dropped, truncated, left_out];
        let told: Vec<String> = told.into_iter().flatten().collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}
