"""Writes small datasets of the same columns and formats as ten that job files often name (data/).

Run it with `pyarrow` installed, in any folder: python make.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path(__file__).parent / "data"
ROWS = 40


def instruction(row):
    return {"instruction": f"Say {row}.", "input": f"number {row}" if row % 2 else "", "output": f"It is {row}."}


def messages(row):
    return [{"content": f"What is {row}?", "role": "user"}, {"content": f"It is {row}.", "role": "assistant"}]


def turns(row):
    return [{"from": "human", "value": f"What is {row}?"}, {"from": "gpt", "value": f"It is {row}."}]


def thinking(row):
    plain = {"content": "reasoning language: German", "role": "system", "thinking": None}
    asked, answered = ({**message, "thinking": None} for message in messages(row))
    return [plain, asked, {**answered, "thinking": f"Hm, {row}."}]


def preference(row):
    asked, answered = messages(row)
    return {"conversation": [asked], "chosen": answered, "rejected": {**answered, "content": "no"}}


def parquet(name, rows):
    path = DATA / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def text(name, content):
    path = DATA / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


rows = range(ROWS)
parquet("mhenrichsen/alpaca_2k_test/alpaca_2000.parquet", [{**instruction(row), "text": "x"} for row in rows])
parquet("fozziethebeat/alpaca_messages_2k_test/data/train-00000-of-00001.parquet", [{"messages": messages(row)} for row in rows])
parquet(
    "mlabonne/FineTome-100k/data/train-00000-of-00001.parquet",
    [{"conversations": turns(row), "source": "s", "score": 5.2 + row / 100} for row in rows],
)
parquet("tatsu-lab/alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", [{**instruction(row), "text": "x"} for row in rows])
text("cgato/SlimOrcaDedupCleaned/train.jsonl", "".join(json.dumps({"conversations": turns(row)}) + "\n" for row in rows))
text("teknium/GPT4-LLM-Cleaned/gpt4_instruct_dedupe.json", json.dumps([instruction(row) for row in rows]))
text("yahma/alpaca-cleaned/alpaca_data_cleaned.json", json.dumps([instruction(row) for row in rows], indent=4))
parquet(
    "HuggingFaceH4/Multilingual-Thinking/data/train-00000-of-00001.parquet",
    [{"reasoning_language": "German", "user": "u", "final": "f", "messages": thinking(row)} for row in rows],
)
text("HuggingFaceH4/Multilingual-Thinking/README.md", "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# Card\n")
parquet("fozziethebeat/alpaca_messages_2k_dpo_test/data/train-00000-of-00001.parquet", [preference(row) for row in rows])
for shard in range(2):
    half = [row for row in rows if row % 2 == shard]
    parquet(
        f"AI-MO/NuminaMath-CoT/data/train-0000{shard}-of-00002.parquet",
        [{"source": "s", "problem": "p", "solution": "q", "messages": messages(row)} for row in half],
    )
parquet("AI-MO/NuminaMath-CoT/data/test-00000-of-00001.parquet", [{"source": "s", "problem": "p", "solution": "q", "messages": messages(99)}])
