//! What rows are read, and how those that cannot be used are named.

use super::*;

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

#[test]
fn a_column_of_answers_that_the_job_names_is_read() {
    let mut setup = Setup::new(r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#);
    setup.job.datasets[0].fields.completion = "chosen".into();
    let data = setup.prepare().unwrap();
    assert_eq!(data.counts.notes.len(), 1);
    assert!(data.counts.notes[0].ends_with("columns that are not read: `rejected` (1 row)"));
}

#[test]
fn numbers_that_json_has_not_matter_only_where_they_are_read() {
    let reason = reason(r#"{"text": NaN}"#);
    assert!(reason.contains("column `text` holds NaN"), "{reason}");
    let setup = Setup::new(r#"{"text": "NaN", "score": -Infinity}"#);
    assert_eq!(setup.prepare().unwrap().counts.rows, 1);
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
fn a_json_array_is_read_as_rows() {
    let setup = Setup::new(&format!("[\n{CHAT},\n{CHAT}]"));
    assert_eq!(setup.prepare().unwrap().counts.rows, 2);
    let setup = Setup::new(&format!("[{CHAT}, {{\"a\": 1}}]"));
    assert!(setup.problems()[0].starts_with("data.jsonl: row 2: no column"));
}
