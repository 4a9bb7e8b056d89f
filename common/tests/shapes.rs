//! Rows of other programs' shapes become the tokens and labels that those programs make of them. The golden files' scripts stand
//! beside them.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use common::data::example::{Example, ExampleMaker};
use common::data::record::{Met, RecordParser};
use common::data::rows::RawRow;
use common::data::template::{ChatTemplate, Variables};
use common::data::tokenize::{SpecialTokens, Tokenizer};
use common::job::{DatasetKind, DatasetSpec, FieldNames, JobSources};
use serde::Deserialize;
use serde_json::{Value as Json, json};

/// Label of what is not learned.
const IGNORED: i64 = -100;

#[derive(Deserialize)]
struct Case {
    row: Json,
    train_on_inputs: bool,
    input_ids: Vec<i64>,
    labels: Vec<i64>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&root().join("examples/tiny-qwen3")).unwrap()
}

fn spec(kind: DatasetKind) -> DatasetSpec {
    DatasetSpec::new(PathBuf::new(), kind, FieldNames::default())
}

fn example(
    tokenizer: &Tokenizer,
    spec: &DatasetSpec,
    case: &Case,
) -> Result<Example, (u64, String)> {
    let parser = RecordParser {
        spec,
        sharegpt: spec,
        accepts_role: &|_| true,
        train_on_inputs: case.train_on_inputs,
        default_system: None,
        variables: &Variables::default(),
        met: &Met::default(),
    };
    let row = parser.parse(RawRow::Value(1, case.row.to_string().into_bytes()))?;
    let maker = ExampleMaker {
        tokenizer,
        template: None,
        train_on_inputs: case.train_on_inputs,
    };
    let mut examples = maker.examples(&row.record, &mut Vec::new()).unwrap();
    assert_eq!(examples.len(), 1);
    Ok(examples.remove(0))
}

#[test]
fn rows_of_instructions_are_those_of_axolotl() {
    let golden = root().join("common/tests/shapes/alpaca.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let (tokenizer, spec) = (tokenizer(), spec(DatasetKind::Alpaca));
    assert!(cases.len() > 10);
    for case in &cases {
        let made = example(&tokenizer, &spec, case).unwrap();
        let ids: Vec<i64> = made.ids.iter().copied().map(i64::from).collect();
        assert_eq!(ids, case.input_ids, "{}", case.row);
        let labels = made.ids.iter().zip(&made.trained);
        let labels: Vec<i64> = labels
            .map(|(id, trained)| if *trained { i64::from(*id) } else { IGNORED })
            .collect();
        // The first label is never used: nothing predicts the first token.
        assert_eq!(labels[1..], case.labels[1..], "{}", case.row);
        for covered in &made.offsets {
            assert!(made.text.get(covered.clone()).is_some(), "{covered:?}");
        }
    }
}

/// A row of prompts.json and what Axolotl made of it.
#[derive(Deserialize)]
struct Prompt {
    r#type: String,
    /// `type` as a mapping, where it is one.
    defined: Option<Json>,
    tokenizer: String,
    train_on_inputs: bool,
    row: Json,
    input_ids: Vec<u32>,
    learned: String,
}

/// The dataset of a job whose entry has these lines.
fn dataset_of(entry: &str) -> DatasetSpec {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("job.yaml");
    let text = format!("base_model: m\ndatasets:\n- path: a\n{entry}");
    std::fs::write(&file, text).unwrap();
    let sources = JobSources {
        file: Some(file),
        ..JobSources::default()
    };
    let job = common::job::load(sources).unwrap_or_else(|errors| panic!("{entry}: {errors}"));
    job.datasets.into_iter().next().unwrap()
}

#[test]
fn each_type_of_a_fixed_text_is_that_of_axolotl() {
    let golden = root().join("common/tests/shapes/prompts.json");
    let cases: Vec<Prompt> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let tokenizers = [
        ("plain", tokenizer()),
        ("bos", support::tokenizer("<|im_end|>")),
    ];
    let mut types = std::collections::BTreeSet::new();
    for case in &cases {
        let entry = match &case.defined {
            Some(defined) => format!("  type: {defined}\n"),
            None => format!("  type: '{}'\n", case.r#type),
        };
        let spec = dataset_of(&entry);
        let (_, tokenizer) = tokenizers
            .iter()
            .find(|(name, _)| *name == case.tokenizer)
            .unwrap();
        let wanted = Case {
            row: case.row.clone(),
            train_on_inputs: case.train_on_inputs,
            input_ids: Vec::new(),
            labels: Vec::new(),
        };
        let made = example(tokenizer, &spec, &wanted).unwrap();
        let place = format!("{} {entry} {}", case.tokenizer, case.row);
        assert_eq!(made.ids, case.input_ids, "{place}");
        let learned: String = made
            .trained
            .iter()
            .map(|on| if *on { '1' } else { '0' })
            .collect();
        // Nothing predicts the first token, whatever its label is.
        assert_eq!(learned[1..], case.learned[1..], "{place}");
        types.insert(case.r#type.as_str());
    }
    assert!(types.len() > 25, "{types:?}");
}

#[test]
fn rows_of_tokens_are_taken_as_they_are() {
    let read = |row: Json| {
        let case = Case {
            row,
            train_on_inputs: false,
            input_ids: Vec::new(),
            labels: Vec::new(),
        };
        example(&tokenizer(), &spec(DatasetKind::Auto), &case).map_err(|(_, reason)| reason)
    };
    let made = read(json!({
        "input_ids": [9, 9, 5, 6, 7, 9], "labels": [-100, -100, -100, 6, 7, -100],
        "attention_mask": [0, 0, 1, 1, 1, 0], "text": "something else"
    }));
    let made = made.unwrap();
    assert_eq!(
        (made.ids, made.trained),
        (vec![5, 6, 7], vec![false, true, true])
    );
    let masked = read(
        json!({"input_ids": [1, 2, 3, 4], "completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]}),
    );
    assert_eq!(masked.unwrap().trained, [false, false, true, true]);
    for (row, word) in [
        (
            json!({"input_ids": [1, 2], "labels": [-100, 3]}),
            "entry 2 of `labels` is 3, and the token there is 2",
        ),
        (
            json!({"input_ids": [1, 2], "labels": [2]}),
            "`labels` has 1 entries, and `input_ids` 2",
        ),
        (
            json!({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}),
            "only padding at the ends",
        ),
        (
            json!({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}),
            "says that it is padding",
        ),
        (
            json!({"input_ids": [1, -2], "labels": [1, -2]}),
            "-2, which is no token",
        ),
        (json!({"input_ids": [], "labels": []}), "has no tokens"),
        (
            json!({"input_ids": [1.5], "labels": [1]}),
            "no whole number",
        ),
    ] {
        let reason = read(row).unwrap_err();
        assert!(reason.contains(word), "{word}: {reason}");
    }
}

#[test]
fn segments_say_of_themselves_whether_they_are_learned() {
    let read = |row: Json, kind| {
        let case = Case {
            row,
            train_on_inputs: false,
            input_ids: Vec::new(),
            labels: Vec::new(),
        };
        example(&tokenizer(), &spec(kind), &case).map_err(|(_, reason)| reason)
    };
    let row = json!({"segments": [{"label": 0, "text": "a"}, {"label": 1, "text": "b"}]});
    let found = read(row.clone(), DatasetKind::Auto).unwrap();
    assert_eq!(found, read(row, DatasetKind::Segments).unwrap());
    assert_eq!(
        (found.text.as_str(), found.trained.as_slice()),
        ("ab", &[false, true][..])
    );
    for (segments, word) in [
        (json!([]), "has no segments"),
        (json!([{"text": "a"}]), "segment 1: no `label`"),
        (
            json!([{"text": "a", "label": "yes"}]),
            "must be true or false",
        ),
        (
            json!([{"text": "a", "label": true, "weight": 2}]),
            "`weight` is not read",
        ),
        (json!([{"text": null, "label": true}]), "must be a string"),
    ] {
        let reason = read(json!({"segments": segments}), DatasetKind::Segments).unwrap_err();
        assert!(reason.contains(word), "{word}: {reason}");
    }
}

#[test]
fn an_instruction_without_an_answer_column_is_named() {
    let row = |text: &str| Case {
        row: serde_json::from_str(text).unwrap(),
        train_on_inputs: false,
        input_ids: Vec::new(),
        labels: Vec::new(),
    };
    let (tokenizer, mut spec) = (tokenizer(), spec(DatasetKind::Alpaca));
    for (text, expected) in [
        (
            r#"{"instruction": "a"}"#,
            "no column `output`, which `type` of the dataset needs",
        ),
        (
            r#"{"instruction": 5, "output": "b"}"#,
            "column `instruction` must be a string, not a number",
        ),
        (
            r#"{"instruction": "a", "input": ["x"], "output": "b"}"#,
            "column `input` must be a string, not a list",
        ),
    ] {
        let (_, reason) = example(&tokenizer, &spec, &row(text)).unwrap_err();
        assert_eq!(reason, expected);
    }
    let preference = row(r#"{"instruction": "a", "chosen": "b", "rejected": "c"}"#);
    spec.fields.output = "chosen".to_owned();
    let made = example(&tokenizer, &spec, &preference).unwrap();
    assert!(made.text.ends_with("### Response:\nb"));
    spec.fields.instruction = "question".to_owned();
    spec.fields.output = "answer".to_owned();
    let renamed = row(r#"{"question": "a", "answer": "b"}"#);
    let made = example(&tokenizer, &spec, &renamed).unwrap();
    assert!(
        made.text
            .ends_with("### Instruction:\na\n\n### Response:\nb")
    );
}

#[test]
fn a_token_that_the_job_names_must_be_the_tokenizers_own() {
    let tokenizer = tokenizer();
    let named = |tokens: &[(&str, &str)]| {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        tokenizer.differing_tokens(&tokens.iter().map(owned).collect::<Vec<_>>())
    };
    assert_eq!(named(&[("eos_token", "<|im_end|>")]), [""; 0]);
    let differing = named(&[("eos_token", "</s>"), ("bos_token", "<s>")]);
    assert!(differing[0].starts_with(
        "special_tokens.eos_token is </s>, and the tokenizer has <|im_end|>: no token is renamed"
    ));
    assert!(differing[1].contains("bos_token is <s>, and the tokenizer has none"));
}

/// The examples of a row, and what is noted of it, with ChatML as the template.
fn conversation(spec: &DatasetSpec, row: &Json) -> Result<(Vec<Example>, Vec<String>), String> {
    conversation_in("chatml", spec, row)
}

fn conversation_in(
    template: &str,
    spec: &DatasetSpec,
    row: &Json,
) -> Result<(Vec<Example>, Vec<String>), String> {
    let tokenizer = tokenizer();
    let text = common::chat_templates::find(template).unwrap();
    let special = SpecialTokens::load(&root().join("examples/tiny-qwen3")).unwrap();
    let template = ChatTemplate::from_source(text, &special, 0).unwrap();
    let sharegpt = common::data::record::sharegpt::spec(spec);
    let parser = RecordParser {
        spec,
        sharegpt: &sharegpt,
        accepts_role: &|role| template.mentions_role(role),
        train_on_inputs: false,
        default_system: None,
        variables: &Variables::default(),
        met: &Met::default(),
    };
    let raw = RawRow::Value(1, row.to_string().into_bytes());
    let mut row = parser.parse(raw).map_err(|(_, reason)| reason)?;
    let maker = ExampleMaker {
        tokenizer: &tokenizer,
        template: Some(&template),
        train_on_inputs: false,
    };
    let examples = maker.examples(&row.record, &mut row.notes)?;
    Ok((
        examples,
        row.notes.iter().map(|note| format!("{note:?}")).collect(),
    ))
}

/// The example of these messages under the usual names.
fn of_messages(messages: Json) -> Vec<Example> {
    let row = json!({"messages": messages});
    conversation(&spec(DatasetKind::Auto), &row).unwrap().0
}

#[test]
fn instructions_are_the_conversation_that_llama_factory_makes_of_them() {
    let row = json!({
        "instruction": "Translate.", "input": "cat", "output": "chat", "system": "You know French.",
        "history": [["Hello", "Hi"]]
    });
    let (found, _) = conversation(&spec(DatasetKind::Instructions), &row).unwrap();
    let wanted = of_messages(json!([
        {"role": "system", "content": "You know French."},
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Translate.\ncat"}, {"role": "assistant", "content": "chat"}
    ]));
    assert_eq!(found, wanted);
    let row = json!({"instruction": "Say a.", "input": "", "output": "a"});
    let (found, notes) = conversation(&spec(DatasetKind::Auto), &row).unwrap();
    let wanted = of_messages(json!([
        {"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}
    ]));
    assert_eq!(found, wanted);
    assert!(notes.iter().any(|note| note == "Instructions"), "{notes:?}");
    for (row, word) in [
        (
            json!({"instruction": "a", "output": ["b", "c"]}),
            "several answers",
        ),
        (
            json!({"instruction": "", "output": "b"}),
            "an instruction is needed",
        ),
        (json!({"instruction": "a"}), "no column `output`"),
        (
            json!({"instruction": "a", "output": "b", "history": [["c"]]}),
            "entry 1 of `history`",
        ),
    ] {
        let reason = conversation(&spec(DatasetKind::Instructions), &row).unwrap_err();
        assert!(reason.contains(word), "{word}: {reason}");
    }
}

#[test]
fn sharegpt_rows_are_told_by_their_columns() {
    let row = json!({"conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    ]});
    let wanted = of_messages(json!([
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    ]));
    let (found, notes) = conversation(&spec(DatasetKind::Auto), &row).unwrap();
    assert_eq!(found, wanted);
    assert!(
        notes.iter().any(|note| note.contains("human as user")),
        "{notes:?}"
    );
}

#[test]
fn roles_and_thinking_have_the_names_of_the_data() {
    let mut own = spec(DatasetKind::Messages);
    own.roles = vec![
        ("client".to_owned(), "user".to_owned()),
        ("agent".to_owned(), "assistant".to_owned()),
    ];
    let row = json!({"messages": [{"role": "client", "content": "q"}, {"role": "agent", "content": "a"}]});
    let wanted = of_messages(
        json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
    );
    assert_eq!(conversation(&own, &row).unwrap().0, wanted);
    own.fields.thinking = Some(["thoughts".to_owned(), "reasoning_content".to_owned()]);
    let row = json!({"messages": [{"role": "client", "content": "q"}, {"role": "agent", "content": "a", "thoughts": "hm"}]});
    let (_, notes) = conversation(&own, &row).unwrap();
    // The template shows none, and the part is known by what it is.
    assert!(
        notes.iter().any(|note| note.contains("NotShown")),
        "{notes:?}"
    );
}

#[test]
fn a_function_call_of_sharegpt_is_a_call_of_a_tool() {
    let sharegpt = common::data::record::sharegpt::spec(&spec(DatasetKind::Auto));
    let row = |value: &str| {
        json!({"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": value},
            {"from": "observation", "value": "12"}, {"from": "gpt", "value": "a"}
        ]})
    };
    let call = r#"{"name": "f", "arguments": {"x": 1}}"#;
    // ChatML shows no calls, so that the answer would be learned as nothing: refused, by what it is.
    let reason = conversation(&sharegpt, &row(call)).unwrap_err();
    assert!(reason.contains("tool call"), "{reason}");
    for (value, word) in [
        ("not JSON", "is no JSON"),
        ("{\"name\": 1}", "`name` and `arguments`"),
    ] {
        let reason = conversation(&sharegpt, &row(value)).unwrap_err();
        assert!(reason.contains(word), "{word}: {reason}");
    }
}

#[test]
fn two_answers_in_a_row_are_both_learned_as_the_marks_say() {
    let found = of_messages(json!([
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    ]));
    let [example] = &found[..] else {
        panic!("{found:?}")
    };
    let learned = example.trained.iter().filter(|trained| **trained).count();
    // Each answer and its end token.
    assert_eq!(learned, 4, "{example:?}");
}

#[test]
fn an_end_that_is_no_token_of_the_tokenizer_is_followed_by_one_that_is() {
    let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    for template in ["gemma3", "phi_3", "llama4"] {
        let (found, _) = conversation_in(template, &spec(DatasetKind::Messages), &row).unwrap();
        let example = &found[0];
        assert!(example.added_eos, "{template}: {example:?}");
        assert_eq!(
            example.ids.last().copied(),
            tokenizer().eos_id(),
            "{template}"
        );
        assert_eq!(example.trained.last(), Some(&true), "{template}");
        // Nothing that is not learned stands between the answer and its end.
        let first = example.trained.iter().position(|trained| *trained).unwrap();
        assert!(
            example.trained[first..].iter().all(|trained| *trained),
            "{template}"
        );
    }
}

#[test]
fn a_system_message_may_stand_in_a_column_of_its_own() {
    let mut own = spec(DatasetKind::Messages);
    own.fields.system = "rules".to_owned();
    own.has_system_column = true;
    let asked = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    let row = json!({"messages": asked, "rules": "Be brief."});
    let wanted = of_messages(json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    ]));
    assert_eq!(conversation(&own, &row).unwrap().0, wanted);
    let row = json!({"messages": asked, "rules": ""});
    assert_eq!(conversation(&own, &row).unwrap().0, of_messages(asked));
    let both = json!({"text": "t", "instruction": "i", "output": "o"});
    let reason = conversation(&spec(DatasetKind::Auto), &both).unwrap_err();
    assert!(reason.contains("which is trained"), "{reason}");
}
