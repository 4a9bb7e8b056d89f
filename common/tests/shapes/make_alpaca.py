"""Writes alpaca.json: rows of instructions, and the tokens and labels that Axolotl makes of them (type: alpaca).

Needs axolotl and transformers: python common/tests/shapes/make_alpaca.py
"""

import json
from pathlib import Path

from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[2] / "examples/tiny-qwen3/tokenizer.json"
EOS = "<|im_end|>"

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say\nit.", "input": None, "output": "\n\n it, with white space before \n"},
    {"instruction": "", "input": "only an input", "output": "an answer"},
    {"instruction": "Ünïcode, 你好", "output": "ελληνικά 🙂"},
    {"instruction": "End it yourself.", "input": "", "output": f"done{EOS}"},
    {"instruction": "With braces {input} and {0}", "input": "{instruction}", "output": "{}"},
]


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token=EOS)
    cases = []
    for train_on_inputs in (False, True):
        strategy = AlpacaPromptTokenizingStrategy(
            AlpacaPrompter(), tokenizer, train_on_inputs=train_on_inputs, sequence_len=4096
        )
        for row in ROWS:
            made = strategy.tokenize_prompt(row)
            cases.append(
                {
                    "row": row,
                    "train_on_inputs": train_on_inputs,
                    "input_ids": made["input_ids"],
                    "labels": made["labels"],
                }
            )
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / "alpaca.json").write_text(f"[\n{lines}\n]\n")


main()
