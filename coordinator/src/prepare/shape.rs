//! The sizes of a model, from its `config.json`: which tensors and which linears it has.
//!
//! Enters: a model folder. Leaves: names and shapes. Reads no weights.

use common::files::model::{Architecture, ModelFolder};
use common::job::TargetModules;
use common::memory::{LINEARS, Shape};
use serde_json::Value;

/// A decoder in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    pub architecture: &'static str,
    pub sizes: Shape,
    pub max_positions: Option<usize>,
}

/// A linear layer that an adapter can be put on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// As in `model.layers.0.self_attn.q_proj`.
    pub path: String,
    pub inputs: usize,
    pub outputs: usize,
    bias: bool,
}

impl ModelShape {
    pub fn of(model: &ModelFolder) -> Result<Self, String> {
        let config = model.config_json();
        let architecture = model.architecture();
        let path = model.dir().join("config.json");
        // Within bounds, and of the right kind, since the folder was opened.
        let given = |name: &str| config.get(name).and_then(Value::as_u64).map(|n| n as usize);
        let required = |name: &str| {
            given(name).ok_or_else(|| format!("{}: {name} is missing", path.display()))
        };
        let flag = |name: &str| config.get(name).and_then(Value::as_bool).unwrap_or(false);
        let (hidden_size, heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let attention_bias = flag("attention_bias");
        let sizes = Shape {
            vocab_size: required("vocab_size")?,
            hidden_size,
            intermediate_size: required("intermediate_size")?,
            layers: required("num_hidden_layers")?,
            heads,
            key_value_heads: given("num_key_value_heads").unwrap_or(heads),
            head_dim: given("head_dim").unwrap_or(match architecture {
                Architecture::Qwen3 => 128,
                _ => hidden_size / heads,
            }),
            tied: flag("tie_word_embeddings"),
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            output_bias: attention_bias && architecture != Architecture::Qwen2,
            mlp_bias: flag("mlp_bias") && architecture == Architecture::Llama,
            head_norms: architecture == Architecture::Qwen3,
        };
        Ok(Self {
            architecture: match architecture {
                Architecture::Llama => "Llama",
                Architecture::Qwen2 => "Qwen2",
                Architecture::Qwen3 => "Qwen3",
            },
            sizes,
            max_positions: given("max_position_embeddings"),
        })
    }

    /// Every linear but the output layer, in the model's order.
    pub fn linears(&self) -> Vec<Linear> {
        const NAMES: [&str; LINEARS] = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ];
        let linears = self.sizes.linears();
        (0..self.sizes.layers)
            .flat_map(|layer| {
                NAMES
                    .into_iter()
                    .zip(linears)
                    .map(move |(name, (inputs, outputs, bias))| Linear {
                        path: format!("model.layers.{layer}.{name}"),
                        inputs,
                        outputs,
                        bias,
                    })
            })
            .collect()
    }

    /// Names and shapes of all tensors in the weights files.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.sizes.hidden_size;
        let vocabulary = vec![self.sizes.vocab_size, hidden];
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vocabulary.clone()),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        if !self.sizes.tied {
            tensors.push(("lm_head.weight".to_owned(), vocabulary));
        }
        for linear in self.linears() {
            if linear.bias {
                tensors.push((format!("{}.bias", linear.path), vec![linear.outputs]));
            }
            tensors.push((
                format!("{}.weight", linear.path),
                vec![linear.outputs, linear.inputs],
            ));
        }
        for layer in 0..self.sizes.layers {
            let mut norm = |name: &str, size| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![size]));
            };
            norm("input_layernorm", hidden);
            norm("post_attention_layernorm", hidden);
            if self.sizes.head_norms {
                norm("self_attn.q_norm", self.sizes.head_dim);
                norm("self_attn.k_norm", self.sizes.head_dim);
            }
        }
        tensors
    }

    /// The linears that the job's target modules name, as PEFT matches them: the whole path or its end.
    pub fn targets(&self, targets: &TargetModules) -> Result<Vec<Linear>, String> {
        let linears = self.linears();
        let TargetModules::Named(names) = targets else {
            return Ok(linears);
        };
        let matches = |linear: &Linear, name: &String| {
            linear.path == *name
                || linear
                    .path
                    .strip_suffix(name.as_str())
                    .is_some_and(|before| before.ends_with('.'))
        };
        for name in names {
            if !linears.iter().any(|linear| matches(linear, name)) {
                return Err(format!(
                    "lora_target_modules: no linear of the model is called {name} (it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)"
                ));
            }
        }
        Ok(linears
            .into_iter()
            .filter(|linear| names.iter().any(|name| matches(linear, name)))
            .collect())
    }
}
