//! The curve of the learning rate: what its keys mean, and what is refused.

use super::*;

fn curve(lines: &str) -> LrScheduler {
    job(lines).lr_scheduler
}

#[test]
fn every_curve_has_the_defaults_of_its_library() {
    let stages = WarmupStableDecay {
        num_stable_steps: None,
        num_decay_steps: Some(10),
        warmup_type: Stage::Linear,
        decay_type: Stage::Cosine,
        min_lr_ratio: 0.0,
        num_cycles: 0.5,
    };
    for (lines, expected) in [
        (
            "lr_scheduler: cosine_with_restarts\n",
            LrScheduler::CosineWithRestarts { num_cycles: 1.0 },
        ),
        (
            "lr_scheduler_type: polynomial\n",
            LrScheduler::Polynomial {
                lr_end: 1e-7,
                power: 1.0,
            },
        ),
        (
            "lr_scheduler: inverse-sqrt\n",
            LrScheduler::InverseSqrt { timescale: None },
        ),
        (
            "lr_scheduler: warmup_stable_decay\nlr_scheduler_kwargs:\n  num_decay_steps: 10\n",
            LrScheduler::WarmupStableDecay(stages),
        ),
        (
            "lr_scheduler: cosine_warmup_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1, min_lr: null}\n",
            LrScheduler::CosineWarmupWithMinLr {
                min_lr_rate: 0.1,
                num_cycles: 0.5,
                warmup_lr_rate: None,
            },
        ),
        (
            "lr_scheduler: rex\n",
            LrScheduler::Rex { min_lr_ratio: 0.0 },
        ),
    ] {
        assert_eq!(curve(lines), expected, "{lines}");
    }
}

#[test]
fn settings_that_say_the_usual_are_the_usual_curve() {
    for lines in [
        "lr_scheduler: cosine\nlr_scheduler_kwargs: {num_cycles: 0.5}\n",
        "lr_scheduler_kwargs: {}\n",
        "lr_scheduler_kwargs:\n",
        "lr_scheduler: COSINE\ncosine_min_lr_ratio: 0\nlr_quadratic_warmup: false\n",
    ] {
        let job = job(lines);
        assert_eq!(job.lr_scheduler, LrScheduler::Cosine, "{lines}");
        assert_eq!(job.digest(), super::job("").digest());
    }
    let of = |cycles: &str| {
        let lines = format!("lr_scheduler_kwargs: {{num_cycles: {cycles}}}\n");
        super::job(&lines).digest()
    };
    assert_ne!(of("1"), of("2"));
    // The form that digests and records have had from the start.
    for name in ["cosine", "linear", "constant", "constant_with_warmup"] {
        let scheduler = curve(&format!("lr_scheduler: {name}\n"));
        assert_eq!(serde_json::to_value(scheduler).unwrap(), name);
    }
}

#[test]
fn the_lowest_rate_is_given_as_a_rate_or_as_a_share() {
    let expected = LrScheduler::CosineWithMinLr {
        min_lr_rate: 0.1,
        num_cycles: 0.5,
    };
    for lines in [
        "lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n",
        "lr_scheduler: cosine_with_min_lr\nlearning_rate: 2e-3\nlr_scheduler_kwargs: {min_lr: 2e-4}\n",
        "cosine_min_lr_ratio: 0.1\n",
        "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.1\ncosine_constant_lr_ratio: 0\n",
    ] {
        assert_eq!(curve(lines), expected, "{lines}");
    }
}

#[test]
fn settings_are_a_mapping_or_json_text_wherever_they_are_given() {
    let expected = LrScheduler::CosineWithRestarts { num_cycles: 3.0 };
    let file = format!("{SMALL}lr_scheduler: cosine_with_restarts\n");
    let json = r#"{"num_cycles": 3}"#;
    for (flags, variables) in [
        (vec![("--lr-scheduler-kwargs", json)], vec![]),
        (
            vec![("--lr_scheduler_kwargs", " {'num_cycles': 3.0}")],
            vec![],
        ),
        (vec![], vec![("MUSTER_LR_SCHEDULER_KWARGS", json)]),
    ] {
        let job = load_with(&file, &variables, &flags).unwrap();
        assert_eq!(job.lr_scheduler, expected);
    }
    let quoted = format!("{file}lr_scheduler_kwargs: '{json}'\n");
    assert_eq!(load_text(&quoted).unwrap().lr_scheduler, expected);
}

#[test]
fn a_setting_that_the_curve_does_not_know_is_refused_with_those_it_knows() {
    for (lines, expected) in [
        (
            "lr_scheduler: polynomial\nlr_scheduler_kwargs:\n  powr: 2\n",
            "5: `lr_scheduler_kwargs` has `powr`, which is no setting of `polynomial`: it knows lr_end, power; did you mean `power`?",
        ),
        (
            "lr_scheduler: linear\nlr_scheduler_kwargs: {num_cycles: 2}\n",
            "4: `lr_scheduler_kwargs` has `num_cycles`, which is no setting of `linear`: it takes none here; remove it",
        ),
        (
            "lr_scheduler: one_cycle\nlr_scheduler_kwargs: {max_momentum: 0.9}\n",
            "4: `lr_scheduler_kwargs` has `max_momentum`, which is no setting of `one_cycle`: it knows anneal_strategy, pct_start, div_factor, \
             final_div_factor, three_phase, cycle_momentum",
        ),
        (
            "lr_scheduler_kwargs: [1]\n",
            "3: `lr_scheduler_kwargs` must be a mapping (lr_scheduler_kwargs: {num_cycles: 2}), found a list",
        ),
        (
            "lr_scheduler: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 2.5}\n",
            "4: `num_decay_steps` in `lr_scheduler_kwargs` must be a whole number of steps, at most 10^9, found `2.5`",
        ),
        (
            "lr_scheduler: warmup_stable_decay\nlr_scheduler_kwargs: {decay_type: exp}\n",
            "4: `decay_type` in `lr_scheduler_kwargs` must be one of linear, cosine, 1-sqrt, found `exp`",
        ),
    ] {
        check_problems(lines, &[expected]);
    }
}

#[test]
fn settings_that_no_curve_can_have_are_refused() {
    for (lines, expected) in [
        (
            "lr_scheduler: cosine_with_min_lr\n",
            "3: `lr_scheduler` needs min_lr or min_lr_rate, the lowest rate or its share of the peak (lr_scheduler_kwargs: {min_lr_rate: 0.1})",
        ),
        (
            "lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6, min_lr_rate: 0.1}\n",
            "4: `lr_scheduler_kwargs` has both min_lr and min_lr_rate; remove one",
        ),
        (
            "lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0}\n",
            "4: `lr_scheduler_kwargs` has a min_lr of 1, which is more than learning_rate (0.00002)",
        ),
        (
            "lr_scheduler: polynomial\nlearning_rate: 1e-3\nlr_scheduler_kwargs: {lr_end: 0.001}\n",
            "5: `lr_scheduler_kwargs` has an lr_end of 0.001, which must be less than learning_rate (0.001)",
        ),
        (
            "lr_scheduler: one_cycle\nlr_scheduler_kwargs: {final_div_factor: 0.01}\n",
            "4: `lr_scheduler_kwargs` has a div_factor of 25 and a final_div_factor of 0.01, which end above learning_rate",
        ),
        (
            "cosine_min_lr_ratio: 1.5\n",
            "3: `cosine_min_lr_ratio` must be a number from 0 to 1, found `1.5`",
        ),
    ] {
        check_problems(lines, &[expected]);
    }
}

#[test]
fn a_rate_that_follows_the_losses_is_refused_with_the_reason() {
    for name in ["reduce_lr_on_plateau", "greedy"] {
        let found = problems_of(&format!("lr_scheduler: {name}\n"));
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("3: `lr_scheduler` is `"), "{found:?}");
        assert!(found[0].contains("follows the losses"), "{found:?}");
    }
    let found = problems_of("lr_scheduler: cosin\n");
    assert!(found[0].contains("inverse_sqrt") && found[0].contains("did you mean `cosine`?"));
}

#[test]
fn keys_of_axolotl_that_change_nothing_are_named() {
    let told = |lines: &str| job(lines).reading.notices;
    for (lines, expected) in [
        (
            "lr_scheduler: linear\ncosine_min_lr_ratio: 0.1\n",
            "cosine_min_lr_ratio: changes nothing with lr_scheduler: linear, as in Axolotl",
        ),
        (
            "cosine_constant_lr_ratio: 0.8\n",
            "cosine_constant_lr_ratio: changes nothing with no cosine_min_lr_ratio, as in Axolotl",
        ),
        (
            "lr_quadratic_warmup: true\ncosine_min_lr_ratio: 0.1\n",
            "cosine_min_lr_ratio: changes nothing with lr_quadratic_warmup, as in Axolotl",
        ),
    ] {
        assert_eq!(told(lines), [expected], "{lines}");
    }
    let eta = told("eta_min: 7e-7\n");
    assert!(eta[0].starts_with("eta_min: Axolotl does nothing with it"));
    let momentum = told("lr_scheduler: one_cycle\n");
    assert!(momentum[0].starts_with("one_cycle: adam_beta1 stays as it is"));
    assert_eq!(
        told("lr_scheduler: one_cycle\nlr_scheduler_kwargs: {cycle_momentum: false}\n"),
        [""; 0]
    );
}
