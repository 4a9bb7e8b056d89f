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

/// What `make_expressions.py` wrote beside each template.
#[test]
fn values_print_compare_and_compute_as_in_python() {
    let table: Json = serde_json::from_str(include_str!("templates/expressions.json")).unwrap();
    let prelude = table["prelude"].as_str().unwrap();
    let cases = table["cases"].as_array().unwrap();
    assert!(cases.len() > 1000);
    let mut wrong = Vec::new();
    for case in cases {
        let text = case[0].as_str().unwrap();
        let has_tags = ["{{", "{%", "{#"].iter().any(|tag| text.contains(tag));
        let source = match has_tags {
            true => text.to_owned(),
            false => format!("{prelude}{{{{ {text} }}}}"),
        };
        let found = unnamed(&source).ok();
        if found.as_deref() != case[1].as_str() {
            wrong.push(format!("{text}: {found:?} where Python has {}", case[1]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn unnamed(text: &str) -> Result<String, TemplateError> {
    ChatTemplate::from_source(text, &SpecialTokens::default(), 0)?.render(&[], None, false)
}

#[test]
fn templates_without_an_end_are_given_up() {
    let doubles = |what: &str| {
        format!(
            "{{% set n = namespace(x='a') %}}{{% for i in range(99) %}}{{% set n.x = {what} %}}{{% endfor %}}"
        )
    };
    for text in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 100000 %}{% for a in range(99999) %}{% set c = x | replace('a', 'b') | upper %}{% endfor %}",
        "{% set x = 'x' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 100000) }}",
        "{{ range(100000) | join('a' * 1000000) }}",
        "{{ ('a\n' * 1000000) | indent(1000000) }}",
        "{{ 'a' | center(10 ** 15) }}",
        "{{ 'a' * 10 ** 18 }}",
        "{{ [1] * 10 ** 18 }}",
        "{{ [1] | batch(10 ** 12, 0) | list }}",
        &doubles("n.x ~ n.x"),
        &doubles("n.x + n.x"),
    ] {
        let template = ChatTemplate::from_source(text, &SpecialTokens::default(), 0).unwrap();
        let render = || template.render(&[], None, false);
        let first = render();
        let given_up = matches!(first, Err(TemplateError::Endless | TemplateError::TooLong));
        assert!(
            given_up && template.gave_up(),
            "{text}: {:?}",
            first.map(|text| text.len())
        );
        assert!(matches!(render(), Err(TemplateError::Stopped)), "{text}");
    }
}

#[test]
fn templates_that_are_too_deep_are_refused() {
    let many = |text: &str| text.repeat(100_000);
    let nests = |what: &str| {
        format!(
            "{{% set n = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% set n.x = {what} %}}{{% endfor %}}{{{{ n.x }}}}"
        )
    };
    for text in [
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}".to_owned(),
        format!("{{{{ {} 1 }}}}", many("not ")),
        format!("{{{{ {} 1 }}}}", many("- ")),
        format!("{{{{ a{} }}}}", many(".a")),
        format!("{{{{ 'a'{} }}}}", many("|upper")),
        format!("{{{{ 1{} }}}}", many(" + 1")),
        format!("{{{{ {}1{} }}}}", many("("), many(")")),
        format!("{{{{ {}1{} }}}}", many("["), many("]")),
        format!("{{{{ {} 1 }}}}", many("1 if 1 else ")),
        many("{% if 1 %}"),
        nests("{'a': n.x}"),
        nests("[n.x]"),
        nests("[n.x].index"),
        nests("(n.x,).nothing"),
        nests("cycler(n.x)"),
        nests("namespace(x=n.x)"),
        "{% set n = namespace() %}{% set n.x = n %}{{ n }}".to_owned(),
        "{% include '/etc/passwd' %}".to_owned(),
    ] {
        let error = unnamed(&text).unwrap_err();
        let what = &text[..text.len().min(80)];
        let is_told = matches!(
            error,
            TemplateError::Failed(_) | TemplateError::Syntax { .. }
        );
        assert!(is_told, "{what}: {error}");
        assert!(error.to_string().len() < 300, "{what}: {error}");
    }
}

fn failing(text: &str, messages: &Json) -> String {
    let template = ChatTemplate::from_source(text, &SpecialTokens::default(), 0).unwrap();
    let rendered = template.render(messages.as_array().unwrap(), None, false);
    rendered.unwrap_err().to_string()
}

#[test]
fn a_failure_names_the_message_and_its_field() {
    let walk = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}";
    let called = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "no JSON"}}]},
    ]);
    let error = failing(walk, &called);
    assert!(
        error.contains("message 2: its `content` is null or missing"),
        "{error}"
    );
    assert!(error.contains("line 1"), "{error}");
    let calls = "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}";
    let error = failing(calls, &called);
    assert!(
        error.contains("message 2: tool call 1: `arguments`"),
        "{error}"
    );
}

#[test]
fn arguments_that_are_json_in_text_are_read_where_the_template_walks_them() {
    let render = |text: &str| {
        let template = ChatTemplate::from_source(text, &SpecialTokens::default(), 0).unwrap();
        let call = json!({"function": {"name": "f", "arguments": "{\"b\": 1, \"a\": [2.50]}"}});
        let message = json!({"role": "assistant", "tool_calls": [call]});
        template.render(&[message], None, false).unwrap()
    };
    let each = "{% set a = messages[0].tool_calls[0].function.arguments %}";
    let walks = "{% for k, v in a.items() %}{{ k }}={{ v }};{% endfor %}";
    assert_eq!(render(&format!("{each}{walks}")), "b=1;a=[2.5];");
    // Where text is fine, it stays text.
    assert_eq!(
        render(&format!("{each}{{{{ a }}}}")),
        "{\"b\": 1, \"a\": [2.50]}"
    );
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
    let input = RenderInput {
        messages: &messages,
        tools: None,
        variables: &Variables::from_json(variables).unwrap(),
        add_generation_prompt: false,
    };
    template.render_marked(input, &template.render_input(input)?)
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
