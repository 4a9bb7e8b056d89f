#!/usr/bin/env python3
"""Compares our templates with the originals on every conversation with every variable, and on random conversations.

    python compare.py [--random N] [--only NAME,..] AXOLOTL [COLLECTION ...]     # places as for make.py

More than golden.json keeps. Random conversations come from a seed, and are the same in every run.
"""
import argparse
import pathlib
import random
import sys

import cases
from originals import ORIGINALS, read_original

HERE = pathlib.Path(__file__).parent
NAMED = HERE.parents[1] / "src" / "chat_templates"

ROLES = ["system", "developer", "user", "user", "user", "assistant", "assistant", "assistant", "tool", "tool", "ipython", "critic"]
TEXTS = [
    "", " ", "a", "b\n", "\n\nc", " d e ", "<think>\nf\n</think>\n\ng", "</think>", "<think>", "h</think> i</think>j\n",
    "<tool_response>\nk\n</tool_response>", "<tool_response>", "é🦀", "<|channel>l<channel|>m", "<|im_end|>", "\r\n\r\nn\n\n\no",
    "{\"p\": 1}", "'q' \"r\" \\ {{ s }}",
]  # fmt: skip
ARGUMENTS = [{}, {"city": "A"}, {"b": [1, 2.5, None], "a": {"c": True}}, '{"city": "B"}', "", "x=1", 5]


def random_content(source):
    kind = source.random()
    if kind < 0.8:
        return source.choice(TEXTS)
    if kind < 0.97:
        parts = [{"type": "text", "text": source.choice(TEXTS)} for _ in range(source.randrange(3))]
        if source.random() < 0.3:
            parts.insert(0, source.choice([cases.IMAGE, {"type": "audio"}, {"type": "image_url", "image_url": "u"}, {"text": "t"}]))
        return parts
    return source.choice([None, 5, {"content": "v"}])


def random_call(source):
    function = {"name": source.choice(["f", "get_weather"]), "arguments": source.choice(ARGUMENTS)}
    entry = {"id": source.choice(["abc123XYZ", "id0000002", "id0000003", "1"]), "type": "function", "function": function}
    if source.random() < 0.1:
        del entry[source.choice(["id", "type", "function"])]
    return entry


def random_conversation(source):
    """Messages and tools. Half of the conversations are of a usual order."""
    count = source.randrange(1, 8)
    messages = []
    is_usual = source.random() < 0.5
    for index in range(count):
        role = ["user", "assistant"][index % 2] if is_usual else source.choice(ROLES)
        message = {"role": role, "content": random_content(source)}
        if role == "assistant" and source.random() < 0.35:
            message["tool_calls"] = [random_call(source) for _ in range(source.randrange(4))]
        if role == "assistant" and source.random() < 0.3:
            message[source.choice(["reasoning_content", "reasoning", "thinking"])] = source.choice(TEXTS)
        if role == "tool":
            message["tool_call_id"] = source.choice(["abc123XYZ", "id0000002", "id0000003", "1"])
        if source.random() < 0.1:
            message["name"] = "n"
        if source.random() < 0.03:
            del message[source.choice(["role", "content"])]
        messages.append(message)
        if message.get("tool_calls") and is_usual:
            calls = [entry for entry in message["tool_calls"] if "id" in entry]
            messages += [{"role": "tool", "tool_call_id": entry["id"], "content": source.choice(TEXTS)} for entry in calls]
    if source.random() < 0.4:
        messages.insert(0, {"role": source.choice(["system", "system", "developer"]), "content": random_content(source)})
    tools = source.choice([None, None, None, [], [cases.WEATHER], [cases.WEATHER, cases.CLOCK], [cases.SCHEMA]])
    return messages, tools


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=1000)
    parser.add_argument("--only", default="")
    parser.add_argument("places", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()
    seeded = random.Random(14)
    conversations = list(cases.CONVERSATIONS.values()) + [random_conversation(seeded) for _ in range(arguments.random)]
    failed = total = 0
    for name in ORIGINALS:
        path = NAMED / f"{name}.jinja"
        if not path.is_file() or (arguments.only and name not in arguments.only.split(",")):
            continue
        original, ours = read_original(name, arguments.places), path.read_text()
        equal = raising = 0
        wrong = []
        for number, (messages, tools) in enumerate(conversations):
            of_case = cases.variables_of(original)
            if number >= len(cases.CONVERSATIONS):
                of_case = [seeded.choice(of_case)] if of_case else []
            for variables in [{}, *of_case]:
                for values in (variables, cases.prompted(variables)):
                    known = cases.without_nulls(messages)
                    found = cases.render(ours, known, tools, values, cases.TOKENS)
                    text = cases.render(original, known, tools, values, cases.TOKENS)
                    if text is None and found is not None:
                        text = cases.expected(original, messages, tools, values, cases.TOKENS)
                    if found == text:
                        equal += 1
                        raising += text is None
                    else:
                        wrong.append((messages, tools, values, text, found))
        print(f"{name}: {equal} equal ({raising} raise), {len(wrong)} differ", flush=True)
        for messages, tools, values, text, found in wrong[:3]:
            print("  ", messages, bool(tools), values)
            print("     original:", repr(text))
            print("     ours:    ", repr(found))
        failed += len(wrong)
        total += equal
    print(f"{total} equal, {failed} not")
    sys.exit(1 if failed else 0)


main()
