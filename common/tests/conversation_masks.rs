//! What of conversations is learned, by the settings of a job and by what messages say: the labels are those that Axolotl
//! gives, token by token. The golden file's script stands beside it.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use common::data::example::{Example, ExampleMaker};
use common::data::record::{Met, RecordParser, sharegpt};
use common::data::rows::RawRow;
use common::data::template::{ChatTemplate, Variables};
use common::data::tokenize::{SpecialTokens, Tokenizer};
use common::job::{DatasetSpec, JobSources};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

#[derive(Deserialize)]
struct Golden {
    templates: Map<String, Json>,
    ends: Map<String, Json>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    setting: Json,
    messages: Json,
    input_ids: Vec<u32>,
    learned: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A template with its tokenizer.
struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    eot_tokens: Vec<String>,
}

impl Model {
    fn new(golden: &Golden, name: &str) -> Self {
        let (eos, eot): (String, Option<Vec<String>>) =
            serde_json::from_value(golden.ends[name].clone()).unwrap();
        let mut tokenizer = match name {
            "chatml" => Tokenizer::load(&root().join("examples/tiny-qwen3")).unwrap(),
            _ => support::tokenizer(&eos),
        };
        let eot_tokens = eot.unwrap_or_default();
        assert_eq!(tokenizer.add_end_tokens(&eot_tokens), [""; 0]);
        let special = SpecialTokens::from_pairs([("eos_token", eos.as_str())]);
        let source = golden.templates[name].as_str().unwrap();
        Self {
            tokenizer,
            template: ChatTemplate::from_source(source, &special, 0).unwrap(),
            eot_tokens,
        }
    }

    fn examples(&self, setting: &Json, row: &Json) -> Result<(Vec<Example>, Vec<String>), String> {
        let spec = self.dataset(setting);
        let parser = RecordParser {
            sharegpt: &sharegpt::spec(&spec),
            spec: &spec,
            accepts_role: &|role| self.template.mentions_role(role),
            train_on_inputs: false,
            default_system: None,
            variables: &Variables::default(),
            met: &Met::default(),
        };
        let raw = RawRow::Value(1, row.to_string().into_bytes());
        let mut row = parser.parse(raw).map_err(|(_, reason)| reason)?;
        let maker = ExampleMaker {
            tokenizer: &self.tokenizer,
            template: Some(&self.template),
            train_on_inputs: false,
        };
        let examples = maker.examples(&row.record, &mut row.notes)?;
        let notes = row.notes.iter().map(|note| format!("{note:?}"));
        Ok((examples, notes.collect()))
    }

    /// The dataset of a job whose entry says this.
    fn dataset(&self, setting: &Json) -> DatasetSpec {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("job.yaml");
        let mut entry = json!({"path": "a", "type": "chat_template"});
        let fields = entry.as_object_mut().unwrap();
        fields.extend(setting.as_object().unwrap().clone());
        let mut job = json!({"base_model": "m", "datasets": [entry]});
        if !self.eot_tokens.is_empty() {
            job["eot_tokens"] = json!(self.eot_tokens);
        }
        std::fs::write(&file, job.to_string()).unwrap();
        let sources = JobSources {
            file: Some(file),
            ..JobSources::default()
        };
        let job = common::job::load(sources).unwrap_or_else(|errors| panic!("{setting}: {errors}"));
        job.datasets.into_iter().next().unwrap()
    }
}

fn golden() -> Golden {
    let file = root().join("common/tests/shapes/masks.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn learned(example: &Example) -> String {
    let trained = example.trained.iter();
    trained.map(|on| if *on { '1' } else { '0' }).collect()
}

#[test]
fn the_labels_of_conversations_are_those_of_axolotl() {
    let golden = golden();
    let mut wrong = Vec::new();
    for case in &golden.cases {
        let model = Model::new(&golden, &case.template);
        let row = json!({"messages": case.messages});
        let place = format!("{} {} {}", case.template, case.setting, case.messages);
        let (examples, _) = model
            .examples(&case.setting, &row)
            .unwrap_or_else(|reason| panic!("{place}: {reason}"));
        let [example] = &examples[..] else {
            panic!("{place}: {} examples", examples.len())
        };
        assert_eq!(example.ids, case.input_ids, "{place}");
        let (found, wanted) = (learned(example), &case.learned);
        // Nothing predicts the first token, whatever its label is.
        if found[1..] != wanted[1..] {
            wrong.push(format!("{place}\n  found {found}\n  wanted {wanted}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        golden.cases.len(),
        wrong.join("\n")
    );
    assert!(golden.cases.len() > 90);
}

/// What is learned of these messages in ChatML-like text, each stretch as text.
fn stretches(
    name: &str,
    setting: Json,
    messages: Json,
) -> Result<(Vec<Vec<String>>, Vec<String>), String> {
    let golden = golden();
    let model = Model::new(&golden, name);
    let (examples, notes) = model.examples(&setting, &json!({"messages": messages}))?;
    let of = |example: &Example| {
        let pairs: Vec<(u32, bool)> = example
            .ids
            .iter()
            .copied()
            .zip(example.trained.iter().copied())
            .collect();
        let runs = pairs
            .chunk_by(|one, other| one.1 == other.1)
            .filter(|run| run[0].1);
        runs.map(|run| {
            let ids: Vec<u32> = run.iter().map(|(id, _)| *id).collect();
            model.tokenizer.decode(&ids).unwrap()
        })
        .collect()
    };
    Ok((examples.iter().map(of).collect(), notes))
}

fn said(role: &str, content: Json) -> Json {
    json!({"role": role, "content": content})
}

#[test]
fn a_message_of_any_role_is_learned_where_it_says_so() {
    let (found, _) = stretches(
        "chatml",
        json!({}),
        json!([{"role": "user", "content": "ask this", "train": true}, said("assistant", json!("ok"))]),
    )
    .unwrap();
    assert_eq!(found, [["ask this<|im_end|>", "ok<|im_end|>"]]);
    let history = json!([
        said("user", json!("a")),
        said("assistant", json!("b")),
        said("user", json!("c")),
        said("assistant", json!("d"))
    ]);
    let golden = golden();
    let model = Model::new(&golden, "chatml");
    let mut spec = model.dataset(&json!({}));
    spec.mask.last_only = true;
    let parser = RecordParser {
        sharegpt: &spec,
        spec: &spec,
        accepts_role: &|_| true,
        train_on_inputs: false,
        default_system: None,
        variables: &Variables::default(),
        met: &Met::default(),
    };
    let raw = RawRow::Value(1, json!({"messages": history}).to_string().into_bytes());
    let common::data::record::Record::Conversation(chat) = parser.parse(raw).unwrap().record else {
        panic!("a conversation")
    };
    assert_eq!(chat.learned, [false, false, false, true]);
}

#[test]
fn parts_of_reasoning_and_of_what_follows_are_learned_by_themselves() {
    let golden = golden();
    let special = SpecialTokens::from_pairs([("eos_token", "<|im_end|>")]);
    let source = [
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}",
        "{%- if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}",
        "{{- m.content }}<|im_end|>{% endfor %}",
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ]
    .concat();
    let model = Model {
        template: ChatTemplate::from_source(&source, &special, 0).unwrap(),
        ..Model::new(&golden, "chatml")
    };
    let part = |text: &str, train: bool| json!({"type": "text", "text": text, "train": train});
    let thought = json!([part("wrong", false), part(" right", true)]);
    let answer = json!([part("no", false), part(" yes", true)]);
    let last = json!({"role": "assistant", "reasoning_content": thought, "content": answer});
    // The first answer has no thinking once the conversation goes on, so that it is learned in a text of its own.
    let row = json!({"messages": [said("user", json!("q")), last, said("user", json!("r")), last]});
    let (examples, _) = model.examples(&json!({}), &row).unwrap();
    assert_eq!(examples.len(), 2);
    for example in &examples {
        let ids = example.ids.iter().zip(&example.trained);
        let ids: Vec<u32> = ids.filter(|(_, on)| **on).map(|(id, _)| *id).collect();
        assert_eq!(
            model.tokenizer.decode(&ids).unwrap(),
            " right yes<|im_end|>"
        );
    }
}

#[test]
fn a_mask_that_cannot_be_exact_is_refused() {
    let ranges = |begin: usize, end: usize| json!([said("user", json!("q")), {"role": "assistant", "content": "abc", "spans": [{"begin_offset": begin, "end_offset": end, "train": true}]}]);
    let detail = json!({"message_field_training_detail": "spans"});
    for (setting, messages, word) in [
        (detail.clone(), ranges(2, 1), "characters 2 to 1"),
        (detail.clone(), ranges(3, 4), "and the text has 3"),
        (
            json!({}),
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "training_detail": [1]}]),
            "message_field_training_detail",
        ),
        (
            detail.clone(),
            json!([said("user", json!("q")), {"role": "assistant", "content": "abc", "spans": "all"}]),
            "must be a list of ranges",
        ),
        (
            detail,
            json!([said("user", json!("q")), {"role": "assistant", "content": [{"type": "text", "text": "a", "train": true}], "spans": [{"begin_offset": 0, "end_offset": 0, "train": true}]}]),
            "which is no string",
        ),
        (
            json!({"roles_to_train": ["critic"]}),
            json!([said("user", json!("q")), said("assistant", json!("a"))]),
            "no critic turn",
        ),
        (
            json!({"type": "sharegpt"}),
            json!([said("user", json!("q"))]),
            "no column `conversations`",
        ),
    ] {
        let reason = stretches("chatml", setting, messages).unwrap_err();
        assert!(reason.contains(word), "{word}: {reason}");
    }
    // A template that changes what a message says hides where its parts are.
    let golden = golden();
    let special = SpecialTokens::from_pairs([("eos_token", "<|im_end|>")]);
    let source = "{%- for m in messages %}<|im_start|>{{ m.role + '\n' + m.content | upper }}<|im_end|>{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let model = Model {
        template: ChatTemplate::from_source(source, &special, 0).unwrap(),
        ..Model::new(&golden, "chatml")
    };
    let parts = json!([{"type": "text", "text": "a", "train": false}, {"type": "text", "text": "b", "train": true}]);
    let row = json!({"messages": [said("user", json!("q")), said("assistant", parts)]});
    let reason = model.examples(&json!({}), &row).unwrap_err();
    assert!(
        reason.contains("does not show the text of message 2 as it is"),
        "{reason}"
    );
}

#[test]
fn no_roles_and_no_message_that_says_so_learn_nothing_and_tell_it() {
    let messages = json!([said("user", json!("q")), said("assistant", json!("a"))]);
    let (found, notes) = stretches("chatml", json!({"roles_to_train": []}), messages).unwrap();
    assert_eq!(found, [[""; 0]]);
    assert!(notes.contains(&"NothingLearned".to_owned()), "{notes:?}");
}

#[test]
fn white_space_at_the_ends_of_a_message_is_learned_where_the_template_shows_it() {
    let golden = golden();
    let special = SpecialTokens::from_pairs([("eos_token", "<|im_end|>")]);
    // What the assistant says is trimmed, and what others say is not.
    let source = [
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}",
        "{{- (m.content | trim) if m.role == 'assistant' else m.content }}<|im_end|>{% endfor %}",
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ]
    .concat();
    let model = Model {
        template: ChatTemplate::from_source(&source, &special, 0).unwrap(),
        ..Model::new(&golden, "chatml")
    };
    let row = json!({"messages": [said("user", json!("\n ask  ")), said("assistant", json!("  tell \n"))]});
    let setting = json!({"roles_to_train": ["user", "assistant"]});
    let (examples, _) = model.examples(&setting, &row).unwrap();
    let ids = examples[0].ids.iter().zip(&examples[0].trained);
    let ids: Vec<u32> = ids.filter(|(_, on)| **on).map(|(id, _)| *id).collect();
    assert_eq!(
        model.tokenizer.decode(&ids).unwrap(),
        "\n ask  <|im_end|>tell<|im_end|>"
    );
}
