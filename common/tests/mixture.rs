//! Several datasets become one: which rows are trained on, how often, in what order.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use common::data::block::Block;
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::data::{DataErrors, PreparedData, SetCounts, prepare_blocks};
use common::job::{JobSources, JobSpec, load};
use common::progress::Progress;
use support::{template_text, write_model};

/// A folder with a model, and files of rows `{name}{number}`.
struct Setup {
    folder: tempfile::TempDir,
}

impl Setup {
    fn new(files: &[(&str, usize)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let template = template_text("chatml_generation");
        write_model(folder.path(), Some(&template), "<|im_end|>");
        let setup = Self { folder };
        for (name, rows) in files {
            let rows = (0..*rows).map(|row| format!("{name}{row}"));
            setup.write(name, &rows.collect::<Vec<_>>());
        }
        setup
    }

    fn write(&self, name: &str, texts: &[String]) {
        let rows = texts
            .iter()
            .map(|text| format!("{{\"text\": \"{text}\"}}\n"));
        let path = self.folder.path().join(format!("{name}.jsonl"));
        std::fs::write(path, rows.collect::<String>()).unwrap();
    }

    /// The job of this file, with a row a block, in the order of the data unless it says otherwise. `DIR/` is the folder.
    fn job(&self, lines: &str) -> JobSpec {
        let folder = self.folder.path();
        let order = match lines.contains("shuffle: ") {
            true => "",
            false => "shuffle: false\n",
        };
        let text = format!(
            "base_model: {0}\noutput_dir: {0}/out\nsequence_len: 32\nsample_packing: false\n{order}{1}",
            folder.display(),
            lines.replace("DIR/", &format!("{}/", folder.display()))
        );
        let file = folder.join("job.yaml");
        std::fs::write(&file, text).unwrap();
        let sources = JobSources {
            file: Some(file),
            ..JobSources::default()
        };
        load(sources).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn try_prepare(&self, job: &JobSpec) -> Result<PreparedData, DataErrors> {
        let tokenizer = Tokenizer::load(self.folder.path()).unwrap();
        let template = ChatTemplate::load_optional(self.folder.path()).unwrap();
        let out = self.folder.path().join("out/.muster");
        let progress = Progress::default();
        prepare_blocks(job, &tokenizer, template.as_ref(), &out, &progress)
    }

    fn prepare(&self, lines: &str) -> PreparedData {
        let job = self.job(lines);
        self.try_prepare(&job)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The texts of these blocks.
    fn texts(&self, data: &PreparedData, blocks: std::ops::Range<u64>) -> Vec<String> {
        let tokenizer = Tokenizer::load(self.folder.path()).unwrap();
        let text = |block: u64| {
            let bytes = data.file.block_bytes(block).unwrap();
            let block = Block::decode(bytes, data.file.sequence_len()).unwrap();
            let tokens = &block.tokens[..block.used_len()];
            tokenizer.decode_with(tokens, true).unwrap()
        };
        blocks.map(text).collect()
    }

    /// The rows that are trained on, in their order.
    fn trained(&self, lines: &str) -> Vec<String> {
        let data = self.prepare(lines);
        self.texts(&data, 0..data.file.train_blocks())
    }
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

const TWO: &str = "datasets:\n- path: DIR/a.jsonl\n- path: DIR/b.jsonl\n";

#[test]
fn datasets_take_turns_until_one_or_all_are_over() {
    let setup = Setup::new(&[("a", 2), ("b", 3)]);
    for (strategy, expected) in [
        ("concat", ["a0", "a1", "b0", "b1", "b2"].as_slice()),
        ("interleave_under", &["a0", "b0", "a1", "b1"]),
        ("interleave_over", &["a0", "b0", "a1", "b1", "a0", "b2"]),
        ("interleave_once", &["a0", "b0", "a1", "b1", "b2"]),
    ] {
        let lines = format!("{TWO}mix_strategy: {strategy}\n");
        assert_eq!(setup.trained(&lines), owned(expected), "{strategy}");
    }
}

#[test]
fn a_mixture_is_a_function_of_the_seed_and_told_by_set() {
    let setup = Setup::new(&[("a", 40), ("b", 40)]);
    let lines = format!("{TWO}mix_strategy: interleave_under\ninterleave_probs: [0.8, 0.2]\n");
    let data = setup.prepare(&lines);
    let digest = data.file.digest().to_owned();
    std::fs::remove_file(data.file.path()).unwrap();
    assert_eq!(setup.prepare(&lines).file.digest(), digest);
    assert_ne!(
        setup.prepare(&format!("{lines}seed: 7\n")).file.digest(),
        digest
    );
    let texts = setup.texts(&data, 0..data.file.train_blocks());
    let of_b = texts.iter().filter(|text| text.starts_with('b')).count() as u64;
    assert!(of_b > 2 && of_b < 20, "{texts:?}");
    let [a, b] = data.counts.sets[..] else {
        panic!("{:?}", data.counts.sets)
    };
    assert_eq!(
        (a.rows, b.rows, a.rows_read, b.rows_read),
        (40, of_b, 40, 40)
    );
    assert_eq!(a.tokens + b.tokens, data.counts.tokens);
    assert_eq!(
        a.trained_tokens + b.trained_tokens,
        data.counts.trained_tokens
    );
    // Weights say the same.
    let weights = "datasets:\n- path: DIR/a.jsonl\n  weight: 4\n- path: DIR/b.jsonl\n  weight: 1\nmix_strategy: interleave_under\n";
    assert_eq!(setup.trained(weights), texts);
}

#[test]
fn fractions_repeats_skips_and_limits_choose_the_rows() {
    let setup = Setup::new(&[("a", 4), ("b", 4)]);
    for (a, b, expected) in [
        (
            "fraction: 3",
            "fraction: 1",
            ["a0", "a1", "a2", "a3", "b0"].as_slice(),
        ),
        ("repeat: 2\n  take: 1", "skip: 3", &["a0", "a0", "b3"]),
        ("skip: 1\n  max_samples: 2", "take: 1", &["a1", "a2", "b0"]),
        ("split: 'train[2:]'\n  skip: 1", "take: 1", &["a3", "b0"]),
    ] {
        let lines = format!("datasets:\n- path: DIR/a.jsonl\n  {a}\n- path: DIR/b.jsonl\n  {b}\n");
        assert_eq!(setup.trained(&lines), owned(expected), "{a}, {b}");
    }
}

#[test]
fn the_parts_of_a_dataset_hold_its_rows_once() {
    let setup = Setup::new(&[("a", 10)]);
    let part = |index: usize| {
        let lines = format!("datasets:\n- path: DIR/a.jsonl\n  shards: 3\n  shards_idx: {index}\n");
        setup.trained(&lines)
    };
    let parts = [part(0), part(1), part(2)];
    assert_eq!(parts.each_ref().map(Vec::len), [4, 3, 3]);
    let all: BTreeSet<String> = parts.concat().into_iter().collect();
    assert_eq!(all.len(), 10);
    assert_ne!(parts[0], owned(&["a0", "a1", "a2", "a3"]));
}

#[test]
fn rows_that_come_again_are_never_both_learned_and_held_out() {
    let setup = Setup::new(&[("a", 6), ("b", 6)]);
    let lines = "datasets:\n- path: DIR/a.jsonl\n  repeat: 3\n- path: DIR/b.jsonl\nshuffle: true\nval_set_size: 5\n";
    let data = setup.prepare(lines);
    let (train, all) = (data.file.train_blocks(), data.file.total_blocks());
    let learned: BTreeSet<String> = setup.texts(&data, 0..train).into_iter().collect();
    let held_out = setup.texts(&data, train..all);
    assert_eq!(held_out.len(), 5);
    assert!(held_out.iter().all(|text| !learned.contains(text)));
    assert_eq!(learned.len(), 7);
    let rows: u64 = data.counts.sets.iter().map(|set| set.rows).sum();
    assert_eq!(rows, train);
}

#[test]
fn duplicates_are_left_out_over_all_datasets_and_counted() {
    let setup = Setup::new(&[("a", 3)]);
    setup.write("b", &owned(&["a1", "b1", "b1", "a2", "b2"]));
    let lines = format!("{TWO}dataset_exact_deduplication: true\n");
    let data = setup.prepare(&lines);
    assert_eq!(
        setup.texts(&data, 0..data.file.train_blocks()),
        owned(&["a0", "a1", "a2", "b1", "b2"])
    );
    assert_eq!((data.counts.rows, data.counts.duplicate_rows), (8, 3));
    let told = data.counts.filter_notice(0).unwrap();
    assert!(
        told.ends_with("(dataset_exact_deduplication): 3 rows"),
        "{told}"
    );
    // Found again with its counts.
    assert_eq!(setup.prepare(&lines).counts, data.counts);
    assert_eq!(setup.prepare(TWO).counts.duplicate_rows, 0);
}

#[test]
fn examples_that_are_too_short_are_left_out_and_counted() {
    let setup = Setup::new(&[]);
    setup.write("a", &owned(&["x", "hello hello hello", "y"]));
    let data = setup.prepare("datasets: DIR/a.jsonl\nmin_sample_len: 5\n");
    assert_eq!(
        setup.texts(&data, 0..data.file.train_blocks()),
        owned(&["hello hello hello"])
    );
    assert_eq!((data.counts.rows, data.counts.short_examples), (3, 2));
}

#[test]
fn one_dataset_and_one_after_the_other_stay_as_they_were() {
    let setup = Setup::new(&[("a", 3), ("b", 2)]);
    let plain = setup.prepare(TWO);
    assert_eq!(plain.counts.sets.iter().map(|set| set.rows).sum::<u64>(), 5);
    let one = setup.prepare("datasets: DIR/a.jsonl\n");
    assert_eq!(one.counts.sets, Vec::<SetCounts>::new());
    // Axolotl joins nothing where there is one.
    let lines = "datasets: DIR/a.jsonl\nshuffle_before_merging_datasets: true\n";
    assert_eq!(setup.trained(lines), owned(&["a0", "a1", "a2"]));
}

#[test]
fn a_curriculum_keeps_the_order_of_the_data() {
    let setup = Setup::new(&[("a", 5)]);
    let job = setup.job("datasets: DIR/a.jsonl\nshuffle: false\n");
    let curriculum = Setup::job(
        &setup,
        "datasets: DIR/a.jsonl\ncurriculum_sampling: true # shuffle: \n",
    );
    assert_eq!(
        (curriculum.shuffle, curriculum.digest()),
        (false, job.digest())
    );
}

#[test]
fn examples_packed_in_order_never_go_back_to_fill_an_earlier_block() {
    let setup = Setup::new(&[]);
    // With the tokens before and after it: 14, 8 and 3.
    setup.write("a", &["ab".repeat(6), "ab".repeat(3), "x".to_owned()]);
    let lines = "datasets: DIR/a.jsonl\n";
    let mut job = setup.job(lines);
    job.sample_packing = true;
    job.sequence_len = 17;
    let best = setup.try_prepare(&job).unwrap();
    job.mixture.packs_in_order = true;
    let in_order = setup.try_prepare(&job).unwrap();
    let last = |data: &PreparedData| {
        let blocks = data.file.train_blocks();
        setup.texts(data, blocks - 1..blocks).remove(0)
    };
    assert!(last(&in_order).ends_with('x'), "{}", last(&in_order));
    assert!(!last(&best).ends_with('x'), "{}", last(&best));
}

#[test]
fn a_set_without_rows_to_mix_is_named() {
    let setup = Setup::new(&[("a", 2)]);
    setup.write("b", &owned(&["a0"]));
    let lines = format!("{TWO}dataset_exact_deduplication: true\nmix_strategy: interleave_over\n");
    let error = setup
        .try_prepare(&setup.job(&lines))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("dataset 2 of the job has no rows"),
        "{error}"
    );
    let beyond = setup.job("datasets:\n- path: DIR/a.jsonl\n  skip: 2\n");
    let error = setup.try_prepare(&beyond).unwrap_err().to_string();
    assert!(error.contains("skip passes over 2 rows"), "{error}");
    let parts = setup.job("datasets:\n- path: DIR/a.jsonl\n  shards: 3\n");
    let error = setup.try_prepare(&parts).unwrap_err().to_string();
    assert!(error.contains("3 parts of 2 rows"), "{error}");
}
