//! Chat templates render as Transformers renders them (golden outputs and the script that makes them are in
//! `templates/`).
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use common::data::template::{ChatTemplate, TemplateError};
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
