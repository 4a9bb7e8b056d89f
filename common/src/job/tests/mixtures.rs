//! How several datasets become one: what the fields mean, and what contradicts itself.

use super::*;

const TWO: &str = "base_model: m\ndatasets:\n- path: a.jsonl\n- path: b.jsonl\n";

fn two(a: &str, b: &str, lines: &str) -> String {
    format!("base_model: m\ndatasets:\n- path: a.jsonl\n  {a}\n- path: b.jsonl\n  {b}\n{lines}")
}

#[test]
fn weights_and_probabilities_say_the_same() {
    let weights = two("weight: 3", "weight: 1", "mix_strategy: interleave_over\n");
    let listed = "mix_strategy: all_exhausted\ninterleave_probs: 0.75,0.25\n";
    let weights = load_text(&weights).unwrap();
    let listed = load_text(&format!("{TWO}{listed}")).unwrap();
    assert_eq!(weights.mixture, listed.mixture);
    assert_eq!(weights.mixture.probabilities, [0.75, 0.25]);
    assert_eq!(weights.mixture.strategy, MixStrategy::InterleaveOver);
    assert_eq!(weights.digest(), listed.digest());
}

#[test]
fn a_job_that_mixes_nothing_keeps_its_digest() {
    let plain = load_text(TWO).unwrap();
    let same = two(
        "repeat: 1",
        "skip: 0",
        "mix_strategy: concat\nmin_sample_len: 0\ndataset_exact_deduplication: false\nshuffle_before_merging_datasets: false\n\
         sample_packing_sequentially: false\ncurriculum_sampling: false\ndataset_prepared_path: elsewhere\n",
    );
    let same = load_text(&same).unwrap();
    assert_eq!(same.digest(), plain.digest());
    assert_eq!(same.reading.prepared_dir, Some("elsewhere".into()));
    let json = serde_json::to_string(&same).unwrap();
    assert!(
        !json.contains("mixture") && !json.contains("selection"),
        "{json}"
    );
    for other in [
        "mix_strategy: interleave_once\n",
        "min_sample_len: 5\n",
        "dataset_exact_deduplication: true\n",
        "shuffle_before_merging_datasets: true\n",
        "sample_packing_sequentially: true\n",
        "curriculum_sampling: true\n",
    ] {
        let other = load_text(&format!("{TWO}{other}")).unwrap();
        assert_ne!(other.digest(), plain.digest());
        let json = serde_json::to_string(&other).unwrap();
        let back: JobSpec = serde_json::from_str(&json).unwrap();
        assert_eq!(back.digest(), other.digest());
    }
    for other in [
        "repeat: 2",
        "skip: 1",
        "shards: 2",
        "fraction: 1\n- path: b.jsonl\n  fraction: 1",
    ] {
        let text =
            format!("base_model: m\ndatasets:\n- path: b.jsonl\n- path: a.jsonl\n  {other}\n");
        let text = text.replace("- path: b.jsonl\n- path", "- path");
        let text = match other.contains("fraction") {
            true => text,
            false => format!("{text}- path: b.jsonl\n"),
        };
        let other = load_text(&text).unwrap();
        assert_ne!(other.digest(), plain.digest(), "{text}");
    }
}

#[test]
fn parts_of_a_dataset_are_numbered_from_0() {
    let job = load_text(&two("shards: 4\n  shards_idx: 3", "shards: 2", "")).unwrap();
    let shards = [0, 1].map(|set: usize| job.datasets[set].selection.shard.unwrap());
    assert_eq!(
        shards.map(|shard| (shard.count, shard.index)),
        [(4, 3), (2, 0)]
    );
    let found = problems(load_text(&two(
        "shards: 4\n  shards_idx: 4",
        "shards_idx: 1",
        "",
    )));
    assert_eq!(
        found,
        [
            "5: `shards_idx` must be below shards, 4: the parts are numbered from 0",
            "7: `shards_idx` needs shards, the number of parts that it is one of"
        ]
    );
}

#[test]
fn mixtures_that_contradict_themselves_are_refused_with_what_to_do() {
    for (lines, expected) in [
        (
            "interleave_probs: [0.5, 0.5]\n",
            "say until when, with mix_strategy",
        ),
        (
            "mix_strategy: interleave_over\ninterleave_probs: [1, 0]\n",
            "leaves a dataset out, and mix_strategy waits for its rows",
        ),
        (
            "mix_strategy: interleave_under\ninterleave_probs: [0.5, 0.4]\n",
            "adds up to 0.9, and probabilities to 1",
        ),
        (
            "mix_strategy: interleave_under\ninterleave_probs: [1]\n",
            "has 1 number, and there are 2 datasets",
        ),
        (
            "mix_strategy: interleave_under\ninterleave_probs: [2, -1]\n",
            "must be a list of probabilities, from 0 to 1",
        ),
        (
            "curriculum_sampling: true\nshuffle_merged_datasets: true\n",
            "and curriculum_sampling both decide the order",
        ),
        ("mix_strategy: interleave\n", "must be one of concat"),
    ] {
        let found = problems(load_text(&format!("{TWO}{lines}")));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(expected), "{found:?}");
    }
    for (a, b, lines, expected) in [
        (
            "weight: 1",
            "skip: 0",
            "mix_strategy: interleave_under\n",
            "for some datasets only",
        ),
        (
            "weight: 0",
            "weight: 0",
            "mix_strategy: interleave_under\n",
            "leaves every dataset out",
        ),
        (
            "fraction: 0.5",
            "skip: 0",
            "",
            "give it for all datasets or for none",
        ),
        (
            "weight: 1",
            "weight: 1",
            "mix_strategy: interleave_under\ninterleave_probs: [0.5, 0.5]\n",
            "both decide how often its rows come",
        ),
    ] {
        let found = problems(load_text(&two(a, b, lines)));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(expected), "{found:?}");
    }
}

#[test]
fn the_fraction_of_a_single_dataset_is_told_to_be_all_of_it() {
    let job = load_text("base_model: m\ndatasets:\n- path: a.jsonl\n  fraction: 0.1\n").unwrap();
    let told = &job.reading.notices;
    assert!(
        told.iter().any(|told| told.contains("all of it is read")),
        "{told:?}"
    );
}

#[test]
fn files_are_named_by_split() {
    let lines = "base_model: m\ndatasets:\n- path: json\n  data_files: {train: [a.jsonl, b.jsonl], test: c.jsonl}\n  split: all\n";
    let job = load_text(lines).unwrap();
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let expected: Vec<(String, Vec<String>)> = vec![
        ("train".to_owned(), owned(&["a.jsonl", "b.jsonl"])),
        ("test".to_owned(), owned(&["c.jsonl"])),
    ];
    assert_eq!(job.datasets[0].named_files(), expected);
    assert_eq!(job.datasets[0].format.as_deref(), Some("json"));
    for (files, expected) in [
        ("{train: {a: b}}", "or a mapping of splits to their files"),
        ("{train: []}", "or a mapping of splits to their files"),
        ("{'a b': a.jsonl}", "names the split `a b`"),
    ] {
        let lines = format!("base_model: m\ndatasets:\n- path: folder\n  data_files: {files}\n");
        let found = problems(load_text(&lines));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(expected), "{found:?}");
    }
}
