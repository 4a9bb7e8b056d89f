"""Chats as token ids, with the library datasets and Transformers' apply_chat_template, in several processes.

In: a model folder with tokenizer and template, and JSON Lines with `messages`. Out: one line of JSON. The masks of what is learned are
not made: templates without generation marks give none.
"""

import argparse
import json
import os
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--processes", type=int, default=2)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as cache:
    os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def tokens(batch):
        return {"input_ids": tokenizer.apply_chat_template(batch["messages"], return_dict=True)["input_ids"]}

    started = time.monotonic()
    rows = datasets.load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(tokens, batched=True, num_proc=args.processes, remove_columns=rows.column_names)
    seconds = time.monotonic() - started
    print(json.dumps({"rows": len(rows), "seconds": seconds, "rows_per_second": len(rows) / seconds}))
