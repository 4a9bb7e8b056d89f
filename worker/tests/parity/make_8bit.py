#!/usr/bin/env python3
"""Makes the golden files of moments in 8 bits, by bitsandbytes' own optimizers on its processor path: ten steps on made-up
gradients with the codes that they leave (`worker/src/engine/optim/golden/eight_bits.json`), and ten steps of LoRA and of full
training of a tiny model (`golden/qwen3-8bit`), by Transformers and PEFT.

    python worker/tests/parity/make_8bit.py

One thing of it is replaced: how a number becomes a code. There the processor path finds it among 65,536 equal places, which its GPU
kernels do not; here it is the nearest value of the map, and of a second moment above 0 a value above 0 (see
`worker/src/engine/optim/eight_bits.rs`). The losses of the path as it is are kept beside those (`lora_as_is`, `full_as_is`).

Needs torch, transformers, peft, safetensors and bitsandbytes; what it was last run with is in `golden/qwen3-8bit/versions.json`.
"""

import json
import shutil
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes.backends.cpu import ops
from bitsandbytes.optim import AdamW, GlobalOptimManager, Lion

import make_golden
from cases import COMMON
from make_golden import EAGER, STEPS

HERE = Path(__file__).parent
NAME = "qwen3-8bit"
CODES = HERE.parents[1] / "src" / "engine" / "optim" / "golden" / "eight_bits.json"
AS_IS = ops._quant_blockwise_fp32_direct
RATE = 0.01
# Blocks that end with the tensor and before; a vector, which does not decay; an embedding and a small matrix, in float32.
SHAPES = {
    "model.embed_tokens.weight": (70, 60),
    "model.layers.0.mlp.up_proj.weight": (70, 60),
    "model.layers.0.self_attn.q_proj.weight": (64, 63),
    "model.norm.weight": (4096,),
}
MASK = 0xFFFFFFFF


def nearest(values, code, absmax_out, codes_out, blocksize):
    flat = values.flatten()
    limits = (code[:-1] + code[1:]) * 0.5
    if code[0] == 0:
        limits[0] = 0
    codes, absmax = codes_out.view(-1), absmax_out.view(-1)
    for index, start in enumerate(range(0, len(flat), blocksize)):
        block = flat[start : start + blocksize]
        absmax[index] = block.abs().max()
        found = torch.searchsorted(limits, block / absmax[index]) if absmax[index] > 0 else torch.zeros_like(block)
        codes[start : start + blocksize] = found.to(torch.uint8)


def scramble(x):
    """A number below 2^32 that looks random."""
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x


def made_up(count, seed):
    """Numbers of five sizes, and every ninth is 0."""

    def number(index):
        x = scramble((index * 0x9E3779B1 + seed * 0x85EBCA77 + 1) & MASK)
        return 0.0 if x % 9 == 0 else (x / 2**32 - 0.5) / 10 ** (index % 5)

    return torch.tensor([number(index) for index in range(count)], dtype=torch.float32)


def optimizer_of(kind, named, lr, betas, weight_decay, is_decayed):
    """As Transformers' trainer makes it: embeddings keep float32."""
    GlobalOptimManager._instance = None
    manager = GlobalOptimManager.get_instance()
    groups = [
        dict(params=[p for n, p in named if is_decayed(n)], weight_decay=weight_decay),
        dict(params=[p for n, p in named if not is_decayed(n)], weight_decay=0.0),
    ]
    optimizer = kind([group for group in groups if group["params"]], lr=lr, betas=betas, optim_bits=8)
    for name, parameter in named:
        if name.endswith("embed_tokens.weight"):
            manager.override_config(parameter, "optim_bits", 32)
    return optimizer


def steps_of(kind, betas):
    parameters = {
        name: torch.nn.Parameter(made_up(torch.Size(shape).numel(), 100).reshape(shape)) for name, shape in SHAPES.items()
    }
    optimizer = optimizer_of(kind, list(parameters.items()), RATE, betas, 0.1, lambda name: len(SHAPES[name]) == 2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        for name, parameter in parameters.items():
            parameter.grad = made_up(parameter.numel(), step).reshape(parameter.shape)
        optimizer.step()
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[name] = dict(weights=parameter.detach().flatten()[::7].tolist())
        for moment, key in (("state1", "absmax1"), ("state2", "absmax2")):
            if key in state:
                codes = state[moment].flatten()
                assert codes.dtype == torch.uint8
                tensors[name][moment] = dict(codes=bytes(codes.tolist()).hex(), absmax=state[key].tolist())
    return tensors


def make_codes():
    functional = bitsandbytes.functional
    golden = dict(
        signed=functional.create_dynamic_map(signed=True).tolist(),
        unsigned=functional.create_dynamic_map(signed=False).tolist(),
        shapes=[[name, list(shape)] for name, shape in SHAPES.items()],
        rate=RATE,
        cases=[
            dict(optimizer="adamw_8bit", beta1=0.9, beta2=0.95, tensors=steps_of(AdamW, (0.9, 0.95))),
            dict(optimizer="lion_8bit", beta1=0.9, beta2=0.99, tensors=steps_of(Lion, (0.9, 0.99))),
        ],
    )
    CODES.write_text(json.dumps(golden) + "\n")


def make_adamw(groups, lr, betas, eps):
    """In place of `torch.optim.AdamW`, whose place in `make_golden.train` it takes."""
    assert eps == 1e-8
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = [(name, p) for name, p in make_adamw.model.named_parameters() if p.requires_grad]
    names = {name: decay[id(p)] > 0 for name, p in named}
    return optimizer_of(AdamW, named, lr, betas, 0.01, names.get)


def train(model, examples, rate, quantise):
    ops._quant_blockwise_fp32_direct = quantise
    make_adamw.model, usual = model, torch.optim.AdamW
    torch.optim.AdamW = make_adamw
    try:
        return make_golden.train(model, examples, rate)
    finally:
        torch.optim.AdamW = usual
        ops._quant_blockwise_fp32_direct = nearest


def make_model(folder):
    sizes = COMMON | dict(hidden_size=64, intermediate_size=80, num_hidden_layers=1)
    config = transformers.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(88)
    base = make_golden.random_model(config, generator)
    make_golden.save_model(base, folder / "model")
    golden = dict(
        learning_rate_lora=2e-3,
        learning_rate_full=5e-4,
        sequence_len=make_golden.SEQUENCE_LEN,
        batch=make_golden.BATCH,
        examples=make_golden.random_examples(generator),
        greedy_base=[],
        greedy_adapter=[],
    )

    def full(quantise):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", **EAGER)
        return model, train(model, golden["examples"], golden["learning_rate_full"], quantise)

    _, golden["full_as_is"] = full(AS_IS)
    model, golden["full"] = full(nearest)
    make_golden.save_model(model, folder / "full")

    torch.manual_seed(88)
    # A has 4096 scalars, B of one linear too.
    settings = dict(r=64, lora_alpha=64, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapter = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    make_golden.save_adapter(adapter, folder / "adapter")

    def lora(quantise):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", **EAGER)
        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
        return model, train(model, golden["examples"], golden["learning_rate_lora"], quantise)

    _, golden["lora_as_is"] = lora(AS_IS)
    model, golden["lora"] = lora(nearest)
    make_golden.save_adapter(model, folder / "trained_adapter")
    # No path of this machine.
    path = folder / "trained_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path=None), indent=2) + "\n")
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    versions = {m.__name__: str(m.__version__) for m in (torch, transformers, peft, bitsandbytes)}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ops._quant_blockwise_fp32_direct = nearest
    make_codes()
    folder = HERE / "golden" / NAME
    shutil.rmtree(folder, ignore_errors=True)
    make_model(folder)


main()
