"""The tiny models of `make_golden.py`, one a family or kind of model, each with the adapter that is trained on it.

A case's place is its seed, unless SEEDS has another: new ones come last.
"""

import torch
import transformers

VOCABULARY = 96
PAD = 0

COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=PAD,
)
# Its original length is short, so that kept, blended and slowed frequencies all occur.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# No text here is longer than the original length, so that only the short factors are used.
LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.5, 2.0, 3.0],
    long_factor=[8.0, 16.0, 32.0],
    original_max_position_embeddings=64,
    partial_rotary_factor=0.75,
)
# As in LLAMA3_ROPE, the original length is so short that kept, blended and slowed frequencies all occur.
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    beta_fast=4.0,
    beta_slow=1.0,
    original_max_position_embeddings=64,
)
# Shorter than most examples, so that it matters.
WINDOW = 6
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
# Values have other heads than keys, of another size, and two share a key.
LINEAR_ATTENTION = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
)
GEMMA4 = dict(
    head_dim=12,
    global_head_dim=16,
    sliding_window=WINDOW,
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
        full_attention=dict(rope_type="proportional", rope_theta=10000.0, partial_rotary_factor=0.25),
    ),
    final_logit_softcapping=3.0,
    tie_word_embeddings=True,
)
QUARTER_ROPE = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "llama": (
        transformers.LlamaConfig(**COMMON, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "qwen2-tied": (
        transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True),
    ),
    "qwen3-tied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "qwen3-untied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_rslora=False),
    ),
    "mistral": (
        transformers.MistralConfig(**COMMON, head_dim=12, sliding_window=None, tie_word_embeddings=False),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "mistral-window": (
        transformers.MistralConfig(**COMMON, sliding_window=WINDOW, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_rslora=True),
    ),
    # Both caps are about as large as what they cap.
    "gemma2": (
        transformers.Gemma2Config(
            **COMMON,
            head_dim=12,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **COMMON | dict(num_hidden_layers=3),
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", rope_theta=10000.0, factor=8.0),
            ),
            tie_word_embeddings=True,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "phi3": (
        transformers.Phi3Config(
            **COMMON,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
            tie_word_embeddings=False,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    # The window is longer than everything, as that of its larger kin is.
    "phi3-longrope": (
        transformers.Phi3Config(
            **COMMON,
            original_max_position_embeddings=64,
            rope_parameters=LONG_ROPE,
            sliding_window=512,
            tie_word_embeddings=True,
        ),
        dict(target_modules=["qkv_proj", "gate_up_proj"], use_rslora=True),
    ),
    "granite": (
        transformers.GraniteConfig(
            **COMMON,
            embedding_multiplier=0.5,
            attention_multiplier=0.2,
            residual_multiplier=1.6,
            logits_scaling=2.0,
            tie_word_embeddings=True,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    # A one stands for a layer with rotation, a zero for one without.
    "smollm3": (
        transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0], tie_word_embeddings=True),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "olmo2": (
        transformers.Olmo2Config(**COMMON, tie_word_embeddings=False),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "olmo3": (
        transformers.Olmo3Config(
            **COMMON | dict(num_hidden_layers=3),
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
                full_attention=YARN_ROPE,
            ),
            tie_word_embeddings=False,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "glm4": (
        transformers.Glm4Config(
            **COMMON,
            head_dim=12,
            attention_bias=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
            tie_word_embeddings=False,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    # Some texts are longer than the original length, and the first becomes so as it goes on.
    "phi3-longrope-long": (
        transformers.Phi3Config(
            **COMMON,
            original_max_position_embeddings=12,
            rope_parameters=LONG_ROPE | dict(original_max_position_embeddings=12),
            tie_word_embeddings=True,
        ),
        dict(target_modules="all-linear", use_rslora=False),
    ),
    "glm": (
        transformers.GlmConfig(
            **COMMON,
            head_dim=12,
            attention_bias=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
            tie_word_embeddings=False,
        ),
        dict(target_modules=["q_proj", "gate_up_proj"], use_rslora=True),
    ),
    # The experts' own size is that of one expert; the other is that of a layer without experts.
    "qwen3-moe": (
        transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=12, norm_topk_prob=True, tie_word_embeddings=False),
        dict(target_modules=ATTENTION),
    ),
    "mixtral": (
        transformers.MixtralConfig(
            **COMMON | dict(intermediate_size=16),
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        dict(target_modules=ATTENTION),
    ),
    "olmoe": (
        transformers.OlmoeConfig(
            **COMMON | dict(intermediate_size=16),
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            tie_word_embeddings=False,
        ),
        dict(target_modules=ATTENTION),
    ),
    # Its middle layer has no experts.
    "qwen2-moe": (
        transformers.Qwen2MoeConfig(
            **COMMON | dict(num_hidden_layers=3),
            **EXPERTS,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[1],
            norm_topk_prob=False,
            tie_word_embeddings=False,
        ),
        dict(target_modules=ATTENTION),
    ),
    # The loss has the router's besides.
    "qwen3-moe-router-loss": (
        transformers.Qwen3MoeConfig(
            **COMMON,
            **EXPERTS,
            head_dim=12,
            norm_topk_prob=False,
            output_router_logits=True,
            router_aux_loss_coef=0.05,
            tie_word_embeddings=False,
        ),
        dict(target_modules=ATTENTION),
    ),
    # The limit is such that it clamps some gates and ups; no pair of frequencies is where the blend of YaRN begins or ends.
    "gpt-oss": (
        transformers.GptOssConfig(
            **COMMON | dict(intermediate_size=16),
            head_dim=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            swiglu_limit=0.8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=YARN_ROPE | dict(truncate=False),
            tie_word_embeddings=False,
        ),
        dict(target_modules="all-linear"),
    ),
    "qwen3.5": (
        transformers.Qwen3_5TextConfig(
            **COMMON | dict(num_hidden_layers=3),
            head_dim=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            **LINEAR_ATTENTION,
            rope_parameters=QUARTER_ROPE,
            tie_word_embeddings=True,
        ),
        dict(target_modules="all-linear"),
    ),
    "qwen3.5-moe": (
        transformers.Qwen3_5MoeTextConfig(
            **{key: value for key, value in COMMON.items() if key != "intermediate_size"},
            **EXPERTS,
            shared_expert_intermediate_size=24,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            **LINEAR_ATTENTION,
            rope_parameters=QUARTER_ROPE,
            tie_word_embeddings=False,
        ),
        dict(target_modules="all-linear"),
    ),
    # Its last layer has no experts, and the loss has the router's besides.
    "qwen3-next": (
        transformers.Qwen3NextConfig(
            **COMMON | dict(num_hidden_layers=3),
            **EXPERTS,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[2],
            output_router_logits=True,
            router_aux_loss_coef=0.05,
            head_dim=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            **LINEAR_ATTENTION,
            rope_parameters=QUARTER_ROPE,
            tie_word_embeddings=False,
        ),
        dict(target_modules=[*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"]),
    ),
    # As the largest of its kin: values are keys in the layer that sees everything, whose heads are larger and fewer.
    "gemma4": (
        transformers.Gemma4TextConfig(
            **COMMON | dict(num_hidden_layers=3),
            **GEMMA4,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            use_bidirectional_attention="vision",
        ),
        dict(target_modules="all-linear"),
    ),
    # As the smallest: the last three layers have the keys and values of the first two, and all have inputs of their own.
    "gemma4-shared": (
        transformers.Gemma4TextConfig(
            **COMMON | dict(num_hidden_layers=5),
            **GEMMA4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
        ),
        dict(target_modules="all-linear"),
    ),
    # Experts stand beside the dense half of each layer; their router is a linear.
    "gemma4-experts": (
        transformers.Gemma4TextConfig(
            **COMMON,
            **GEMMA4,
            layer_types=["sliding_attention", "full_attention"],
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
        ),
        dict(target_modules="all-linear"),
    ),
}
GEMMA3 = dict(
    head_dim=12,
    query_pre_attn_scalar=20,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
        full_attention=dict(rope_type="default", rope_theta=10000.0),
    ),
    tie_word_embeddings=True,
)
# Adapters that are more than LoRA on linear layers.
ADAPTER_CASES = {
    # No text has the tokens below 3. The order is not that of the vocabulary.
    "tokens-tied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], trainable_token_indices=[41, 7, 2, 60]),
    ),
    "tokens-untied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(
            target_modules=["q_proj", "v_proj", "down_proj"],
            trainable_token_indices={"embed_tokens": [60, 1, 7, 41], "lm_head": [7, 2, 50]},
        ),
    ),
    "saved-untied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    # Two weights come of the tied one, each trained by itself.
    "saved-tied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    # Here they stay one.
    "saved-tied-ensured": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(
            target_modules=["q_proj", "v_proj", "down_proj"],
            modules_to_save=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
        ),
    ),
    "dora": (
        transformers.LlamaConfig(**COMMON, tie_word_embeddings=False),
        dict(target_modules="all-linear", use_dora=True),
    ),
    # Linear layers with a bias and without.
    "dora-bias": (
        transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True, use_rslora=True),
    ),
    # Where several patterns fit a layer, the first counts.
    "rank-pattern": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(
            target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 6, "q_proj": 2, r"layers\.0\..*v_proj": 3},
            alpha_pattern={"k_proj": 16, "1.self_attn.q_proj": 5},
        ),
    ),
    "rank-pattern-rslora": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(
            target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 6, "q_proj": 2},
            alpha_pattern={"k_proj": 16, "down_proj": 5},
            use_rslora=True,
        ),
    ),
    # The keys have a bias, but no adapter.
    "bias-lora-only": (
        transformers.Qwen2Config(**COMMON, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], bias="lora_only"),
    ),
    "bias-all": (
        transformers.Qwen2Config(**COMMON, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], bias="all"),
    ),
    "lora-embedding": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    ),
    # The embedding and the head, one weight in the base, have an adapter each.
    "lora-embedding-tied": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    ),
    "exclude-modules": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(target_modules="all-linear", exclude_modules=["k_proj", "1.mlp.down_proj"]),
    ),
    "layers-to-transform": (
        transformers.Qwen3Config(**COMMON | dict(num_hidden_layers=3), head_dim=12, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    ),
    # The router and the fused weights of the experts are among what PEFT finds here.
    "qwen3-moe-all-linear": (
        transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=12, norm_topk_prob=True, tie_word_embeddings=False),
        dict(target_modules="all-linear"),
    ),
    # Here it finds the shared expert and its gate, and neither the router nor the experts.
    "qwen2-moe-all-linear": (
        transformers.Qwen2MoeConfig(
            **COMMON, **EXPERTS, shared_expert_intermediate_size=24, norm_topk_prob=False, tie_word_embeddings=False
        ),
        dict(target_modules="all-linear"),
    ),
    # What the adapter starts with is taken off the base.
    "pissa": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="pissa"),
    ),
    "olora": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="olora", use_rslora=True),
    ),
    # Its embedding scales what it looks up.
    "tokens-gemma3": (
        transformers.Gemma3TextConfig(**COMMON, **GEMMA3),
        dict(target_modules=["q_proj", "v_proj", "down_proj"], trainable_token_indices=[41, 7, 2, 60]),
    ),
    "lora-embedding-gemma3": (
        transformers.Gemma3TextConfig(**COMMON, **GEMMA3),
        dict(target_modules=["embed_tokens", "q_proj"]),
    ),
    # The factors B have biases of their own.
    "lora-bias": (
        transformers.Qwen2Config(**COMMON, tie_word_embeddings=False),
        dict(target_modules=["q_proj", "v_proj"], lora_bias=True),
    ),
    # The output layer alone has one; the embedding, which it is of, stays as it is.
    "dora-lm-head": (
        transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
        dict(target_modules=["lm_head", "q_proj"], use_dora=True),
    ),
    # No linear layer has an adapter.
    "experts-alone": (
        transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=12, norm_topk_prob=True, tie_word_embeddings=False),
        dict(target_modules=[], target_parameters=EXPERT_PARAMETERS),
    ),
    "experts-mixtral": (
        transformers.MixtralConfig(
            **COMMON | dict(intermediate_size=16),
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        dict(
            target_modules=ATTENTION,
            target_parameters=EXPERT_PARAMETERS,
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={"1.mlp.experts.gate_up_proj": 5},
            use_rslora=True,
        ),
    ),
    # One of the two has one, and the middle layer has no experts.
    "experts-down": (
        transformers.Qwen2MoeConfig(
            **COMMON | dict(num_hidden_layers=3),
            **EXPERTS,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[1],
            norm_topk_prob=False,
            tie_word_embeddings=False,
        ),
        dict(target_modules="all-linear", target_parameters=["experts.down_proj"]),
    ),
    "experts-gate-up": (
        transformers.OlmoeConfig(
            **COMMON | dict(intermediate_size=16),
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            tie_word_embeddings=False,
        ),
        dict(target_modules=["q_proj"], target_parameters=["layers.1.mlp.experts.gate_up_proj"]),
    ),
    # Here experts are stored the other way, and have biases; the router has an adapter, too.
    "experts-gpt-oss": (
        transformers.GptOssConfig(
            **COMMON | dict(intermediate_size=16),
            head_dim=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            swiglu_limit=0.8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=YARN_ROPE | dict(truncate=False),
            tie_word_embeddings=False,
        ),
        dict(target_modules=ATTENTION, target_parameters=[*EXPERT_PARAMETERS, "router.weight"]),
    ),
}
# With these a model goes on in several tokens: where head and embedding are one, most models repeat one token for ever.
SEEDS = {
    "gemma2": 43,
    "gemma3": 40,
    "granite": 16,
    "smollm3": 37,
    "saved-tied": 23,
    "saved-tied-ensured": 23,
    "dora-bias": 38,
    "dora-lm-head": 77,
    "phi3-longrope-long": 22,
    "lora-embedding-gemma3": 36,
    # With these no token's last expert is nearly as likely as the next one.
    "qwen3-moe": 21,
    "mixtral": 34,
    "olmoe": 32,
    "qwen2-moe": 42,
    "qwen3-moe-router-loss": 41,
    "gpt-oss": 44,
    "qwen3.5-moe": 29,
    "qwen3-next": 32,
    "qwen3-moe-all-linear": 29,
    "qwen2-moe-all-linear": 25,
    "experts-alone": 48,
    "experts-mixtral": 69,
    "experts-down": 56,
    "experts-gate-up": 62,
    "experts-gpt-oss": 68,
}


def seed(name):
    if name in CASES:
        return SEEDS.get(name, list(CASES).index(name))
    return SEEDS.get(name, 15 + list(ADAPTER_CASES).index(name))


@torch.no_grad()
def prepare(name, model):
    """What a case changes in its random weights.

    In GLM half of a head is not rotated. There a key's bias adds the same to every score of a query, so that its
    gradient is rounding alone; Adam would make it as large as any other. Small queries make it small against Adam's
    epsilon.

    In linear attention what is convolved would be so small that the norm behind the delta rule would mostly add its epsilon.

    In Gemma 4 what layers give is multiplied by numbers that are no parameters, and would all be one.
    """
    if name in ("glm", "glm4"):
        config = model.config
        for layer in model.model.layers:
            for parameter in layer.self_attn.q_proj.parameters():
                heads = parameter.unflatten(0, (config.num_attention_heads, config.head_dim))
                heads[:, config.head_dim // 2 :] *= 0.005
    if name in ("qwen3.5", "qwen3.5-moe", "qwen3-next"):
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.conv1d.weight *= 4
    if name.startswith("gemma4"):
        for number, layer in enumerate(model.model.layers):
            layer.layer_scalar.fill_(0.75 + 0.125 * number)
