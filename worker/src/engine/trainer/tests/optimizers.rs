//! Updates: every optimizer and loss, and the states that they leave.

use common::job::{Eaft, Optimizer, RateGroup, RateGroups, TokenLoss};

use super::*;

#[test]
fn an_update_from_held_sums_is_that_of_their_mean() {
    let dir = model("Qwen3ForCausalLM");
    for job in [job(Method::Full), job(lora(TargetModules::AllLinear, 0.0))] {
        let [mut held, mut given] = [1, 3].map(|threads| load(dir.path(), job.clone(), threads));
        for step in 0..2 {
            assert_eq!(
                slot_sums(&mut held, step, &blocks()),
                slot_sums(&mut given, step, &blocks())
            );
            let mean = MeanGradient {
                values: given.accumulator().mean(),
                invalid: 0,
            };
            let expected = given.apply(&mean, 1e-2).unwrap();
            assert_eq!(held.apply_held(1e-2).unwrap(), expected);
            assert_eq!(
                held.weights_digest().unwrap(),
                given.weights_digest().unwrap()
            );
        }
    }
}

#[test]
fn an_invalid_gradient_skips_the_update_but_not_the_step() {
    let dir = model("LlamaForCausalLM");
    let mut trainer = load(dir.path(), job(Method::Full), 1);
    let before = trainer.weights_digest().unwrap();
    let mean = MeanGradient {
        values: vec![1.0; trainer.layout().scalars],
        invalid: 1,
    };
    let outcome = trainer.apply(&mean, 1.0).unwrap();
    assert!(outcome.skipped);
    assert_eq!(
        (trainer.step(), trainer.weights_digest().unwrap()),
        (1, before)
    );
}

/// Jobs with each optimizer, learning rates by group and each loss, and a learning rate that they learn with.
fn jobs_of_every_kind() -> Vec<(JobSpec, f64)> {
    let adapter = lora(TargetModules::AllLinear, 0.1);
    let with = |method: &Method, optimizer, rate| {
        let job = JobSpec {
            optimizer,
            weight_decay: 0.01,
            ..job(method.clone())
        };
        (job, rate)
    };
    let sgd = |momentum, nesterov| Optimizer::Sgd {
        momentum,
        dampening: 0.0,
        nesterov,
    };
    let muon = |trains_vectors| Optimizer::Muon { trains_vectors };
    let mut jobs = vec![
        with(&Method::Full, sgd(0.0, false), 1.0),
        with(&Method::Full, sgd(0.9, true), 0.1),
        with(&Method::Full, Optimizer::Lion, 1e-3),
        with(&Method::Full, muon(true), 1e-2),
        with(&Method::Full, muon(false), 1e-2),
        with(&adapter, sgd(0.9, false), 1.0),
        with(&adapter, Optimizer::Lion, 3e-3),
        with(&adapter, muon(true), 3e-2),
    ];
    let group = RateGroup {
        name: "output".to_owned(),
        modules: vec!["o_proj".to_owned()],
        lr: 3e-2,
    };
    let grouped = RateGroups::Named {
        embedding: Some(1e-3),
        groups: vec![group],
    };
    for (method, lr_groups) in [
        (
            &adapter,
            RateGroups::LoraPlus {
                ratio: 8.0,
                embedding: None,
            },
        ),
        (&Method::Full, grouped),
    ] {
        let grouped = JobSpec {
            lr_groups,
            ..job(method.clone())
        };
        jobs.push((grouped, 1e-2));
    }
    let eaft = Eaft {
        alpha: 0.5,
        k: 20,
        divisor: 3.0,
    };
    for token_loss in [
        TokenLoss::Dft,
        TokenLoss::Eaft(eaft),
        TokenLoss::Smoothed { share: 0.1 },
    ] {
        let job = JobSpec {
            token_loss,
            ..job(adapter.clone())
        };
        jobs.push((job, 1e-2));
    }
    jobs
}

#[test]
fn every_optimizer_and_loss_learns_and_its_bits_depend_neither_on_threads_nor_on_a_resume() {
    let dir = model("Qwen3ForCausalLM");
    for (job, rate) in jobs_of_every_kind() {
        let name = format!("{} {} {:?}", job.optimizer, job.token_loss, job.lr_groups);
        let mut whole = load(dir.path(), job.clone(), 1);
        let losses: Vec<f64> = (0..6).map(|_| step(&mut whole, &blocks(), rate)).collect();
        // What is weighted by its own probability grows with it at first.
        match job.token_loss {
            TokenLoss::Dft => assert_ne!(losses[5], losses[0], "{name}"),
            _ => assert!(losses[5] < 0.99 * losses[0], "{name}: {losses:?}"),
        }
        let mut first = load(dir.path(), job.clone(), 3);
        for _ in 0..3 {
            step(&mut first, &blocks(), rate);
        }
        let saved = first.snapshot().unwrap();
        assert_eq!(saved.moments.len(), job.optimizer.moments().count, "{name}");
        let mut resumed = load(dir.path(), job.clone(), 2);
        resumed.restore(&saved).unwrap();
        for _ in 3..6 {
            step(&mut resumed, &blocks(), rate);
        }
        assert_eq!(
            resumed.snapshot().unwrap(),
            whole.snapshot().unwrap(),
            "{name}"
        );
    }
}

#[test]
fn a_state_of_another_optimizer_is_refused() {
    let dir = model("Qwen3ForCausalLM");
    let with = |optimizer| {
        let job = JobSpec {
            optimizer,
            ..job(Method::Full)
        };
        load(dir.path(), job, 1)
    };
    let saved = with(Optimizer::Adamw).snapshot().unwrap();
    let refused = with(Optimizer::Lion).restore(&saved);
    assert!(matches!(refused, Err(EngineError::LayoutMismatch { .. })));
}
