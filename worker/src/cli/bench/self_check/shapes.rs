//! The small models that a self-check compares devices on.

use serde_json::{Value, json};

use crate::cli::bench::{Dtype, Mode};

/// A model to compare on.
pub struct Shape {
    pub name: &'static str,
    pub config: Value,
    pub mode: Mode,
    pub dtype: Dtype,
    pub seq: u32,
    /// Whether all matrices but routers are in 4 bits.
    pub in_4_bits: bool,
}

/// The shapes to check: every method and type; heads of 64, 128 and 256, and sequences that fill no tile; windows, soft caps, and norms
/// before and behind the halves of layers, of each head and of all together; experts beside a shared one, and fused ones with sinks;
/// linear attention over several chunks, by attention with a gate; bases of 4 bits.
pub fn shapes() -> Vec<Shape> {
    let config = |architecture: &str, head_dim: usize| {
        json!({
            "architectures": [architecture], "vocab_size": 1000, "hidden_size": 256,
            "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": head_dim, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": false,
            "tie_word_embeddings": architecture == "Qwen3ForCausalLM", "initializer_range": 0.05
        })
    };
    let shape = |name, architecture, head_dim, mode, dtype, seq| Shape {
        name,
        config: config(architecture, head_dim),
        mode,
        dtype,
        seq,
        in_4_bits: false,
    };
    let in_4_bits = |shape: Shape| Shape {
        in_4_bits: true,
        ..shape
    };
    let with = |mut shape: Shape, settings: Value| {
        for (key, value) in settings.as_object().into_iter().flatten() {
            shape.config[key] = value.clone();
        }
        shape
    };
    vec![
        shape(
            "Qwen3, LoRA, float32",
            "Qwen3ForCausalLM",
            64,
            Mode::Lora,
            Dtype::Float32,
            100,
        ),
        shape(
            "Qwen3, LoRA, bfloat16",
            "Qwen3ForCausalLM",
            128,
            Mode::Lora,
            Dtype::Bfloat16,
            300,
        ),
        shape(
            "Qwen2, all weights, float32",
            "Qwen2ForCausalLM",
            64,
            Mode::Full,
            Dtype::Float32,
            130,
        ),
        shape(
            "Llama, all weights, bfloat16",
            "LlamaForCausalLM",
            128,
            Mode::Full,
            Dtype::Bfloat16,
            129,
        ),
        with(
            shape(
                "Gemma 2, LoRA, bfloat16",
                "Gemma2ForCausalLM",
                256,
                Mode::Lora,
                Dtype::Bfloat16,
                150,
            ),
            json!({
                "sliding_window": 70, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0
            }),
        ),
        with(
            shape(
                "OLMo 3, all weights, float32",
                "Olmo3ForCausalLM",
                64,
                Mode::Full,
                Dtype::Float32,
                130,
            ),
            json!({"sliding_window": 70, "layer_types": ["sliding_attention", "full_attention"]}),
        ),
        with(
            shape(
                "Qwen2-MoE, LoRA, float32",
                "Qwen2MoeForCausalLM",
                64,
                Mode::Lora,
                Dtype::Float32,
                140,
            ),
            json!({
                "num_experts": 20, "num_experts_per_tok": 4, "moe_intermediate_size": 96,
                "shared_expert_intermediate_size": 160, "output_router_logits": true,
                "router_aux_loss_coef": 0.1
            }),
        ),
        with(
            shape(
                "GPT-OSS, all weights, float32",
                "GptOssForCausalLM",
                64,
                Mode::Full,
                Dtype::Float32,
                150,
            ),
            json!({
                "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 160,
                "sliding_window": 70, "layer_types": ["sliding_attention", "full_attention"],
                "attention_bias": true
            }),
        ),
        with(
            shape(
                "Qwen3.5, LoRA, bfloat16",
                "Qwen3_5ForCausalLM",
                256,
                Mode::Lora,
                Dtype::Bfloat16,
                170,
            ),
            json!({
                "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                "linear_key_head_dim": 128, "linear_value_head_dim": 128
            }),
        ),
        with(
            shape(
                "Qwen3-Next, all weights, float32",
                "Qwen3NextForCausalLM",
                64,
                Mode::Full,
                Dtype::Float32,
                140,
            ),
            json!({
                "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                "linear_key_head_dim": 64, "linear_value_head_dim": 96, "num_experts": 8,
                "num_experts_per_tok": 2, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 96
            }),
        ),
        in_4_bits(shape(
            "Qwen3, 4 bits, bfloat16",
            "Qwen3ForCausalLM",
            128,
            Mode::Lora,
            Dtype::Bfloat16,
            300,
        )),
        in_4_bits(with(
            shape(
                "Qwen3-MoE, 4 bits, float32",
                "Qwen3MoeForCausalLM",
                64,
                Mode::Lora,
                Dtype::Float32,
                140,
            ),
            json!({"num_experts": 20, "num_experts_per_tok": 4, "moe_intermediate_size": 96}),
        )),
    ]
}
