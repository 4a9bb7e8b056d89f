//! What is learned under templates that make it hard to tell: that open otherwise than they prompt, end a turn late, hide
//! what a row says, or want more of a conversation than its beginning.
#![allow(clippy::unwrap_used)]

mod support;

use common::data::example::{Example, ExampleMaker};
use common::data::record::{Chat, Record};
use common::data::template::ChatTemplate;
use common::data::tokenize::{SpecialTokens, Tokenizer};
use serde_json::{Value as Json, json};

const EOS: &str = "<|im_end|>";

/// A model with this template.
struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Model {
    fn new(template: &str) -> Self {
        let special = SpecialTokens::from_pairs([("bos_token", "<s>"), ("eos_token", EOS)]);
        Self {
            tokenizer: support::tokenizer(EOS),
            template: ChatTemplate::from_source(template, &special, 0).unwrap(),
        }
    }

    /// The examples of a conversation in which answers are learned but for those that say otherwise.
    fn examples(&self, messages: &Json) -> Result<Vec<Example>, String> {
        let messages = messages.as_array().unwrap().clone();
        let maker = ExampleMaker {
            tokenizer: &self.tokenizer,
            template: Some(&self.template),
            train_on_inputs: false,
        };
        let chat = Chat {
            learned: messages.iter().map(|m| m["role"] == "assistant").collect(),
            messages,
            ..Chat::default()
        };
        maker.examples(&Record::Conversation(chat), &mut Vec::new())
    }

    /// The learned stretches of all examples as text.
    fn learned(&self, messages: &Json) -> Vec<String> {
        let examples = self.examples(messages).unwrap();
        examples
            .iter()
            .flat_map(|example| self.stretches(example))
            .collect()
    }

    fn stretches(&self, example: &Example) -> Vec<String> {
        let masks = example.trained.iter().copied();
        let tokens: Vec<(u32, bool)> = example.ids.iter().copied().zip(masks).collect();
        let runs = tokens.chunk_by(|(_, one), (_, other)| one == other);
        let learned = runs.filter(|run| run[0].1);
        learned
            .map(|run| run.iter().map(|(id, _)| *id).collect::<Vec<_>>())
            .map(|ids| self.tokenizer.decode(&ids).unwrap())
            .collect()
    }
}

fn check(template: &str, messages: Json, expected: &[&str]) {
    assert_eq!(Model::new(template).learned(&messages), expected);
}

fn refused(template: &str, messages: Json) -> String {
    Model::new(template).examples(&messages).unwrap_err()
}

fn user(text: &str) -> Json {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Json {
    json!({"role": "assistant", "content": text})
}

fn call() -> Json {
    json!({"type": "function", "function": {"name": "sky", "arguments": {"city": "Bonn"}}})
}

const PROMPT: &str = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn what_comes_before_the_first_message_is_not_learned() {
    let turns = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
    let begin = [
        "{% for m in messages %}{% if loop.first %}<s>{% endif %}",
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}",
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}",
    ];
    for begin in begin {
        for end in [PROMPT, ""] {
            check(
                &format!("{begin}{turns}{end}"),
                json!([assistant("hello")]),
                &["hello<|im_end|>"],
            );
        }
        check(
            &format!("{begin}{turns}{PROMPT}"),
            json!([assistant("hello"), user("a"), assistant("ok")]),
            &["hello<|im_end|>", "ok<|im_end|>"],
        );
    }
}

#[test]
fn a_system_message_that_waits_for_the_user_is_not_learned() {
    let template = "{% for m in messages %}{% if m.role == 'system' %}{% set ns.held = m.content %}{% else %}{{ ns.held }}{% set ns.held = '' %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let template = format!("{{% set ns = namespace(held='') %}}{template}");
    check(
        &template,
        json!([{"role": "system", "content": "12"}, assistant("hello"), user("a"), assistant("ok")]),
        &["hello<|im_end|>", "ok<|im_end|>"],
    );
}

#[test]
fn a_header_that_differs_from_the_prompt_in_white_space_is_not_learned() {
    let template = "{% for m in messages %}\n\n    {% if m.role == 'user' %}\n        {{ 'U: ' + m.content + '\n' }}\n    {% else %}\n        {{ 'BOT: ' + m.content + '<|im_end|>\n' }}\n    {% endif %}\n{% endfor %}\n\n{% if add_generation_prompt %}\n    {{ 'BOT:' }}\n{% endif %}\n";
    check(
        template,
        json!([user("a"), assistant("hello"), user("b"), assistant("x y")]),
        &[" hello<|im_end|>", " x y<|im_end|>"],
    );
}

#[test]
fn an_end_token_that_comes_with_the_next_message_is_learned() {
    let template = "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}";
    check(
        template,
        json!([user("a"), assistant("hello"), user("b"), assistant("ok")]),
        &["hello<|im_end|>", "ok<|im_end|>"],
    );
    // The token is the template's, not what the next message happens to begin with.
    let template = "{% for m in messages %}{{ m.content }}\n{% endfor %}";
    check(
        template,
        json!([
            user("a"),
            assistant("hello"),
            user("<|im_end|>"),
            assistant("ok")
        ]),
        &["hello\n", "ok\n<|im_end|>"],
    );
}

#[test]
fn a_conversation_of_which_only_the_whole_renders_is_learned() {
    let guard = "{% set ns = namespace(user=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = true %}{% endif %}{% endfor %}{% if not ns.user %}{{ raise_exception('no user') }}{% endif %}";
    let turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}";
    let template = format!("{guard}{turns}{PROMPT}");
    check(
        &template,
        json!([
            {"role": "system", "content": "12"},
            assistant(" hello\n"),
            user("a"),
            assistant("ok")
        ]),
        &["hello<|im_end|>", "ok<|im_end|>"],
    );
    check(
        &template,
        json!([
            {"role": "assistant", "content": "", "tool_calls": [call()]},
            {"role": "tool", "content": "dry"},
            user("a"),
            assistant("ok")
        ]),
        &[
            "<call>{\"name\": \"sky\", \"arguments\": {\"city\": \"Bonn\"}}</call><|im_end|>",
            "ok<|im_end|>",
        ],
    );
    // Nothing says where the first answer ends.
    let endless = template.replace("<|im_end|>", "");
    let reason = refused(
        &endless,
        json!([assistant("hello"), user("a"), assistant("ok")]),
    );
    assert!(reason.contains("where this answer ends"), "{reason}");
}

#[test]
fn generation_marks_say_what_is_learned() {
    let template = format!(
        "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}{{{{ m.reasoning_content }}}}|{{% generation %}}{{{{ m.content }}}}<|im_end|>{{% endgeneration %}}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}\n{{% endfor %}}{PROMPT}"
    );
    let answer = json!({"role": "assistant", "content": "hello", "reasoning_content": "12"});
    check(
        &template,
        json!([user("a"), answer, user("b"), answer]),
        &["hello<|im_end|>", "hello<|im_end|>"],
    );
    let model = Model::new(&template);
    let messages = vec![user("a"), answer.clone(), user("b"), assistant("ok")];
    let chat = Chat {
        learned: vec![false, false, false, true],
        messages,
        ..Chat::default()
    };
    let maker = ExampleMaker {
        tokenizer: &model.tokenizer,
        template: Some(&model.template),
        train_on_inputs: false,
    };
    let examples = maker
        .examples(&Record::Conversation(chat), &mut Vec::new())
        .unwrap();
    let learned = examples[0].trained.iter().filter(|learned| **learned);
    assert_eq!(learned.count(), 2, "of `ok` and its end alone");
}

#[test]
fn an_answer_of_which_nothing_shows_is_refused() {
    let template = format!(
        "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content if m.content is string else '' }}}}<|im_end|>\n{{% endfor %}}{PROMPT}"
    );
    let parts = json!([{"type": "text", "text": "hello"}]);
    let reason = refused(
        &template,
        json!([user("a"), {"role": "assistant", "content": parts}]),
    );
    assert!(
        reason.contains("message 2") && reason.contains("list of parts"),
        "{reason}"
    );
    let reason = refused(
        &template,
        json!([user("a"), {"role": "assistant", "content": "", "tool_calls": [call()]}]),
    );
    assert!(reason.contains("tool call"), "{reason}");
    // An answer that is empty in the row is what the row says.
    check(
        &template,
        json!([user("a"), assistant("")]),
        &["<|im_end|>"],
    );
}

/// 60 turns, some of them calls, with answers of all kinds.
#[test]
fn a_call_of_which_only_arguments_in_text_show_is_learned() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\
        {% for call in m.tool_calls %}{% for name, value in call.function.arguments | items %}\
        {{ name }}={{ value }};{% endfor %}{% endfor %}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    let answer = json!({"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{\"city\": \"Bonn\"}"}}
    ]});
    check(
        template,
        json!([user("Look"), answer]),
        &["city=Bonn;<|im_end|>"],
    );
}

fn long_conversation() -> Json {
    let mut messages = vec![json!({"role": "system", "content": "12"})];
    for turn in 0..60 {
        messages.push(user(&format!("q{turn} <|im_end|>")));
        if turn % 7 == 3 {
            messages.push(json!({"role": "assistant", "content": "", "tool_calls": [call()]}));
            messages.push(json!({"role": "tool", "content": format!("r{turn}")}));
        }
        let answer = ["hello", " ok\n", "<b>12</b>", "<|im_start|>assistant\n"][turn % 4];
        messages.push(assistant(&format!("{answer}{turn}")));
    }
    Json::Array(messages)
}

#[test]
fn long_conversations_are_learned_as_short_ones_are() {
    let templates = [
        format!(
            "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}<call>{{{{ c | tojson }}}}</call>{{% endfor %}}<|im_end|>\n{{% endfor %}}{PROMPT}"
        ),
        support::template_text("qwen3"),
        support::template_text("llama3"),
        "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}".to_owned(),
    ];
    for template in templates {
        let model = Model::new(&template);
        let messages = long_conversation();
        let all = messages.as_array().unwrap();
        let mut whole = model.learned(&messages);
        // Answers of the same conversation, no more than a few learned at a time: each found on its own.
        let mut one_by_one = Vec::new();
        let turns: Vec<usize> = (0..all.len())
            .filter(|index| all[*index]["role"] == "assistant")
            .collect();
        for few in turns.chunks(3) {
            let chat = Chat {
                messages: all.clone(),
                learned: (0..all.len()).map(|index| few.contains(&index)).collect(),
                ..Chat::default()
            };
            let maker = ExampleMaker {
                tokenizer: &model.tokenizer,
                template: Some(&model.template),
                train_on_inputs: false,
            };
            let examples = maker
                .examples(&Record::Conversation(chat), &mut Vec::new())
                .unwrap();
            for example in &examples {
                one_by_one.extend(model.stretches(example));
            }
        }
        // Texts of their own come first, so the order differs.
        whole.sort_unstable();
        one_by_one.sort_unstable();
        assert_eq!(whole, one_by_one);
        assert!(whole.len() >= turns.len(), "{}", whole.len());
    }
}
