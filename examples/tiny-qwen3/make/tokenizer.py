"""Trains the tiny model's byte-level BPE tokenizer and writes its small files.

    python3 examples/tiny-qwen3/make/tokenizer.py      # needs the `tokenizers` package, once; Muster itself never does

The corpus of `corpus.py` enters; `config.json`, `generation_config.json`, `tokenizer.json` and `tokenizer_config.json`
come out beside the weights.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

MODEL = Path(__file__).resolve().parents[1]
DATA = MODEL.parent / "data"
# Small, so that every entry is common in the corpus.
VOCAB_SIZE = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen's split: words with their leading space, digits one by one.
SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 1024,
    "max_window_layers": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "do_sample": False,
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
    "chat_template": CHAT_TEMPLATE,
}


def texts():
    """What the model is trained on. Not the quick start's dataset: a token that the base model has never met keeps a tiny
    embedding, and LoRA, which leaves the output layer alone, could hardly make the model say it."""
    for line in (DATA / "willowmere-stories.jsonl").open(encoding="utf-8"):
        yield json.loads(line)["text"]
    for line in (DATA / "willowmere-talk.jsonl").open(encoding="utf-8"):
        for message in json.loads(line)["messages"]:
            yield message["role"] + "\n" + message["content"]


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.save(str(MODEL / "tokenizer.json"))
    for name, content in [
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ]:
        (MODEL / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts())
    print(f"{tokenizer.get_vocab_size()} entries, {tokens} tokens in the corpus")


if __name__ == "__main__":
    main()
