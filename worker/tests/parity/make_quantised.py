#!/usr/bin/env python3
"""Makes the golden files of models in NF4, by Transformers, PEFT and bitsandbytes in float32 on a CPU: tiny random
models as `from_pretrained(..., quantization_config)` and `save_pretrained` leave them, their logits and greedy
continuations, and ten AdamW steps of LoRA on them.

    python worker/tests/parity/make_quantised.py            # rewrites golden/NAME-nf4/ beside this file
    python worker/tests/parity/make_quantised.py FOLDER     # writes elsewhere, for a live comparison

Needs torch, transformers, peft, bitsandbytes, accelerate and safetensors; golden.json says which versions it was made
with. In each folder, `base` is what was quantised and `model` what came of it.

PEFT's prepare_model_for_kbit_training is not called: what it casts to float32 is float32, so it would change no number.
"""

import json
import os
import shutil
import sys
from pathlib import Path

# The fallbacks in torch as written, not compiled.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes
import make_golden
import peft
import torch
import transformers
from cases import COMMON, LLAMA3_ROPE
from make_golden import BATCH, SEQUENCE_LEN, batch, greedy, save_adapter, save_model, train
from safetensors.torch import save_file

# Columns that are a multiple of 64 and columns that are not, so that blocks cross rows and a last block is short. None
# is a multiple of 16 alone: those bitsandbytes dequantises wrongly on AVX512 (common/tests/nf4/make.py).
LLAMA = dict(COMMON, hidden_size=64, intermediate_size=72, rope_parameters=LLAMA3_ROPE)
QWEN3 = dict(COMMON, hidden_size=40, intermediate_size=64, head_dim=18)
CASES = {
    "llama-nf4": (
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
        torch.float32,
        dict(bnb_4bit_use_double_quant=True),
    ),
    "qwen3-tied-nf4": (
        transformers.Qwen3Config(**QWEN3, tie_word_embeddings=True),
        torch.bfloat16,
        dict(bnb_4bit_use_double_quant=False),
    ),
    # Some layers are left as they are, as in the "dynamic" folders that people publish.
    "qwen3-untied-nf4": (
        transformers.Qwen3Config(**QWEN3, tie_word_embeddings=False),
        torch.bfloat16,
        dict(
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"],
        ),
    ),
}


def load(folder, dtype, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", device_map={"": "cpu"}, **settings
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Else evaluation on AVX512-BF16 goes over to bfloat16, for good, and changes the absmax.
            module.support_avx512bf16_for_cpu = False
            # Else the backward pass rounds the weights to the dtype they were quantised from, the forward pass not.
            module.weight.quant_state.dtype = dtype
    # What is not quantised keeps the dtype of the file, whatever `dtype` says.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def quantise(base, dtype, settings, folder):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **settings
    )
    save_model(load(base, dtype, quantization_config=config), folder)


def adapted(model, generator, seed):
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    # Where the base lay is no part of the file.
    model.peft_config["default"].base_model_name_or_path = model.base_model.model.name_or_path = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_case(folder, config, dtype, settings, seed):
    generator = torch.Generator().manual_seed(seed)
    save_model(make_golden.random_model(config, generator).to(dtype), folder / "base")
    quantise(folder / "base", dtype, settings, folder / "model")
    model = load(folder / "model", torch.float32)

    examples = make_golden.random_examples(generator)
    prompts = [example["tokens"] for example in examples[:3]]
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
        loss = model(**batch(examples[:BATCH])).loss.item()
    save_file({f"logits.{i}": rows.contiguous() for i, rows in enumerate(logits)}, folder / "logits.safetensors")
    golden = dict(
        learning_rate_lora=2e-3,
        learning_rate_full=0.0,
        sequence_len=SEQUENCE_LEN,
        batch=BATCH,
        examples=examples,
        # Of the first batch, without an adapter.
        loss_base=loss,
        greedy_base=greedy(model, prompts[0], 24),
        # What is quantised is not trained.
        full=[],
    )

    model = adapted(model, generator, seed)
    save_adapter(model, folder / "adapter")
    golden["lora"] = train(model, examples, golden["learning_rate_lora"])
    save_adapter(model, folder / "trained_adapter")
    golden["greedy_adapter"] = greedy(model, prompts[0], 24)
    golden["versions"] = {m.__name__: str(m.__version__) for m in (torch, transformers, peft, bitsandbytes)}
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "golden"
    for seed, (name, (config, dtype, settings)) in enumerate(CASES.items(), start=16):
        shutil.rmtree(target / name, ignore_errors=True)
        make_case(target / name, config, dtype, settings, seed)


if __name__ == "__main__":
    main()
