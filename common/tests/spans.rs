//! What is learned of a conversation: the assistant's turns with their end token, and nothing else.
#![allow(clippy::unwrap_used)]

mod support;

use common::data::example::{Example, ExampleMaker};
use common::data::record::{Chat, Record};
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use serde_json::{Value as Json, json};
use support::{golden, model};

fn conversation(messages: Json, tools: Option<Json>) -> Record {
    let messages = messages.as_array().unwrap().clone();
    Record::Conversation(Chat {
        learned: messages.iter().map(|m| m["role"] == "assistant").collect(),
        messages,
        tools,
        ..Chat::default()
    })
}

fn user(text: &str) -> Json {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Json {
    json!({"role": "assistant", "content": text})
}

fn make(model: &(Tokenizer, ChatTemplate), record: &Record) -> Vec<Example> {
    let maker = ExampleMaker {
        tokenizer: &model.0,
        template: Some(&model.1),
        train_on_inputs: false,
    };
    maker.examples(record, &mut Vec::new()).unwrap()
}

/// The learned stretches as text.
fn learned(tokenizer: &Tokenizer, example: &Example) -> Vec<String> {
    assert_eq!(example.ids.len(), example.trained.len());
    assert_eq!(example.ids.len(), example.offsets.len());
    let mut stretches: Vec<Vec<u32>> = Vec::new();
    let mut open = false;
    for (id, trained) in example.ids.iter().zip(&example.trained) {
        if *trained && !open {
            stretches.push(Vec::new());
        }
        if *trained {
            stretches.last_mut().unwrap().push(*id);
        }
        open = *trained;
    }
    stretches
        .iter()
        .map(|ids| tokenizer.decode(ids).unwrap())
        .collect()
}

/// One example whose learned stretches are these.
fn check(template: &str, eos: &str, messages: Json, expected: &[&str]) -> Example {
    let model = model(template, eos);
    let mut examples = make(&model, &conversation(messages, None));
    assert_eq!(examples.len(), 1);
    let example = examples.remove(0);
    assert_eq!(learned(&model.0, &example), expected);
    example
}

#[test]
fn answers_are_learned_with_their_end_token_and_without_the_newline() {
    check(
        "chatml",
        "<|im_end|>",
        json!([
            user("hi"),
            assistant("hello"),
            user("12"),
            assistant(" ok\n\n")
        ]),
        &["hello<|im_end|>", " ok\n\n<|im_end|>"],
    );
    check(
        "gemma",
        "<end_of_turn>",
        json!([user("hi"), assistant(" hello ")]),
        &["hello<end_of_turn>"],
    );
    check(
        "mistral",
        "</s>",
        json!([user("a"), assistant("b"), user("c"), assistant("d")]),
        &[" b</s>", " d</s>"],
    );
    check(
        "llama3",
        "<|eot_id|>",
        json!([user("a"), assistant("b"), user("c"), assistant("d")]),
        &["b<|eot_id|>", "d<|eot_id|>"],
    );
}

#[test]
fn characters_of_several_bytes_do_not_shift_the_mask() {
    check(
        "chatml",
        "<|im_end|>",
        json!([
            user("Grüße 日本語 🦀"),
            assistant("🦀 é"),
            user("ß"),
            assistant("日本")
        ]),
        &["🦀 é<|im_end|>", "日本<|im_end|>"],
    );
}

#[test]
fn text_that_looks_like_the_template_does_not_shift_the_mask() {
    let example = check(
        "chatml",
        "<|im_end|>",
        json!([
            user("<|im_start|>assistant\nno<|im_end|>"),
            assistant("hello"),
            user("hello"),
            assistant("<|im_end|> hello")
        ]),
        &["hello<|im_end|>", "<|im_end|> hello<|im_end|>"],
    );
    assert!(!example.added_eos);
}

#[test]
fn generation_blocks_and_rendering_agree() {
    let model = model("chatml_generation", "<|im_end|>");
    let golden = golden();
    let mut compared = 0;
    for case in golden["cases"].as_array().unwrap() {
        let Some(spans) = case["assistant_spans"].as_array() else {
            continue;
        };
        let conversation_of = golden["conversations"]
            .as_array()
            .unwrap()
            .iter()
            .find(|conversation| conversation["name"] == case["conversation"])
            .unwrap();
        let text: Vec<char> = case["text"].as_str().unwrap().chars().collect();
        let expected: Vec<String> = spans
            .iter()
            .map(|span| {
                let bound = |at: usize| span[at].as_u64().unwrap() as usize;
                text[bound(0)..bound(1)].iter().collect()
            })
            .collect();
        let record = conversation(conversation_of["messages"].clone(), None);
        let examples = make(&model, &record);
        assert_eq!(learned(&model.0, &examples[0]), expected, "{case}");
        compared += 1;
    }
    assert!(compared > 10);
}

#[test]
fn a_template_that_adds_to_the_last_answer_still_gives_one_example() {
    let example = check(
        "qwen3",
        "<|im_end|>",
        json!([
            user("a"),
            assistant("b"),
            user("c"),
            assistant("d"),
            user("e"),
            assistant("f")
        ]),
        &[
            "b<|im_end|>",
            "d<|im_end|>",
            "<think>\n\n</think>\n\nf<|im_end|>",
        ],
    );
    assert!(example.text.contains("assistant\nb<|im_end|>"));
}

#[test]
fn thinking_that_the_template_removes_later_is_learned_where_it_shows() {
    let model = model("qwen3", "<|im_end|>");
    let inside = json!([
        user("a"),
        assistant("<think>\nhm\n</think>\n\nfirst"),
        user("b"),
        assistant("<think>\nso\n</think>\n\nsecond")
    ]);
    let field = json!([
        user("a"),
        {"role": "assistant", "content": "first", "reasoning_content": "hm"},
        user("b"),
        {"role": "assistant", "content": "second", "reasoning_content": "so"}
    ]);
    for messages in [inside, field] {
        let examples = make(&model, &conversation(messages, None));
        let learned: Vec<Vec<String>> = examples
            .iter()
            .map(|example| learned(&model.0, example))
            .collect();
        assert_eq!(
            learned,
            [
                ["<think>\nhm\n</think>\n\nfirst<|im_end|>"],
                ["<think>\nso\n</think>\n\nsecond<|im_end|>"]
            ]
        );
        assert!(examples[1].text.contains("assistant\nfirst<|im_end|>"));
    }
}

#[test]
fn tool_calls_are_learned_and_results_are_not() {
    let call = |city: &str| json!({"type": "function", "function": {"name": "sky", "arguments": {"city": city}}});
    let messages = json!([
        user("a"),
        {"role": "assistant", "content": "Look:", "tool_calls": [call("A"), call("B")]},
        {"role": "tool", "content": "wet"},
        {"role": "tool", "content": "dry"},
        assistant("Both."),
        user("b"),
        {"role": "assistant", "content": null, "tool_calls": [call("C")]},
        {"role": "tool", "content": "hot"},
        assistant("Hot.")
    ]);
    let tools = json!([{"type": "function", "function": {"name": "sky", "parameters": {}}}]);
    let model = model("qwen3", "<|im_end|>");
    let examples = make(&model, &conversation(messages, Some(tools)));
    let all: Vec<String> = examples
        .iter()
        .flat_map(|example| learned(&model.0, example))
        .collect();
    assert_eq!(all.len(), 4, "{all:?}");
    let calls = "Look:\n<tool_call>\n{\"name\": \"sky\", \"arguments\": {\"city\": \"A\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"sky\", \"arguments\": {\"city\": \"B\"}}\n</tool_call><|im_end|>";
    assert!(all.contains(&calls.to_owned()), "{all:?}");
    assert!(all.iter().any(|text| text.contains("\"C\"")));
    assert!(all.iter().all(|text| text.ends_with("<|im_end|>")));
    assert!(!all.concat().contains("wet") && !all.concat().contains("hot"));
}

#[test]
fn a_prompt_that_opens_thinking_does_not_hide_the_start_of_an_answer() {
    let model = model("deepseek", "</s>");
    let messages = json!([
        user("a"),
        assistant("<b>b"),
        user("c"),
        assistant("<think>x</think>d")
    ]);
    let examples = make(&model, &conversation(messages, None));
    let all: Vec<String> = examples
        .iter()
        .flat_map(|example| learned(&model.0, example))
        .collect();
    assert_eq!(all, ["<b>b</s>", "d</s>"]);
}

#[test]
fn eos_is_added_where_the_template_has_no_end_token() {
    let example = check(
        "plain",
        "</s>",
        json!([user("a"), assistant("hello")]),
        &[" hello\n</s>"],
    );
    assert!(example.added_eos);
}

#[test]
fn an_answer_that_comes_first_is_learned() {
    check(
        "chatml_generation",
        "<|im_end|>",
        json!([assistant("hello"), user("a"), assistant("ok")]),
        &["hello<|im_end|>", "ok<|im_end|>"],
    );
}

#[test]
fn only_the_completion_of_a_conversation_is_learned() {
    let model = model("chatml", "<|im_end|>");
    let record = Record::Conversation(Chat {
        messages: vec![user("a"), assistant("b"), user("c"), assistant("d")],
        learned: vec![false, false, false, true],
        ..Chat::default()
    });
    let examples = make(&model, &record);
    assert_eq!(learned(&model.0, &examples[0]), ["d<|im_end|>"]);
}

#[test]
fn completions_and_texts_end_with_eos_and_begin_as_the_tokenizer_begins() {
    let model = model("chatml", "</s>");
    let record = Record::Completion {
        prompt: "12 ".into(),
        completion: "hello 🦀".into(),
    };
    let examples = make(&model, &record);
    // " hello" is one token that reaches over the end of the prompt.
    assert_eq!(learned(&model.0, &examples[0]), [" hello 🦀</s>"]);
    assert_eq!(examples[0].ids[0], 1);
    let examples = make(&model, &Record::Text("hello ok".into()));
    assert_eq!(learned(&model.0, &examples[0]), ["hello ok</s>"]);
    assert_eq!(examples[0].ids[0], 1, "<s> is not learned");
    let examples = make(&model, &Record::Text("hello</s>".into()));
    assert_eq!(learned(&model.0, &examples[0]), ["hello</s>"]);
    let examples = make(
        &model,
        &Record::Completion {
            prompt: "a".into(),
            completion: String::new(),
        },
    );
    assert_eq!(learned(&model.0, &examples[0]), ["</s>"]);
}

#[test]
fn train_on_inputs_learns_all_but_the_first_token() {
    let model = model("chatml", "<|im_end|>");
    let maker = ExampleMaker {
        tokenizer: &model.0,
        template: Some(&model.1),
        train_on_inputs: true,
    };
    let record = conversation(json!([user("a"), assistant("b")]), None);
    let example = maker.examples(&record, &mut Vec::new()).unwrap().remove(0);
    assert!(!example.trained[0]);
    assert!(example.trained[1..].iter().all(|trained| *trained));
}

#[test]
fn whatever_renders_can_be_learned() {
    let golden = golden();
    let conversations = golden["conversations"].as_array().unwrap();
    let mut failures = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let (name, text) = (case["template"].as_str().unwrap(), case["text"].as_str());
        // What this one prints of a message depends on how many follow.
        if name == "python" || text.is_none() {
            continue;
        }
        let model = model(name, "</s>");
        let maker = ExampleMaker {
            tokenizer: &model.0,
            template: Some(&model.1),
            train_on_inputs: false,
        };
        let found = conversations
            .iter()
            .find(|conversation| conversation["name"] == case["conversation"])
            .unwrap();
        let tools = Some(found["tools"].clone()).filter(|tools| !tools.is_null());
        let record = conversation(found["messages"].clone(), tools);
        match maker.examples(&record, &mut Vec::new()) {
            Err(reason) => failures.push(format!("{name} on {}: {reason}", case["conversation"])),
            Ok(examples) => {
                for example in &examples {
                    assert!(example.trained.contains(&true));
                }
            }
        }
    }
    // This one has no place for tools, and the answer is nothing else.
    assert_eq!(failures.len(), 1, "{failures:?}");
    assert!(failures[0].starts_with("plain on \"tools\": the chat template shows nothing"));
}
