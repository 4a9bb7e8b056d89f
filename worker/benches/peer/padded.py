"""LoRA on chats in PyTorch, Transformers and PEFT, in the usual way: shuffled batches, padded to their longest row.

In: a model folder and chats. Out: one JSON line with the trained tokens a second over one epoch, after one step that is not
counted.
"""

import argparse
import json
import os
import random
import time

import chats


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = chats.tokenizer_of(args.model)
    examples = chats.read(args.data, tokenizer, args.longest)
    random.Random(0).shuffle(examples)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, use_cache=False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**chats.pad(rows, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    batches = [examples[at : at + args.batch] for at in range(0, len(examples), args.batch)]
    step(batches[0])
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    seconds = time.perf_counter() - started
    tokens = sum(label != chats.IGNORED for _, labels in examples for label in labels)
    report = {"trained_tokens": tokens, "trained_tokens_per_second": tokens / seconds, "torch": torch.__version__}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
