"""Writes prompts.json: rows of each type of a fixed text, of segments and of user-defined texts, and the tokens and labels that
Axolotl makes of them.

Needs axolotl and transformers: python common/tests/shapes/make_prompts.py
"""

import json
from pathlib import Path

from axolotl import prompt_tokenizers, prompters
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TESTS = HERE.parent
TOKENIZERS = {
    "plain": (HERE.parents[2] / "examples/tiny-qwen3/tokenizer.json", "<|im_end|>", None),
    # Puts <s> before a text of its own accord.
    "bos": (TESTS / "templates/tokenizer.json", "<|im_end|>", "<s>"),
}

INSTRUCTIONS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add {input}, {0} and {{}}.", "input": "2 and\n3", "output": "5 {output}"},
    {"instruction": "Ünïcode, 你好", "input": None, "output": " ελληνικά 🙂\n"},
    {"instruction": "End it yourself.", "input": "x", "output": "done<|im_end|>"},
]
WITH_SYSTEM = [
    {"instruction": "Hello?", "input": "", "output": "Hi.", "system": "You are {kind}."},
    {"instruction": "Hello?", "input": "in", "output": "Hi.", "system": ""},
    {"instruction": "Hello?", "input": "in", "output": "Hi.", "system": None},
]
ORCA = [
    {"question": "Why {so}?", "response": "Because.", "system_prompt": "Think."},
    {"question": "Why?", "response": " So.", "system_prompt": ""},
]
QUESTIONS = [{"question": "How {far}?", "category": "Space", "answer": "a light year"}, {"question": "q", "category": "", "answer": "b"}]
ARTICLES = [
    {
        "article": "The {sky} is blue.", "context": "The sky.", "question": "Which colour?", "answer": "blue",
        "unanswerable_question": "How high?",
    },
]
SEGMENTS = [
    {"segments": [{"label": False, "text": "<s>Say"}, {"label": True, "text": " it.<|im_end|>"}, {"label": False, "text": "\n\n"}, {"label": True, "text": "你好"}]},
    {"segments": [{"label": True, "text": "first"}, {"label": False, "text": ""}, {"label": True, "text": " and last"}]},
]

TYPES = {
    "alpaca": INSTRUCTIONS, "alpaca:instruct": INSTRUCTIONS, "alpaca:chat": INSTRUCTIONS, "alpaca:chatml": INSTRUCTIONS,
    "alpaca:phi": INSTRUCTIONS, "alpaca_chat": INSTRUCTIONS, "alpaca_chat.load_concise": INSTRUCTIONS,
    "alpaca_chat.load_no_prompt": INSTRUCTIONS, "alpaca_chat.load_qa": QUESTIONS,
    "alpaca_chat.load_camel_ai": [{"message_1": "a {b}", "message_2": "c"}],
    "alpaca_instruct": INSTRUCTIONS, "alpaca_instruct.load_no_prompt": INSTRUCTIONS,
    "alpaca_w_system": WITH_SYSTEM, "alpaca_w_system.load_instruct": WITH_SYSTEM, "alpaca_w_system.load_chat": WITH_SYSTEM,
    "alpaca_w_system.load_open_orca": ORCA, "alpaca_w_system.load_open_orca_chatml": ORCA, "orcamini": ORCA,
    "jeopardy": QUESTIONS, "jeopardy:chat": QUESTIONS,
    "gpteacher": [{"instruction": "i", "input": "x", "response": "r"}, {"instruction": "i", "input": "", "response": "r"}],
    "gpteacher:chat": [{"instruction": "i", "input": "x", "response": "r"}],
    "oasst": [{"INSTRUCTION": "i {j}", "RESPONSE": "r"}], "oasst:chat": [{"INSTRUCTION": "i", "RESPONSE": "r"}],
    "summarizetldr": [{"article": "Long {text}.", "summary": "Short."}],
    "context_qa": ARTICLES, "context_qa.load_v2": ARTICLES, "context_qa.load_404": ARTICLES,
    "metharme": [{"prompt": "<|user|>a {b}<|model|>", "generation": "c"}, {"prompt": "a", "generation": "c<|im_end|>"}],
    "creative_acr.load_answer": [{"instruction": "i {x}", "revision": "r"}],
    "input_output": SEGMENTS,
}
# What axolotl/utils/data/wrappers.py makes of types that are no modules of prompt_strategies.
HANDLERS = {
    "alpaca": ("AlpacaPrompter", "Alpaca"),
    "summarizetldr": ("SummarizeTLDRPrompter", "SummarizeTLDR"),
    "jeopardy": ("JeopardyPrompter", "Jeopardy"),
    "oasst": ("AlpacaPrompter", "OpenAssistant"),
    "gpteacher": ("GPTeacherPrompter", "GPTeacher"),
}
USER_DEFINED = [
    ({}, WITH_SYSTEM),
    (
        {"system_prompt": "Be {brief}.", "system_format": "<<{system}>>{{}}\n", "format": "[{instruction}|{input}]\n", "no_input_format": "[{instruction}]\n"},
        WITH_SYSTEM + INSTRUCTIONS,
    ),
    (
        {"field_instruction": "question", "field_output": "response", "field_system": "system_prompt", "no_input_format": "Q: {instruction}\nA:", "format": "{input}{instruction}"},
        ORCA,
    ),
]


def learned(made):
    """A 1 for each token whose label is the token itself, a 0 for each without a label."""
    pairs = list(zip(made["input_ids"], made["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    return "".join("0" if label == -100 else "1" for _, label in pairs)


def cases_of(name, kind, tokenizer_name, strategy, rows, train_on_inputs):
    for row in rows:
        made = strategy.tokenize_prompt(row)
        yield {
            "type": name, "defined": kind, "tokenizer": tokenizer_name, "train_on_inputs": train_on_inputs, "row": row,
            "input_ids": list(made["input_ids"]), "learned": learned(made),
        }


def strategy_of(kind, tokenizer, cfg):
    if isinstance(kind, dict):
        return load("user_defined", tokenizer, cfg, kind)
    found = load(kind, tokenizer, cfg, DictDefault({"type": kind}))
    if found:
        return found
    base, _, style = kind.partition(":")
    prompter, strategy = HANDLERS[base]
    prompter = getattr(prompters, prompter)(style or None)
    strategy = getattr(prompt_tokenizers, strategy + "PromptTokenizingStrategy")
    return strategy(prompter, tokenizer, cfg.train_on_inputs, cfg.sequence_len)


def main():
    cases = []
    for tokenizer_name, (path, eos, bos) in TOKENIZERS.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=eos, bos_token=bos)
        for train_on_inputs in (False, True):
            cfg = DictDefault({"train_on_inputs": train_on_inputs, "sequence_len": 4096})
            for name, rows in TYPES.items():
                if train_on_inputs and name not in ("alpaca:chat", "metharme", "input_output"):
                    continue
                strategy = strategy_of(name, tokenizer, cfg)
                cases += cases_of(name, None, tokenizer_name, strategy, rows, train_on_inputs)
            for kind, rows in USER_DEFINED:
                strategy = strategy_of(kind, tokenizer, cfg)
                cases += cases_of("user_defined", kind, tokenizer_name, strategy, rows, train_on_inputs)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    (HERE / "prompts.json").write_text(f"[\n{lines}\n]\n")


main()
