"""A fine-tuning script with Transformers' Trainer and PEFT, until its first step is done.

In: a model folder and chats. Out: one JSON line with the seconds from the start of the process.
"""

import argparse
import json
import os
import tempfile
import time

import chats


def seconds_since_start():
    """Of this process, as the system counts them."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
    with open("/proc/uptime") as uptime:
        return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    # Read before anything is imported; monotonic from there on.
    before, began = seconds_since_start(), time.monotonic()
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        seconds = None

        def on_step_end(self, _args, _state, control, **_):
            if self.seconds is None:
                self.seconds = before + time.monotonic() - began
            control.should_training_stop = True
            return control

    torch.set_num_threads(args.threads)
    tokenizer = chats.tokenizer_of(args.model)
    examples = chats.read(args.data, tokenizer, args.longest)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=get_peft_model(model, lora),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=args.batch,
                max_steps=2,
                learning_rate=1e-4,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=examples,
            data_collator=lambda rows: chats.pad(rows, tokenizer.pad_token_id),
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"first_step_seconds": clock.seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
