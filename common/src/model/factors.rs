//! What numbers of a model are multiplied by and limited to, by its family and its `config.json`.

use super::fields::Fields;
use crate::files::model::Architecture;

/// What numbers are multiplied by on their way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Token embeddings, before the first layer.
    pub embedding: f64,
    /// Attention scores.
    pub attention: f64,
    /// What each half of a layer adds to the residual.
    pub residual: f64,
    pub logits: f64,
}

impl Scales {
    /// Nothing is multiplied, not even scores.
    pub const NONE: Self = Self {
        embedding: 1.0,
        attention: 1.0,
        residual: 1.0,
        logits: 1.0,
    };
}

/// What numbers are limited to, as `cap · tanh(number / cap)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Caps {
    /// Attention scores, once they are scaled.
    pub attention: Option<f64>,
    pub logits: Option<f64>,
}

impl Fields<'_> {
    pub(super) fn scales(
        &self,
        architecture: Architecture,
        hidden: usize,
        head_dim: usize,
    ) -> Scales {
        let usual = Scales {
            embedding: 1.0,
            attention: f64::from(1.0 / (head_dim as f32).sqrt()),
            residual: 1.0,
            logits: 1.0,
        };
        match architecture {
            Architecture::Gemma2 | Architecture::Gemma3 => Scales {
                embedding: (hidden as f64).sqrt(),
                attention: 1.0 / self.number("query_pre_attn_scalar").unwrap_or(256.0).sqrt(),
                ..usual
            },
            Architecture::Gemma4 => Scales {
                embedding: (hidden as f64).sqrt(),
                attention: 1.0,
                ..usual
            },
            Architecture::Granite => {
                let factor = |key: &str| self.number(key).unwrap_or(1.0);
                Scales {
                    embedding: factor("embedding_multiplier"),
                    attention: factor("attention_multiplier"),
                    residual: factor("residual_multiplier"),
                    logits: 1.0 / factor("logits_scaling"),
                }
            }
            _ => usual,
        }
    }

    pub(super) fn caps(&self, architecture: Architecture) -> Caps {
        // Null means none, and a key that is not there the family's own.
        let cap = |key: &str, usual: f64| match self.json.get(key) {
            None => Some(usual),
            Some(value) => value.as_f64(),
        };
        match architecture {
            Architecture::Gemma2 => Caps {
                attention: cap("attn_logit_softcapping", 50.0),
                logits: cap("final_logit_softcapping", 30.0),
            },
            // What it has of the other is never used.
            Architecture::Gemma3 | Architecture::Gemma4 => Caps {
                attention: None,
                logits: self.number("final_logit_softcapping"),
            },
            _ => Caps::default(),
        }
    }
}
