//! Chat templates render as Transformers renders them (golden outputs and the script that makes them are in
//! `templates/`).
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use common::data::template::{
    ChatTemplate, RenderInput, Rendered, TemplateError, Variables, message_value,
};
use common::data::tokenize::SpecialTokens;
use serde_json::{Value as Json, json};
use support::{golden, template_text, tokenizer};

fn template(name: &str, moment: i64) -> ChatTemplate {
    let special = SpecialTokens::from_pairs([("bos_token", "<s>"), ("eos_token", "</s>")]);
    ChatTemplate::from_source(&template_text(name), &special, moment).unwrap()
}

/// A rendering, or that it fails (with this message, where the template raises).
fn check(found: Result<String, TemplateError>, expected: &Json, what: &str) {
    match (found, expected) {
        (Ok(found), Json::String(expected)) => assert_eq!(&found, expected, "{what}"),
        (Err(error), Json::Object(expected)) => {
            if let Some(message) = expected["error"].as_str() {
                let TemplateError::Raised(found) = error else {
                    panic!("{what}: {error}");
                };
                assert_eq!(found, message, "{what}");
            }
        }
        (found, expected) => panic!("{what}: {found:?} where {expected} is expected"),
    }
}

#[test]
fn templates_render_as_in_transformers() {
    let golden = golden();
    let tokenizer = tokenizer("</s>");
    let moment = golden["made_with"]["moment"].as_i64().unwrap();
    let conversations: BTreeMap<&str, &Json> = golden["conversations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|conversation| (conversation["name"].as_str().unwrap(), conversation))
        .collect();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    let mut templates = BTreeMap::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = templates
            .entry(name)
            .or_insert_with(|| template(name, moment));
        let conversation = conversations[case["conversation"].as_str().unwrap()];
        let messages = conversation["messages"].as_array().unwrap();
        let tools = Some(&conversation["tools"]).filter(|tools| !tools.is_null());
        let what = format!("{name} on {}", case["conversation"]);
        check(
            template.render(messages, tools, false),
            &case["text"],
            &what,
        );
        if let Some(ids) = case["ids"].as_array() {
            let found = tokenizer.encode(case["text"].as_str().unwrap(), false);
            assert_eq!(&json!(found.unwrap().ids), &json!(ids), "{what}");
        }
        if !case["prompted"].is_null() {
            let before = &messages[..messages.len() - 1];
            check(
                template.render(before, tools, true),
                &case["prompted"],
                &what,
            );
        }
    }
}

#[test]
fn plain_text_is_tokenised_as_in_transformers() {
    let tokenizer = tokenizer("</s>");
    for case in golden()["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let found = tokenizer.encode(text, true).unwrap();
        assert_eq!(json!(found.ids), case["ids"], "{text:?}");
        assert_eq!(found.offsets.len(), found.ids.len());
        for covered in &found.offsets {
            assert!(covered.start <= covered.end && covered.end <= text.len());
        }
    }
}

#[test]
fn hostile_templates_are_bounded() {
    let special = SpecialTokens::default();
    let render = |text: &str| {
        let template = ChatTemplate::from_source(text, &special, 0).unwrap();
        template.render(&[], None, false)
    };
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless), Err(TemplateError::Endless)));
    let long = "{% set x = 'x' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}";
    assert!(matches!(render(long), Err(TemplateError::TooLong)));
    let deep = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}";
    assert!(matches!(render(deep), Err(TemplateError::Failed(_))));
    let reads = "{% include '/etc/passwd' %}";
    assert!(render(reads).is_err());
}

#[test]
fn a_template_that_does_not_parse_names_the_line() {
    let error = ChatTemplate::from_source("a\n{% for %}", &SpecialTokens::default(), 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("line 2"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

fn rendered(text: &str, messages: &Json, variables: &Json) -> Result<Rendered, TemplateError> {
    let template = ChatTemplate::from_source(text, &SpecialTokens::default(), 0).unwrap();
    let messages: Vec<_> = messages
        .as_array()
        .unwrap()
        .iter()
        .map(message_value)
        .collect();
    assert!(template.has_generation_marks(None));
    template.render_marked(RenderInput {
        messages: &messages,
        tools: None,
        variables: &Variables::from_json(variables).unwrap(),
        add_generation_prompt: false,
    })
}

#[test]
fn generation_marks_tell_what_is_learned() {
    let messages = json!([
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "\u{100000}x\u{100001}"},
        {"role": "assistant", "content": "\u{100000}one\u{100001}"},
    ]);
    let check = |text: &str, expected: &str, learned: &[&str]| {
        let found = rendered(text, &messages, &Json::Null).unwrap();
        assert_eq!(found.text, expected, "{text}");
        let parts: Vec<&str> = found
            .generated
            .iter()
            .map(|range| &found.text[range.clone()])
            .collect();
        assert_eq!(parts, learned, "{text}");
    };
    let all = "é,one;\u{100000}x\u{100001},\u{100000}one\u{100001};";
    let learned = ["one;", "\u{100000}one\u{100001};"];
    check(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }},{% else %}{% generation %}{{ m.content }};{% endgeneration %}{% endif %}{% endfor %}",
        all,
        &learned,
    );
    // White space control, as with any block.
    check(
        "{% for m in messages %}\n{%- if m.role == 'user' %}{{ m.content }},\n  {%- else -%}\n  {%- generation -%}  \n {{ m.content -}} \n ;{%- endgeneration -%}  \n{%- endif -%}\n{% endfor %}",
        all,
        &learned,
    );
    // In a macro, and in text that is kept before it is printed.
    check(
        "{% macro turn(m) %}{% generation %}{{ m.content }};{% endgeneration %}{% endmacro %}{% for m in messages %}{% if m.role == 'user' %}{{ m.content ~ ',' }}{% else %}{% set kept %}{{ turn(m) }}{% endset %}{{ kept }}{% endif %}{% endfor %}",
        all,
        &learned,
    );
    check("{% generation %}{% endgeneration %}a", "a", &[]);
    check(
        "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}c",
        "abc",
        &["ab"],
    );
    check(
        "{% generation %}a{% endgeneration %}{% if false %}{% generation %}b{% endgeneration %}{% endif %}",
        "a",
        &["a"],
    );
}

#[test]
fn a_template_without_generation_marks_says_so() {
    let special = SpecialTokens::default();
    let marked = |text: &str| {
        ChatTemplate::from_source(text, &special, 0)
            .unwrap()
            .has_generation_marks(None)
    };
    assert!(!marked("{% if generation %}{{ generation }}{% endif %}"));
    assert!(!marked("{# {% generation %} #}a"));
    assert!(marked("{%- generation -%}a{%- endgeneration -%}"));
}

#[test]
fn a_row_gives_the_template_variables_of_its_own() {
    let text = "{% generation %}{{ 'on' if enable_thinking is not defined or enable_thinking else 'off' }}{% endgeneration %}";
    for (variables, expected) in [
        (json!(null), "on"),
        (json!({"enable_thinking": true}), "on"),
        (json!({"enable_thinking": false}), "off"),
    ] {
        let found = rendered(text, &json!([]), &variables).unwrap();
        assert_eq!(found.text, expected, "{variables}");
    }
}
