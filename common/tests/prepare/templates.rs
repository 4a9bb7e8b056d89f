//! Chat templates: what rows give them, what is learned, and what they refuse.

use super::*;

#[test]
fn messages_that_say_so_are_not_learned() {
    for switch in [
        r#""train": false"#,
        r#""weight": 0"#,
        r#""weight": 0.0, "loss": false"#,
    ] {
        let messages = format!(
            r#"[{{"role": "user", "content": "hi", "weight": 0}}, {{"role": "assistant", "content": "no", {switch}}},
                {{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "ok", "weight": 1}}]"#
        );
        let setup = Setup::new(&row(&messages, "").replace('\n', ""));
        let data = setup.prepare().unwrap();
        let learned = data.samples[0].spans.iter().filter(|span| span.trained);
        let learned: Vec<&str> = learned.map(|span| span.text.as_str()).collect();
        assert_eq!(learned, ["ok<|im_end|>"], "{switch}");
        let told = data
            .counts
            .notes
            .iter()
            .any(|note| note.contains("not learned where"));
        assert!(told, "{:?}", data.counts.notes);
    }
    for (keys, word) in [
        (r#""weight": 0.5"#, "`weight` is 0.5"),
        (r#""weight": 1, "train": false"#, "contradict"),
        (r#""train_detail": []"#, "`train_detail`"),
    ] {
        let messages = format!(r#"[{{"role": "assistant", "content": "x", {keys}}}]"#);
        let reason = reason(&row(&messages, ""));
        assert!(reason.contains(word), "{reason}");
    }
    let in_prompt = r#"{"prompt": [{"role": "assistant", "content": "x", "weight": 1}], "completion": [{"role": "assistant", "content": "y"}]}"#;
    let said = reason(in_prompt);
    assert!(
        said.contains("message 1 of `prompt` asks to be learned"),
        "{said}"
    );
    let empty = Setup::new(r#"{"prompt": "a", "completion": "  "}"#).prepare();
    let notes = empty.unwrap().counts.notes;
    assert!(
        notes.iter().any(|note| note.contains("an answer is empty")),
        "{notes:?}"
    );
    let mut setup = Setup::new(&row(
        r#"[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]"#,
        "",
    ));
    setup.job.train_on_inputs = true;
    assert!(setup.problems()[0].contains("`train_on_inputs` that everything is"));
}

#[test]
fn a_row_may_give_its_template_variables() {
    let template = "{% if not thinking_on | default(true) %}[off]{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let setup = Setup::new(&row(
        TURNS,
        r#", "chat_template_kwargs": {"thinking_on": false}"#,
    ));
    let config = serde_json::json!({"eos_token": "<|im_end|>", "chat_template": template});
    std::fs::write(
        setup.folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    let data = setup.prepare().unwrap();
    assert!(data.samples[0].text.starts_with("[off]"));
    assert_eq!(data.counts.notes, Vec::<String>::new());
    let reserved = row(TURNS, r#", "chat_template_kwargs": {"messages": []}"#);
    assert!(reason(&reserved).contains("column `chat_template_kwargs`: `messages`"));
}

#[test]
fn rows_that_became_several_examples_are_counted() {
    let thinking = r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "reasoning_content": "so"}]"#;
    let rows = format!("{}\n{CHAT}", row(thinking, "").replace('\n', ""));
    let setup = Setup::with_template(&rows, Some("qwen3"));
    let counts = setup.prepare().unwrap().counts;
    assert_eq!(
        (counts.rows, counts.examples, counts.divided_rows),
        (2, 3, 1)
    );
    assert_eq!(counts.notes, Vec::<String>::new());
}

#[test]
fn a_template_that_raises_says_so_for_the_row() {
    let rows = CHAT.replace("\"user\"", "\"system\"");
    let setup = Setup::with_template(&format!("{CHAT}\n{rows}"), Some("gemma"));
    assert_eq!(
        setup.problems(),
        ["data.jsonl:2: the chat template raises: System role not supported"]
    );
}

#[test]
fn a_template_without_an_end_is_told_once() {
    let setup = Setup::new(&format!("{CHAT}\n{CHAT}\n{CHAT}"));
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    std::fs::write(setup.folder.path().join("chat_template.jinja"), endless).unwrap();
    let problems = setup.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains("does not come to an end"),
        "{problems:?}"
    );
}

#[test]
fn a_model_without_template_is_one_problem_and_takes_text() {
    let setup = Setup::with_template(&format!("{CHAT}\n{CHAT}"), None);
    let problems = setup.problems();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("has no chat template"));
    Setup::with_template("{\"text\": \"hello\"}", None)
        .prepare()
        .unwrap();
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let setup = Setup::new(CHAT);
    let path = setup.folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let vocabulary = config.find("\"vocab_size\":").unwrap();
    let end = vocabulary + config[vocabulary..].find(',').unwrap();
    let smaller = config.replace(&config[vocabulary..end], "\"vocab_size\":40");
    std::fs::write(&path, smaller).unwrap();
    let problems = setup.problems();
    assert!(
        problems[0].contains("outside the model's vocabulary of 40"),
        "{problems:?}"
    );
}

#[test]
fn samples_show_what_is_learned() {
    let setup = Setup::new(&format!("{CHAT}\n{{\"text\": \"hello\"}}"));
    let (tokenizer, template) = setup.parts();
    let samples = samples(&setup.job, &tokenizer, template.as_ref(), 5).unwrap();
    assert_eq!(samples.len(), 2);
    let learned: Vec<&str> = samples[0]
        .spans
        .iter()
        .filter(|span| span.trained)
        .map(|span| span.text.as_str())
        .collect();
    assert_eq!(learned, ["hello<|im_end|>"]);
    for sample in &samples {
        let text: String = sample.spans.iter().map(|span| span.text.as_str()).collect();
        assert_eq!(text, sample.text);
        assert_eq!(sample.labels.len(), sample.input_ids.len());
        assert_eq!(sample.labels[0], -100);
    }
}
