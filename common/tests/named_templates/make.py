#!/usr/bin/env python3
"""Renders the original of every named template on every conversation, and writes golden.json.

    python make.py AXOLOTL [COLLECTION ...]     # needs transformers and jinja2

AXOLOTL is a checkout of Axolotl (or its git folder). Others hold the templates of models that Axolotl has no name for; see
originals.py. The originals are read and not kept.

A case says what the original writes for a conversation: `text`, or null where it raises. With a prompt for an answer it
writes `prompt` after that, or else `prompted` instead. Texts that begin alike have their beginning in `openings`, by number.
"""
import json
import os
import pathlib
import sys

import jinja2
import transformers

import cases
from originals import ORIGINALS, read_original

HERE = pathlib.Path(__file__).parent
NAMED = HERE.parents[1] / "src" / "chat_templates"
# Texts that share so many characters share an opening.
LONG = 300


def rendered(name, source):
    for conversation, (messages, tools) in cases.CONVERSATIONS.items():
        for variables, tokens in cases.settings(source, conversation):
            case = {"template": name, "conversation": conversation}
            if variables:
                case["variables"] = variables
            if not tokens:
                case["tokens"] = {}
            text = cases.expected(source, messages, tools, variables, tokens)
            prompted = cases.expected(source, messages, tools, cases.prompted(variables), tokens)
            case["text"] = text
            if text is not None and prompted is not None and prompted.startswith(text):
                case["prompt"] = prompted[len(text) :]
            else:
                case["prompted"] = prompted
            parsed = cases.with_parsed_arguments(messages)
            if text is None and parsed != messages:
                # For renderers that try again with arguments parsed where a template cannot take text.
                again = cases.expected(source, parsed, tools, variables, tokens)
                if again is not None:
                    case["text_with_parsed_arguments"] = again
            yield case


def shorten(found, openings):
    """Moves long beginnings that several texts have into `openings`."""
    groups = {}
    for case in found:
        if case["text"] and len(case["text"]) > LONG:
            groups.setdefault(case["text"][:LONG], []).append(case)
    for group in groups.values():
        if len(group) < 3:
            continue
        opening = os.path.commonprefix([case["text"] for case in group])
        for case in group:
            case["opening"] = len(openings)
            case["text"] = case["text"][len(opening) :]
        openings.append(opening)


def line(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    places = [pathlib.Path(argument) for argument in sys.argv[1:]]
    openings, golden = [], []
    for name in ORIGINALS:
        if not (NAMED / f"{name}.jinja").is_file():
            continue
        source = read_original(name, places)
        if source is None:
            sys.exit(f"no original of {name} in {' '.join(sys.argv[1:])}")
        found = list(rendered(name, source))
        raising = sum(case["text"] is None for case in found)
        print(f"{name}: {len(found)} cases, {raising} raise")
        shorten(found, openings)
        golden += found
    conversations = [
        {"name": name, "messages": messages, "tools": tools} for name, (messages, tools) in cases.CONVERSATIONS.items()
    ]
    head = {
        "transformers": transformers.__version__,
        "jinja2": jinja2.__version__,
        "moment": cases.MOMENT,
        "tokens": cases.TOKENS,
    }
    (HERE / "golden.json").write_text(
        f'{{"made_with":{line(head)},\n"openings":[\n' + ",\n".join(map(line, openings)) + "\n],\n"
        '"conversations":[\n' + ",\n".join(map(line, conversations)) + "\n],\n"
        '"cases":[\n' + ",\n".join(map(line, golden)) + "\n]}\n"
    )
    print(len(golden), "cases")


main()
