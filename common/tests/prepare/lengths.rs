//! Examples that are too long, or of which nothing is left to learn.

use super::*;

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
