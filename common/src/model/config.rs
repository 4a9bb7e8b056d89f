//! The decoder that `config.json` describes. What differs between families is data here, not copies of the model.
//!
//! In: a Hugging Face `config.json`. Out: a [`ModelConfig`] the decoder can build, or an error that names what is not
//! supported. Never guesses at a feature it does not know.

use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use crate::files::FileError;
use crate::files::model::{Architecture, ModelFolder, check_numbers, is_four_bits};
use crate::job::Quantization;

/// Why a model cannot be trained here.
#[derive(Debug, Error)]
pub enum ModelError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: {feature} is not supported")]
    Feature { path: PathBuf, feature: String },
}

/// A decoder as the engine builds it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_epsilon: f64,
    pub rope: Rope,
    /// The output layer is the embedding.
    pub tied: bool,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The attention's output layer has a bias.
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// Each query and key head is normalised.
    pub head_norms: bool,
    /// Tokens a query sees, where some layers limit it.
    pub sliding_window: Option<usize>,
    /// Tokens of a text that the model was made for, where it says so.
    pub max_positions: Option<usize>,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// How the folder's linears are kept in 4 bits, if they are.
    pub quantization: Option<Quantization>,
}

/// Rotary position frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Llama 3.1's: low frequencies are slowed down, high ones kept, those between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
}

/// What an architecture has that its `config.json` does not say.
struct Family {
    /// None: as `attention_bias` says.
    qkv_bias: Option<bool>,
    output_bias: Option<bool>,
    head_norms: bool,
    default_head_dim: Option<usize>,
}

impl Family {
    fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama => Self {
                qkv_bias: None,
                output_bias: None,
                head_norms: false,
                default_head_dim: None,
            },
            Architecture::Qwen2 => Self {
                qkv_bias: Some(true),
                output_bias: Some(false),
                head_norms: false,
                default_head_dim: None,
            },
            Architecture::Qwen3 => Self {
                qkv_bias: None,
                output_bias: None,
                head_norms: true,
                default_head_dim: Some(128),
            },
        }
    }
}

impl ModelConfig {
    pub fn of(folder: &ModelFolder) -> Result<Self, ModelError> {
        Self::parse(folder.config_json(), &folder.dir().join("config.json"))
    }

    /// `path` is named in errors.
    pub fn parse(json: &Value, path: &Path) -> Result<Self, ModelError> {
        check_numbers(path, json)?;
        let fields = Fields { json, path };
        let architecture = Architecture::of_config(path, json)?;
        let family = Family::of(architecture);
        fields.refuse_unsupported()?;
        let attention_bias = fields.flag("attention_bias");
        let heads = fields.size("num_attention_heads")?;
        let hidden_size = fields.size("hidden_size")?;
        let head_dim = fields
            .optional_size("head_dim")?
            .or(family.default_head_dim)
            .unwrap_or(hidden_size / heads);
        let config = Self {
            architecture,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            layers: fields.size("num_hidden_layers")?,
            heads,
            key_value_heads: fields
                .optional_size("num_key_value_heads")?
                .unwrap_or(heads),
            head_dim,
            rms_norm_epsilon: fields.number("rms_norm_eps").unwrap_or(1e-6),
            rope: fields.rope()?,
            tied: fields.flag("tie_word_embeddings"),
            qkv_bias: family.qkv_bias.unwrap_or(attention_bias),
            output_bias: family.output_bias.unwrap_or(attention_bias),
            mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias"),
            head_norms: family.head_norms,
            sliding_window: fields.sliding_window()?,
            max_positions: fields.optional_size("max_position_embeddings")?,
            initializer_range: fields.number("initializer_range").unwrap_or(0.02),
            quantization: is_four_bits(json).then(|| Quantization {
                nested_scales: json["quantization_config"]["bnb_4bit_use_double_quant"]
                    .as_bool()
                    .unwrap_or(false),
                embeddings: false,
            }),
        };
        if !config.head_dim.is_multiple_of(2) {
            let reason = "hidden_size / num_attention_heads is odd, where pairs are rotated";
            return Err(fields.bad(reason));
        }
        Ok(config)
    }

    /// Refuses sequences for which a sliding window would hide something.
    pub fn check_sequence_len(&self, sequence_len: usize, path: &Path) -> Result<(), ModelError> {
        match self.sliding_window {
            Some(window) if window < sequence_len => Err(ModelError::Feature {
                path: path.to_owned(),
                feature: format!(
                    "a sliding window of {window} tokens with sequence_len {sequence_len}"
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Radians per position of each pair of dimensions, rounded to float32 where Transformers does.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / self.head_dim as f32;
                let frequency = 1.0 / self.rope.theta.powf(f64::from(exponent)) as f32;
                self.rope.scaling.apply(frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    /// As `transformers/modeling_rope_utils.py`.
    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
                if wavelength > original_positions / low_freq_factor {
                    frequency / factor as f32
                } else if wavelength < original_positions / high_freq_factor {
                    frequency
                } else {
                    let smooth = (original_positions / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    let frequency = f64::from(frequency);
                    ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
                }
            }
        }
    }
}

struct Fields<'a> {
    json: &'a Value,
    path: &'a Path,
}

impl Fields<'_> {
    fn bad(&self, reason: &str) -> ModelError {
        FileError::malformed(self.path, reason).into()
    }

    fn unsupported(&self, feature: String) -> ModelError {
        ModelError::Feature {
            path: self.path.to_owned(),
            feature,
        }
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(&format!("{key} is missing")))
    }

    /// Within the bounds of [`check_numbers`].
    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match &self.json[key] {
            Value::Null => Ok(None),
            value => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) => Ok(Some(size)),
                None => Err(self.bad(&format!("{key} is {value}, not a size"))),
            },
        }
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.json[key].as_f64()
    }

    fn flag(&self, key: &str) -> bool {
        self.json[key].as_bool().unwrap_or(false)
    }

    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        let activation = self.json["hidden_act"].as_str().unwrap_or("silu");
        if activation != "silu" {
            return Err(
                self.unsupported(format!("hidden_act {activation:?} (supported: \"silu\")"))
            );
        }
        if self.json["quantization_config"].is_object() && !is_four_bits(self.json) {
            return Err(self.unsupported("a quantised base model".to_owned()));
        }
        let rotated = self
            .number("partial_rotary_factor")
            .or(self.json["rope_parameters"]["partial_rotary_factor"].as_f64());
        if rotated.is_some_and(|factor| factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor".to_owned()));
        }
        Ok(())
    }

    /// Both layouts: `rope_theta` with `rope_scaling`, and Transformers 5's `rope_parameters`, which holds them all.
    fn rope(&self) -> Result<Rope, ModelError> {
        let scaling = match &self.json["rope_parameters"] {
            Value::Null => &self.json["rope_scaling"],
            parameters => parameters,
        };
        let theta = scaling["rope_theta"]
            .as_f64()
            .or(self.number("rope_theta"))
            .unwrap_or(10_000.0);
        let kind = scaling["rope_type"]
            .as_str()
            .or(scaling["type"].as_str())
            .unwrap_or("default");
        let number = |key: &str| {
            scaling[key]
                .as_f64()
                .filter(|number| *number > 0.0)
                .ok_or_else(|| self.bad(&format!("rope scaling {kind:?} without a valid {key}")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: number("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_positions: number("original_max_position_embeddings")?,
            },
            other => {
                return Err(self.unsupported(format!(
                    "rope scaling {other:?} (supported: \"default\", \"linear\", \"llama3\")"
                )));
            }
        };
        Ok(Rope { theta, scaling })
    }

    fn sliding_window(&self) -> Result<Option<usize>, ModelError> {
        let window = self.optional_size("sliding_window")?;
        let limited = match self.json["layer_types"].as_array() {
            Some(types) => types.iter().any(|kind| kind == "sliding_attention"),
            None => self.flag("use_sliding_window"),
        };
        Ok(window.filter(|_| limited))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ModelError> {
        let mut json = json!({
            "architectures": ["Qwen3ForCausalLM"], "vocab_size": 100, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "tie_word_embeddings": true
        });
        change(&mut json);
        ModelConfig::parse(&json, Path::new("config.json"))
    }

    #[test]
    fn families_differ_in_biases_and_norms() {
        let qwen3 = parse(|_| {}).unwrap();
        assert!(qwen3.head_norms && qwen3.tied && !qwen3.qkv_bias && !qwen3.output_bias);
        let qwen2 = parse(|json| json["architectures"][0] = "Qwen2ForCausalLM".into()).unwrap();
        assert!(!qwen2.head_norms && qwen2.qkv_bias && !qwen2.output_bias);
        let llama = parse(|json| {
            json["architectures"][0] = "LlamaForCausalLM".into();
            json["attention_bias"] = true.into();
            json["head_dim"] = Value::Null;
        })
        .unwrap();
        assert!(!llama.head_norms && llama.qkv_bias && llama.output_bias);
        assert_eq!(llama.head_dim, 16);
    }

    #[test]
    fn both_layouts_of_rope_scaling_give_the_same_frequencies() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        let old = parse(|json| json["rope_scaling"] = scaling.clone()).unwrap();
        let new = parse(|json| {
            json["rope_parameters"] = scaling.clone();
            json["rope_parameters"]["rope_theta"] = json["rope_theta"].take();
        })
        .unwrap();
        assert_eq!(old, new);
        let (scaled, plain) = (
            old.rope_frequencies(),
            parse(|_| {}).unwrap().rope_frequencies(),
        );
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[15], plain[15] / 8.0);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let message = |change: fn(&mut Value)| parse(change).unwrap_err().to_string();
        let gpt = message(|json| json["architectures"][0] = "GPT2LMHeadModel".into());
        assert!(gpt.contains("GPT2LMHeadModel") && gpt.contains("Qwen3ForCausalLM"));
        assert!(message(|json| json["hidden_act"] = "gelu".into()).contains("gelu"));
        let yarn = message(|json| json["rope_scaling"] = json!({"type": "yarn", "factor": 4.0}));
        assert!(yarn.contains("yarn"));
        assert!(message(|json| json["vocab_size"] = (-1).into()).contains("vocab_size"));
        assert!(message(|json| json["hidden_size"] = Value::Null).contains("hidden_size"));
        let layers = message(|json| json["num_hidden_layers"] = 5000.into());
        assert!(layers.contains("num_hidden_layers"));
    }

    #[test]
    fn values_of_the_wrong_kind_are_refused_never_replaced() {
        for (key, value) in [
            ("rms_norm_eps", json!("x")),
            ("rope_theta", json!("abc")),
            ("rope_theta", json!(-1)),
            ("hidden_size", json!(16_000_000)),
            ("attention_bias", json!("no")),
        ] {
            let message = parse(|json| json[key] = value).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn a_sliding_window_is_refused_where_it_would_matter() {
        let config = parse(|json| {
            json["sliding_window"] = 128.into();
            json["use_sliding_window"] = true.into();
        })
        .unwrap();
        let path = Path::new("config.json");
        assert!(config.check_sequence_len(128, path).is_ok());
        assert!(config.check_sequence_len(129, path).is_err());
        let unused = parse(|json| json["sliding_window"] = 128.into()).unwrap();
        assert!(unused.check_sequence_len(4096, path).is_ok());
    }
}
