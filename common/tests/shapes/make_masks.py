"""Writes masks.json: conversations under several settings of what is learned, and the labels that Axolotl gives their tokens.

Needs axolotl and transformers: python common/tests/shapes/make_masks.py
"""

import json
from copy import deepcopy
from pathlib import Path

from axolotl.prompt_strategies.chat_template import load
from axolotl.utils.dict import DictDefault
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
EOS = "<|im_end|>"
# Templates of our own that say little, so that a difference is one of the mask. The second ends turns with a token that is no EOS, and
# answers with both; the third trims, and has no end behind what users say.
TEMPLATES = {
    "chatml": "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}",
    "two_ends": "{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' + ('</s>' if m.role == 'assistant' else '') }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "trims": "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '\n<|Assistant|>\n' + (m.content | trim) + '</s>' }}"
    "{%- else %}{{ '\n<|User|>\n' + (m.content | trim) }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\n<|Assistant|>\n' }}{%- endif %}",
}
ENDS = {"chatml": ("<|im_end|>", None), "two_ends": ("</s>", ["<|eot_id|>"]), "trims": ("</s>", None)}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


PLAIN = [
    said("system", "Be brief."), said("user", "Who are you?"), said("assistant", "A model, 你好."), said("user", "Really?"),
    said("assistant", "Yes."),
]
ENDS_WITH_USER = PLAIN + [said("user", "Thanks!")]
TRAINING = [
    said("user", "Who?", keep=True), said("assistant", "Nobody.", keep=False), said("user", "What?"), said("assistant", "A thing.", keep=True),
    said("user", "Why?", keep=False), said("assistant", "So."),
]


def details(*ranges):
    return [{"begin_offset": b, "end_offset": e, "train": t} for b, e, t in ranges]


# Ranges at the ends of tokens, inside of them by one character and by more, over several, and of single characters.
DETAILED = [
    [said("user", "Sum?"), said("assistant", "The answer is four.", spans=details((0, 9, False), (10, 18, True)))],
    [said("user", "Sum?"), said("assistant", "The answer is four.", spans=details((0, 1, True), (5, 6, True), (12, 12, True)))],
    [said("user", "Sum?"), said("assistant", "Thinking about it: 12345", spans=details((3, 8, True), (9, 20, False), (21, 40, True)))],
    [said("user", "Who are you?", spans=details((0, 3, True))), said("assistant", "me", spans=details((0, 0, True)))],
    [said("user", "a"), said("assistant", "one two three", spans=details((0, 12, True)), keep=False), said("user", "b"), said("assistant", "four")],
]
PARTS = [
    [said("user", "Sum?"), said("assistant", [{"type": "text", "text": "Let me think.", "train": False}, {"type": "text", "text": " It is four."}])],
    [said("user", "Sum?"), said("assistant", [{"type": "text", "text": "Wrong", "weight": 0}, {"type": "text", "text": " right", "weight": 1}, {"type": "text", "text": " wrong again", "weight": 0}])],
    [said("user", [{"type": "text", "text": "Learn", "train": True}, {"type": "text", "text": " not this", "train": False}]), said("assistant", "ok")],
]

SETTINGS = [
    ({}, [PLAIN, ENDS_WITH_USER]),
    ({"roles_to_train": ["user"]}, [PLAIN, ENDS_WITH_USER]),
    ({"roles_to_train": ["human", "gpt"]}, [PLAIN]),
    ({"roles_to_train": ["system", "user", "assistant"]}, [PLAIN]),
    ({"roles_to_train": [], "message_field_training": "keep"}, [TRAINING]),
    ({"message_field_training": "keep"}, [TRAINING]),
    ({"message_field_training": "keep", "train_on_eos": "all"}, [TRAINING]),
    ({"message_field_training": "keep", "train_on_eos": "last"}, [TRAINING]),
    ({"message_field_training": "keep", "train_on_eos": "none"}, [TRAINING]),
    ({"train_on_eos": "all"}, [PLAIN, ENDS_WITH_USER]),
    ({"train_on_eos": "last"}, [PLAIN, ENDS_WITH_USER]),
    ({"train_on_eos": "none"}, [PLAIN, ENDS_WITH_USER]),
    ({"train_on_eos": "turn"}, [PLAIN]),
    ({"message_field_training_detail": "spans", "message_field_training": "keep"}, DETAILED),
    ({"message_field_training_detail": "spans", "train_on_eos": "none"}, DETAILED[:4]),
    ({}, PARTS),
]
# Only where the two ends are different tokens.
TWO_ENDS = [
    ({"train_on_eos": "none", "train_on_eot": "turn"}, [PLAIN]),
    ({"train_on_eos": "turn", "train_on_eot": "none"}, [PLAIN]),
    ({"train_on_eos": "last", "train_on_eot": "all"}, [PLAIN, ENDS_WITH_USER]),
]


def tokenizer_of(name, eos):
    """The tokenizer of a template. Its offsets have the white space that a token begins with, as those of Qwen's tokenizers do: where
    a tokenizer leaves it out, Axolotl counts it to the token before, and masks a token too many or too few at the ends of ranges."""
    file = HERE.parents[2] / "examples/tiny-qwen3/tokenizer.json" if name == "chatml" else HERE.parent / "templates/tokenizer.json"
    described = json.loads(file.read_text())
    described["post_processor"] = None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token=eos)


def main():
    cases = []
    for name, template in TEMPLATES.items():
        eos, eot_tokens = ENDS[name]
        tokenizer = tokenizer_of(name, eos)
        cfg = {"train_on_inputs": False, "sequence_len": 4096, "chat_template": "jinja", "chat_template_jinja": template}
        if eot_tokens:
            cfg["eot_tokens"] = eot_tokens
        for setting, rows in SETTINGS + (TWO_ENDS if eot_tokens else []):
            strategy = load(tokenizer, DictDefault(cfg), {"type": "chat_template", **setting})
            for messages in rows:
                made = strategy._tokenize_single_prompt({"messages": deepcopy(messages)})
                learned = "".join("0" if label == -100 else "1" for label in made["labels"])
                cases.append({"template": name, "setting": setting, "messages": messages, "input_ids": made["input_ids"], "learned": learned})
    written = {"templates": TEMPLATES, "ends": ENDS}
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    (HERE / "masks.json").write_text(f"{json.dumps(written)[:-1]}, \"cases\": [\n{lines}\n]}}\n")


main()
