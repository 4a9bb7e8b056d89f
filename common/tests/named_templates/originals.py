"""Where the original of each named template is: in a file of a checkout, of a git folder, or of a model.

Enters: a name and the places to look in. Leaves: a template's source, or a function that formats a conversation. Nothing is
downloaded, and nothing is kept.
"""
import json
import re
import subprocess
import sys
import types

AXOLOTL = "src/axolotl/utils/chat_templates/templates/{}.jinja"
OF_AXOLOTL = [
    "chatml", "llama3", "qwen3", "qwen_25", "gemma", "gemma3", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken",
    "mistral_v7_tekken", "phi_3", "phi_35", "phi_4", "alpaca", "deepseek_v2", "deepseek_v3", "falcon_h1", "command_a",
    "command_a_tool_use", "command_a_rag", "exaone", "exaone4", "cohere", "aya", "jamba", "metharme", "nemotron_h",
    "qwen3_5", "gemma3n", "gemma4", "gemma4_unified", "llama4", "llama3_2_vision", "qwen2_vl", "pixtral", "llava",
]  # fmt: skip


def of_tokenizer(text):
    return json.loads(text)["chat_template"]


def on_one_line(text):
    """Collections show templates over several lines; they are used without indents and line breaks."""
    return re.sub(r" {2,}(?=[{ ])", "", text.replace("\n", ""))


def of_readme(heading):
    def extract(text):
        section = text.split(f"## {heading}\n", 1)[1]
        return on_one_line(section.split("```", 2)[1])

    return extract


def of_fastchat(text):
    """FastChat's conversation `vicuna_v1.1`, as its trainer uses it: the roles have to take turns."""
    module = types.ModuleType("conversation")
    sys.modules["conversation"] = module  # dataclasses look their module up
    exec(compile(text, "conversation.py", "exec"), module.__dict__)

    def render(messages, tools, variables, tokens):
        conversation = module.get_conv_template("vicuna_v1.1")
        if messages[0].get("role") == "system":
            conversation.set_system_message(messages[0]["content"] + "")
            messages = messages[1:]
        for index, message in enumerate(messages):
            assert message["role"] == ("user", "assistant")[index % 2]
            conversation.append_message(conversation.roles[index % 2], message["content"] + "")
        if variables.get("add_generation_prompt"):
            conversation.append_message(conversation.roles[1], None)
        text = conversation.get_prompt()
        if "eos_token" not in tokens and conversation.sep2 in text:
            raise ValueError("no end token")
        return tokens.get("bos_token", "") + text

    return render


# name: (path in a place, how the original is taken out of the file)
ORIGINALS = {name: (AXOLOTL.format(name), None) for name in OF_AXOLOTL}
ORIGINALS |= {
    # tokenizer_config.json of meta-llama/Llama-2-7b-chat-hf
    "llama2": ("llama2/tokenizer_config.json", of_tokenizer),
    # tokenizer_config.json of HuggingFaceH4/zephyr-7b-beta
    "zephyr": ("zephyr/tokenizer_config.json", of_tokenizer),
    # tokenizer_config.json of HuggingFaceTB/SmolLM2-360M-Instruct
    "smollm": ("smollm/tokenizer_config.json", of_tokenizer),
    # tokenizer_config.json of allenai/OLMo-2-1124-13B-Instruct
    "olmo": ("olmo/tokenizer_config.json", of_tokenizer),
    # github.com/lm-sys/FastChat: the models' tokenizers have no template
    "vicuna": ("fastchat/conversation.py", of_fastchat),
    # github.com/chujiezheng/chat_templates
    "granite": ("chat_templates/granite-3.0-instruct.jinja", None),
    # github.com/jndiogo/LLM-chat-templates
    "falcon": ("README.md", of_readme("Falcon")),
}


def file_of(place, path):
    """The text of a file in a checkout or in a git folder, or None."""
    if (place / path).is_file():
        return (place / path).read_text()
    shown = subprocess.run(["git", f"--git-dir={place}", "show", f"HEAD:{path}"], capture_output=True)
    return shown.stdout.decode() if shown.returncode == 0 else None


def read_original(name, places):
    """The original, from the first place that has it."""
    path, extract = ORIGINALS[name]
    for place in places:
        text = file_of(place, path)
        if text is None:
            continue
        try:
            return extract(text) if extract else text
        except (IndexError, KeyError):
            continue
    return None
