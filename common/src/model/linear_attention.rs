//! Linear attention (gated DeltaNet; Yang et al., 2024) of a `config.json`: its sizes, and which layers have it in place of attention.
//!
//! Source of names and defaults: Transformers 5.24, `configuration_qwen3_5.py` and `configuration_qwen3_next.py`.

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;
use crate::memory::LinearAttention;

/// What the weights of a layer of linear attention are called in it, beside its linears.
pub const CONVOLUTION: &str = "linear_attn.conv1d.weight";
pub const HEAD_NORM: &str = "linear_attn.norm.weight";
/// The logarithm of how fast each head forgets.
pub const DECAY: &str = "linear_attn.A_log";
/// What is added to what a token says of how much is forgotten.
pub const DECAY_BIAS: &str = "linear_attn.dt_bias";

impl Fields<'_> {
    /// The sizes of layers of linear attention in a model of so many layers.
    pub(super) fn linear_attention(&self, layers: usize) -> Result<LinearAttention, ModelError> {
        if self.json["attn_output_gate"].as_bool() == Some(false) {
            return Err(self.unsupported("attn_output_gate false (supported: true)".to_owned()));
        }
        let size = |key: &str, usual: usize| -> Result<usize, ModelError> {
            Ok(self.optional_size(key)?.unwrap_or(usual))
        };
        let sizes = LinearAttention {
            key_heads: size("linear_num_key_heads", 16)?,
            value_heads: size("linear_num_value_heads", 32)?,
            key_dim: size("linear_key_head_dim", 128)?,
            value_dim: size("linear_value_head_dim", 128)?,
            kernel: size("linear_conv_kernel_dim", 4)?,
            layers: self.linear_layers(layers)?,
            is_grouped: false,
        };
        if !sizes.value_heads.is_multiple_of(sizes.key_heads) {
            return Err(self.bad(&format!(
                "linear_num_key_heads {} does not divide linear_num_value_heads {}",
                sizes.key_heads, sizes.value_heads
            )));
        }
        Ok(sizes)
    }

    /// Those of `layer_types`, or where these are not given all but the last of every so many.
    fn linear_layers(&self, layers: usize) -> Result<Vec<bool>, ModelError> {
        if let Some(types) = self.json["layer_types"].as_array() {
            let is_linear = |kind: &Value| kind == "linear_attention";
            return Ok(types.iter().map(is_linear).collect());
        }
        let every = self.optional_size("full_attention_interval")?.unwrap_or(4);
        let layers = 1..=layers;
        Ok(layers.map(|layer| !layer.is_multiple_of(every)).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::model::{ModelConfig, base_tensors, linears};

    fn parse(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, String> {
        let mut json = json!({
            "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 100, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2
        });
        change(&mut json);
        ModelConfig::parse(&json, Path::new("config.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn qwen3_5_has_attention_in_every_fourth_layer_and_linear_attention_in_the_others() {
        let plain = parse(|_| {}).unwrap();
        assert_eq!((plain.head_dim, plain.rotary_dim), (256, 64));
        assert!(plain.output_gate && plain.norm_offset && !plain.tied);
        let sizes = plain.linear_attention.clone().unwrap();
        assert_eq!(sizes.layers, [true, true, true, false, true]);
        assert_eq!(
            (sizes.convolved(), sizes.values()),
            (2 * 16 * 128 + 32 * 128, 32 * 128)
        );
        let names = |layer| -> Vec<(&str, usize)> {
            let linears = linears(&plain, layer).into_iter();
            linears.map(|linear| (linear.path, linear.out)).collect()
        };
        assert_eq!(
            names(0)[..5],
            [
                ("linear_attn.in_proj_qkv", 8192),
                ("linear_attn.in_proj_z", 4096),
                ("linear_attn.in_proj_b", 32),
                ("linear_attn.in_proj_a", 32),
                ("linear_attn.out_proj", 64),
            ]
        );
        assert_eq!(names(3)[0], ("self_attn.q_proj", 2 * 4 * 256));
        let tensors = base_tensors(&plain);
        let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, s)| &s[..]);
        let of = |layer: usize, name: &str| format!("model.layers.{layer}.{name}");
        assert_eq!(shape(&of(0, CONVOLUTION)), Some(&[8192, 1, 4][..]));
        assert_eq!(shape(&of(4, DECAY)), Some(&[32][..]));
        assert_eq!(shape(&of(3, DECAY)), None);
        assert_eq!(shape(&of(0, "self_attn.q_norm.weight")), None);
    }

    #[test]
    fn qwen3_next_reads_through_two_linears() {
        let mixture = |class: &'static str| {
            move |json: &mut Value| {
                json["architectures"][0] = class.into();
                for (key, value) in [
                    ("num_experts", 8),
                    ("num_experts_per_tok", 2),
                    ("moe_intermediate_size", 24),
                    ("shared_expert_intermediate_size", 40),
                ] {
                    json[key] = value.into();
                }
            }
        };
        let names = |class| -> Vec<(&str, usize, usize)> {
            let linears = linears(&parse(mixture(class)).unwrap(), 0).into_iter();
            let linears = linears.map(|linear| (linear.path, linear.slot, linear.out));
            linears.collect()
        };
        let next = names("Qwen3NextForCausalLM");
        assert_eq!(
            next[..3],
            [
                ("linear_attn.in_proj_qkvz", 0, 8192 + 4096),
                ("linear_attn.in_proj_ba", 1, 64),
                ("linear_attn.out_proj", 4, 64),
            ]
        );
        let four = names("Qwen3_5MoeForCausalLM");
        assert_eq!(four[0], ("linear_attn.in_proj_qkv", 0, 8192));
        assert_eq!(next[3..], four[5..], "the shared expert");
    }

    #[test]
    fn a_mixture_in_every_layer_needs_no_size_of_dense_ones() {
        let without = |class: &str| {
            parse(|json| {
                json["architectures"][0] = class.into();
                json["intermediate_size"] = Value::Null;
                for key in ["num_experts", "num_experts_per_tok"] {
                    json[key] = 4.into();
                }
                for key in ["moe_intermediate_size", "shared_expert_intermediate_size"] {
                    json[key] = 24.into();
                }
            })
        };
        without("Qwen3_5MoeForCausalLM").unwrap();
        let next = without("Qwen3NextForCausalLM").unwrap_err();
        assert!(next.contains("intermediate_size is missing"), "{next}");
    }

    #[test]
    fn which_layers_are_linear_may_be_said_in_two_ways() {
        let interval = parse(|json| json["full_attention_interval"] = 2.into()).unwrap();
        let listed = parse(|json| {
            let kind = |layer: usize| ["linear_attention", "full_attention"][layer % 2];
            json["layer_types"] = (0..5).map(kind).collect::<Vec<_>>().into();
        });
        assert_eq!(listed.unwrap(), interval);
    }

    #[test]
    fn what_is_not_done_of_linear_attention_is_refused_by_name() {
        for (key, value, word) in [
            ("attn_output_gate", json!(false), "attn_output_gate false"),
            ("linear_num_value_heads", json!(24), "does not divide"),
            ("linear_conv_kernel_dim", json!(0), "linear_conv_kernel_dim"),
            ("linear_key_head_dim", json!("wide"), "linear_key_head_dim"),
            (
                "layer_types",
                json!(vec!["sliding_attention"; 5]),
                "sliding_attention",
            ),
            ("layer_types", json!(["linear_attention"]), "layer_types"),
        ] {
            let message = parse(|json| json[key] = value).unwrap_err();
            assert!(message.contains(word), "{message}");
        }
    }
}
