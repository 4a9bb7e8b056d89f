#!/usr/bin/env python3
"""Loads what Muster wrote with Transformers and PEFT, checks it, and prints the greedy answer to a prompt.

    python worker/tests/parity/peft_roundtrip.py MODEL PROMPT MAX_NEW_TOKENS [ADAPTER]

The answer must be what `worker generate` gives. Of an adapter it also checks that every tensor finds its place, and
that PEFT, saving it again, writes the same tensors and the same configuration.
"""

import json
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file


def check_adapter(model, adapter):
    # Not the base model's matrices that adapters on the embedding and the output layer are on.
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == written.keys(), f"tensors differ: {sorted(loaded.keys() ^ written.keys())}"
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor), f"{name} differs"
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        ours = json.loads((adapter / "adapter_config.json").read_text())
        theirs = json.loads((Path(again) / "adapter_config.json").read_text())
    # PEFT holds them as sets, writes its own version, and of some mixtures of experts an empty list of parameters.
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
        config["target_parameters"] = sorted(config["target_parameters"] or []) or None
        config.pop("peft_version")
    assert list(ours) == list(theirs), f"fields differ: {sorted(ours.keys() ^ theirs.keys())}"
    for field in ours:
        assert ours[field] == theirs[field], f"{field}: {ours[field]!r} for PEFT's {theirs[field]!r}"


def main():
    model_dir, prompt, max_new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if len(sys.argv) > 4:
        model = peft.PeftModel.from_pretrained(model, sys.argv[4])
        check_adapter(model, Path(sys.argv[4]))
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    sys.stdout.buffer.write(tokenizer.decode(answer, skip_special_tokens=True).encode() + b"\n")


if __name__ == "__main__":
    main()
