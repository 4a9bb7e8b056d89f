//! Weights that are trained in bfloat16: they learn what float32 weights learn, and their bits depend on their inputs alone.

use common::files::snapshot::WeightsFormat;
use common::files::tensors::Dtype;
use common::job::{Optimizer, Unfrozen};

use super::eight_bits::{digests_of_workers, wide_model};
use super::*;

fn pure(job: JobSpec) -> JobSpec {
    JobSpec {
        base_dtype: BaseDtype::Bfloat16,
        pure_bf16: true,
        ..job
    }
}

#[test]
fn every_family_is_trained_to_the_same_bits_by_any_threads_and_after_a_resume() {
    for architecture in FAMILIES {
        let dir = model(architecture);
        let job = JobSpec {
            weight_decay: 0.01,
            ..pure(job(Method::Full))
        };
        check_resumed(dir.path(), &job, 1e-2, architecture);
    }
}

#[test]
fn every_optimizer_trains_them_and_workers_and_threads_change_no_bit() {
    let dir = wide_model();
    for (optimizer, rate) in [
        (Optimizer::Adamw, 3e-3),
        (Optimizer::Adamw8bit, 3e-3),
        (Optimizer::Lion, 3e-4),
        (Optimizer::Lion8bit, 3e-4),
        (
            Optimizer::Sgd {
                momentum: 0.9,
                dampening: 0.0,
                nesterov: false,
            },
            3e-2,
        ),
        (
            Optimizer::Muon {
                trains_vectors: true,
            },
            3e-3,
        ),
    ] {
        let job = JobSpec {
            optimizer,
            ..pure(job(Method::Full))
        };
        check_resumed(dir.path(), &job, rate, &optimizer.to_string());
        let alone = digests_of_workers(&dir, &job, rate, 1);
        for digest in digests_of_workers(&dir, &job, rate, 3) {
            assert_eq!(digest, alone[0], "{optimizer}");
        }
    }
}

/// A rate so small that each update is far below half the distance of two numbers of bfloat16.
#[test]
fn small_updates_come_to_what_they_come_to_in_float32() {
    let dir = wide_model();
    let losses = |job: JobSpec| -> Vec<f64> {
        let mut trainer = load(dir.path(), job, 2);
        (0..40)
            .map(|_| step(&mut trainer, &blocks(), 1e-4))
            .collect()
    };
    let (wide, narrow) = (losses(job(Method::Full)), losses(pure(job(Method::Full))));
    assert!(wide[39] < 0.9 * wide[0], "{wide:?}");
    let near = 0.01 * wide[0];
    for (wide, narrow) in wide.iter().zip(&narrow) {
        assert!((narrow - wide).abs() < near, "{narrow} for {wide}");
    }
}

#[test]
fn a_checkpoint_has_them_in_the_model_alone() {
    let dir = wide_model();
    let mut trainer = load(dir.path(), pure(job(Method::Full)), 2);
    step(&mut trainer, &blocks(), 1e-3);
    let saved = trainer.snapshot().unwrap();
    let format = WeightsFormat::Model {
        config: config("LlamaForCausalLM"),
        dtype: Dtype::BF16,
        frozen: None,
    };
    let folder = tempfile::tempdir().unwrap();
    saved.write_files(folder.path(), &format).unwrap();
    let read = Snapshot::read_files(folder.path(), &trainer.layout()).unwrap();
    assert_eq!(read, saved);
    let mut wide = load(dir.path(), job(Method::Full), 1);
    let refused = wide.restore(&saved).unwrap_err();
    assert!(matches!(refused, EngineError::LayoutMismatch { .. }));
}

#[test]
fn what_is_left_as_it_is_is_bfloat16_too() {
    let dir = model("Qwen3ForCausalLM");
    let job = JobSpec {
        unfrozen: Unfrozen::new(vec!["model.layers.1.mlp".to_owned()]),
        ..pure(job(Method::Full))
    };
    let [start, _] = check_resumed(dir.path(), &job, 1e-2, "some of the weights");
    let mut names = start.layout.tensors.iter().map(|tensor| &tensor.name);
    assert!(names.all(|name| name.starts_with("model.layers.1.mlp")));
    // The model is that of the job that trains all of its weights, norms among them, to the last bit.
    let loss = |job: JobSpec| {
        let mut trainer = load(dir.path(), job, 1);
        trainer.eval_slot(&blocks()).unwrap().loss_sum
    };
    let all = JobSpec {
        unfrozen: Unfrozen::default(),
        ..job.clone()
    };
    assert_eq!(loss(job), loss(all));
}
