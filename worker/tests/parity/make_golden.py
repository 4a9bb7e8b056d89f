#!/usr/bin/env python3
"""Makes the golden files that the parity tests compare with, all by Transformers and PEFT in float32: tiny random
models, their logits and greedy continuations, ten AdamW steps of LoRA and of full training on token ids; the same of
adapters that are more than LoRA on linear layers; and ten steps of LoRA on dataset files, from chat template and
tokenizer to the trained adapter (`dataset/`).

    python worker/tests/parity/make_golden.py            # rewrites its folders of golden/
    python worker/tests/parity/make_golden.py FOLDER     # writes elsewhere, for a live comparison
    python worker/tests/parity/make_golden.py --only CASE CASE
                                                         # rewrites these cases only, and leaves the others as they are

Needs torch, transformers, peft and safetensors. What it was last run with is recorded in golden/versions.json, or, for
cases made by name, in a versions.json of their own.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

from cases import ADAPTER_CASES, CASES, COMMON, PAD, VOCABULARY, prepare, seed

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
DATASET = "dataset"
DATASET_SEED = 4
SEQUENCE_LEN = 20
# Tokens of several chunks, where layers go through a text chunk by chunk.
LONG = 150
STEPS = 10
BATCH = 4
# Texts of a slot, as the tests have them.
SLOT = 2
IGNORED = -100
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
NAMES = [*CASES, *ADAPTER_CASES, DATASET]


def random_model(config, generator):
    """Weights large enough that every part of the model matters in the logits. Those of norms scatter around what the
    family starts them with: one, or zero where one is added to them."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scale")):
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    model.tie_weights()
    return model.eval()


def random_examples(generator):
    """STEPS * BATCH examples of several lengths; the first few tokens of each are a prompt and not trained."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    examples = []
    for _ in range(STEPS * BATCH):
        length = draw(5, SEQUENCE_LEN + 1)
        tokens = [draw(3, VOCABULARY) for _ in range(length)]
        prompt = draw(1, length - 2)
        labels = [IGNORED] * prompt + tokens[prompt:]
        examples.append(dict(tokens=tokens, labels=labels))
    return examples


def random_text(name):
    drawn = torch.randint(3, VOCABULARY, (LONG,), generator=torch.Generator().manual_seed(seed(name)))
    return drawn.tolist()


def batch(examples):
    longest = max(len(example["tokens"]) for example in examples)

    def pad(rows, value):
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    tokens = [example["tokens"] for example in examples]
    return dict(
        input_ids=pad(tokens, PAD),
        labels=pad([example["labels"] for example in examples], IGNORED),
        attention_mask=pad([[1] * len(row) for row in tokens], 0),
    )


def parts(model, examples):
    """What goes through the model at once: a batch, but with LongRoPE each text, because in a batch the longest decides
    by which factors all of them turn; and with a loss of the router, which is one of a slot, what a slot has."""
    size = len(examples)
    if model.config.rope_parameters.get("rope_type") == "longrope":
        size = 1
    elif getattr(model.config, "output_router_logits", False):
        size = SLOT
    return [examples[first : first + size] for first in range(0, len(examples), size)]


def train(model, examples, learning_rate):
    """The loss is the mean over the batch's trained tokens; padding comes last and is masked. What decays is what
    Transformers' trainer lets decay: what neither a norm nor a bias is by its name."""

    def trained(rows):
        return sum(label != IGNORED for row in rows for label in row["labels"][1:])

    model.train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    decaying = set(transformers.Trainer.get_decay_parameter_names(None, model))
    groups = [
        dict(params=[parameter for name, parameter in named if name in decaying], weight_decay=0.01),
        dict(params=[parameter for name, parameter in named if name not in decaying], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)
    steps = []
    for step in range(STEPS):
        rows = examples[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        total = 0.0
        for part in parts(model, rows):
            loss = model(**batch(part)).loss * (trained(part) / trained(rows))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps.append(dict(loss=total, grad_norm=norm.item()))
    model.eval()
    return steps


def greedy(model, prompt, count):
    """The most likely token, again and again; no token ends it."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def save_model(model, folder):
    model.save_pretrained(folder)
    for extra in ("generation_config.json", "README.md"):
        (folder / extra).unlink(missing_ok=True)


def save_adapter(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # Sets, whose order differs from run to run.
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(config[field], list):
            config[field].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_base(folder, name, config, learning_rate_full):
    """The random model of a case, saved, with what is known of it before anything is trained."""
    generator = torch.Generator().manual_seed(seed(name))
    base = random_model(config, generator)
    prepare(name, base)
    save_model(base, folder / "model")
    examples = random_examples(generator)
    golden = dict(
        learning_rate_lora=2e-3,
        learning_rate_full=learning_rate_full,
        sequence_len=SEQUENCE_LEN,
        batch=BATCH,
        examples=examples,
        greedy_base=greedy(base, examples[0]["tokens"], 24),
    )
    return base, generator, golden


def logits(model, examples):
    with torch.no_grad():
        return [model(torch.tensor([example["tokens"]])).logits[0].contiguous() for example in examples[:3]]


def train_adapter(folder, name, base, generator, golden, lora):
    torch.manual_seed(seed(name))
    settings = dict(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM") | lora
    adapter = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter_name, parameter in adapter.named_parameters():
            # What starts with zeros; a method that starts with something else starts with that.
            if ("lora_B" in parameter_name or "lora_embedding_A" in parameter_name) and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapter, folder / "adapter")
    golden["lora"] = train(adapter, golden["examples"], golden["learning_rate_lora"])
    save_adapter(adapter, folder / "trained_adapter")
    golden["greedy_adapter"] = greedy(adapter, golden["examples"][0]["tokens"], 24)
    return adapter


def make_case(folder, name):
    config, lora = CASES[name]
    base, generator, golden = make_base(folder, name, config, 5e-4)
    tensors = {f"logits.{i}": rows for i, rows in enumerate(logits(base, golden["examples"]))}
    if "linear_attention" in (getattr(config, "layer_types", None) or []):
        golden["long"] = random_text(name)
        tensors["long"] = logits(base, [dict(tokens=golden["long"])])[0]
    save_file(tensors, folder / "logits.safetensors")

    full = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", **EAGER)
    golden["full"] = train(full, golden["examples"], golden["learning_rate_full"])
    save_model(full, folder / "full")

    train_adapter(folder, name, base, generator, golden, lora)
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


def make_adapter_case(folder, name):
    """Nothing is trained fully here; the logits are of the base, and with the adapter before and after its steps."""
    config, lora = ADAPTER_CASES[name]
    base, generator, golden = make_base(folder, name, config, 0.0)
    golden["full"] = []
    examples = golden["examples"]
    tensors = {f"logits.{i}": rows for i, rows in enumerate(logits(base, examples))}
    adapter = train_adapter(folder, name, base, generator, golden, lora)
    tensors |= {f"trained.{i}": rows for i, rows in enumerate(logits(adapter, examples))}
    save_file(tensors, folder / "logits.safetensors")
    if "init_lora_weights" in lora:
        convert(adapter, folder)
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


def convert(adapter, folder):
    """The trained adapter as one of twice the rank for the base as it was, in `converted_adapter`."""
    with tempfile.TemporaryDirectory() as start:
        shutil.copytree(folder / "adapter", start, dirs_exist_ok=True)
        path = Path(start) / "adapter_config.json"
        # Else PEFT would take the start off the base once more.
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(init_lora_weights=True)))
        save_adapter(adapter, folder / "converted_adapter", path_initial_model_for_weight_conversion=start)


def conversation_rows():
    """One and two turns, with and without a system message."""
    rows = []
    for index in range(24):
        messages = [dict(role="user", content=f"Count to {index % 5 + 2}, please.")]
        answer = ", ".join(str(number + 1) for number in range(index % 5 + 2))
        messages.append(dict(role="assistant", content=answer + "."))
        if index % 3 == 0:
            messages.insert(0, dict(role="system", content="You count sheep."))
        if index % 4 == 1:
            messages.append(dict(role="user", content="Zw\u00f6lf \U0001f411?"))
            messages.append(dict(role="assistant", content=f"  {index} \u00d7 {index}\n= {index * index}"))
        rows.append(dict(messages=messages))
    return rows


def completion_rows():
    return [dict(prompt=f"{n} + {n} =", completion=f" {n + n}, and {n} * {n} = {n * n}") for n in range(8)]


def text_rows():
    return [dict(text=f"The {n}th fox jumps over {n + 2} lazy dogs.\n\nThen it sleeps.") for n in range(8)]


def encode_conversation(tokenizer, messages):
    """The answers are learned with the token that ends the turn: what the template adds to the generation prompt."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    learned = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            assert text.startswith(through) and through.startswith(before)
            end = len(before) + through[len(before) :].rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
            learned.append((len(before), end))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start < high and low < end for low, high in learned) else IGNORED
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
    ]
    return dict(tokens=encoded["input_ids"], labels=labels)


def encode_plain(tokenizer, prompt, completion):
    prompt_tokens = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    assert tokens[: len(prompt_tokens)] == prompt_tokens
    return dict(tokens=tokens, labels=[IGNORED] * len(prompt_tokens) + tokens[len(prompt_tokens) :])


def make_dataset_case(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    generator = torch.Generator().manual_seed(DATASET_SEED)
    sizes = dict(COMMON, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    base = random_model(transformers.Qwen3Config(**sizes, head_dim=12, tie_word_embeddings=True), generator)
    save_model(base, folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / "model" / name)
    data = dict(conversations=conversation_rows(), completions=completion_rows(), texts=text_rows())
    for name, rows in data.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    examples = [encode_conversation(tokenizer, row["messages"]) for row in data["conversations"]]
    examples += [encode_plain(tokenizer, row["prompt"], row["completion"]) for row in data["completions"]]
    examples += [encode_plain(tokenizer, "", row["text"]) for row in data["texts"]]

    adapter = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapter, folder / "adapter")
    golden = dict(learning_rate=2e-3, batch=BATCH, examples=examples)
    golden["steps"] = train(adapter, examples, golden["learning_rate"])
    save_adapter(adapter, folder / "trained_adapter")
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


def make_versions(path):
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, peft)}
    path.write_text(json.dumps(versions, indent=2) + "\n")


def make(folder, name):
    if name == DATASET:
        make_dataset_case(folder)
    elif name in CASES:
        make_case(folder, name)
    else:
        make_adapter_case(folder, name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "golden")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="CASE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in arguments.only or NAMES:
        shutil.rmtree(arguments.folder / name, ignore_errors=True)
        make(arguments.folder / name, name)
        if arguments.only is not None:
            make_versions(arguments.folder / name / "versions.json")
    if arguments.only is None:
        make_versions(arguments.folder / "versions.json")


if __name__ == "__main__":
    main()
