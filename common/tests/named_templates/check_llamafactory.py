#!/usr/bin/env python3
"""Compares our templates with LLaMA-Factory's, as its trainer joins the turns, and writes golden_llamafactory.json.

    python check_llamafactory.py LLAMA_FACTORY     # a checkout or its git folder; needs transformers and jinja2

Its templates are slots in src/llamafactory/data/template.py. That file is run with stand-ins for what it imports; what its
classes do with the slots is written again here. Only text is compared, and tools are not.
"""
import json
import pathlib
import random
import re
import sys

import cases
from originals import file_of

HERE = pathlib.Path(__file__).parent
NAMED = HERE.parents[1] / "src" / "chat_templates"
# LLaMA-Factory's names that are the same text as one of our named templates, and the end token where it has to be this one.
SAME = {
    "chatml": "chatml", "yi": "chatml", "smollm": "chatml", "qwen3_nothink": "chatml", "qwen3_vl_nothink": "chatml",
    "qwen3_5_nothink": "chatml", "qwen3_omni_nothink": "chatml", "moss_vl": "chatml", "llava_next_yi": "chatml",
    "llava_next_video_yi": "chatml", "qwen": "qwen_25", "qwen2_vl": "qwen2_vl", "qwen2_audio": "qwen2_vl",
    "qwen2_omni": "qwen2_vl", "minicpm_v": "qwen2_vl", "minicpm_v_4_6": "qwen2_vl", "llava_next_qwen": "qwen2_vl",
    "llama3": "llama3", "mllama": "llama3", "llava_next_llama3": "llama3", "llama4": "llama4", "gemma": "gemma3",
    "gemma3": "gemma3", "gemma3n": "gemma3n", "phi": "phi_35", "falcon_h1": "falcon_h1", "cpm4": "falcon_h1",
    "intern_s1": "falcon_h1", "granite3": "granite", "deepseek3": "deepseek_v3", "cohere": "cohere",
}  # fmt: skip
END_OF = {"deepseek3": "<｜end▁of▁sentence｜>", "cohere": "<|END_OF_TURN_TOKEN|>"}
# Further names that share a text of ours in llamafactory/.
SHARED = {
    "qwen3": ["qwen3_vl", "qwen3_5", "qwen3_6", "qwen3_omni", "keye_vl"],
    "ministral": ["ministral3", "pixtral"],
}


class Slots:
    def __init__(self, slots=None, tool_format=None):
        self.slots = slots or []


class Template:
    pass


class Llama2Template(Template):
    pass


class ReasoningTemplate(Template):
    pass


class Glm47ReasoningTemplate(ReasoningTemplate):
    pass


class MossVLTemplate(Template):
    pass


def registered(text):
    """The arguments of every `register_template`, by name."""
    found = {}
    formatters = dict.fromkeys(["StringFormatter", "EmptyFormatter", "FunctionFormatter", "ToolFormatter"], Slots)
    classes = [Template, Llama2Template, ReasoningTemplate, Glm47ReasoningTemplate, MossVLTemplate]
    names = {
        **formatters,
        **{known.__name__: known for known in classes},
        "get_mm_plugin": lambda *_, **__: None,
        "register_template": lambda name, **arguments: found.update({name: arguments}),
    }
    exec(text[text.index('register_template(\n    name="alpaca"') :], names)
    return found


def without_thoughts(text, words):
    pattern = re.compile(f"{re.escape(words[0])}(.*?){re.escape(words[1])}", re.DOTALL)
    return re.sub(pattern, "", text).lstrip("\n")


def joined(template, messages, end, thinks=True):
    """The text of a conversation, and the end token. Without the one at the very end that `efficient_eos` is: Muster adds it."""
    end = template["stop_words"][0] if template.get("replace_eos") else end
    kind = template.get("template_class") or Template
    words = template.get("thought_words") or ("<think>\n", "\n</think>\n\n")
    is_brief = template.get("efficient_eos")
    usual = {
        "format_user": ["{{content}}"],
        "format_assistant": ["{{content}}"] if is_brief else ["{{content}}", {"eos_token"}],
        "format_system": ["{{content}}"],
        "format_prefix": [],
    }

    def filled(name, content=""):
        slots = template[name].slots if template.get(name) else usual[name]
        tokens = {"bos_token": cases.TOKENS["bos_token"], "eos_token": end}
        texts = (slot.replace("{{content}}", content) if isinstance(slot, str) else tokens[next(iter(slot))] for slot in slots)
        return "".join(texts)

    system = template.get("default_system", "")
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"] or system, messages[1:]
    system = filled("format_system", system) if system else ""
    is_inside = kind is Llama2Template
    text = filled("format_prefix") + ("" if is_inside else system)
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            text += filled("format_user", (system if is_inside and index == 0 else "") + content)
            continue
        if issubclass(kind, ReasoningTemplate):
            content = content if thinks else without_thoughts(content, words)
            if words[0].strip() not in content and words[1].strip() not in content:
                text += words[0] + words[1]
        text += filled("format_assistant", content)
    return text, end


def conversations():
    """Conversations with contents that no template trims, and at the end some that thought."""
    source = random.Random(14)
    texts = ["Hi", "a\nb", "é 🦀", "1\n\n2", "x"]
    for _ in range(40):
        pairs = source.randrange(1, 4)
        messages = [{"role": ["user", "assistant"][i % 2], "content": source.choice(texts)} for i in range(2 * pairs)]
        yield messages
        yield [{"role": "system", "content": source.choice(texts)}, *messages]


THOUGHTS = [
    "<think>\nhm\n</think>\n\nyes", "<think>\n\n</think>\n\n\nno", "<think>hm</think>x", "a<think>\nb\n</think>\n\nc<think>\nd\n</think>\n\n",
    "<think>\na<think>\nb\n</think>\n\nc\n</think>\n\nd", "</think>", "<think>\n</think>\n\nx<think>\ny\n</think>\n\nz",
]  # fmt: skip


def chats_for(is_own):
    """The conversations to compare on: those of ours in llamafactory/ have to be exact on all."""
    chats = list(conversations())
    if is_own:
        first = chats[0]
        chats += [[first[0], {"role": "assistant", "content": thought}, *first] for thought in THOUGHTS]
        chats += [[{"role": "system", "content": ""}, *first], [{**m, "content": f"\n {m['content']} "} for m in first]]
    return chats


def compared(name, path, template):
    """Every conversation with what LLaMA-Factory and what ours writes."""
    is_own, source = path.parent.name == "llamafactory", path.read_text()
    settings = [True, False] if is_own and "enable_thinking" in source else [True]
    for messages in chats_for(is_own):
        for thinks in settings:
            text, end = joined(template, messages, END_OF.get(name, "</s>"), thinks)
            variables = {} if thinks else {"enable_thinking": False}
            found = cases.render(source, messages, None, variables, {**cases.TOKENS, "eos_token": end})
            yield {"template": name, "ours": path.stem, "messages": messages, "variables": variables, "eos_token": end, "text": text}, found


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    text = file_of(pathlib.Path(sys.argv[1]), "src/llamafactory/data/template.py")
    if text is None:
        sys.exit(f"no templates of LLaMA-Factory in {sys.argv[1]}")
    theirs = registered(text)
    kept = []
    pairs = [(name, NAMED / f"{ours}.jinja") for name, ours in SAME.items()]
    for path in sorted((NAMED / "llamafactory").glob("*.jinja")):
        pairs += [(name, path) for name in [path.stem, *SHARED.get(path.stem, [])]]
    failed = 0
    for name, path in pairs:
        found = list(compared(name, path, theirs[name]))
        wrong = [(case, ours) for case, ours in found if ours != case["text"]]
        for case, ours in wrong[:2]:
            print(case["messages"], case["variables"], "\n   theirs:", repr(case["text"]), "\n   ours:  ", repr(ours))
        print(f"{name} = {path.parent.name}/{path.stem}: {len(found) - len(wrong)} equal, {len(wrong)} differ")
        failed += len(wrong)
        # Of those that are ours under the same name alone, a few at each end are kept for tests elsewhere.
        if path.parent.name == "llamafactory" and name == path.stem:
            kept += [case for case, _ in found[:4] + found[-14:]]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in kept)
    (HERE / "golden_llamafactory.json").write_text(f'{{"bos_token":"{cases.TOKENS["bos_token"]}","cases":[\n{lines}\n]}}\n')
    print(f"{failed} differ; {len(kept)} cases kept")
    sys.exit(1 if failed else 0)


main()
