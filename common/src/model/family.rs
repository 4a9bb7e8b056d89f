//! What tells decoders of one family from those of another: where there are norms, what a layer sees and how it rotates,
//! what numbers are multiplied and limited by. One decoder reads them all; a family is a row of switches.
//!
//! Source of names and defaults: Transformers 5.24, `configuration_*.py` and `modeling_*.py` of each family.

use super::experts::ExpertKind;
use super::rope::RotaryPairs;
use crate::files::model::Architecture;
use crate::memory::Fused;

/// Where a decoder layer has norms, by their names in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerNorms {
    /// Of what the attention reads.
    pub attention_input: Option<&'static str>,
    /// Of the attention's result, before it is added to the residual.
    pub attention_output: Option<&'static str>,
    /// Of what the feed-forward half reads.
    pub mlp_input: Option<&'static str>,
    /// Of that half's result, before it is added to the residual.
    pub mlp_output: Option<&'static str>,
}

impl LayerNorms {
    const BEFORE: Self = Self {
        attention_input: Some("input_layernorm"),
        attention_output: None,
        mlp_input: Some("post_attention_layernorm"),
        mlp_output: None,
    };
    const AFTER: Self = Self {
        attention_input: None,
        attention_output: Some("post_attention_layernorm"),
        mlp_input: None,
        mlp_output: Some("post_feedforward_layernorm"),
    };
    const BOTH: Self = Self {
        attention_input: Some("input_layernorm"),
        attention_output: Some("post_attention_layernorm"),
        mlp_input: Some("pre_feedforward_layernorm"),
        mlp_output: Some("post_feedforward_layernorm"),
    };
    /// GLM-4-0414's, in which what is named after the attention stands before the other half.
    const BOTH_OF_GLM: Self = Self {
        attention_input: Some("input_layernorm"),
        attention_output: Some("post_self_attn_layernorm"),
        mlp_input: Some("post_attention_layernorm"),
        mlp_output: Some("post_mlp_layernorm"),
    };

    /// Their names, in the order of a layer.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            self.attention_input,
            self.attention_output,
            self.mlp_input,
            self.mlp_output,
        ];
        all.into_iter().flatten()
    }

    /// Whether a result is normalised before it is added.
    pub fn are_behind(&self) -> bool {
        self.attention_output.is_some() || self.mlp_output.is_some()
    }
}

/// Norms of queries and keys before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNormKind {
    None,
    /// Each head for itself, all with the same weights.
    EachHead,
    /// All heads together.
    AllHeads,
}

/// What the gate of the feed-forward half goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// GELU by its tanh formula.
    GeluTanh,
}

/// What an architecture has that its `config.json` does not say.
pub(super) struct Family {
    /// Key that says whether the attention's linears have biases.
    pub bias_key: &'static str,
    /// None: as that key says.
    pub qkv_bias: Option<bool>,
    pub output_bias: Option<bool>,
    pub default_attention_bias: bool,
    /// Whether `mlp_bias` is read.
    pub has_mlp_bias: bool,
    pub fused: Fused,
    pub head_norms: HeadNormKind,
    pub norms: LayerNorms,
    /// Whether norms multiply by 1 + weight.
    pub norm_offset: bool,
    pub default_head_dim: Option<usize>,
    pub default_epsilon: f64,
    pub default_theta: f64,
    /// The share of each head that is rotated where nothing is said, in families that may leave a part as it is.
    pub default_rotated: Option<f64>,
    pub rotary_pairs: RotaryPairs,
    pub default_tied: bool,
    /// Whether the activation is named by `hidden_activation` (and is GELU), or by `hidden_act`.
    pub is_gelu: bool,
    pub windows: Windows,
    /// The window where `sliding_window` is not there and the family has one all the same.
    pub default_window: usize,
    /// Whether each head has a logit that takes part in its softmax and stands for no token.
    pub has_sinks: bool,
    /// Whether queries come with a gate of what the attention gives.
    pub has_output_gate: bool,
    /// Whether layers of `layer_types` have linear attention.
    pub has_linear_attention: bool,
    /// Whether what these read goes through two linears in place of four, whose columns lie key head by key head.
    pub has_grouped_projections: bool,
    /// Whether layers without a window have other sizes than those with one, and some have keys and values of others, and inputs of
    /// their own.
    pub layers_differ: bool,
    /// Whether values of each head are normed, without weights.
    pub value_norms: bool,
    /// Whether what a layer gives is multiplied by a number of its own.
    pub layer_scalars: bool,
    pub experts: Option<ExpertKind>,
}

/// Which layers limit what a query sees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// None: the family reads neither `sliding_window` nor `layer_types`.
    Never,
    /// Those of `layer_types`, or where these are not given all from `max_window_layers` on, with `use_sliding_window`.
    Asked,
    /// All, with `use_sliding_window`; `layer_types` is not read.
    AllAsked,
    /// Those of `layer_types`, or where these are not given every other one below `max_window_layers` (28), with
    /// `use_sliding_window`.
    EveryOtherAsked,
    /// Those of `layer_types`, or all where these are not given.
    All,
    /// All, where there is a `sliding_window`; `layer_types` is not read.
    AllWhereGiven,
    /// Those of `layer_types`; where these are not given, the last of every so many sees everything.
    AllBut { every: usize },
    /// Those of `layer_types`; where these are not given, the last of every six and the last one see everything.
    AllButSixthAndLast,
}

impl Family {
    /// What the others are told from.
    const LLAMA: Self = Self {
        bias_key: "attention_bias",
        qkv_bias: None,
        output_bias: None,
        default_attention_bias: false,
        has_mlp_bias: false,
        fused: Fused::NONE,
        head_norms: HeadNormKind::None,
        norms: LayerNorms::BEFORE,
        norm_offset: false,
        default_head_dim: None,
        default_epsilon: 1e-6,
        default_theta: 10_000.0,
        default_rotated: None,
        rotary_pairs: RotaryPairs::Halves,
        default_tied: false,
        is_gelu: false,
        windows: Windows::Never,
        default_window: 4096,
        has_sinks: false,
        has_output_gate: false,
        has_linear_attention: false,
        has_grouped_projections: false,
        layers_differ: false,
        value_norms: false,
        layer_scalars: false,
        experts: None,
    };

    const GEMMA: Self = Self {
        norms: LayerNorms::BOTH,
        norm_offset: true,
        default_head_dim: Some(256),
        default_tied: true,
        is_gelu: true,
        windows: Windows::AllBut { every: 2 },
        ..Self::LLAMA
    };

    const GEMMA3: Self = Self {
        head_norms: HeadNormKind::EachHead,
        default_theta: 1_000_000.0,
        windows: Windows::AllBut { every: 6 },
        ..Self::GEMMA
    };

    const GEMMA4: Self = Self {
        norm_offset: false,
        windows: Windows::AllButSixthAndLast,
        default_window: 512,
        layers_differ: true,
        value_norms: true,
        layer_scalars: true,
        experts: Some(ExpertKind::GEMMA4),
        ..Self::GEMMA3
    };

    const OLMO: Self = Self {
        head_norms: HeadNormKind::AllHeads,
        norms: LayerNorms::AFTER,
        default_epsilon: 1e-5,
        ..Self::LLAMA
    };

    const GLM: Self = Self {
        output_bias: Some(false),
        default_attention_bias: true,
        fused: Fused {
            qkv: false,
            gate_up: true,
        },
        default_head_dim: Some(128),
        default_epsilon: 1.5625e-7,
        default_rotated: Some(0.5),
        rotary_pairs: RotaryPairs::Neighbours,
        ..Self::LLAMA
    };

    /// Attention in some layers, and linear attention in the others.
    const HYBRID: Self = Self {
        head_norms: HeadNormKind::EachHead,
        norm_offset: true,
        default_head_dim: Some(256),
        default_rotated: Some(0.25),
        has_output_gate: true,
        has_linear_attention: true,
        ..Self::LLAMA
    };

    pub fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama | Architecture::Granite => Self {
                has_mlp_bias: true,
                ..Self::LLAMA
            },
            Architecture::Qwen2 => Self {
                qkv_bias: Some(true),
                output_bias: Some(false),
                windows: Windows::Asked,
                ..Self::LLAMA
            },
            Architecture::Qwen3 => Self {
                head_norms: HeadNormKind::EachHead,
                default_head_dim: Some(128),
                windows: Windows::Asked,
                ..Self::LLAMA
            },
            Architecture::Mistral => Self {
                qkv_bias: Some(false),
                output_bias: Some(false),
                windows: Windows::All,
                ..Self::LLAMA
            },
            Architecture::SmolLm3 => Self {
                has_mlp_bias: true,
                default_theta: 2_000_000.0,
                default_tied: true,
                windows: Windows::Asked,
                ..Self::LLAMA
            },
            Architecture::Gemma2 => Self::GEMMA,
            Architecture::Gemma3 => Self::GEMMA3,
            Architecture::Gemma4 => Self::GEMMA4,
            Architecture::Olmo2 => Self::OLMO,
            Architecture::Olmo3 => Self {
                windows: Windows::AllBut { every: 4 },
                ..Self::OLMO
            },
            Architecture::Phi3 => Self {
                qkv_bias: Some(false),
                output_bias: Some(false),
                fused: Fused {
                    qkv: true,
                    gate_up: true,
                },
                default_epsilon: 1e-5,
                default_rotated: Some(1.0),
                windows: Windows::AllWhereGiven,
                ..Self::LLAMA
            },
            Architecture::Qwen2Moe => Self {
                bias_key: "qkv_bias",
                output_bias: Some(false),
                default_attention_bias: true,
                windows: Windows::EveryOtherAsked,
                experts: Some(ExpertKind::QWEN_SHARED),
                ..Self::LLAMA
            },
            Architecture::Qwen3Moe => Self {
                head_norms: HeadNormKind::EachHead,
                windows: Windows::AllAsked,
                experts: Some(ExpertKind::QWEN),
                ..Self::LLAMA
            },
            Architecture::Mixtral => Self {
                qkv_bias: Some(false),
                output_bias: Some(false),
                default_epsilon: 1e-5,
                default_theta: 1_000_000.0,
                windows: Windows::AllWhereGiven,
                experts: Some(ExpertKind::MIXTRAL),
                ..Self::LLAMA
            },
            Architecture::Olmoe => Self {
                head_norms: HeadNormKind::AllHeads,
                default_epsilon: 1e-5,
                experts: Some(ExpertKind::OLMOE),
                ..Self::LLAMA
            },
            Architecture::GptOss => Self {
                default_attention_bias: true,
                default_head_dim: Some(64),
                default_epsilon: 1e-5,
                default_theta: 150_000.0,
                windows: Windows::AllBut { every: 2 },
                default_window: 128,
                has_sinks: true,
                experts: Some(ExpertKind::GPT_OSS),
                ..Self::LLAMA
            },
            Architecture::Qwen35 => Self::HYBRID,
            Architecture::Qwen35Moe => Self {
                experts: Some(ExpertKind::QWEN_3_5),
                ..Self::HYBRID
            },
            Architecture::Qwen3Next => Self {
                has_grouped_projections: true,
                experts: Some(ExpertKind::QWEN_NEXT),
                ..Self::HYBRID
            },
            Architecture::Glm => Self::GLM,
            Architecture::Glm4 => Self {
                norms: LayerNorms::BOTH_OF_GLM,
                ..Self::GLM
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
