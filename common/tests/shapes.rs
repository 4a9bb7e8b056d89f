//! Rows of other programs' shapes become the tokens and labels that those programs make of them. The golden files' scripts stand
//! beside them.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use common::data::example::{Example, ExampleMaker};
use common::data::record::RecordParser;
use common::data::rows::RawRow;
use common::data::template::Variables;
use common::data::tokenize::Tokenizer;
use common::job::{DatasetKind, DatasetSpec, FieldNames};
use serde::Deserialize;
use serde_json::Value as Json;

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
            "no column `output`, which `type: alpaca` needs",
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
