//! What a job says although something else in it leaves it no effect is told by name, and changes nothing.

use super::*;

/// Checks that the job is told exactly this, and is the same job without it.
fn check(lines: &str, without: &str, expected: &[&str]) {
    let (told, same) = (job(lines), job(without));
    assert_eq!(told.reading.notices, expected, "{lines}");
    let alike = |mut job: JobSpec| {
        job.reading = Reading::default();
        job
    };
    assert_eq!(alike(told).digest(), alike(same).digest(), "{lines}");
}

#[test]
fn numbers_of_adamw_are_told_where_the_optimizer_has_none_of_them() {
    let sgd = "changes nothing with SGD, which has neither betas nor an epsilon (optim_args: {momentum: 0.9} gives it a momentum)";
    let told = job("optimizer: sgd\nadam_beta1: 0.8\nadam_beta2: 0.95\nadam_eps: 1e-6\n");
    assert_eq!(
        told.reading.notices,
        [format!("adam_beta1, adam_beta2, adam_eps: {sgd}")]
    );
    let lion = job("optimizer: lion\nadam_beta1: 0.8\nadam_epsilon: 1e-6\n");
    assert_eq!(
        lion.reading.notices,
        ["adam_epsilon: changes nothing with Lion, which has no epsilon"]
    );
    let muon = job("optimizer: muon\nadapter: lora\nadam_beta2: 0.9\n")
        .reading
        .notices;
    assert!(
        muon.iter().any(|told| told.starts_with(
            "adam_beta2: changes nothing with Muon on adapters, all of which are matrices"
        )),
        "{muon:?}"
    );
    // Embedding and output layer follow AdamW there.
    for used in [
        "optimizer: muon\nadam_beta2: 0.9\n",
        "optimizer: muon\nadapter: lora\nlora_target_modules: [q_proj, lm_head]\nadam_beta2: 0.9\n",
        "adam_beta2: 0.9\n",
    ] {
        let notices = job(used).reading.notices;
        assert!(
            notices.iter().all(|told| !told.contains("adam_beta2")),
            "{used}: {notices:?}"
        );
    }
}

#[test]
fn evaluations_of_nothing_are_told_and_not_refused() {
    let nothing = "nothing is evaluated, because val_set_size holds no examples out and test_datasets names none";
    for (lines, names) in [
        ("eval_steps: 5\n", "eval_steps"),
        ("eval_steps: 5\nval_set_size: 0\n", "eval_steps"),
        ("evaluation_strategy: epoch\n", "evaluation_strategy"),
        (
            "eval_strategy: steps\neval_steps: 0.1\n",
            "eval_strategy, eval_steps",
        ),
        ("evals_per_epoch: 2\n", "evals_per_epoch"),
        ("eval_on_start: true\n", "eval_on_start"),
    ] {
        check(lines, "", &[&format!("{names}: {nothing}")]);
    }
    for off in [
        "eval_steps: 0\n",
        "eval_strategy: no\n",
        "evals_per_epoch: 0\n",
    ] {
        check(off, "", &[]);
    }
    let held_out = "without test_datasets: of data that val_set_size holds out, all is evaluated";
    check(
        "val_set_size: 4\nmax_eval_samples: 2\n",
        "val_set_size: 4\n",
        &[&format!("max_eval_samples: changes nothing {held_out}")],
    );
    check(
        "test_datasets: b.jsonl\nmax_eval_samples: 2\n",
        "test_datasets: [{path: b.jsonl, max_samples: 2}]\n",
        &[],
    );
}

#[test]
fn what_tells_the_best_weights_is_told_where_nothing_comes_of_them() {
    let makes_best = "load_best_model_at_end, early_stopping_patience or save_strategy: best";
    let evaluated = "val_set_size: 4\neval_steps: 2\n";
    check(
        &format!("{evaluated}greater_is_better: true\n"),
        evaluated,
        &[&format!(
            "greater_is_better: changes nothing without {makes_best}"
        )],
    );
    check(
        "metric_for_best_model: loss\n",
        "",
        &[&format!(
            "metric_for_best_model: changes nothing without {makes_best}"
        )],
    );
    check(
        &format!("{evaluated}metric_for_best_model: eval_loss\n"),
        evaluated,
        &[&format!(
            "metric_for_best_model: changes nothing but what run.json tells of the best weights: the last ones are the result without \
             {makes_best}"
        )],
    );
    check(
        "early_stopping_threshold: 0.5\n",
        "",
        &["early_stopping_threshold: changes nothing without early_stopping_patience"],
    );
    let best =
        "load_best_model_at_end: true\nmetric_for_best_model: loss\ngreater_is_better: true\n";
    assert_eq!(job(&format!("{evaluated}{best}")).reading.notices, [""; 0]);
}

#[test]
fn warm_ups_and_settings_of_curves_without_any_are_told() {
    for (lines, without, expected) in [
        (
            "lr_scheduler: constant\nwarmup_ratio: 0.03\n",
            "lr_scheduler: constant\n",
            "warmup_ratio: changes nothing with lr_scheduler: constant, as in Transformers (constant_with_warmup warms up)",
        ),
        (
            "lr_scheduler: constant_with_warmup\nlr_scheduler_kwargs: {num_cycles: 2}\n",
            "lr_scheduler: constant_with_warmup\n",
            "lr_scheduler_kwargs: changes nothing with lr_scheduler: constant_with_warmup, as in Transformers",
        ),
        (
            "lr_scheduler: rex\nlr_scheduler_kwargs: {num_cycles: 2}\n",
            "lr_scheduler: rex\n",
            "lr_scheduler_kwargs: changes nothing with lr_scheduler: rex, as in Axolotl",
        ),
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler_kwargs: {num_cycles: 2}\n",
            "cosine_min_lr_ratio: 0.1\n",
            "lr_scheduler_kwargs: changes nothing with cosine_min_lr_ratio, as in Axolotl",
        ),
        (
            "lr_scheduler: one_cycle\nlr_scheduler_kwargs: {pct_start: 0.3, cycle_momentum: false}\nwarmup_steps: 5\n",
            "lr_scheduler: one_cycle\nlr_scheduler_kwargs: {pct_start: 0.3}\n",
            "warmup_steps: changes nothing with pct_start in lr_scheduler_kwargs, which decides the warm-up",
        ),
    ] {
        check(lines, without, &[expected]);
    }
}

#[test]
fn what_every_dataset_says_itself_or_none_has_is_told() {
    let one = "because there is one dataset to train on";
    check(
        "mix_strategy: interleave_under\nshuffle_before_merging_datasets: true\n",
        "mix_strategy: interleave_under\n",
        &[&format!(
            "shuffle_before_merging_datasets, mix_strategy: changes nothing {one}"
        )],
    );
    let of = |lines: &str| {
        let job = load_text(&format!("base_model: m\n{lines}"));
        job.unwrap_or_else(|errors| panic!("{errors}"))
            .reading
            .notices
    };
    let own = "datasets: [{path: a, max_samples: 3, split: 'train[:3]'}, {path: b, max_samples: 3, split: train}]\n";
    assert_eq!(
        of(&format!("{own}max_samples: 5\ndataset_train_split: test\n")),
        [
            "max_samples: changes nothing because every dataset says its own",
            "dataset_train_split: changes nothing because every dataset says its own split"
        ]
    );
    assert_eq!(
        of(
            "datasets:\n- {path: a, type: alpaca, roles: {user: [x]}}\n- {path: b, type: completion, field_prompt: p, \
             drop_system_message: true}\n- {path: c, type: chat_template, field_text: t}\ndataset_text_field: body\n"
        ),
        [
            "roles: changes nothing with type: alpaca",
            "drop_system_message, field_prompt: changes nothing with type: completion",
            "field_text: changes nothing with type: chat_template",
        ]
    );
    assert_eq!(
        of(
            "datasets: [{path: a, type: alpaca}]\ndataset_text_field: body\ndefault_system_message: Be kind.\n\
             enable_thinking: true\n"
        ),
        [
            "dataset_text_field: changes nothing because no dataset is of plain text",
            "default_system_message, enable_thinking: changes nothing because no dataset has conversations",
        ]
    );
}

#[test]
fn other_pairs_of_which_one_leaves_the_other_nothing_are_told() {
    for (lines, without, expected) in [
        (
            "init_weights: pretrained\nreinit_weights: true\n",
            "init_weights: random\n",
            "init_weights: changes nothing with reinit_weights",
        ),
        (
            "packing: false\nsample_packing_sequentially: true\n",
            "packing: false\n",
            "sample_packing_sequentially: changes nothing without sample_packing",
        ),
        (
            "hub_model_id: a/b\npush_to_hub: false\n",
            "",
            "hub_model_id: changes nothing because nothing is pushed (push_to_hub)",
        ),
        (
            "hub_strategy: every_save\n",
            "",
            "hub_strategy: changes nothing because nothing is pushed (push_to_hub)",
        ),
        (
            "dialect: axolotl\ndataset_dir: data\n",
            "",
            "dataset_dir: changes nothing but with dialect: llama_factory",
        ),
    ] {
        check(lines, without, &[expected]);
    }
    let unsaved = job("hub_model_id: a/b\nhub_strategy: checkpoint\nsave_strategy: no\n");
    let told = "hub_strategy: changes nothing because no checkpoint is saved (save_steps)";
    assert!(
        unsaved.reading.notices.iter().any(|notice| notice == told),
        "{:?}",
        unsaved.reading.notices
    );
    let steps = job("max_steps: 5\nnum_train_epochs: 3\n");
    assert_eq!(
        steps.reading.notices,
        ["num_train_epochs: changes nothing with max_steps"]
    );
    // Whoever gives the steps on the command line knows that they replace the epochs of the file.
    let file = format!("{SMALL}num_epochs: 3\n");
    let job = load_with(&file, &[], &[("--max-steps", "5")]).unwrap();
    assert_eq!(job.reading.notices, [""; 0]);
}

#[test]
fn a_pretraining_dataset_with_max_steps_is_told_to_be_read_whole() {
    let of = |lines: &str| {
        let job = load_text(&format!("base_model: m\npretraining_dataset: a\n{lines}"));
        job.unwrap().reading.notices
    };
    let told = of("max_steps: 5\n");
    assert!(
        told.len() == 1
            && told[0].starts_with("pretraining_dataset: every row is read before training"),
        "{told:?}"
    );
    assert_eq!(of("num_epochs: 1\n"), [""; 0]);
    assert_eq!(of("max_steps: -1\n"), [""; 0]);
}
