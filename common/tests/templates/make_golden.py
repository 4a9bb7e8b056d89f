#!/usr/bin/env python3
"""Renders every template here on every conversation with Transformers, and writes golden.json.

    python make_golden.py        # needs transformers, jinja2, tokenizers

The templates are our own, written after the habits of well-known ones. The outputs are what
`apply_chat_template` gives, as text and as tokens of tokenizer.json; where it raises, the message. For templates with
{% generation %} blocks the assistant's parts are kept too, in characters. `texts` are plain strings with special tokens.
"""
import datetime
import json
import pathlib

import jinja2
import transformers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
MOMENT = 1721984707  # 2024-07-26 09:05:07 UTC


class FixedDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(MOMENT, datetime.timezone.utc).replace(tzinfo=None)


chat_template_utils.datetime = FixedDatetime

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für \"Städte\" <&>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}


def call(arguments, id="abc123XYZ"):
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS = {
    "one": ([user("Hi"), assistant("Hello!")], None),
    "system": ([{"role": "system", "content": " Be brief. "}, user("Hi\n"), assistant("  Hello, world!  ")], None),
    "several": ([user("1+1?"), assistant("2"), user("2+2?"), assistant("4"), user("3+3?"), assistant("6")], None),
    "unicode": ([user("Grüße 日本語 🦀"), assistant("é̂ 👩‍👩‍👧 naïve\u00a0…\n\nZeile")], None),
    "thinking_inside": (
        [user("a"), assistant("<think>\nhm\n</think>\n\nfirst"), user("b"), assistant("<think>\nso\n</think>\n\nsecond")],
        None,
    ),
    "thinking_field": (
        [user("a"), assistant("first", reasoning_content="hm"), user("b"), assistant("second", reasoning="so")],
        None,
    ),
    "tools": (
        [
            user("Weather in Köln?"),
            {"role": "assistant", "content": None, "tool_calls": [call({"city": "Köln", "days": 2})]},
            {"role": "tool", "name": "get_weather", "content": "{\"sky\": \"grau\"}"},
            assistant("Grey."),
        ],
        [WEATHER],
    ),
    "two_calls": (
        [
            {"role": "system", "content": "Use tools."},
            user("Both?"),
            {"role": "assistant", "content": "Let me look.", "tool_calls": [call({"city": "A"}), call("{\"city\": \"B\"}", "id0000002")]},
            {"role": "tool", "content": "wet"},
            {"role": "tool", "content": "dry"},
            assistant("Wet and dry.", tool_calls=None),
            user("Thanks"),
            assistant("Welcome."),
        ],
        [WEATHER, WEATHER],
    ),
    "not_alternating": ([user("a"), user("b"), assistant("c")], None),
    "answer_first": ([assistant("Welcome!"), user("Hi"), assistant("Yes?")], None),
    "bad_role": ([user("a"), {"role": "critic", "content": "b"}, assistant("c")], None),
    "ends_with_user": ([user("a"), assistant("b"), user("c")], None),
    "marks_in_text": ([user("say <|im_end|>"), assistant("<|im_start|>assistant\n<|im_end|> </s> done")], None),
    "numbers": ([user("n"), {"role": "assistant", "content": "x", "tool_calls": [call({"a": 1.0, "b": 1e-7, "c": [True, None], "d": 12345678901234567})]}], None),
}


TOKENISED = ["chatml", "chatml_generation", "llama3", "qwen3"]
TEXTS = ["", "hello hello", "  12\n\n ok", "🦀 Grüße 日本", "a</s>", "<|im_end|>hello</s>b", " hello", "\n\n\n"]


def load(eos):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), bos_token="<s>", eos_token=eos
    )


def render(tokenizer, messages, tools, prompt):
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raised = type(error) is jinja2.exceptions.TemplateError  # by raise_exception
        return {"error": str(error) if raised else None, "kind": type(error).__name__}


def main():
    cases = []
    for path in sorted(HERE.glob("*.jinja")):
        template = path.read_text()
        tokenizer = load("</s>")
        tokenizer.chat_template = template
        for name, (messages, tools) in CONVERSATIONS.items():
            case = {"template": path.stem, "conversation": name}
            case["text"] = render(tokenizer, messages, tools, False)
            case["prompted"] = render(tokenizer, messages[:-1], tools, True) if len(messages) > 1 else None
            if isinstance(case["text"], str) and path.stem in TOKENISED:
                case["ids"] = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
            if isinstance(case["text"], str) and "generation" in path.stem:
                # Not return_assistant_tokens_mask: with offsets that ByteLevel trims, it loses answers that begin with a space.
                compiled = chat_template_utils._compile_jinja_template(template)
                _, spans = chat_template_utils._render_with_assistant_indices(compiled, messages, tools, None, False)
                case["assistant_spans"] = spans
            cases.append(case)
    head = {"transformers": transformers.__version__, "jinja2": jinja2.__version__, "moment": MOMENT}
    def lines(items):
        return ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)

    plain = load("</s>")
    texts = [{"text": text, "ids": plain(text)["input_ids"]} for text in TEXTS]
    conversations = [{"name": name, "messages": m, "tools": t} for name, (m, t) in CONVERSATIONS.items()]
    (HERE / "golden.json").write_text(
        f'{{"made_with": {json.dumps(head)},\n"conversations": [\n{lines(conversations)}\n],'
        f'\n"texts": [\n{lines(texts)}\n],\n"cases": [\n{lines(cases)}\n]}}\n'
    )
    print(len(cases), "cases")


main()
