//! Moments of 8 bits: the bits of a run depend neither on workers, nor on threads, nor on a checkpoint between.

use common::files::snapshot::WeightsFormat;
use common::files::tensors::Dtype;
use common::job::AdapterInit;
use serde_json::Value;

use common::job::Optimizer;

use super::*;
use crate::engine::MeanGradient;
use crate::engine::accumulator::Sums;

/// A model whose matrices are large enough for 8 bits.
fn wide_config() -> Value {
    let mut config = config("LlamaForCausalLM");
    for (name, size) in [
        ("hidden_size", 64),
        ("intermediate_size", 88),
        ("head_dim", 16),
    ] {
        config[name] = size.into();
    }
    config
}

pub(super) fn wide_model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &wide_config(), 7);
    dir
}

/// All weights, and an adapter whose factors are large enough too; with a learning rate for each optimizer.
fn jobs() -> Vec<(JobSpec, f64)> {
    let Method::Lora(adapter) = lora(TargetModules::AllLinear, 0.1) else {
        unreachable!()
    };
    let adapter = Method::Lora(LoraSpec { r: 64, ..adapter });
    let with = |method: &Method, optimizer, rate| {
        let job = JobSpec {
            optimizer,
            weight_decay: 0.01,
            ..job(method.clone())
        };
        (job, rate)
    };
    vec![
        with(&Method::Full, Optimizer::Adamw8bit, 3e-3),
        with(&Method::Full, Optimizer::Lion8bit, 3e-4),
        with(&adapter, Optimizer::Adamw8bit, 3e-3),
        with(&adapter, Optimizer::Lion8bit, 3e-3),
    ]
}

/// Models and jobs: those of [`jobs`], and adapters with magnitudes and biases, and with second halves. Their model is so narrow
/// and so wide within that vectors have 8 bits, too.
fn jobs_of_all_kinds() -> Vec<(tempfile::TempDir, JobSpec, f64)> {
    let plain = jobs().into_iter();
    let mut all: Vec<_> = plain.map(|(job, rate)| (wide_model(), job, rate)).collect();
    let kinds: [fn(&mut LoraSpec); 2] = [
        |spec| {
            spec.use_dora = true;
            spec.biases = TrainedBiases::All;
        },
        |spec| spec.init = AdapterInit::Pissa { iterations: None },
    ];
    for kind in kinds {
        let mut config = config("Qwen2ForCausalLM");
        for (name, size) in [
            ("hidden_size", 16),
            ("intermediate_size", 4100),
            ("num_hidden_layers", 1),
            ("head_dim", 4),
        ] {
            config[name] = size.into();
        }
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, 7);
        let Method::Lora(mut spec) = lora(TargetModules::AllLinear, 0.0) else {
            unreachable!()
        };
        kind(&mut spec);
        let job = JobSpec {
            optimizer: Optimizer::Adamw8bit,
            weight_decay: 0.01,
            ..job(Method::Lora(spec))
        };
        all.push((dir, job, 3e-3));
    }
    all
}

/// Some steps of so many workers: each has some of the slots, and all update by the mean of all. Returns their digests.
pub(super) fn digests_of_workers(
    dir: &tempfile::TempDir,
    job: &JobSpec,
    rate: f64,
    count: usize,
) -> Vec<String> {
    let mut workers: Vec<Trainer> = (0..count)
        .map(|i| load(dir.path(), job.clone(), i + 1))
        .collect();
    let blocks = [
        block(&[20, 17, 9], 1),
        block(&[40, 3], 2),
        block(&[11, 30], 3),
    ];
    let tokens = blocks.iter().map(Block::trained_tokens).sum();
    for number in 0..4 {
        let mut sums = vec![0i64; workers[0].layout().scalars];
        for (index, worker) in workers.iter_mut().enumerate() {
            worker.begin_step(number, tokens, blocks.len()).unwrap();
            for (slot, block) in blocks
                .iter()
                .enumerate()
                .filter(|(slot, _)| slot % count == index)
            {
                worker
                    .train_slot(slot as u32, std::slice::from_ref(block))
                    .unwrap();
            }
            let Sums::Exact { sums: own, .. } = worker.accumulator().sums() else {
                panic!("exact sums")
            };
            let mut plain = vec![0; sums.len()];
            own.read(0, &mut plain);
            sums.iter_mut()
                .zip(plain)
                .for_each(|(sum, own)| *sum += own);
        }
        let mean = MeanGradient {
            values: sums.into_iter().map(common::exact::dequantize).collect(),
            invalid: 0,
        };
        for worker in &mut workers {
            worker.apply(&mean, rate).unwrap();
        }
    }
    let state = |worker: &Trainer| {
        let snapshot = worker.snapshot().unwrap();
        snapshot.weights_digest() + &snapshot.optimizer_digest()
    };
    workers.iter().map(state).collect()
}

#[test]
fn workers_and_threads_change_no_bit_of_weights_and_moments() {
    for (dir, job, rate) in jobs_of_all_kinds() {
        let alone = digests_of_workers(&dir, &job, rate, 1);
        for count in [2, 3] {
            for digest in digests_of_workers(&dir, &job, rate, count) {
                assert_eq!(digest, alone[0], "{} {count}", job.optimizer);
            }
        }
    }
}

#[test]
fn a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits() {
    for (dir, job, rate) in jobs_of_all_kinds() {
        let mut whole = load(dir.path(), job.clone(), 1);
        let mut first = load(dir.path(), job.clone(), 3);
        for _ in 0..3 {
            step(&mut first, &blocks(), rate);
        }
        let format = WeightsFormat::Model {
            config: wide_config(),
            dtype: Dtype::BF16,
            frozen: None,
        };
        let folder = tempfile::tempdir().unwrap();
        let saved = first.snapshot().unwrap();
        // Beside weights of bfloat16 those that are trained are kept in float32, whatever they are of.
        saved.write_files(folder.path(), &format).unwrap();
        let read = Snapshot::read_files(folder.path(), &first.layout()).unwrap();
        assert_eq!(read, saved);
        let mut resumed = load(dir.path(), job.clone(), 2);
        resumed.restore(&read).unwrap();
        for _ in 0..6 {
            step(&mut whole, &blocks(), rate);
        }
        for _ in 3..6 {
            step(&mut resumed, &blocks(), rate);
        }
        let (found, expected) = (resumed.snapshot().unwrap(), whole.snapshot().unwrap());
        assert_eq!(found, expected, "{}", job.optimizer);
    }
}

#[test]
fn the_mean_loss_of_a_run_is_within_a_hundredth_of_that_with_float32_moments() {
    let dir = wide_model();
    for (job, rate) in jobs() {
        // Slowly, so that many steps are made before the text is known by heart.
        let (in_float32, rate) = match job.optimizer {
            Optimizer::Adamw8bit => (Optimizer::Adamw, rate / 5.0),
            _ => (Optimizer::Lion, rate / 3.0),
        };
        let run = |optimizer| {
            let job = JobSpec {
                optimizer,
                ..job.clone()
            };
            let mut trainer = load(dir.path(), job, 2);
            let losses = (0..30).map(|_| step(&mut trainer, &blocks(), rate));
            losses.collect::<Vec<f64>>()
        };
        let (losses, expected) = (run(job.optimizer), run(in_float32));
        assert!(
            losses[29] < 0.9 * losses[0],
            "{}: {losses:?}",
            job.optimizer
        );
        assert_ne!(losses, expected);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let apart = mean(&losses) / mean(&expected) - 1.0;
        assert!(apart.abs() < 0.01, "{}: {apart}", job.optimizer);
    }
}

#[test]
fn magnitudes_of_many_rows_have_moments_of_8_bits() {
    let all = jobs_of_all_kinds();
    let with_magnitudes = all
        .iter()
        .filter(|(_, job, _)| matches!(&job.method, Method::Lora(spec) if spec.use_dora));
    let mut count = 0;
    for (dir, job, _) in with_magnitudes {
        let layout = load(dir.path(), job.clone(), 1).layout();
        let magnitudes = layout.tensors.iter();
        let magnitudes = magnitudes.filter(|tensor| tensor.name.ends_with("magnitude_vector"));
        count += magnitudes
            .filter(|tensor| tensor.has_8bit_moments())
            .count();
    }
    assert_eq!(count, 2, "those of gate and up");
}

#[test]
fn a_state_with_float32_moments_is_refused() {
    let dir = wide_model();
    let with = |optimizer| {
        let job = JobSpec {
            optimizer,
            ..job(Method::Full)
        };
        load(dir.path(), job, 1)
    };
    let saved = with(Optimizer::Adamw).snapshot().unwrap();
    let refused = with(Optimizer::Adamw8bit).restore(&saved);
    assert!(matches!(refused, Err(EngineError::LayoutMismatch { .. })));
}
