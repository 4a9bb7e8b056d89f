//! The decoder that `config.json` describes. What differs between families is data here, not copies of the model.
//!
//! In: a Hugging Face `config.json`. Out: a [`ModelConfig`] the decoder can build, or an error that names what is not
//! supported. Never guesses at a feature it does not know.

use std::path::Path;

use serde_json::Value;

use crate::files::model::{Architecture, ModelFolder, check_numbers, is_four_bits};
use crate::job::{JobSpec, Method, Quantization, TrainedTokens};
use crate::memory::{Fused, KeyValues, LayerInputs, LayerSizes, LinearAttention};

use super::error::ModelError;
use super::experts::{ExpertKind, Experts};
use super::factors::{Caps, Scales};
use super::family::{Activation, Family, HeadNormKind, LayerNorms};
use super::fields::Fields;
use super::layer_kinds::{LayerKind, Rotation, layer_kinds};
use super::rope::{Rope, RotaryPairs};

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
    /// Dimensions of each head that are rotated, the first ones; of heads of layers with a window see
    /// [`local_rotary_dim`](Self::local_rotary_dim).
    pub rotary_dim: usize,
    pub rotary_pairs: RotaryPairs,
    /// The output layer is the embedding.
    pub tied: bool,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The attention's output layer has a bias.
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub fused: Fused,
    pub head_norms: HeadNormKind,
    /// Each head has a logit that takes part in its softmax and stands for no token.
    pub sinks: bool,
    /// Queries come with a gate of what the attention gives.
    pub output_gate: bool,
    /// The sizes of layers of linear attention, and which layers these are.
    pub linear_attention: Option<LinearAttention>,
    pub norms: LayerNorms,
    /// Norms multiply by 1 + weight.
    pub norm_offset: bool,
    pub activation: Activation,
    /// One for each layer.
    pub layer_kinds: Vec<LayerKind>,
    /// The frequencies of layers with a window, where these have their own.
    pub local_rope: Option<Rope>,
    /// Dimensions of each head that are rotated by these.
    pub local_rotary_dim: usize,
    /// The sizes of each layer, where they differ; empty where all layers have those above.
    pub layer_sizes: Vec<LayerSizes>,
    /// What layers have of each token beside the residual.
    pub layer_inputs: Option<LayerInputs>,
    /// Values of each head are normed, without weights.
    pub value_norms: bool,
    /// What a layer gives is multiplied by a number of its own, which is never trained.
    pub layer_scalars: bool,
    pub scales: Scales,
    pub caps: Caps,
    /// The experts of the layers that have some.
    pub experts: Option<Experts>,
    /// Tokens of a text that the model was made for, where it says so.
    pub max_positions: Option<usize>,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// The folder holds linears in 4 bits.
    pub is_four_bits: bool,
    /// How its linears are kept in 4 bits, if all of them are.
    pub quantization: Option<Quantization>,
}

impl ModelConfig {
    pub fn of(folder: &ModelFolder) -> Result<Self, ModelError> {
        Self::parse(folder.config_json(), &folder.dir().join("config.json"))
    }

    /// The model of a job, which may have rows for more tokens than its folder.
    pub fn for_job(mut self, job: &JobSpec) -> Self {
        self.vocab_size = self.vocab_size.max(job.token_rows());
        let asked = job.router_loss;
        self.experts = self.experts.map(|experts| experts.with_router_loss(asked));
        match &job.method {
            Method::Full => self,
            Method::Lora(lora) => self.with_trained_tokens(&lora.tokens),
        }
    }

    /// The model with what an adapter has of its embedding and its output layer: perhaps rows for more tokens, perhaps an output
    /// layer that is not the embedding any more.
    pub fn with_trained_tokens(mut self, trained: &TrainedTokens) -> Self {
        self.vocab_size = self.vocab_size.max(trained.id_bound());
        self.tied &= !trained.unties();
        self
    }

    /// `path` is named in errors.
    pub fn parse(json: &Value, path: &Path) -> Result<Self, ModelError> {
        check_numbers(path, json)?;
        let fields = Fields { json, path };
        let architecture = Architecture::of_config(path, json)?;
        let family = Family::of(architecture);
        fields.refuse_unsupported(architecture, family.is_gelu)?;
        fields.refuse_dropout(architecture)?;
        let attention_bias = json[family.bias_key]
            .as_bool()
            .unwrap_or(family.default_attention_bias);
        let heads = fields.size("num_attention_heads")?;
        let hidden_size = fields.size("hidden_size")?;
        let head_dim = fields
            .optional_size("head_dim")?
            .or(family.default_head_dim)
            .unwrap_or(hidden_size / heads);
        let ropes = fields.ropes(family.default_theta)?;
        let local_rotary_dim = fields.rotary_dim(family.default_rotated, head_dim)?;
        let layers = fields.size("num_hidden_layers")?;
        let kinds = layer_kinds(json, architecture, layers, ropes.1.is_some());
        let intermediate_size = fields.intermediate_size(&family)?;
        let key_value_heads = fields
            .optional_size("num_key_value_heads")?
            .unwrap_or(heads);
        let usual = LayerSizes {
            key_value_heads,
            head_dim,
            key_values: KeyValues::Apart,
            intermediate_size,
        };
        let layer_sizes = fields.sizes_by_layer(&family, heads, &kinds, usual)?;
        let rotary_dim = match layer_sizes.last() {
            None => local_rotary_dim,
            Some(global) => global.head_dim,
        };
        fields.check_long_rope(&ropes.0, rotary_dim)?;
        let config = Self {
            architecture,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            key_value_heads,
            head_dim,
            rms_norm_epsilon: fields
                .number("rms_norm_eps")
                .unwrap_or(family.default_epsilon),
            layer_kinds: kinds,
            rope: ropes.0,
            rotary_dim,
            rotary_pairs: family.rotary_pairs,
            local_rope: ropes.1,
            local_rotary_dim,
            layer_inputs: match family.layers_differ {
                true => fields.layer_inputs()?,
                false => None,
            },
            layer_sizes,
            value_norms: family.value_norms,
            layer_scalars: family.layer_scalars,
            tied: json["tie_word_embeddings"]
                .as_bool()
                .unwrap_or(family.default_tied),
            qkv_bias: family.qkv_bias.unwrap_or(attention_bias),
            output_bias: family.output_bias.unwrap_or(attention_bias),
            mlp_bias: family.has_mlp_bias && fields.flag("mlp_bias"),
            fused: family.fused,
            head_norms: family.head_norms,
            sinks: family.has_sinks,
            output_gate: family.has_output_gate,
            linear_attention: match family.has_linear_attention {
                true => Some(LinearAttention {
                    is_grouped: family.has_grouped_projections,
                    ..fields.linear_attention(layers)?
                }),
                false => None,
            },
            norms: family.norms,
            norm_offset: family.norm_offset,
            activation: match family.is_gelu {
                true => Activation::GeluTanh,
                false => Activation::Silu,
            },
            scales: fields.scales(architecture, hidden_size, head_dim),
            caps: fields.caps(architecture),
            experts: fields
                .kind_of_experts(&family)
                .map(|kind| fields.experts(kind, layers))
                .transpose()?,
            max_positions: fields.optional_size("max_position_embeddings")?,
            initializer_range: fields.number("initializer_range").unwrap_or(0.02),
            is_four_bits: is_four_bits(json),
            quantization: quantization(json),
        };
        fields.check_windows(&family)?;
        if !config.head_dim.is_multiple_of(2) {
            let reason = "hidden_size / num_attention_heads is odd, where pairs are rotated";
            return Err(fields.bad(reason));
        }
        Ok(config)
    }

    /// The sizes of a layer in which it may differ from others.
    pub fn sizes_of(&self, layer: usize) -> LayerSizes {
        let own = self.layer_sizes.get(layer).copied();
        own.unwrap_or(LayerSizes {
            key_value_heads: self.key_value_heads,
            head_dim: self.head_dim,
            key_values: KeyValues::Apart,
            intermediate_size: self.intermediate_size,
        })
    }

    /// Refuses a vocabulary for which layers have no inputs of their own: rows for tokens that a job adds.
    ///
    /// # Errors
    /// One line, where there are such tokens.
    pub fn check_vocabulary(&self) -> Result<(), ModelError> {
        let rows = self.layer_inputs.map_or(usize::MAX, |own| own.vocabulary);
        match self.vocab_size <= rows {
            true => Ok(()),
            false => Err(ModelError::Vocabulary {
                vocabulary: self.vocab_size,
                rows,
            }),
        }
    }

    /// The smallest window of any layer.
    pub fn smallest_window(&self) -> Option<usize> {
        self.layer_kinds.iter().filter_map(|kind| kind.window).min()
    }

    /// All windows that layers have, each once, the smallest first.
    pub fn windows(&self) -> Vec<usize> {
        let kinds = self.layer_kinds.iter();
        let mut windows: Vec<usize> = kinds.filter_map(|kind| kind.window).collect();
        windows.sort_unstable();
        windows.dedup();
        windows
    }
}

impl Fields<'_> {
    fn intermediate_size(&self, family: &Family) -> Result<usize, ModelError> {
        match family.experts {
            // No layer is dense, and what experts are wide is read with them.
            Some(kind) if !kind.may_be_dense && !kind.beside_dense => {
                Ok(self.optional_size("intermediate_size")?.unwrap_or(0))
            }
            _ => self.size("intermediate_size"),
        }
    }

    /// The kind of experts that the model has, if it has some.
    fn kind_of_experts(&self, family: &Family) -> Option<ExpertKind> {
        let is_there = |kind: &ExpertKind| !kind.beside_dense || self.flag("enable_moe_block");
        family.experts.filter(is_there)
    }

    /// The sizes of each layer, in families whose layers differ.
    fn sizes_by_layer(
        &self,
        family: &Family,
        heads: usize,
        kinds: &[LayerKind],
        usual: LayerSizes,
    ) -> Result<Vec<LayerSizes>, ModelError> {
        if !family.layers_differ {
            return Ok(Vec::new());
        }
        let has_window = kinds.iter().map(|kind| kind.rotation == Rotation::Local);
        let sizes = self.layer_sizes(&has_window.collect::<Vec<_>>(), usual)?;
        self.check_layer_sizes(heads, &sizes)?;
        Ok(sizes)
    }
}

/// How the folder of this configuration keeps its linears in 4 bits, if it keeps all of them so.
fn quantization(json: &Value) -> Option<Quantization> {
    // Where layers are left out, nothing here says how large those are: memory is counted as if none were quantised.
    if !is_four_bits(json) || !leaves_nothing_out(json) {
        return None;
    }
    let nested_scales = &json["quantization_config"]["bnb_4bit_use_double_quant"];
    Some(Quantization {
        nested_scales: nested_scales.as_bool().unwrap_or(false),
        embeddings: false,
        experts: false,
    })
}

/// Whether a quantised folder leaves no linear of the decoder as it was.
fn leaves_nothing_out(json: &Value) -> bool {
    let skipped = &json["quantization_config"]["llm_int8_skip_modules"];
    let skipped = skipped.as_array().into_iter().flatten();
    let mut names = skipped.filter_map(Value::as_str);
    names.all(|name| name == "lm_head")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::Rotation;
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
        assert_eq!(qwen3.head_norms, HeadNormKind::EachHead);
        assert!(qwen3.tied && !qwen3.qkv_bias && !qwen3.output_bias);
        let qwen2 = parse(|json| json["architectures"][0] = "Qwen2ForCausalLM".into()).unwrap();
        assert_eq!(qwen2.head_norms, HeadNormKind::None);
        assert!(qwen2.qkv_bias && !qwen2.output_bias);
        let llama = parse(|json| {
            json["architectures"][0] = "LlamaForCausalLM".into();
            json["attention_bias"] = true.into();
            json["head_dim"] = Value::Null;
        })
        .unwrap();
        assert!(llama.qkv_bias && llama.output_bias);
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
        let frequencies = |config: &ModelConfig| config.rope.frequencies(config.rotary_dim);
        let (scaled, plain) = (frequencies(&old), frequencies(&parse(|_| {}).unwrap()));
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[15], plain[15] / 8.0);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let message = |change: fn(&mut Value)| parse(change).unwrap_err().to_string();
        let gpt = message(|json| json["architectures"][0] = "GPT2LMHeadModel".into());
        assert!(gpt.contains("GPT2LMHeadModel") && gpt.contains("Qwen3ForCausalLM"));
        assert!(message(|json| json["hidden_act"] = "gelu".into()).contains("gelu"));
        let longrope = json!({"type": "longrope", "factor": 4.0});
        let message_of = parse(|json| json["rope_scaling"] = longrope).unwrap_err();
        assert!(message_of.to_string().contains("longrope"));
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
    fn windows_are_those_of_the_layers_that_have_one() {
        let windows = |change: &dyn Fn(&mut Value)| {
            let config = parse(|json| {
                json["sliding_window"] = 128.into();
                change(json);
            });
            let kinds = config.unwrap().layer_kinds;
            kinds.iter().map(|kind| kind.window).collect::<Vec<_>>()
        };
        let class =
            |name: &'static str| move |json: &mut Value| json["architectures"][0] = name.into();
        assert_eq!(windows(&|_| {}), [None, None]);
        let asked = |json: &mut Value| json["use_sliding_window"] = true.into();
        assert_eq!(windows(&asked), [Some(128); 2]);
        let upper = |json: &mut Value| {
            json["use_sliding_window"] = true.into();
            json["max_window_layers"] = 1.into();
        };
        assert_eq!(windows(&upper), [None, Some(128)]);
        let named = |json: &mut Value| {
            json["layer_types"] = json!(["sliding_attention", "full_attention"]);
        };
        assert_eq!(windows(&named), [Some(128), None]);
        assert_eq!(windows(&class("MistralForCausalLM")), [Some(128); 2]);
        assert_eq!(windows(&class("LlamaForCausalLM")), [None, None]);
        assert_eq!(windows(&class("Gemma2ForCausalLM")), [Some(128), None]);
        let without = parse(class("MistralForCausalLM")).unwrap();
        assert_eq!(without.smallest_window(), Some(4096));
        let null = parse(|json| {
            class("MistralForCausalLM")(json);
            json["sliding_window"] = Value::Null;
        });
        assert_eq!(null.unwrap().smallest_window(), None);
    }

    #[test]
    fn older_spellings_mean_what_the_newer_ones_do() {
        let gemma = |change: &dyn Fn(&mut Value)| {
            let config = parse(|json| {
                json["architectures"][0] = "Gemma3ForCausalLM".into();
                json["sliding_window"] = 16.into();
                change(json);
            });
            config.map_err(|error| error.to_string())
        };
        let older = gemma(&|json| {
            json["rope_theta"] = 1e6.into();
            json["rope_local_base_freq"] = 1e4.into();
            json["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
            json["sliding_window_pattern"] = 2.into();
        });
        let newer = gemma(&|json| {
            json["layer_types"] = json!(["sliding_attention", "full_attention"]);
            json["rope_parameters"] = json!({
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}
            });
        });
        let (older, newer) = (older.unwrap(), newer.unwrap());
        assert_eq!(older, newer);
        assert_eq!(older.layer_kinds[0].rotation, Rotation::Local);
        assert_eq!(older.layer_kinds[1].rotation, Rotation::Usual);
        let flat = gemma(&|json| json["rope_parameters"] = json!({"rope_theta": 1e4}));
        assert!(
            flat.unwrap_err()
                .contains("full_attention and sliding_attention")
        );
        let smol = parse(|json| {
            json["architectures"][0] = "SmolLM3ForCausalLM".into();
            json["num_hidden_layers"] = 4.into();
        });
        let rotations = smol
            .unwrap()
            .layer_kinds
            .into_iter()
            .map(|kind| kind.rotation);
        let usual = Rotation::Usual;
        assert_eq!(
            rotations.collect::<Vec<_>>(),
            [usual, usual, usual, Rotation::None]
        );
    }
}
