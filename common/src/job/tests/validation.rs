//! Data of its own to evaluate, the best weights, and when a run ends early: as Axolotl, LLaMA-Factory, TRL and Transformers say it.

use std::path::PathBuf;

use super::*;

fn paths(datasets: &[DatasetSpec]) -> Vec<String> {
    datasets
        .iter()
        .map(|dataset| dataset.path.display().to_string())
        .collect()
}

#[test]
fn data_to_evaluate_is_named_in_every_programs_way() {
    let axolotl = job(
        "test_datasets:\n- path: eval.jsonl\n  split: train[:9]\n  type: completion\n- b.jsonl\neval_steps: 5\n",
    );
    assert_eq!(paths(&axolotl.test_datasets), ["eval.jsonl", "b.jsonl"]);
    assert_eq!(axolotl.test_datasets[0].kind, DatasetKind::Text);
    assert_eq!(axolotl.test_datasets[0].split.as_deref(), Some("train[:9]"));
    assert_eq!((axolotl.eval_steps, axolotl.datasets.len()), (Some(5), 1));
    for alias in ["eval_dataset", "validation_file", "eval_file"] {
        let one = job(&format!("{alias}: eval.jsonl\n"));
        assert_eq!(paths(&one.test_datasets), ["eval.jsonl"], "{alias}");
    }
    let flags = load_with(
        SMALL,
        &[("MUSTER_TEST_DATASETS_0_TYPE", "text")],
        &[
            ("--eval-dataset", "eval.jsonl"),
            ("test_datasets.0.max_samples", "7"),
        ],
    );
    let flags = flags.unwrap();
    assert_eq!(flags.test_datasets[0].kind, DatasetKind::Text);
    assert_eq!(flags.test_datasets[0].max_samples, Some(7));
    let most =
        job("test_datasets: [a, {path: b, max_samples: 2}]\nmax_samples: 5\nmax_eval_samples: 3\n");
    let samples: Vec<_> = most
        .all_datasets()
        .map(|dataset| dataset.max_samples)
        .collect();
    assert_eq!(samples, [Some(5), Some(3), Some(2)]);
}

#[test]
fn trl_evaluates_another_split_of_the_same_data() {
    let named = job(
        "dataset_test_split: validation\ndataset_train_split: train[:90%]\nmax_eval_samples: 4\n",
    );
    assert_eq!(named.test_datasets[0].path, named.datasets[0].path);
    assert_eq!(named.test_datasets[0].split.as_deref(), Some("validation"));
    assert_eq!(named.test_datasets[0].max_samples, Some(4));
    assert_eq!(named.datasets[0].split.as_deref(), Some("train[:90%]"));
    let trl = |more: &str| {
        let text = format!("base_model: m\ndataset_name: trl-lib/Capybara\n{more}");
        load_text(&text).unwrap()
    };
    let asked = trl("eval_strategy: steps\neval_steps: 100\n");
    assert_eq!(asked.test_datasets[0].split.as_deref(), Some("test"));
    assert!(trl("").test_datasets.is_empty());
    let off = trl("eval_strategy: no\ndataset_test_split: test\n");
    assert!(off.test_datasets.is_empty());
    let told = "dataset_test_split: test is not evaluated, because eval_strategy is no";
    assert!(off.reading.notices.iter().any(|notice| notice == told));
}

#[test]
fn evaluations_by_steps_alone_are_as_often_as_lines() {
    let alone = job("val_set_size: 4\neval_strategy: steps\nlogging_steps: 7\n");
    assert_eq!(alone.eval_steps, Some(7));
    let own = job("val_set_size: 4\neval_strategy: steps\nlogging_steps: 7\neval_steps: 3\n");
    assert_eq!(own.eval_steps, Some(3));
    let steps = "`eval_strategy` is steps, but `eval_steps` says no number of them";
    check_problems(
        "val_set_size: 4\neval_strategy: steps\n",
        &[&format!("4: {steps}")],
    );
}

#[test]
fn llama_factory_names_data_to_evaluate_in_its_dataset_info() {
    let folder = tempfile::tempdir().unwrap();
    let info = "{\"mine\": {\"file_name\": \"a.json\"}, \"other\": {\"file_name\": \"b.json\"}}";
    std::fs::write(folder.path().join("dataset_info.json"), info).unwrap();
    let text = format!(
        "base_model: m\nstage: sft\ndataset: mine\neval_dataset: other\neval_steps: 3\nearly_stopping_steps: 2\ndataset_dir: {}\n",
        folder.path().display()
    );
    let job = load_text(&text).unwrap();
    let file = |name: &str| -> Vec<PathBuf> { vec![folder.path().join(name)] };
    assert_eq!(vec![job.datasets[0].path.clone()], file("a.json"));
    assert_eq!(vec![job.test_datasets[0].path.clone()], file("b.json"));
    assert_eq!(job.test_datasets[0].kind, DatasetKind::Instructions);
    assert_eq!(job.test_datasets[0].split.as_deref(), Some("train"));
    let best = job.best_model.unwrap();
    assert_eq!(best.early_stopping.unwrap().patience, 2);
    assert!(!best.load_at_end, "its callback alone loads nothing");
}

#[test]
fn the_data_is_held_out_or_named_and_not_both() {
    for (text, message) in [
        (
            "val_set_size: 0.1\ntest_datasets: [b]\n",
            "3: `val_set_size` and `test_datasets` both say what is evaluated; remove one",
        ),
        (
            "val_set_size: 3\ndataset_test_split: test\n",
            "3: `val_set_size` and `dataset_test_split` both say what is evaluated; remove one",
        ),
        (
            "test_datasets: [b]\ndataset_test_split: test\n",
            "4: `dataset_test_split` and `test_datasets` both say what is evaluated; remove one",
        ),
        (
            "test_datasets: []\n",
            "3: `test_datasets` is empty: name the data to evaluate, or remove it",
        ),
    ] {
        check_problems(text, &[message]);
    }
    assert_eq!(
        job("val_set_size: 0\ntest_datasets: [b]\n")
            .test_datasets
            .len(),
        1
    );
}

#[test]
fn jobs_without_these_fields_are_written_as_before() {
    let json = serde_json::to_value(job("val_set_size: 0.1\n")).unwrap();
    for field in [
        "test_datasets",
        "best_model",
        "eval_on_start",
        "save_first_step",
        "logging_first_step",
    ] {
        assert!(json.get(field).is_none(), "{field}");
    }
}

#[test]
fn patience_is_axolotls_and_the_best_weights_are_the_result_then() {
    let best = |text: &str| job(&format!("val_set_size: 4\neval_steps: 2\n{text}")).best_model;
    assert_eq!(best(""), None);
    assert_eq!(
        best("early_stopping_patience: 0\nload_best_model_at_end: false\n"),
        None
    );
    let patient = best("early_stopping_patience: 3\n").unwrap();
    assert!(patient.load_at_end && patient.saves() && !patient.greater_is_better);
    let stopping = patient.early_stopping.unwrap();
    assert_eq!((stopping.patience, stopping.threshold), (3, 0.0));
    let last = best("early_stopping_patience: 3\nearly_stopping_threshold: 0.01\nload_best_model_at_end: false\n").unwrap();
    assert!(!last.load_at_end && !last.saves() && last.decides());
    assert_eq!(last.early_stopping.unwrap().threshold, 0.01);
    let kept = best("save_strategy: best\nmetric_for_best_model: eval_loss\n").unwrap();
    assert!(kept.saves() && !kept.decides());
    let greatest = best("load_best_model_at_end: true\ngreater_is_better: true\n").unwrap();
    assert!(greatest.greater_is_better);
    let only = job("val_set_size: 4\neval_strategy: epoch\nsave_strategy: best\n");
    assert_eq!(only.save_steps, SaveSteps::Never);
}

#[test]
fn rules_between_saving_and_evaluating_are_transformers() {
    let load = |text: &str| format!("load_best_model_at_end: true\nval_set_size: 4\n{text}");
    let rule = "3: `load_best_model_at_end` needs checkpoints where evaluations are, as Transformers has it:";
    let steps = format!("{rule} save_steps (3) is no multiple of eval_steps (2)");
    check_problems(&load("eval_steps: 2\nsave_steps: 3\n"), &[&steps]);
    let mixed = format!(
        "{rule} one of them is said in steps and the other in epochs; say both in the same, or write save_strategy: best"
    );
    check_problems(&load("eval_steps: 2\nsave_strategy: epoch\n"), &[&mixed]);
    check_problems(&load("eval_strategy: epoch\nsave_steps: 3\n"), &[&mixed]);
    let none = format!(
        "{rule} there are none with save_strategy: no; remove that, or write save_strategy: best"
    );
    check_problems(&load("eval_steps: 2\nsave_strategy: no\n"), &[&none]);
    for fine in [
        "eval_steps: 2\nsave_steps: 4\n",
        "eval_steps: 2\n",
        "eval_steps: 2\nsave_strategy: best\n",
        "eval_strategy: epoch\nsave_strategy: epoch\n",
        "evals_per_epoch: 4\nsaves_per_epoch: 1\n",
    ] {
        assert!(job(&load(fine)).best_model.unwrap().load_at_end, "{fine}");
    }
    let nothing = "has nothing to go by: give eval_steps, evals_per_epoch or eval_strategy, so that the run stops for evaluations";
    check_problems(
        &load(""),
        &[&format!("3: `load_best_model_at_end` {nothing}")],
    );
    let no_data = "has nothing to evaluate: `val_set_size` holds no examples out, and `test_datasets` names none";
    check_problems(
        "early_stopping_patience: 3\n",
        &[&format!("3: `early_stopping_patience` {no_data}")],
    );
    check_problems(
        "metric_for_best_model: rouge\n",
        &[
            "3: `metric_for_best_model` must be loss or eval_loss, found `rouge`: an evaluation measures nothing else that tells weights \
           apart",
        ],
    );
}
