//! Rows that are held out, and sets of data to evaluate.

use super::*;

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
