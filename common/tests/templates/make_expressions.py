#!/usr/bin/env python3
"""Renders every template of expressions.json with Transformers' Jinja, and writes what comes out beside it.

    python make_expressions.py        # needs transformers and jinja2

`prelude` is put before templates that are expressions (no tags of their own). A template that fails has null.
"""
import json
import pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template

FILE = pathlib.Path(__file__).parent / "expressions.json"


def source(prelude, text):
    has_tags = any(tag in text for tag in ("{{", "{%", "{#"))
    return text if has_tags else prelude + "{{ " + text + " }}"


def rendered(text):
    try:
        return _compile_jinja_template(text).render()
    except Exception:
        return None


def main():
    table = json.loads(FILE.read_text(encoding="utf-8"))
    prelude = table["prelude"]
    cases = [[text, rendered(source(prelude, text))] for text, _ in table["cases"]]
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    FILE.write_text(f'{{"prelude": {json.dumps(prelude)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
