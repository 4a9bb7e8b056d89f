//! What layers of one model have in different sizes, and what they have of each other (Gemma 4): heads, keys and values, feed-forward
//! halves, and inputs of their own.
//!
//! Source of names and defaults: Transformers 5.24, `configuration_gemma4.py`, which reads `global_head_dim` and
//! `num_global_key_value_heads` and writes `per_layer_config` in their place.

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;
use crate::memory::{KeyValues, LayerInputs, LayerSizes};

/// Keys that `per_layer_config` may have for a layer.
const OWN_KEYS: [&str; 2] = ["head_dim", "num_key_value_heads"];

impl Fields<'_> {
    /// The sizes of each layer of a model whose layers differ, by whether they have a window; `usual` are those of layers that do.
    pub(super) fn layer_sizes(
        &self,
        has_window: &[bool],
        usual: LayerSizes,
    ) -> Result<Vec<LayerSizes>, ModelError> {
        let global = self.global_sizes(has_window, usual)?;
        let is_same = self.flag("attention_k_eq_v");
        let mut sizes: Vec<LayerSizes> = has_window
            .iter()
            .map(|has_window| match (has_window, is_same) {
                (true, _) => usual,
                (false, false) => global,
                (false, true) => LayerSizes {
                    key_values: KeyValues::Same,
                    ..global
                },
            })
            .collect();
        self.share_keys(has_window, &mut sizes)?;
        Ok(sizes)
    }

    /// Lets the last layers have the keys and values of the last one before them of their kind.
    fn share_keys(&self, has_window: &[bool], sizes: &mut [LayerSizes]) -> Result<(), ModelError> {
        let sharing = self.optional_size("num_kv_shared_layers")?.unwrap_or(0);
        let layers = sizes.len();
        if sharing >= layers {
            return Err(self.bad(&format!(
                "num_kv_shared_layers {sharing} leaves none of the {layers} layers (num_hidden_layers) with keys and values of its own"
            )));
        }
        let (own, factor) = (layers - sharing, self.flag("use_double_wide_mlp"));
        for layer in own..layers {
            let of_kind = |other: &usize| has_window[*other] == has_window[layer];
            let lender = (0..own).rev().find(of_kind).ok_or_else(|| {
                self.bad(&format!(
                    "num_kv_shared_layers {sharing}: layer {layer} shares keys and values of an earlier layer of its type (layer_types), \
                     and there is none"
                ))
            })?;
            sizes[layer].key_values = KeyValues::Of(lender);
            sizes[layer].intermediate_size *= 1 + usize::from(factor);
        }
        Ok(())
    }

    /// The sizes of layers that see everything.
    fn global_sizes(
        &self,
        has_window: &[bool],
        usual: LayerSizes,
    ) -> Result<LayerSizes, ModelError> {
        if let Some(own) = self.json["per_layer_config"].as_object() {
            return self.sizes_of_layers(own, has_window, usual);
        }
        let heads = match self.flag("attention_k_eq_v") {
            true => self.optional_size("num_global_key_value_heads")?,
            false => None,
        };
        Ok(LayerSizes {
            head_dim: self.optional_size("global_head_dim")?.unwrap_or(512),
            key_value_heads: heads.unwrap_or(usual.key_value_heads),
            ..usual
        })
    }

    /// The sizes of layers that see everything, by what is said of each layer by its number.
    fn sizes_of_layers(
        &self,
        own: &serde_json::Map<String, Value>,
        has_window: &[bool],
        usual: LayerSizes,
    ) -> Result<LayerSizes, ModelError> {
        let mut found: Vec<LayerSizes> = vec![usual; has_window.len()];
        for (number, values) in own {
            let layer = number.parse().ok().and_then(|n: usize| found.get_mut(n));
            let (Some(layer), Some(values)) = (layer, values.as_object()) else {
                let reason =
                    format!("per_layer_config has {number:?}, which is none of its layers");
                return Err(self.bad(&reason));
            };
            if let Some(key) = values.keys().find(|key| !OWN_KEYS.contains(&key.as_str())) {
                return Err(self.unsupported(format!("per_layer_config with {key}")));
            }
            let size = |key: &str, usual: usize| {
                let size = values.get(key).map_or(Some(usual as u64), Value::as_u64);
                let size = size.filter(|size| (1..=MAX_WIDTH).contains(size));
                size.ok_or_else(|| {
                    self.bad(&format!(
                        "per_layer_config: {key} of layer {number} is no size"
                    ))
                })
            };
            let [head_dim, heads] = OWN_KEYS;
            layer.head_dim = size(head_dim, usual.head_dim)? as usize;
            layer.key_value_heads = size(heads, usual.key_value_heads)? as usize;
        }
        let of = |windowed: bool| {
            let kind = found.iter().zip(has_window);
            kind.filter(move |(_, has_window)| **has_window == windowed)
        };
        let global = of(false).next().map_or(usual, |(sizes, _)| *sizes);
        match of(false).all(|(sizes, _)| *sizes == global)
            && of(true).all(|(sizes, _)| *sizes == usual)
        {
            true => Ok(global),
            false => Err(self.unsupported(
                "per_layer_config that differs between layers of one type (layer_types)".to_owned(),
            )),
        }
    }

    /// What each layer has of a token beside the residual, where layers have such.
    pub(super) fn layer_inputs(&self) -> Result<Option<LayerInputs>, ModelError> {
        const USUAL_WIDTH: usize = 256;
        const USUAL_VOCABULARY: usize = 262_144;
        let width = self.optional_size("hidden_size_per_layer_input")?;
        let width = width.unwrap_or(USUAL_WIDTH);
        if width == 0 {
            return Ok(None);
        }
        let rows = self.optional_size("vocab_size_per_layer_input")?;
        let inputs = LayerInputs {
            width,
            vocabulary: rows.unwrap_or(USUAL_VOCABULARY),
        };
        let vocabulary = self.size("vocab_size")?;
        match inputs.vocabulary < vocabulary {
            true => Err(self.bad(&format!(
                "vocab_size_per_layer_input {} is below vocab_size {vocabulary}: some tokens would have no row in embed_tokens_per_layer",
                inputs.vocabulary
            ))),
            false => Ok(Some(inputs)),
        }
    }

    /// Checks what follows from the sizes of layers: that heads divide, and that pairs are rotated.
    pub(super) fn check_layer_sizes(
        &self,
        heads: usize,
        sizes: &[LayerSizes],
    ) -> Result<(), ModelError> {
        for own in sizes {
            let (head_dim, shared) = (own.head_dim, own.key_value_heads);
            if !heads.is_multiple_of(shared) {
                return Err(self.bad(&format!(
                    "{shared} heads of keys and values (num_global_key_value_heads) do not divide num_attention_heads {heads}"
                )));
            }
            if !head_dim.is_multiple_of(2) {
                return Err(self.bad(&format!(
                    "global_head_dim {head_dim} is odd, where pairs are rotated"
                )));
            }
            if (heads * head_dim) as u64 > MAX_WIDTH {
                return Err(self.bad(&format!(
                    "num_attention_heads {heads} times global_head_dim {head_dim} is above {MAX_WIDTH}"
                )));
            }
        }
        Ok(())
    }
}

/// Largest side of a matrix, as `config.json` is checked for elsewhere.
const MAX_WIDTH: u64 = 1 << 20;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
