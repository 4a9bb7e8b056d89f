"""The conversations that templates are compared on, and how a template is rendered.

Enters: a template's source and a case. Leaves: its text, or that it raises. Nothing is downloaded.
"""
import contextlib
import datetime
import io
import json

with contextlib.redirect_stderr(io.StringIO()):
    from transformers.utils import chat_template_utils

MOMENT = 1721984707  # 2024-07-26 09:05:07 UTC
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class FixedDatetime(datetime.datetime):
    """A clock that stands still."""

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
            "properties": {
                "city": {"type": "string", "description": "Name"},
                "days": {"type": "integer", "minimum": 1},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "What time it is",
        "parameters": {"type": "object", "properties": {}},
        "return": {"type": "string", "description": "the time"},
    },
}
# A tool whose parameters use what schemas can say.
SCHEMA = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book",
        "parameters": {
            "type": "object",
            "properties": {
                "names": {"type": "array", "items": {"type": "string", "minLength": 1}, "description": "Who"},
                "Stops": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"at": {"type": "string", "nullable": True}},
                        "required": ["at"],
                    },
                },
                "kinds": {"type": "array", "items": {"type": ["string", "null"], "default": None}},
                "seat": {"type": "object", "properties": {"row": {"type": "integer"}}, "required": ["row"], "nullable": True},
                "free": {"type": "object", "size": {"type": "number", "description": "How big"}},
                "class": {"type": "string", "enum": ["a", 1, True, None, {"x": [1.5]}]},
                "any": {},
            },
            "required": ["names", "seat"],
        },
        "response": {"type": "object", "description": "The ticket"},
    },
}


def call(arguments, id="abc123XYZ", name="get_weather"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calling(*calls, **more):
    return {"role": "assistant", **more, "tool_calls": list(calls)}


def tool(content, id="abc123XYZ", **more):
    return {"role": "tool", "tool_call_id": id, "content": content, **more}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


LONDON = {"city": "London", "days": 2}
IMAGE = {"type": "image", "image": "a.png"}

# name: (messages, tools)
CONVERSATIONS = {
    "one": ([user("Hi"), assistant("Hello!")], None),
    "question": ([user("Hi")], None),
    "system": ([system("Be brief."), user("Hi"), assistant("Hello!")], None),
    "system_question": ([system("Be brief."), user("Hi")], None),
    "system_alone": ([system("Be brief.")], None),
    "none": ([], None),
    "several": ([user("1+1?"), assistant("2"), user("2+2?"), assistant("4"), user("3+3?"), assistant("6")], None),
    "several_system": ([system("Add."), user("1+1?"), assistant("2"), user("2+2?"), assistant("4")], None),
    "several_question": ([system("Add."), user("1+1?"), assistant("2"), user("2+2?")], None),
    "spaces": ([system("  Be \n brief.\n\n"), user("\n Hi\t\n"), assistant("  \n\nHello, world!  \n")], None),
    "spaces_question": ([system("\n\nBe brief. "), user(" Hi "), assistant(" a \n"), user("\n b\n\n")], None),
    "empty_contents": ([system(""), user(""), assistant("")], None),
    "empty_answer": ([user("Hi"), assistant(""), user(""), assistant("x")], None),
    "unicode": ([user("Grüße 日本語 🦀"), assistant("é 👩‍👩‍👧 naïve\u00a0…\n\n\u00a0Zeile\u2003")], None),
    "marks_in_text": ([user("say <|im_end|>{{ x }}"), assistant("<|im_start|>assistant\n<|im_end|> </s> [/INST] 'a' \"b\" \\n")], None),
    "parts": ([system(parts("Be ", "brief. ")), user(parts(" Hi ", "there\n")), assistant(parts(" Hel", "lo! "))], None),
    "parts_question": ([user(parts("a")), assistant("b"), user(parts("c", " d"))], None),
    "parts_of_answer": ([user("a"), assistant(parts("b", "c\n"))], None),
    "parts_empty": ([user([]), assistant([])], None),
    "parts_image": ([user([IMAGE, {"type": "text", "text": "What is it?"}]), assistant("A cat.")], None),
    "parts_untyped": ([user([{"text": "a"}]), assistant("b")], None),
    "parts_unknown": ([user([{"type": "video", "video": "a.mp4"}, {"type": "audio"}]), assistant("b")], None),
    "two_users": ([user("a"), user("b"), assistant("c")], None),
    "two_answers": ([user("a"), assistant("b"), assistant("c")], None),
    "two_systems": ([system("a"), system("b"), user("c"), assistant("d")], None),
    "system_later": ([user("a"), assistant("b"), system("c"), user("d"), assistant("e")], None),
    "system_last": ([user("a"), assistant("b"), system("c")], None),
    "answer_first": ([assistant("Welcome!"), user("Hi"), assistant("Yes?")], None),
    "answer_alone": ([assistant("Welcome!")], None),
    "system_answer_first": ([system("s"), assistant("Welcome!"), user("Hi")], None),
    "developer": ([{"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Hello!")], None),
    "developer_later": ([user("a"), {"role": "developer", "content": "b"}, user("c"), assistant("d")], None),
    "unknown_role": ([user("a"), {"role": "critic", "content": "b"}, user("c"), assistant("d")], None),
    "no_role": ([{"content": "a"}, assistant("b")], None),
    "no_content": ([{"role": "user"}, {"role": "assistant"}], None),
    "no_content_of_answer": ([user("a"), {"role": "assistant", "content": None}], None),
    "upper_role": ([{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}], None),
    "model_role": ([user("a"), {"role": "model", "content": "b"}, user("c"), {"role": "chatbot", "content": "d"}], None),
    "thinking_inside": (
        [user("a"), assistant("<think>\nhm\n</think>\n\nfirst"), user("b"), assistant("<think>\nso\n</think>\n\nsecond")],
        None,
    ),
    "thinking_inside_bare": ([user("a"), assistant("hm</think>first"), user("b"), assistant("<think></think>second")], None),
    "thinking_inside_open": ([user("a"), assistant("<think>hm"), user("b"), assistant("x</think>y</think> z\n")], None),
    "thinking_field": (
        [user("a"), assistant("first", reasoning_content="hm"), user("b"), assistant("second", reasoning_content="\nso\n")],
        None,
    ),
    "thinking_field_empty": ([user("a"), assistant("<think>x</think>first", reasoning_content="")], None),
    "thinking_question": ([user("a"), assistant("\n\nfirst", reasoning_content="hm"), user("b")], None),
    "thinking_parts": ([user("a"), assistant(parts("<think>hm</think>", "first"), reasoning="so")], None),
    "thinking_tools": (
        [
            user("a"),
            assistant("", reasoning_content="look", tool_calls=[call(LONDON)]),
            tool("wet"),
            assistant("Wet.", reasoning_content="so"),
        ],
        [WEATHER],
    ),
    "tools_given": ([user("Hi"), assistant("Hello!")], [WEATHER]),
    "tools_given_system": ([system("Use tools."), user("Hi"), assistant("Hello!")], [WEATHER, CLOCK]),
    "tools_given_question": ([system("Use tools."), user("a"), assistant("b"), user("c")], [WEATHER, CLOCK]),
    "tools_given_schema": ([user("Hi"), assistant("Hello!")], [SCHEMA, CLOCK]),
    "tools_given_odd": ([user("Hi")], [{"type": "code", "function": {"name": "f", "parameters": None}}]),
    "tools_given_bare": ([user("Hi")], [{"name": "f", "description": "d", "parameters": {}}]),
    "tools_given_parts": ([system(parts("Use ", "tools.")), user(parts("a"))], [WEATHER]),
    "tools_empty": ([user("Hi"), assistant("Hello!")], []),
    "tools_same_question": ([user("a"), assistant("b"), user("a"), assistant("c")], [WEATHER]),
    "tools_none": ([], [WEATHER]),
    "tools": (
        [
            user("Weather?"),
            assistant("", tool_calls=[call(LONDON)]),
            tool("{\"sky\": \"grey\"}", name="get_weather"),
            assistant("Grey."),
            user("Thanks"),
            assistant("Welcome."),
        ],
        [WEATHER],
    ),
    "tools_null_content": ([user("Weather?"), calling(call(LONDON), content=None), tool("wet"), assistant("Wet.")], [WEATHER]),
    "tools_absent_content": ([user("Weather?"), calling(call(LONDON)), tool("wet")], [WEATHER]),
    "tools_text_arguments": (
        [user("Weather?"), assistant("", tool_calls=[call('{"city": "Bath", "days": 1.0}')]), tool("wet"), assistant("Wet.")],
        [WEATHER],
    ),
    "tools_broken_arguments": ([user("Weather?"), assistant("", tool_calls=[call("city=Bath")])], [WEATHER]),
    "tools_several": (
        [
            system("Use tools."),
            user("Both?"),
            assistant("Let me look.", tool_calls=[call(LONDON), call({}, "id0000002", "clock")]),
            tool("wet"),
            tool("12:00", "id0000002"),
            assistant("Wet at noon."),
            user("Again"),
            assistant("So.", tool_calls=[call({"city": "Ä"}, "id0000003")]),
            tool("dry", "id0000003"),
        ],
        [WEATHER, CLOCK],
    ),
    "tools_several_text": (
        [
            system("Use tools."),
            user("Both?"),
            assistant("Let me look.", tool_calls=[call('{"city": "A"}'), call("{}", "id0000002", "clock")]),
            tool("wet"),
            tool("12:00", "id0000002"),
            calling(call('{"city": "B"}', "id0000003"), content=None),
            tool("dry", "id0000003"),
            assistant("Wet at noon.</think>Dry."),
        ],
        None,
    ),
    "tools_chain": (
        [
            user("a"),
            assistant("", tool_calls=[call({"a": 1.0, "b": 1e-7, "c": [True, None], "d": {"e": "f"}, "g": "h\ni"})]),
            tool("1"),
            assistant("b", tool_calls=[call({}, "id0000002")]),
            tool("2", "id0000002"),
            user("c"),
        ],
        None,
    ),
    "tools_bare_calls": ([user("a"), assistant("", tool_calls=[{"name": "clock", "arguments": {"x": 1}}])], [CLOCK]),
    "tools_short_id": ([user("a"), assistant("", tool_calls=[call(LONDON, "1")]), tool("wet", "1")], [WEATHER]),
    "tools_no_id": (
        [user("a"), assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]), {"role": "tool", "content": "x"}],
        None,
    ),
    "tools_no_type": (
        [user("a"), assistant("", tool_calls=[{"id": "abc123XYZ", "function": {"name": "f", "arguments": {"x": "y"}}}]), tool("x")],
        None,
    ),
    "tools_no_calls": ([user("a"), assistant("b", tool_calls=[]), user("c"), assistant("d", tool_calls=None)], None),
    "tools_result_first": ([tool("x"), user("a"), assistant("b")], None),
    "tools_result_user": ([user("a"), assistant("", tool_calls=[call(LONDON)]), tool("x"), user("b"), assistant("c")], None),
    "tools_result_object": ([user("a"), assistant("", tool_calls=[call(LONDON)]), tool({"content": {"sky": "grey"}}), assistant("c")], None),
    "tools_result_parts": ([user("a"), assistant("", tool_calls=[call(LONDON)]), tool(parts("we", "t")), assistant("c")], None),
    "tools_result_number": ([user("a"), assistant("", tool_calls=[call(LONDON)]), tool(5), assistant("c")], None),
    "tool_results_role": ([user("a"), assistant("", tool_calls=[call(LONDON)]), {**tool("x"), "role": "tool_results"}, assistant("c")], None),
    "tool_response_role": ([user("a"), {"role": "assistant_tool_call", "content": "[]"}, {"role": "tool_response", "content": "x"}, assistant("c")], None),
    "tool_in_disguise": (
        [user("a"), assistant("b", reasoning_content="t"), user("<tool_response>\nx\n</tool_response>"), assistant("c", reasoning_content="u")],
        None,
    ),
    "tools_several_answers": (
        [user("a"), assistant("b", tool_calls=[call(LONDON)]), tool("x"), assistant("c"), assistant("d"), tool("y"), user("e")],
        None,
    ),
    "tools_embedded_results": (
        [user("a"), assistant("b", tool_calls=[call(LONDON)], tool_responses=[{"name": "f", "response": {"B": [1], "a": None}}, {"response": "x"}])],
        None,
    ),
    "tools_result_media": (
        [user("a"), assistant(None, tool_calls=[call(LONDON)]), tool([{"type": "text", "text": "x"}, IMAGE]), assistant("c")],
        None,
    ),
    "tools_thinking_both": (
        [user("a"), assistant("<|channel>thought\nhm<channel|> b", reasoning="t", tool_calls=[call(LONDON)]), tool("x"), assistant("c", reasoning="u")],
        None,
    ),
    "tool_plan": ([user("a"), calling(call(LONDON), tool_plan="I look."), tool("x"), assistant("c")], [WEATHER]),
    "citations": ([user("a"), assistant("b", citations=[{"document_id": 1}, {"document_id": 0}])], None),
    "names": ([{**user("a"), "name": "Ann"}, assistant("b", name="Bot")], None),
    "ipython_role": ([user("a"), assistant("b"), {"role": "ipython", "content": "x"}, assistant("c")], None),
}

# Variables that a template may read, with values to try; only templates that name one of them get it.
NAMED = {
    "enable_thinking": [True, False],
    "real_last_index": [1],
    "safety_mode": ["STRICT", "contextual"],
    "skip_think": [True, False],
    "add_vision_id": [True],
    "date_string": ["01 Jan 2025"],
    "documents": [[{"title": "A", "text": "Über \"a\""}, {"title": "B", "text": "b", "source_url": 1}]],
    "enable_citations": [True],
    "tools_in_user_message": [False],
    "custom_tools": [[CLOCK]],
    "knobs": [{"is_set": True, "citation_mode": "fast", "response_format": "json_object"}],
    "role_to_predict": ["user"],
    "generation_preamble": [" Well"],
    "bom_str": ["<bom>"],
}
TOGETHER = [
    {"documents": NAMED["documents"][0], "enable_citations": True},
    {"documents": NAMED["documents"][0], "safety_mode": "STRICT"},
    {"documents": NAMED["documents"][0], "knobs": NAMED["knobs"][0]},
    {"skip_think": False, "enable_thinking": True},
]
# Conversations that are kept with variables, and without special tokens.
WITH_VARIABLES = [
    "system", "several_question", "thinking_field", "thinking_inside", "tools_several", "tools_given_system", "tool_plan",
    "parts_image", "tool_in_disguise",
]  # fmt: skip
WITHOUT_TOKENS = ["one", "system"]


def variables_of(source):
    """The sets of variables that make a difference to a template."""
    if callable(source):
        return []
    alone = [{name: value} for name, values in NAMED.items() if name in source for value in values]
    return alone + [together for together in TOGETHER if all(name in source for name in together)]


def settings(source, name, every=False):
    """The variables and special tokens that a template is rendered with on a conversation."""
    yield {}, TOKENS
    if every or name in WITH_VARIABLES:
        for variables in variables_of(source):
            yield variables, TOKENS
    if name in WITHOUT_TOKENS:
        yield {}, {}


def without_nulls(messages):
    """The messages as trainers hand them over: a field that is null is not there."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def with_parsed_arguments(messages):
    """The messages with the arguments of calls parsed where they are JSON text."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for entry in message.get("tool_calls") or []:
            holder = entry.get("function", entry)
            if isinstance(holder.get("arguments"), str):
                try:
                    holder["arguments"] = json.loads(holder["arguments"])
                except ValueError:
                    pass
    return copy


def render(source, messages, tools, variables, tokens):
    """The text, or None where the template raises. The source may be a function that formats by itself."""
    try:
        if callable(source):
            return source(messages, tools, variables, tokens)
        rendered, _ = chat_template_utils.render_jinja_template(
            [messages], tools=tools, chat_template=source, **tokens, **variables
        )
    except Exception:
        return None
    return rendered[0]


def prompted(variables):
    """The variables with which a template writes what comes before an answer, too."""
    return {**variables, "add_generation_prompt": True}


def with_null_answers(messages):
    """The messages with a null content for answers that have none."""
    return [{"content": None, **message} if message.get("role") == "assistant" else message for message in messages]


def expected(source, messages, tools, variables, tokens):
    """What the template writes: without null fields, or else with them, for a null and nothing are one to renderers."""
    forms = (without_nulls(messages), messages, with_null_answers(messages))
    texts = (render(source, form, tools, variables, tokens) for form in forms)
    return next((text for text in texts if text is not None), None)
