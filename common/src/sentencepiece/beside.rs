//! The JSON files beside a `tokenizer.model`, and what they name.

use serde_json::Value;

/// What to do with a tokenizer that is not read.
pub(super) const CONVERT: &str =
    "convert it with `AutoTokenizer.from_pretrained(..).save_pretrained(..)` of Transformers";

/// Names of the special tokens that a tokenizer's configuration may give.
pub const SPECIAL_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The JSON files beside a `tokenizer.model`; null where there is none.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    pub config: Value,
    pub tokenizer_config: Value,
    pub special_tokens_map: Value,
    pub added_tokens: Value,
}
