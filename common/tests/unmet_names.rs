//! Names that a job gives and no row has are told, and rows that nothing can be made of say why.
#![allow(clippy::unwrap_used)]

mod support;

use common::data::prepare_blocks;
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::job::JobSources;
use common::progress::Progress;
use serde_json::{Value as Json, json};

/// The notes on these rows under a job whose dataset says this, or the problems.
fn notes(dataset: Json, more: Json, rows: &[Json]) -> Result<Vec<String>, String> {
    let folder = tempfile::tempdir().unwrap();
    let template = support::template_text("chatml_generation");
    support::write_model(folder.path(), Some(&template), "<|im_end|>");
    let data = folder.path().join("data.jsonl");
    let lines: Vec<String> = rows.iter().map(Json::to_string).collect();
    std::fs::write(&data, lines.join("\n")).unwrap();
    let mut entry = json!({"path": data});
    entry
        .as_object_mut()
        .unwrap()
        .extend(dataset.as_object().unwrap().clone());
    let mut job = json!({"base_model": folder.path(), "datasets": [entry], "sequence_len": 64});
    job.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let file = folder.path().join("job.yaml");
    std::fs::write(&file, job.to_string()).unwrap();
    let sources = JobSources {
        file: Some(file),
        ..JobSources::default()
    };
    let job = common::job::load(sources).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    let template = ChatTemplate::load_optional(folder.path()).unwrap();
    let out = folder.path().join("out");
    let prepared = prepare_blocks(
        &job,
        &tokenizer,
        template.as_ref(),
        &out,
        &Progress::default(),
    );
    let dir = format!("{}/", folder.path().display());
    match prepared {
        Ok(prepared) => Ok(prepared
            .counts
            .notes
            .iter()
            .map(|note| note.replace(&dir, ""))
            .collect()),
        Err(errors) => Err(errors.to_string().replace(&dir, "")),
    }
}

fn chat() -> Json {
    json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
}

#[test]
fn a_name_that_no_row_has_is_told() {
    for (dataset, told) in [
        (
            json!({"field_text": "nope"}),
            "data.jsonl: no row has the column `nope`, which field_text names",
        ),
        (
            json!({"field_tools": "functions"}),
            "data.jsonl: no row has the column `functions`, which field_tools names",
        ),
        (
            json!({"field_thinking": "thoughts"}),
            "data.jsonl: no message has the key `thoughts`, which field_thinking names",
        ),
        (
            json!({"message_field_training": "keep"}),
            "data.jsonl: no message has the key `keep`, which message_field_training names",
        ),
        (
            json!({"roles": {"user": ["client"], "tool": ["shell"]}}),
            "data.jsonl: no message has one of the roles `client`, `shell`, which roles names",
        ),
        (
            json!({"roles_to_train": ["assistant", "tool"]}),
            "data.jsonl: no message is of the role `tool`, which roles_to_train names",
        ),
    ] {
        let found = notes(dataset, json!({}), &[chat(), chat()]).unwrap();
        assert!(found.iter().any(|note| note == told), "{told}: {found:?}");
    }
    let met =
        json!({"roles": {"user": ["user", "human"]}, "roles_to_train": ["assistant", "user"]});
    let found = notes(met, json!({}), &[chat()]).unwrap();
    assert!(
        !found.iter().any(|note| note.contains("names")),
        "{found:?}"
    );
}

#[test]
fn a_text_of_the_jobs_own_is_refused_where_no_row_has_a_column_that_it_shows() {
    let row = json!({"instruction": "a", "output": "b"});
    let of = |kind: Json| {
        notes(
            json!({"type": kind}),
            json!({}),
            &[row.clone(), row.clone()],
        )
    };
    for (kind, told) in [
        (
            json!({"format": "Q: {instruction} {input}"}),
            "data.jsonl: no row has the column `input`, which `format` shows: name that column with field_input, or say with \
             no_input_format what rows without one ask",
        ),
        (
            json!({"format": "Q: {input}", "no_input_format": "Q: {instruction}", "field_input": "context"}),
            "data.jsonl: no row has the column `context`, which field_input names",
        ),
        (
            json!({"field_system": "sys"}),
            "data.jsonl: no row has the column `sys`, which field_system names",
        ),
    ] {
        assert_eq!(of(kind).unwrap_err(), told);
    }
    let own = json!({"format": "Q: {instruction} {input}", "no_input_format": "Q: {instruction}"});
    let told = "data.jsonl: no row has the column `input`: each is in the text of no_input_format, and none in that of format";
    let found = of(own).unwrap();
    assert!(found.iter().any(|note| note == told), "{found:?}");
    for fine in [
        json!({"format": "Q: {instruction}"}),
        json!({"system_prompt": "Be kind."}),
    ] {
        of(fine).unwrap();
    }
}

#[test]
fn a_variable_that_the_template_does_not_read_is_told() {
    let more = json!({"chat_template_kwargs": {"enable_thinking": false}});
    let found = notes(json!({}), more, &[chat()]).unwrap();
    let told = "chat_template_kwargs: the chat template does not read `enable_thinking`";
    assert!(found.iter().any(|note| note == told), "{found:?}");
}

#[test]
fn a_column_of_nothing_and_a_role_that_nobody_knows_are_named() {
    let reason = notes(json!({}), json!({}), &[json!({"text": null, "id": 1})]).unwrap_err();
    assert_eq!(
        reason,
        "data.jsonl:1: column `text` is null: write its text, or leave the row out"
    );
    let row = json!({"conversations": [{"from": "human", "value": "a"}, {"from": "wizard", "value": "b"}]});
    let reason = notes(json!({}), json!({}), &[row]).unwrap_err();
    assert_eq!(
        reason,
        "data.jsonl:1: no assistant turn: nothing to learn from; unknown roles: `wizard`: say which role they are with `roles`, as in {assistant: [wizard]}"
    );
}

#[test]
fn the_marks_of_a_template_are_put_aside_where_more_is_asked_than_they_know() {
    let setting = json!({"roles_to_train": ["user", "assistant"]});
    let found = notes(setting, json!({}), &[chat()]).unwrap();
    let told = found
        .iter()
        .any(|note| note.contains("marks of the chat template are not asked"));
    assert!(told, "{found:?}");
}
