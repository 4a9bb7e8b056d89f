"""The tiny models of `make_golden.py`, one a family or kind of model, each with the adapter that is trained on it.

A case's place here is its seed: new ones come last.
"""

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
}
