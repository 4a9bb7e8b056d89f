//! What the data of a job came to, in numbers.

use serde::{Deserialize, Serialize};

use crate::plan::DataSize;
use crate::text::count;

/// What the data came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataCounts {
    pub rows: u64,
    /// Tokenised texts, training and validation.
    pub examples: u64,
    pub eval_examples: u64,
    /// Blocks to train on.
    pub blocks: u64,
    pub eval_blocks: u64,
    /// In all blocks, without padding. The token at which an example is cut is in both pieces.
    pub tokens: u64,
    pub trained_tokens: u64,
    pub padding_tokens: u64,
    /// Over all examples in blocks, or their pieces, the square of their tokens.
    pub squared_tokens: u64,
    /// Tokens of the longest example.
    pub longest: u64,
    /// Examples longer than a block, cut into pieces.
    pub split_examples: u64,
    /// Pieces and examples left out because nothing in them is learned.
    pub untrained_pieces: u64,
    pub untrained_tokens: u64,
    /// Examples of a template that ends no turn with a special token: EOS was added.
    pub added_eos: u64,
    /// The template prints the date, so another day gives other tokens.
    pub dated_template: bool,
    /// Rows that became several examples, since the template shows an answer otherwise once the conversation goes on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub divided_rows: u64,
    /// What of the rows was passed over, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl DataCounts {
    /// What defaults follow. Where no example was cut, it is the same for blocks of any length.
    pub(super) fn size(&self, model_positions: Option<usize>) -> DataSize {
        DataSize {
            examples: self.examples,
            longest: self.longest,
            tokens: self.tokens + self.untrained_tokens,
            model_positions,
        }
    }

    /// Tokens of the text that a token attends in, on average over all tokens.
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
        let told: Vec<String> = cut.into_iter().chain(left_out).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}
