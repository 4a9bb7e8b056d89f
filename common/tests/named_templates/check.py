#!/usr/bin/env python3
"""Renders our templates in named/ on the cases of golden.json, and compares.

    python check.py [NAME ...]      # needs transformers and jinja2
"""
import json
import pathlib
import sys

import cases

HERE = pathlib.Path(__file__).parent
NAMED = HERE.parents[1] / "src" / "chat_templates"


def expected_of(case, openings):
    """The two texts of a case: without and with a prompt for an answer."""
    text = case["text"]
    if text is not None and "opening" in case:
        text = openings[case["opening"]] + text
    return text, text + case["prompt"] if "prompt" in case else case["prompted"]


def main():
    golden = json.loads((HERE / "golden.json").read_text())
    conversations = {c["name"]: c for c in golden["conversations"]}
    wanted = sys.argv[1:] or sorted(path.stem for path in (NAMED).glob("*.jinja"))
    failed = total = 0
    for name in wanted:
        source = (NAMED / f"{name}.jinja").read_text()
        equal = raising = 0
        wrong = []
        for case in (case for case in golden["cases"] if case["template"] == name):
            conversation = conversations[case["conversation"]]
            messages = cases.without_nulls(conversation["messages"])
            variables = case.get("variables", {})
            tokens = case.get("tokens", golden["made_with"]["tokens"])
            for values, text in zip((variables, cases.prompted(variables)), expected_of(case, golden["openings"])):
                found = cases.render(source, messages, conversation["tools"], values, tokens)
                if found == text:
                    equal += 1
                    raising += text is None
                else:
                    wrong.append((case["conversation"], values, tokens, text, found))
        marks = "marked" if "endgeneration" in source else "no marks"
        print(f"{name}: {equal} equal ({raising} raise), {len(wrong)} differ, {marks}")
        for *what, text, found in wrong[:4]:
            print("  ", *what)
            print("     original:", repr(text))
            print("     ours:    ", repr(found))
        failed += len(wrong) + (equal == 0)
        total += equal
    print(f"{total} equal, {failed} not, {len(wanted)} templates")
    sys.exit(1 if failed else 0)


main()
