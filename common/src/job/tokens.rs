//! Tokens that a job adds to its tokenizer, and the rows of the embedding and the output layer that are trained beside adapters.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::limits::MAX_VOCABULARY;

/// The last names of the embedding and the output layer.
const EMBEDDING: &str = "embed_tokens";
const HEAD: &str = "lm_head";

/// A token that is added where the tokenizer does not have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    pub text: String,
    /// Whether ordinary text never becomes it and answers are shown without it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_special: bool,
    /// Its id. None until the tokenizer has been read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
}

/// What is trained of the embedding and of the output layer beside adapters. Where the output layer is the embedding, rows of it
/// are the embedding's; what is trained as a whole is a matrix of its own, as in PEFT.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedTokens {
    #[serde(default, skip_serializing_if = "TrainedRows::is_none")]
    pub embedding: TrainedRows,
    #[serde(default, skip_serializing_if = "TrainedRows::is_none")]
    pub head: TrainedRows,
}

/// Rows of a matrix with one for each token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedRows {
    /// The rows of these tokens, all different, in the order in which an adapter has them.
    These(Vec<u32>),
    All,
}

impl Default for TrainedRows {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

impl TrainedRows {
    pub fn is_none(&self) -> bool {
        matches!(self, Self::These(ids) if ids.is_empty())
    }

    /// The rows that are trained each by itself: none where all are.
    pub fn listed(&self) -> &[u32] {
        match self {
            Self::These(ids) => ids,
            Self::All => &[],
        }
    }

    /// Trains the rows of these tokens, too.
    pub fn add(&mut self, more: &[u32]) {
        if let Self::These(ids) = self {
            let mut known: HashSet<u32> = ids.iter().copied().collect();
            ids.extend(more.iter().filter(|id| known.insert(**id)));
        }
    }
}

impl TrainedTokens {
    pub fn is_none(&self) -> bool {
        self.embedding.is_none() && self.head.is_none()
    }

    /// What is trained of a model, whose output layer is the embedding where it is `tied`. None where that would be rows of the one
    /// and not of the other, or of a matrix beside one that is trained as a whole.
    pub fn of_model(self, tied: bool) -> Option<Self> {
        if !tied {
            return Some(self);
        }
        if self.unties() {
            let has_rows = !self.embedding.listed().is_empty() || !self.head.listed().is_empty();
            return (!has_rows).then_some(self);
        }
        let is_same = self.head.is_none() || self.head == self.embedding;
        is_same.then(|| Self {
            embedding: self.embedding,
            head: TrainedRows::default(),
        })
    }

    /// Whether the output layer is not the embedding any more, where it was.
    pub fn unties(&self) -> bool {
        [&self.embedding, &self.head].contains(&&TrainedRows::All)
    }

    /// One more than the largest id that is named.
    pub fn id_bound(&self) -> usize {
        let rows = [&self.embedding, &self.head].into_iter();
        let ids = rows.flat_map(TrainedRows::listed);
        ids.map(|id| *id as usize + 1).max().unwrap_or(0)
    }

    /// What an `adapter_config.json` names of both. None where it names something else, or nothing that can be read.
    pub fn of_adapter(config: &Value) -> Option<Self> {
        let mut trained = Self::default();
        match &config["trainable_token_indices"] {
            Value::Null => {}
            Value::Object(modules) => {
                for (module, listed) in modules {
                    trained.rows_of(module)?.add(&ids(listed)?);
                }
            }
            listed => trained.embedding.add(&ids(listed)?),
        }
        for module in match &config["modules_to_save"] {
            Value::Null => &[],
            listed => listed.as_array()?.as_slice(),
        } {
            *trained.rows_of(module.as_str()?)? = TrainedRows::All;
        }
        (trained.id_bound() <= MAX_VOCABULARY).then_some(trained)
    }

    /// What is trained of the module of that name, or of a path that ends with it.
    pub fn rows_of(&mut self, module: &str) -> Option<&mut TrainedRows> {
        match module.rsplit('.').next() {
            Some(EMBEDDING) => Some(&mut self.embedding),
            Some(HEAD) => Some(&mut self.head),
            _ => None,
        }
    }
}

fn ids(listed: &Value) -> Option<Vec<u32>> {
    let ids = listed.as_array()?.iter();
    ids.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_tied_output_layer_is_trained_as_the_embedding() {
        let these = |ids: &[u32]| TrainedRows::These(ids.to_vec());
        let both = |embedding, head| TrainedTokens { embedding, head };
        let found = both(these(&[3, 5]), these(&[3, 5])).of_model(true);
        assert_eq!(found, Some(both(these(&[3, 5]), these(&[]))));
        assert_eq!(both(these(&[3]), these(&[5])).of_model(true), None);
        assert_eq!(both(these(&[]), these(&[5])).of_model(true), None);
        assert_eq!(both(these(&[3]), TrainedRows::All).of_model(true), None);
        let whole = both(these(&[]), TrainedRows::All);
        assert_eq!(whole.clone().of_model(true), Some(whole));
        let apart = both(these(&[3]), these(&[9]));
        assert_eq!(apart.clone().of_model(false), Some(apart.clone()));
        assert_eq!(apart.id_bound(), 10);
    }

    #[test]
    fn an_adapter_says_what_it_has_of_both() {
        let of = |json: Value| TrainedTokens::of_adapter(&json);
        let these = |ids: &[u32]| TrainedRows::These(ids.to_vec());
        let both = |embedding, head| Some(TrainedTokens { embedding, head });
        assert_eq!(of(json!({})), both(these(&[]), these(&[])));
        let listed = json!({"trainable_token_indices": [7, 2], "modules_to_save": null});
        assert_eq!(of(listed), both(these(&[7, 2]), these(&[])));
        let named = json!({"trainable_token_indices": {"model.embed_tokens": [7], "lm_head": [3]}});
        assert_eq!(of(named), both(these(&[7]), these(&[3])));
        let whole = json!({"modules_to_save": ["lm_head", "embed_tokens"]});
        assert_eq!(of(whole), both(TrainedRows::All, TrainedRows::All));
        for other in [
            json!({"trainable_token_indices": {"wte": [7]}}),
            json!({"trainable_token_indices": [-1]}),
            json!({"trainable_token_indices": "all"}),
            json!({"modules_to_save": ["classifier"]}),
            json!({"modules_to_save": "lm_head"}),
        ] {
            assert_eq!(of(other.clone()), None, "{other}");
        }
    }
}
