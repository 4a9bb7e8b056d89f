"""One training loop of PyTorch, Transformers and PEFT on random weights, as `worker bench` is one of Muster.

In: the same shape, batch, and thread count or GPU. Out: one JSON line with the medians. Downloads nothing.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the model's config.json")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or a GPU such as cuda:0")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--load-in-4bit", action="store_true", help="QLoRA: layers in NF4 by bitsandbytes, absmax too")
    args = parser.parse_args()
    if args.load_in_4bit and args.mode != "lora":
        parser.error("what is quantised cannot be trained: --load-in-4bit goes with --mode lora")
    return args


def quantise(model, compute_dtype, device):
    """As `from_pretrained` with a BitsAndBytesConfig: every linear layer but the head, computed in `compute_dtype`."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"quant_type": "nf4", "compress_statistics": True}
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            assert layer.bias is None, name
            sizes = (layer.in_features, layer.out_features)
            made = Linear4bit(*sizes, bias=False, compute_dtype=compute_dtype, device="meta", **settings)
            made.weight = Params4bit(layer.weight.data, requires_grad=False, module=made, **settings)
            # This is what quantises.
            model.set_submodule(name, made.to(device))
    model.is_loaded_in_4bit = True


def model_of(args):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with open(args.config) as file:
        values = json.load(file)
    theta = values.pop("rope_theta")
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if args.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    if args.load_in_4bit:
        quantise(model, getattr(torch, args.dtype), args.device)
    if args.mode == "lora":
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model = model.to(args.device)
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if args.mode == "lora":
            model.enable_input_require_grads()
    return model, config.vocab_size


class Processor:
    """Memory and time where nothing runs behind the program's back."""

    name = "cpu"

    def settle(self):
        pass

    def peak_memory_bytes(self):
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return 0

    def forget_peak(self):
        """So that building the model does not count."""
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


class Gpu:
    """A GPU runs behind; its memory is what PyTorch's tensors took at a time."""

    def __init__(self, device):
        import torch

        self.cuda, self.device = torch.cuda, device
        self.name = torch.cuda.get_device_name(device)

    def settle(self):
        self.cuda.synchronize(self.device)

    def peak_memory_bytes(self):
        return self.cuda.max_memory_allocated(self.device)

    def forget_peak(self):
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats(self.device)


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = Processor() if args.device == "cpu" else Gpu(args.device)
    model, vocabulary = model_of(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=args.device != "cpu" or None)
    run = torch.compile(model) if args.compile else model
    autocast = args.dtype == "bfloat16"

    def step():
        ids = torch.randint(0, vocabulary, (args.batch, args.seq), device=args.device)
        with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=autocast):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        device.settle()
        return float(loss.detach())

    device.forget_peak()
    for _ in range(args.warmup):
        step()
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    tokens = args.batch * args.seq
    report = {
        "tokens_per_second_median": tokens / statistics.median(seconds),
        "tokens_per_second_best": tokens / min(seconds),
        "peak_memory_bytes": device.peak_memory_bytes(),
        "device": device.name,
        "torch": torch.__version__,
    }
    if args.load_in_4bit:
        report["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
