//! Rows of a dataset become blocks, or every row that cannot be used is named.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use common::data::block::Block;
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::data::{DataErrors, PreparedData, origins, prepare_blocks, prune_blocks, samples};
use common::job::{
    DatasetKind, DatasetSpec, ExcessLength, FieldNames, JobSources, JobSpec, ValSetSize,
};
use common::progress::Progress;
use support::{template_text, write_model};

struct Setup {
    folder: tempfile::TempDir,
    job: JobSpec,
}

impl Setup {
    /// A job on these rows, in blocks of 32 tokens.
    fn new(rows: &str) -> Self {
        Self::with_template(rows, Some("chatml_generation"))
    }

    fn with_template(rows: &str, template: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = template.map(template_text);
        write_model(folder.path(), text.as_deref(), "<|im_end|>");
        let data = folder.path().join("data.jsonl");
        std::fs::write(&data, rows).unwrap();
        let flag = |name: &str, value: &Path| (name.to_owned(), value.display().to_string());
        let mut job = common::job::load(JobSources {
            flags: vec![
                flag("base_model", folder.path()),
                flag("dataset", &data),
                flag("output_dir", &folder.path().join("out")),
                ("sequence_len".to_owned(), "32".to_owned()),
            ],
            ..JobSources::default()
        })
        .unwrap();
        job.datasets = vec![DatasetSpec::new(
            data,
            DatasetKind::Auto,
            FieldNames::default(),
        )];
        Self { folder, job }
    }

    fn parts(&self) -> (Tokenizer, Option<ChatTemplate>) {
        (
            Tokenizer::load(self.folder.path()).unwrap(),
            ChatTemplate::load_optional(self.folder.path()).unwrap(),
        )
    }

    fn prepare(&self) -> Result<PreparedData, DataErrors> {
        let (tokenizer, template) = self.parts();
        let out = self.folder.path().join("out/.muster");
        prepare_blocks(
            &self.job,
            &tokenizer,
            template.as_ref(),
            &out,
            &Progress::default(),
        )
    }

    fn problems(&self) -> Vec<String> {
        let errors = self.prepare().unwrap_err();
        let dir = format!("{}/", self.folder.path().display());
        errors
            .problems
            .iter()
            .map(|problem| problem.to_string().replace(&dir, ""))
            .collect()
    }
}

fn blocks(data: &PreparedData) -> Vec<Block> {
    (0..data.file.total_blocks())
        .map(|block| {
            let bytes = data.file.block_bytes(block).unwrap();
            Block::decode(bytes, data.file.sequence_len()).unwrap()
        })
        .collect()
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}"#;

#[test]
fn every_kind_of_row_is_packed_with_segments_that_restart() {
    let rows = format!(
        "{CHAT}\n\n{}\n{}\n",
        r#"{"prompt": "12", "completion": "ok"}"#, r#"{"text": "hello hello"}"#
    );
    let setup = Setup::new(&rows);
    let data = setup.prepare().unwrap();
    let counts = &data.counts;
    assert_eq!((counts.rows, counts.examples), (3, 3));
    assert_eq!(
        counts.tokens + counts.padding_tokens,
        counts.blocks * setup.job.sequence_len as u64
    );
    let blocks = blocks(&data);
    let trained: u64 = blocks.iter().map(Block::trained_tokens).sum();
    assert_eq!(trained, counts.trained_tokens);
    assert_eq!(
        (0..counts.blocks)
            .map(|block| data.file.trained_tokens(block))
            .sum::<u64>(),
        trained
    );
    let used: u64 = (0..counts.blocks).map(|b| data.file.used_tokens(b)).sum();
    assert_eq!(used, counts.tokens);
    let last_segment: u16 = blocks
        .iter()
        .map(|block| *block.segments.iter().max().unwrap())
        .sum();
    assert_eq!(last_segment, 3);
    let squares = blocks.iter().flat_map(|block| {
        let of = |segment| block.segments.iter().filter(|s| **s == segment).count() as u64;
        (1..=3).map(move |segment| of(segment).pow(2))
    });
    assert_eq!(squares.sum::<u64>(), counts.squared_tokens);
}

#[test]
fn every_row_that_cannot_be_used_is_named_with_its_line() {
    let rows = [
        CHAT,
        r#"{"messages": [{"role": "user", "content": "hi"}"#,
        r#"{"mesages": []}"#,
        r#"{"messages": []}"#,
        r#"{"messages": [{"role": "usr", "content": "hi"}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"messages": [{"role": "human", "content": "hi"}]}"#,
        r#"{"messages": [{"role": "user", "content": "hi"}]}"#,
        r#"{"messages": [{"role": "user", "text": "hi"}]}"#,
        r#"{"messages": "hi"}"#,
        r#"{"prompt": "a"}"#,
        r#"{"prompt": "a", "completion": []}"#,
        r#"{"text": 5}"#,
        r#"{"text": ""}"#,
        "[1, 2]",
        r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 5}]}"#,
        r#"{"prompt": "a", "completion": "b", "text": "ab"}"#,
    ]
    .join("\n");
    assert_eq!(
        Setup::new(&rows).problems(),
        [
            "data.jsonl:2: broken JSON: EOF while parsing a list (column 47)",
            "data.jsonl:3: no column `messages`, `prompt` and `completion`, or `text`; found `mesages` (did you mean `mesages`?)",
            "data.jsonl:4: column `messages` has no messages",
            "data.jsonl:5: message 1 of `messages`: unknown role `usr` (did you mean `user`?)",
            "data.jsonl:6: no assistant turn: nothing to learn from (2 rows; also line 7)",
            "data.jsonl:8: message 1 of `messages`: no `content`; found `role`, `text`",
            "data.jsonl:9: column `messages` must be a list of messages, not a string",
            "data.jsonl:10: no column `completion`; found `prompt`",
            "data.jsonl:11: `prompt` and `completion` must both be strings or both lists of messages, not a string and a list",
            "data.jsonl:12: column `text` must be a string, not a number",
            "data.jsonl:13: column `text` is empty",
            "data.jsonl:14: a row must be a JSON object, not a list",
            "data.jsonl:15: message 2 of `messages`: `content` must be a string or a list of parts, not a number",
            "data.jsonl:16: has `completion` and `text`: say with `type: prompt_completion` or `type: text` which is trained",
        ]
    );
}

fn row(messages: &str, more: &str) -> String {
    format!("{{\"messages\": {messages}{more}}}")
}

const TURNS: &str =
    r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]"#;

/// Why a row cannot be used.
fn reason(row: &str) -> String {
    let problems = Setup::new(&format!("{CHAT}\n{row}\n")).problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0]
        .strip_prefix("data.jsonl:2: ")
        .unwrap()
        .to_owned()
}

#[test]
fn rows_that_ask_for_another_method_are_refused_by_name() {
    for (more, word) in [
        (
            r#", "label": false"#,
            "`label`, which says whether the answer is good",
        ),
        (r#", "label": 1"#, "`label`"),
        (r#", "kto_tag": true"#, "`kto_tag`"),
        (r#", "label": "bad""#, "`label`, which says"),
        (r#", "label": "Thumbs down""#, "`label`, which says"),
        (
            r#", "label": "poem", "label": "poem""#,
            "the key `label` stands twice",
        ),
        (
            r#", "tools": [{"type": "function", "most": 123456789012345678901}]"#,
            "column `tools` holds 123456789012345678901, an integer beyond 64 bits",
        ),
        (
            r#", "tools": "[{\"a\": 1, \"a\": 2}]""#,
            "column `tools`: the key `a` stands twice",
        ),
        (
            r#", "rejected": [{"role": "assistant", "content": "no"}]"#,
            "`rejected`",
        ),
        (r#", "rejected_response": "no""#, "`rejected_response`"),
        (r#", "images": ["a.png"]"#, "`images`: only text"),
        (r#", "weight": 0.5"#, "`weight`: 0.5"),
        (
            r#", "completion": "b""#,
            "`type: messages` or `type: prompt_completion`",
        ),
    ] {
        let reason = reason(&row(TURNS, more));
        assert!(reason.contains(word), "{word}: {reason}");
    }
    let weight = reason(r#"{"text": "a b c", "weight": 0}"#);
    assert!(weight.contains("whole rows are not weighed"), "{weight}");
    let kto = reason(r#"{"prompt": "a", "completion": "b", "label": false}"#);
    assert!(
        kto.contains("bad answers would be trained as good ones"),
        "{kto}"
    );
    let dpo = reason(r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#);
    assert!(dpo.contains("field_completion: chosen"), "{dpo}");
    let tokens = row(TURNS, r#", "input_ids": [1, 2], "labels": [1, 2]"#);
    let mut setup = Setup::new(&tokens);
    assert_eq!(setup.prepare().unwrap().samples[0].input_ids, [1, 2]);
    // Tokens go before what they were made of, unless the job says that this is meant.
    setup.job.datasets[0].kind = DatasetKind::Messages;
    let tokens = setup.problems().remove(0);
    assert!(
        tokens.contains("`input_ids`, of a row that is tokenised already"),
        "{tokens}"
    );
    let instruction = reason(r#"{"instruction": "a", "response": "b"}"#);
    assert!(instruction.contains("field_output"), "{instruction}");
}

#[test]
fn a_column_of_answers_that_the_job_names_is_read() {
    let mut setup = Setup::new(r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#);
    setup.job.datasets[0].fields.completion = "chosen".into();
    let data = setup.prepare().unwrap();
    assert_eq!(data.counts.notes.len(), 1);
    assert!(data.counts.notes[0].ends_with("columns that are not read: `rejected` (1 row)"));
}

#[test]
fn what_a_row_has_beside_what_is_read_is_told_once() {
    let rows = [
        row(TURNS, r#", "id": 1, "score": NaN, "source": null"#),
        row(TURNS, r#", "id": 2, "label": "poem""#),
        row(
            r#"[{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y", "mood": "glad"}]"#,
            "",
        ),
    ];
    let setup = Setup::new(&rows.join("\n"));
    let expected = [
        "data.jsonl:1: columns that are not read: `id` (2 rows), `label` (1 row), `score` (1 row)",
        "data.jsonl:3: keys of messages that the chat template does not read: `mood` (1 row)",
        "data.jsonl:3: roles given to the chat template as they are: `developer` (1 row)",
    ];
    let dir = format!("{}/", setup.folder.path().display());
    for _ in 0..2 {
        // Made, then read again from the block file.
        let notes = setup.prepare().unwrap().counts.notes;
        let marks = notes.last().unwrap();
        assert!(
            marks.contains("marks with {% generation %} (3 rows)"),
            "{marks}"
        );
        let notes: Vec<String> = notes.iter().map(|note| note.replace(&dir, "")).collect();
        assert_eq!(notes[..3], expected);
    }
}

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
fn tools_are_objects_or_none() {
    for tools in [r#""null""#, r#""""#, "null", r#""[]""#] {
        let setup = Setup::new(&row(TURNS, &format!(", \"tools\": {tools}")));
        setup.prepare().unwrap();
    }
    let strings = reason(&row(TURNS, r#", "tools": ["{\"name\": \"f\"}"]"#));
    assert!(
        strings.contains("tool 1 of column `tools` is a string"),
        "{strings}"
    );
}

#[test]
fn numbers_that_json_has_not_matter_only_where_they_are_read() {
    let reason = reason(r#"{"text": NaN}"#);
    assert!(reason.contains("column `text` holds NaN"), "{reason}");
    let setup = Setup::new(r#"{"text": "NaN", "score": -Infinity}"#);
    assert_eq!(setup.prepare().unwrap().counts.rows, 1);
}

#[test]
fn null_content_is_an_answer_only_beside_a_tool_call() {
    let null = reason(&row(
        r#"[{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]"#,
        "",
    ));
    assert!(
        null.contains("message 2") && null.contains("is null"),
        "{null}"
    );
    let old = r#"[{"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}]"#;
    assert!(reason(&row(old, "")).contains("`tool_calls`"));
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
fn rows_over_several_lines_are_read() {
    let spread = CHAT.replace(", ", ",\n  ").replace('{', "{\n");
    let setup = Setup::new(&format!("{spread}\n{spread}\n{{\"a\":\n1}}"));
    let problems = setup.problems();
    assert_eq!(problems.len(), 1);
    let line = 1 + 2 * spread.split('\n').count();
    assert!(
        problems[0].starts_with(&format!("data.jsonl:{line}: no column")),
        "{problems:?}"
    );
}

#[test]
fn files_that_are_no_rows_are_called_what_they_are() {
    let setup = Setup::new("");
    let path = &setup.job.datasets[0].path;
    for (bytes, word) in [
        (&b"\x1f\x8b\x08"[..], "gzip data is cut off"),
        (b"PAR1....", "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"%PDF-1.7\n", "PDF"),
    ] {
        std::fs::write(path, bytes).unwrap();
        let problems = setup.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains(word), "{problems:?}");
    }
    let mut setup = Setup::new("");
    setup.job.datasets[0].path = setup.folder.path().join("nobody/no_robots");
    assert!(setup.problems()[0].contains("no such file"));
    setup.job.datasets[0].path = setup.folder.path().to_owned();
    assert!(setup.problems()[0].contains("is a folder: name a file in it"));
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
fn a_row_that_is_not_utf8_is_called_that() {
    let setup = Setup::new("");
    let mut bytes = CHAT.as_bytes().to_vec();
    bytes.extend(b"\n{\"text\": \"caf\xe9\"}\n");
    std::fs::write(&setup.job.datasets[0].path, bytes).unwrap();
    assert_eq!(
        setup.problems(),
        [
            "data.jsonl:2: not UTF-8 at byte 107 of the file (0xe9): save the file as UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8`, if it is from Windows)"
        ]
    );
}

#[test]
fn many_rows_with_the_same_problem_are_one_line() {
    let setup = Setup::new(&format!("{CHAT}\n{}", "{\"txt\": 1}\n".repeat(50)));
    let errors = setup.prepare().unwrap_err();
    assert_eq!((errors.problems.len(), errors.total), (1, 50));
    let text = errors.to_string();
    assert!(text.contains("data.jsonl:2: no column"), "{text}");
    assert!(
        text.ends_with(" (50 rows; also line 3, 4, 5, 6, 7, 8, 9, 10, ...)"),
        "{text}"
    );
}

#[test]
fn many_different_problems_are_counted() {
    let rows: String = (0..50).map(|n| format!("{{\"column{n}\": 1}}\n")).collect();
    let errors = Setup::new(&rows).prepare().unwrap_err();
    assert_eq!((errors.problems.len(), errors.total), (20, 50));
    let text = errors.to_string();
    assert!(text.ends_with("... and 30 more rows that cannot be used"));
}

#[test]
fn a_named_kind_asks_for_its_column() {
    let mut setup = Setup::new("{\"conversation\": [], \"id\": 1}\n");
    setup.job.datasets[0].kind = DatasetKind::Messages;
    assert_eq!(
        setup.problems(),
        ["data.jsonl:1: no column `messages`; found `conversation`, `id`"]
    );
}

#[test]
fn columns_and_message_fields_can_have_other_names() {
    let row =
        r#"{"dialog": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]}"#;
    let mut setup = Setup::new(row);
    let fields = &mut setup.job.datasets[0].fields;
    fields.messages = "dialog".into();
    fields.role = "from".into();
    fields.content = "value".into();
    let renamed = setup.prepare().unwrap();
    assert_eq!(
        renamed.samples[0].text,
        Setup::new(CHAT).prepare().unwrap().samples[0].text
    );
}

#[test]
fn missing_and_empty_files_are_named() {
    let mut setup = Setup::new("");
    assert_eq!(setup.problems(), ["data.jsonl: the dataset is empty"]);
    std::fs::write(&setup.job.datasets[0].path, "\n \n").unwrap();
    assert_eq!(
        setup.problems(),
        ["data.jsonl: the dataset is empty: it has no rows"]
    );
    let path = &mut setup.job.datasets[0].path;
    *path = path.with_file_name("none.jsonl");
    assert_eq!(setup.problems(), ["none.jsonl: no such file"]);
}

#[test]
fn a_slice_beyond_the_file_says_how_many_rows_there_are() {
    let mut setup = Setup::new(&format!("{CHAT}\n{CHAT}\n{CHAT}"));
    for (split, asked) in [("train[3:5]", "train[3:5]"), ("train[7:]", "train[7:]")] {
        setup.job.datasets[0].split = Some(split.into());
        let expected = format!(
            "data.jsonl: split {asked} asks for rows that are not there: the file has 3 rows (numbered from 0)"
        );
        assert_eq!(setup.problems(), [expected]);
    }
    let notes = |setup: &Setup| {
        let counts = setup.prepare().unwrap().counts;
        let notes = counts.notes.into_iter();
        let notes = notes.filter(|note| note.contains("split"));
        (counts.rows, notes.collect::<Vec<_>>())
    };
    setup.job.datasets[0].split = Some("train[1:5]".into());
    let (rows, told) = notes(&setup);
    assert_eq!((rows, told.len()), (2, 1));
    let said = "split train[1:5] ends beyond the file, which has 3 rows: 2 rows taken";
    assert!(told[0].ends_with(said), "{told:?}");
    for whole in ["train[1:3]", "train[2:]", "train"] {
        setup.job.datasets[0].split = Some(whole.into());
        assert!(notes(&setup).1.is_empty(), "{whole}");
    }
}

#[test]
fn answers_that_are_all_left_out_are_no_empty_answers() {
    let left_out = row(
        r#"[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]"#,
        "",
    );
    let of = |rows: &str| Setup::new(rows).problems().join("; ");
    let all = of(&format!("{left_out}\n{left_out}"));
    assert!(
        all.contains("answers say that they are not learned") && all.ends_with("in all of 2 rows"),
        "{all}"
    );
}

#[test]
fn what_left_everything_out_is_named_with_its_counts() {
    let rows = format!("{CHAT}\n{CHAT}\n{{\"text\": \"ab\"}}\n");
    let of = |change: &dyn Fn(&mut JobSpec)| {
        let mut setup = Setup::new(&rows);
        change(&mut setup.job);
        setup.problems().join("; ")
    };
    let short = of(&|job| job.mixture.min_sample_len = 100);
    assert_eq!(
        short,
        "nothing to learn: no example is left: of 3 rows, 3 examples are shorter than min_sample_len 100"
    );
    // Whatever else would find nothing then.
    let held_out = of(&|job| {
        job.mixture.min_sample_len = 100;
        job.val_set_size = ValSetSize::Examples(1);
    });
    assert_eq!(held_out, short);
    let both = of(&|job| {
        job.mixture.min_sample_len = 5;
        job.sequence_len = 4;
        job.excess_length_strategy = ExcessLength::Drop;
        job.mixture.deduplicate = true;
    });
    assert_eq!(
        both,
        "nothing to learn: the training data has no trained token: of 3 rows, 1 example is shorter than min_sample_len 5, 1 row was there \
         before (dataset_exact_deduplication), 1 example is longer than sequence_len 4 (excess_length_strategy: drop)"
    );
    let mut unmarked = Setup::new(&format!("{CHAT}\n{CHAT}\n"));
    unmarked.job.datasets[0].mask.roles = Some(Vec::new());
    assert_eq!(
        unmarked.problems().join("; "),
        "nothing to learn: the training data has no trained token: of 2 rows, 2 rows mark nothing as learned (roles_to_train: [] learns only \
         messages that say so)"
    );
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
fn a_json_array_is_read_as_rows() {
    let setup = Setup::new(&format!("[\n{CHAT},\n{CHAT}]"));
    assert_eq!(setup.prepare().unwrap().counts.rows, 2);
    let setup = Setup::new(&format!("[{CHAT}, {{\"a\": 1}}]"));
    assert!(setup.problems()[0].starts_with("data.jsonl: row 2: no column"));
}

#[test]
fn long_examples_become_what_the_job_says() {
    let rows = format!(
        "{{\"text\": \"{}\"}}\n{{\"text\": \"ab\"}}\n",
        "ab".repeat(40)
    );
    let of = |strategy: ExcessLength| {
        let mut setup = Setup::new(&rows);
        setup.job.excess_length_strategy = strategy;
        setup.prepare().map(|data| data.counts)
    };
    let split = of(ExcessLength::Split).unwrap();
    let dropped = of(ExcessLength::Drop).unwrap();
    let cut = of(ExcessLength::Truncate).unwrap();
    assert_eq!((split.split_examples, split.excess_tokens), (1, 0));
    assert_eq!(dropped.dropped_examples, 1);
    assert_eq!(dropped.excess_tokens, split.longest);
    assert_eq!(cut.truncated_examples, 1);
    assert_eq!(cut.excess_tokens, split.longest - 32);
    // What is kept and what is lost make up the data.
    for counts in [&dropped, &cut] {
        let rest = counts.tokens + counts.excess_tokens + counts.untrained_tokens;
        assert_eq!(rest, split.longest + dropped.tokens, "{counts:?}");
    }
    assert!(
        cut.cut_notice(32)
            .unwrap()
            .contains("cut off behind sequence_len 32: 1 example")
    );
    let refused = of(ExcessLength::Raise).unwrap_err().to_string();
    assert!(
        refused.contains("1 example is longer than sequence_len 32")
            && refused.contains("data.jsonl:1"),
        "{refused}"
    );
}

#[test]
fn long_examples_are_cut_and_nothing_is_dropped() {
    let text: String = (0..70)
        .map(|n| if n % 2 == 0 { 'a' } else { 'b' })
        .collect();
    let mut setup = Setup::new(&format!(
        "{{\"text\": \"{text}\"}}\n{{\"text\": \"hello\"}}"
    ));
    for packing in [true, false] {
        setup.job.sample_packing = packing;
        let data = setup.prepare().unwrap();
        assert_eq!((data.counts.split_examples, data.counts.longest), (1, 72));
        // <s>, 70 letters, end, of which two begin a piece again; <s>, hello, end.
        assert_eq!(data.counts.tokens, 72 + 2 + 3);
        // All but the first token of each example.
        assert_eq!(data.counts.trained_tokens, 75 - 2);
        assert_eq!(data.counts.blocks, if packing { 3 } else { 4 });
        let all: Vec<u32> = blocks(&data)
            .iter()
            .flat_map(|block| block.tokens[..block.used_len()].to_vec())
            .collect();
        assert_eq!(all.len(), 77);
        let sample = &data.samples[0];
        assert_eq!(
            sample.labels.iter().filter(|label| **label == -100).count(),
            1
        );
    }
    for sequence_len in [2, 3, 71, 72, 73] {
        setup.job.sequence_len = sequence_len;
        let counts = setup.prepare().unwrap().counts;
        assert_eq!(counts.trained_tokens, 75 - 2, "{sequence_len}");
    }
}

#[test]
fn the_rows_in_a_block_are_found_again() {
    let text: String = (0..70)
        .map(|n| if n % 2 == 0 { 'a' } else { 'b' })
        .collect();
    let mut setup = Setup::new(&format!(
        "{{\"text\": \"{text}\"}}\n\n{{\"text\": \"hello\"}}\n{CHAT}\n"
    ));
    for packing in [true, false] {
        setup.job.sample_packing = packing;
        let data = setup.prepare().unwrap();
        let (tokenizer, template) = setup.parts();
        let lines = |blocks: &[u64]| -> Vec<u64> {
            let template = template.as_ref();
            let found = origins(&setup.job, &tokenizer, template, &data.file, blocks).unwrap();
            let file = &setup.job.datasets[0].path;
            assert!(found.iter().all(|origin| origin.file == *file));
            found.iter().map(|origin| origin.line).collect()
        };
        let every: Vec<u64> = (0..data.counts.blocks).collect();
        assert_eq!(lines(&every), [1, 3, 4]);
        assert_eq!(lines(&[0]), [1], "the first piece fills a block");
        assert_eq!(lines(&[]), [0; 0]);
        let each: Vec<Vec<u64>> = every.iter().map(|block| lines(&[*block])).collect();
        let holds = |line: u64| each.iter().filter(|lines| lines.contains(&line)).count();
        assert_eq!([holds(1), holds(3), holds(4)], [3, 1, 1], "{each:?}");
    }
}

#[test]
fn pieces_with_nothing_to_learn_are_left_out_and_counted() {
    let prompt = "x ".repeat(40);
    let setup = Setup::new(&format!(
        "{{\"prompt\": \"{prompt}\", \"completion\": \"ok\"}}"
    ));
    let data = setup.prepare().unwrap();
    assert_eq!(data.counts.untrained_pieces, 2);
    assert_eq!(data.counts.untrained_tokens, 62);
    assert_eq!(data.counts.blocks, 1);
}

#[test]
fn nothing_to_learn_in_the_whole_set_is_an_error() {
    let setup = Setup::new(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}",
    );
    std::fs::write(
        setup.folder.path().join("tokenizer_config.json"),
        r#"{"eos_token": "</s>", "chat_template": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"}"#,
    )
    .unwrap();
    let problems = setup.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
}

#[test]
fn validation_examples_are_held_out_the_same_way_each_time() {
    let rows: String = (0..20)
        .map(|n| format!("{{\"text\": \"hello {n}\"}}\n"))
        .collect();
    let mut setup = Setup::new(&rows);
    setup.job.sample_packing = false;
    setup.job.val_set_size = ValSetSize::Fraction(0.15);
    let first = setup.prepare().unwrap();
    assert_eq!((first.counts.blocks, first.counts.eval_blocks), (17, 3));
    let digest = first.file.digest().to_owned();
    std::fs::remove_file(first.file.path()).unwrap();
    assert_eq!(setup.prepare().unwrap().file.digest(), digest);
    setup.job.seed += 1;
    assert_ne!(setup.prepare().unwrap().file.digest(), digest);
    setup.job.shuffle = false;
    setup.job.val_set_size = ValSetSize::Examples(2);
    let data = setup.prepare().unwrap();
    let (tokenizer, _) = setup.parts();
    let last = blocks(&data).pop().unwrap();
    let text = tokenizer.decode(&last.tokens[..last.used_len()]).unwrap();
    assert!(text.contains("hello 19"), "{text}");
    setup.job.val_set_size = ValSetSize::Examples(20);
    assert!(setup.problems()[0].contains("none is left to train on"));
}

#[test]
fn data_to_evaluate_makes_blocks_of_its_own_and_is_never_trained_on() {
    let row = |text: &str| {
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}},{{\"role\":\"assistant\",\"content\":\"{text}\"}}]}}\n"
        )
    };
    let rows: String = (0..6)
        .map(|number| row(&format!("learn {number}")))
        .collect();
    let mut setup = Setup::new(&rows);
    let alone = setup.prepare().unwrap();
    let other = setup.folder.path().join("eval.jsonl");
    let judged: String = (0..3)
        .map(|number| row(&format!("judge {number}")))
        .collect();
    std::fs::write(&other, &judged).unwrap();
    let kind = DatasetKind::Auto;
    setup.job.test_datasets = vec![DatasetSpec::new(other.clone(), kind, FieldNames::default())];
    let data = setup.prepare().unwrap();
    assert_eq!((data.counts.examples, data.counts.eval_examples), (9, 3));
    assert_eq!(
        data.counts.blocks, alone.counts.blocks,
        "nothing is held out for it"
    );
    assert!(data.counts.eval_blocks > 0);
    let (tokenizer, _) = setup.parts();
    for (number, block) in blocks(&data).into_iter().enumerate() {
        let text = tokenizer.decode(&block.tokens[..block.used_len()]).unwrap();
        let is_trained = (number as u64) < data.counts.blocks;
        assert_eq!(text.contains("learn"), is_trained, "{text}");
        assert_eq!(text.contains("judge"), !is_trained, "{text}");
    }
    // The blocks are found again, and are others once the data to evaluate is another.
    let again = setup.prepare().unwrap();
    assert_eq!(again.file.digest(), data.file.digest());
    assert_eq!(again.data_digest, data.data_digest);
    std::fs::write(&other, row("judge otherwise")).unwrap();
    let changed = setup.prepare().unwrap();
    assert_ne!(changed.file.digest(), data.file.digest());
    assert_ne!(changed.data_digest, data.data_digest);
    std::fs::write(&other, "").unwrap();
    assert!(setup.problems()[0].contains("eval.jsonl"));
}

/// Rows of plain text, `train` to learn and `eval` to evaluate, each in a file.
fn with_evaluation(train: &[&str], eval: &[&str]) -> Setup {
    let rows = |texts: &[&str]| -> String {
        let rows = texts.iter();
        rows.map(|text| format!("{{\"text\": \"{text}\"}}\n"))
            .collect()
    };
    let mut setup = Setup::new(&rows(train));
    let path = setup.folder.path().join("eval.jsonl");
    std::fs::write(&path, rows(eval)).unwrap();
    let eval = DatasetSpec::new(path, DatasetKind::Auto, FieldNames::default());
    setup.job.test_datasets = vec![eval];
    setup
}

#[test]
fn which_rows_are_evaluated_decides_the_blocks() {
    let mut setup = with_evaluation(&["one", "two"], &["three", "four", "five"]);
    let all = setup.prepare().unwrap();
    setup.job.test_datasets[0].selection.skip = 1;
    let fewer = setup.prepare().unwrap();
    assert_eq!(
        (all.counts.eval_examples, fewer.counts.eval_examples),
        (3, 2)
    );
    // A file that moves from what is learned to what is evaluated makes other data of the same files.
    let path = setup.job.test_datasets.remove(0).path;
    let learned = DatasetSpec::new(path, DatasetKind::Auto, FieldNames::default());
    setup.job.datasets.push(learned);
    let together = setup.prepare().unwrap();
    assert_eq!(together.counts.eval_examples, 0);
    assert_ne!(together.data_digest, all.data_digest);
    assert_ne!(together.file.digest(), all.file.digest());
}

#[test]
fn data_to_evaluate_that_is_all_left_out_is_an_error() {
    let mut setup = with_evaluation(&["one", "two"], &["two", "one"]);
    setup.job.mixture.deduplicate = true;
    let problems = setup.problems();
    assert!(
        problems[0].contains("nothing is left to evaluate"),
        "{problems:?}"
    );
}

#[test]
fn repeated_data_beside_data_to_evaluate_is_found_again() {
    let mut setup = with_evaluation(
        &["one two three four five six", "seven"],
        &["eight nine ten"],
    );
    setup.job.reading.left_to_data.sequence_len = true;
    setup.job.datasets[0].selection.repeat = Some(3);
    let made = setup.prepare().unwrap();
    assert!(!made.is_found);
    assert_eq!((made.counts.examples, made.counts.eval_examples), (7, 1));
    let again = setup.prepare().unwrap();
    assert!(again.is_found);
    assert_eq!(again.job, made.job);
    // Of rows that come several times each is held out once or learned every time.
    setup.job.test_datasets.clear();
    setup.job.val_set_size = ValSetSize::Examples(1);
    let held_out = setup.prepare().unwrap();
    assert_eq!(
        (held_out.counts.examples, held_out.counts.eval_examples),
        (4, 1)
    );
    assert!(setup.prepare().unwrap().is_found);
}

#[test]
fn a_block_file_is_made_once_and_again_when_damaged_or_outdated() {
    let mut setup = Setup::new(CHAT);
    let made = setup.prepare().unwrap();
    let path = made.file.path().to_owned();
    let time = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before = time(&path);
    let again = setup.prepare().unwrap();
    assert_eq!(before, time(&path), "it is reused");
    assert_eq!(again.samples, made.samples);
    assert_eq!(again.counts, made.counts);
    std::fs::write(&path, b"MUSTERBK").unwrap();
    assert_eq!(setup.prepare().unwrap().file.digest(), made.file.digest());
    setup.job.train_on_inputs = true;
    assert_ne!(setup.prepare().unwrap().file.digest(), made.file.digest());
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

#[test]
fn a_slice_of_the_rows_can_be_taken() {
    let rows: String = (0..10)
        .map(|n| format!("{{\"text\": \"hello {n}\"}}\n"))
        .collect();
    let mut setup = Setup::new(&rows);
    for (split, count) in [
        ("train[2:5]", 3),
        ("train", 10),
        ("train[:4]", 4),
        ("train[8:]", 2),
    ] {
        setup.job.datasets[0].split = Some(split.into());
        assert_eq!(setup.prepare().unwrap().counts.rows, count, "{split}");
    }
    setup.job.datasets[0].split = Some("train[x]".into());
    assert!(setup.problems()[0].contains("which names no rows"));
}

#[test]
fn block_files_of_other_inputs_are_removed_and_nothing_else() {
    let mut setup = Setup::new(CHAT);
    let old = setup.prepare().unwrap();
    setup.job.sequence_len = 64;
    let current = setup.prepare().unwrap();
    let folder = current.file.path().parent().unwrap();
    assert_eq!(old.file.path().parent(), Some(folder));
    // What only looks like one.
    let others = [
        "blocks-0123456789abcde.bin",
        "blocks-0123456789abcdef0.bin",
        "blocks-0123456789ABCDEF.bin",
        "blocks-0123456789abcdef.bin.kept",
        "journal",
    ];
    for name in others {
        std::fs::write(folder.join(name), "the user's").unwrap();
    }
    std::fs::create_dir(folder.join("blocks-0123456789abcdef.bin")).unwrap();
    prune_blocks(&current.file);
    assert!(!old.file.path().exists());
    assert!(current.file.path().is_file());
    assert!(others.iter().all(|name| folder.join(name).is_file()));
    assert!(folder.join("blocks-0123456789abcdef.bin").is_dir());
    // Whoever has it open still reads it.
    assert_eq!(blocks(&old).len() as u64, old.file.total_blocks());
}
