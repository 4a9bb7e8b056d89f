//! What a row has beside its texts: columns of other methods, weights, tools.

use super::*;

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
