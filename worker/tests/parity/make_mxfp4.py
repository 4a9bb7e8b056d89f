#!/usr/bin/env python3
"""Makes the golden files of a model whose experts are in MXFP4, by Transformers on a CPU: a tiny random GPT-OSS as its
owner publishes it (`model`), and what Transformers makes of it when it is asked to dequantise (`base`).

    python worker/tests/parity/make_mxfp4.py            # rewrites golden/gpt-oss-mxfp4/ beside this file
    python worker/tests/parity/make_mxfp4.py FOLDER     # writes elsewhere, for a live comparison

Needs torch, transformers, accelerate, peft and safetensors; golden.json says which versions it was made with.
"""

import json
import shutil
import sys
from pathlib import Path

import make_golden
import peft
import torch
import transformers
from cases import COMMON, WINDOW, YARN_ROPE
from make_golden import BATCH, EAGER, SEQUENCE_LEN, greedy, logits, random_examples, save_adapter, save_model, train
from safetensors.torch import load_file, save_file

NAME = "gpt-oss-mxfp4"
SEED = 51
# Several blocks in a row, of gate and up and of down.
CONFIG = transformers.GptOssConfig(
    **COMMON | dict(hidden_size=64, intermediate_size=96, vocab_size=96),
    head_dim=12,
    num_local_experts=3,
    num_experts_per_tok=2,
    swiglu_limit=0.8,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters=YARN_ROPE | dict(truncate=False),
    tie_word_embeddings=False,
)
QUANTISED = dict(
    quant_method="mxfp4",
    modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
)


def quantise(folder, generator):
    """Random blocks and scales in place of the experts' matrices, such that the numbers are about as large as others."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 125, shape, generator=generator, dtype=torch.uint8)
        # Numbers too small for the normal ones of bfloat16.
        scales[0, 0, 0] = 1
        scales[-1, -1, -1] = 0
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path, metadata=dict(format="pt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=QUANTISED), indent=2) + "\n")


def adapted(model, generator):
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    # Where the base lay is no part of the file.
    model.peft_config["default"].base_model_name_or_path = model.base_model.model.name_or_path = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "golden"
    folder = target / NAME
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(SEED)
    save_model(make_golden.random_model(CONFIG, generator).to(torch.bfloat16), folder / "model")
    quantise(folder / "model", generator)
    dequantise = transformers.Mxfp4Config(dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder / "model", dtype=torch.bfloat16, quantization_config=dequantise, device_map="cpu", **EAGER)
    save_model(model, folder / "base")

    model = load(folder / "base", dtype=torch.float32, **EAGER).eval()
    examples = random_examples(generator)
    save_file({f"logits.{i}": rows for i, rows in enumerate(logits(model, examples))}, folder / "logits.safetensors")
    golden = dict(
        learning_rate_lora=2e-3,
        learning_rate_full=5e-4,
        sequence_len=SEQUENCE_LEN,
        batch=BATCH,
        examples=examples,
        greedy_base=greedy(model, examples[0]["tokens"], 24),
        # That of GPT-OSS in bfloat16 is another case.
        full=[],
    )
    model = adapted(model, generator)
    save_adapter(model, folder / "adapter")
    golden["lora"] = train(model, examples, golden["learning_rate_lora"])
    save_adapter(model, folder / "trained_adapter")
    golden["greedy_adapter"] = greedy(model, examples[0]["tokens"], 24)
    golden["versions"] = {m.__name__: str(m.__version__) for m in (torch, transformers, peft)}
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
