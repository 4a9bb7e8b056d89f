//! The chat template that a job names, its variables, and the tokens that end turns.

use serde_json::json;

use super::*;

fn choice(more: &str) -> TemplateChoice {
    job(more).chat_template
}

#[test]
fn a_template_is_the_models_own_one_of_ours_or_a_text() {
    let named = |name: &str| TemplateChoice::Named(name.to_owned());
    assert_eq!(choice(""), TemplateChoice::Model);
    assert_eq!(
        choice("chat_template: tokenizer_default\n"),
        TemplateChoice::Model
    );
    assert_eq!(choice("chat_template: chatml\n"), named("chatml"));
    assert_eq!(
        choice("chat_template: tokenizer_default_fallback_llama3\n"),
        TemplateChoice::ModelOrNamed("llama3".to_owned())
    );
    let text = "{{ messages }}";
    for way in [
        "chat_template: jinja\nchat_template_jinja",
        "chat_template_jinja",
    ] {
        assert_eq!(
            choice(&format!("{way}: '{text}'\n")),
            TemplateChoice::Text(text.to_owned())
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chat_template.jinja");
    fs::write(&path, text).unwrap();
    // TRL names the file or its folder.
    for path in [&path, dir.path()] {
        assert_eq!(
            choice(&format!("chat_template_path: {}\n", path.display())),
            TemplateChoice::Text(text.to_owned())
        );
    }
}

#[test]
fn a_template_that_cannot_be_had_is_told() {
    check(
        "chat_template: chatlm\n",
        "3: `chat_template` names no chat template that is known: `chatlm`; did you mean `chatml`?",
    );
    check(
        "chat_template: jinja\n",
        "3: `chat_template` is jinja, which asks for chat_template_jinja: the template's text, or its file",
    );
    check(
        "chat_template: chatml\nchat_template_jinja: '{{ a }}'\n",
        "4: `chat_template_jinja` and `chat_template: chatml` both say what the template is; remove one",
    );
    check(
        "chat_template_jinja: no/such.jinja\n",
        "3: `chat_template_jinja` names the file no/such.jinja, which cannot be read:",
    );
}

/// The job has one problem, which begins so.
fn check(more: &str, wanted: &str) {
    let found = problems(load_text(&format!("{SMALL}{more}")));
    let [problem] = &found[..] else {
        panic!("{found:?}")
    };
    assert!(problem.starts_with(wanted), "{problem}");
}

#[test]
fn datasets_share_one_template() {
    let of = |first: &str, second: &str| {
        let text = format!("base_model: m\ndatasets:\n- path: a\n{first}- path: b\n{second}");
        load_text(&text)
    };
    let chatml = "  chat_template: chatml\n";
    let read = of(chatml, chatml).unwrap();
    assert_eq!(
        read.chat_template,
        TemplateChoice::Named("chatml".to_owned())
    );
    for second in ["", "  chat_template: llama3\n"] {
        assert_eq!(of(chatml, second).is_ok(), second.is_empty(), "{second}");
    }
    let found = problems(of("", chatml));
    assert!(
        found[0].contains("another template than that of the job"),
        "{found:?}"
    );
}

#[test]
fn variables_are_those_of_the_mapping_and_thinking() {
    let of = |more: &str| serde_json::Value::Object(job(more).chat_template_kwargs);
    assert_eq!(
        of(
            "chat_template_kwargs: {enable_thinking: false, n: 3, x: 0.5, s: 'no', l: [1, a], z: ~}\n"
        ),
        json!({"enable_thinking": false, "n": 3, "x": 0.5, "s": "no", "l": [1, "a"], "z": null})
    );
    assert_eq!(
        of("enable_thinking: true\n"),
        json!({"enable_thinking": true})
    );
    check(
        "chat_template_kwargs: {enable_thinking: false}\nenable_thinking: true\n",
        "4: `enable_thinking` and `chat_template_kwargs` say different things of it; remove one",
    );
    let flag = load_with(SMALL, &[], &[("chat_template_kwargs", "{\"a\": 1}")]).unwrap();
    assert_eq!(
        serde_json::Value::Object(flag.chat_template_kwargs),
        json!({"a": 1})
    );
}

#[test]
fn ends_of_turns_are_those_of_the_job_and_its_datasets() {
    let text = "base_model: m\neot_tokens: [<a>]\ndatasets:\n- path: a\n  eot_tokens: [<b>, <a>]\n";
    assert_eq!(load_text(text).unwrap().eot_tokens, ["<a>", "<b>"]);
}
