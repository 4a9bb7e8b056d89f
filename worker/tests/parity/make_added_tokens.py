#!/usr/bin/env python3
"""Makes the golden files of tokens that are added to a model, all by Transformers and PEFT in float32: a tiny random
model with a tokenizer of single bytes, two tokens added to it, their rows set to the mean of the rows that were there,
and ten AdamW steps of LoRA with these rows trained besides.

    python worker/tests/parity/make_added_tokens.py            # rewrites golden/added-tokens*/ beside this file
    python worker/tests/parity/make_added_tokens.py FOLDER     # writes elsewhere, for a live comparison

Needs torch, transformers, peft and safetensors; golden.json says which versions it was made with. In each folder,
`model` is the model without the added tokens; `adapter` and `trained_adapter` are as PEFT saves them, with the whole
embedding since its size is another than the base's, and beside them the tokenizer with the added tokens. All logits
are of the model with the added tokens: `start` with the mean rows, `trained` with the trained adapter.
"""

import json
import shutil
import sys
from pathlib import Path

import make_golden
import peft
import torch
import transformers
from cases import COMMON
from make_golden import BATCH, EAGER, SEQUENCE_LEN, TOKENIZER, greedy, logits, save_adapter, save_model, train
from safetensors.torch import save_file

ADDED = ["<|sheep|>", "<|fox|>"]
# The special tokens of the shipped tokenizer, and every byte.
OLD_TOKENS = 259
# With these seeds the two most likely tokens of a continuation are never nearly as likely as each other.
CASES = {
    "added-tokens": (False, {"embed_tokens": [259, 260], "lm_head": [259, 260]}, 72),
    "added-tokens-tied": (True, [259, 260], 83),
}


def save_byte_tokenizer(folder):
    """The shipped tokenizer without its merges."""
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["merges"] = []
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < OLD_TOKENS}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)


@torch.no_grad()
def add_tokens(model, tokenizer):
    """The sum of the old rows is taken in float64, their mean rounded once."""
    assert tokenizer.add_tokens(ADDED, special_tokens=True) == len(ADDED)
    old = [layer.weight.double().mean(dim=0).float() for layer in (model.get_input_embeddings(), model.lm_head)]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer, mean in zip((model.get_input_embeddings(), model.lm_head), old):
        layer.weight[OLD_TOKENS:] = mean


def examples_with_added(generator):
    """As elsewhere, with the added tokens in the place of some others."""
    examples = make_golden.random_examples(generator)
    for example in examples:
        for field in ("tokens", "labels"):
            example[field] = [OLD_TOKENS + token % 2 if 3 <= token < 11 else token for token in example[field]]
    return examples


def make_case(folder, tied, indices, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(COMMON, vocab_size=OLD_TOKENS, head_dim=12, tie_word_embeddings=tied)
    save_byte_tokenizer(folder / "model")
    save_model(make_golden.random_model(transformers.Qwen3Config(**sizes), generator), folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", **EAGER)
    add_tokens(model, tokenizer)

    examples = examples_with_added(generator)
    tensors = {f"start.{i}": rows for i, rows in enumerate(logits(model, examples))}
    golden = dict(
        learning_rate_lora=2e-3,
        learning_rate_full=0.0,
        sequence_len=SEQUENCE_LEN,
        batch=BATCH,
        examples=examples,
        full=[],
        greedy_base=greedy(model, examples[0]["tokens"], 24),
    )
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        trainable_token_indices=indices,
        task_type="CAUSAL_LM",
    )
    adapter = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def save(path):
        save_adapter(adapter, path)
        # Where the base lay is no part of the file. PEFT read its size there.
        config = json.loads((path / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(path)

    save(folder / "adapter")
    golden["lora"] = train(adapter, examples, golden["learning_rate_lora"])
    save(folder / "trained_adapter")
    golden["greedy_adapter"] = greedy(adapter, examples[0]["tokens"], 24)
    tensors |= {f"trained.{i}": rows for i, rows in enumerate(logits(adapter, examples))}
    save_file(tensors, folder / "logits.safetensors")
    golden["versions"] = {m.__name__: str(m.__version__) for m in (torch, transformers, peft)}
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "golden"
    for name, (tied, indices, seed) in CASES.items():
        shutil.rmtree(target / name, ignore_errors=True)
        make_case(target / name, tied, indices, seed)


if __name__ == "__main__":
    main()
