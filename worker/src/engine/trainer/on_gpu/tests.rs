//! Training on the GPU follows training on the processor, and its bits depend on its inputs alone. On the emulator where
//! there is no GPU.

use std::path::Path;
use std::sync::Arc;

use common::data::block::Block;
use common::exact::dequantize;
use common::job::{
    AdapterInit, BaseDtype, Checkpointing, Eaft, JobSpec, LoraSpec, Method, Optimizer,
    Quantization, RateGroups, Reduction, TargetModules, TokenLoss, TrainedBiases,
};

use crate::ComputeDevice;
use crate::engine::EngineError;
use crate::engine::cuda::testing::open;
use crate::engine::testing::{
    block, config, job, load, load_on, lora, slot_sums, step, write_model,
};
use crate::engine::{MeanGradient, Trainer, TrainerOptions};

mod families;
mod four_bits;

fn model(architecture: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config(architecture), 7);
    dir
}

fn gpu() -> Option<ComputeDevice> {
    let gpu = Arc::new(open()?);
    Some(ComputeDevice::Cuda { ordinal: 0, gpu })
}

fn blocks() -> [Block; 2] {
    [block(&[20, 17, 9], 1), block(&[40, 3], 2)]
}

fn methods() -> [Method; 3] {
    let few = ["q_proj", "layers.1.mlp.down_proj"].map(str::to_owned);
    [
        Method::Full,
        lora(TargetModules::AllLinear, 0.1),
        lora(TargetModules::Named(few.to_vec()), 0.0),
    ]
}

/// The relative distance of two gradients.
fn distance(found: &[i64], expected: &[i64]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = || {
        found
            .iter()
            .zip(expected)
            .map(|(a, b)| (f64::from(dequantize(*a)), f64::from(dequantize(*b))))
    };
    let apart: f64 = pairs().map(|(a, b)| square(a - b)).sum();
    let norm: f64 = pairs().map(|(_, b)| square(b)).sum();
    (apart / norm).sqrt()
}

/// With B not zero, so that both factors have gradients.
fn trained(device: ComputeDevice, dir: &Path, job: JobSpec) -> Trainer {
    let mut start = load(dir, job.clone(), 2);
    step(&mut start, &blocks(), 1e-2);
    let mut trainer = load_on(device, dir, job, 2);
    trainer.restore(&start.snapshot().unwrap()).unwrap();
    trainer
}

#[test]
fn families_that_the_kernels_do_not_know_are_refused_by_name() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Gemma4ForCausalLM");
    let loaded = Trainer::load(TrainerOptions {
        job: Arc::new(job(Method::Full)),
        model_dir: dir.path().to_owned(),
        adapter_dir: None,
        threads: 1,
        device: gpu,
    });
    let message = loaded.err().unwrap().to_string();
    for words in ["Gemma 4", "keys that layers share", "--device cpu"] {
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn ten_steps_follow_the_processor_s_losses() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    for method in [Method::Full, lora(TargetModules::AllLinear, 0.0)] {
        let run = |device| {
            let mut trainer = load_on(device, dir.path(), job(method.clone()), 2);
            (0..10)
                .map(|_| step(&mut trainer, &blocks(), 3e-3))
                .collect::<Vec<f64>>()
        };
        let (found, expected) = (run(gpu.clone()), run(ComputeDevice::Cpu));
        assert!(expected[9] < 0.98 * expected[0]);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found / expected - 1.0).abs() < 1e-3,
                "{found} instead of {expected}"
            );
        }
    }
}

/// As two workers do: each holds a slot, their sums are added, both update from the mean.
#[test]
fn two_workers_come_to_the_bits_of_one() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    for (method, reduction) in [
        (Method::Full, Reduction::Exact),
        (lora(TargetModules::AllLinear, 0.0), Reduction::Exact),
    ] {
        let job = JobSpec {
            reduction,
            ..job(method)
        };
        let load = || load_on(gpu.clone(), dir.path(), job.clone(), 1);
        let (mut alone, mut first, mut second) = (load(), load(), load());
        for number in 0..2 {
            step(&mut alone, &blocks(), 1e-2);
            let tokens = blocks().iter().map(Block::trained_tokens).sum();
            let mut sums = Vec::new();
            for (slot, (worker, block)) in [&mut first, &mut second]
                .into_iter()
                .zip(&blocks())
                .enumerate()
            {
                worker.begin_step(number, tokens, 2).unwrap();
                worker
                    .train_slot(slot as u32, std::slice::from_ref(block))
                    .unwrap();
                worker.collect().unwrap();
                let mut held = vec![0i64; worker.layout().scalars];
                let crate::engine::accumulator::Sums::Exact { sums: packed, .. } =
                    worker.accumulator().sums()
                else {
                    unreachable!("made as exact");
                };
                packed.read(0, &mut held);
                sums.push(held);
            }
            let mean = sums[0]
                .iter()
                .zip(&sums[1])
                .map(|(a, b)| dequantize(a + b))
                .collect();
            let mean = MeanGradient {
                values: mean,
                invalid: 0,
            };
            for worker in [&mut first, &mut second] {
                worker.apply(&mean, 1e-2).unwrap();
            }
        }
        let digest = alone.weights_digest().unwrap();
        assert_eq!(first.weights_digest().unwrap(), digest);
        assert_eq!(second.weights_digest().unwrap(), digest);
        assert_eq!(first.snapshot().unwrap(), alone.snapshot().unwrap());
    }
}

/// Two layers are looked at twice each, forward and backward.
#[test]
fn a_slot_is_given_up_between_any_two_layers_unless_its_gradient_cannot_be_taken_back() {
    let Some(device) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    let (blocks, tokens) = (blocks(), blocks().iter().map(Block::trained_tokens).sum());
    for method in methods() {
        let is_full = method == Method::Full;
        let load = || load_on(device.clone(), dir.path(), job(method.clone()), 1);
        let mut quiet = load();
        step(&mut quiet, &blocks, 1e-2);
        let mut trainer = load();
        let abandon = trainer.abandon();
        trainer.begin_step(0, tokens, 2).unwrap();
        for (slot, block) in blocks.iter().enumerate() {
            let mut train = || trainer.train_slot(slot as u32, std::slice::from_ref(block));
            let looks = if is_full && slot > 0 { 2 } else { 4 };
            for look in 1..=looks {
                abandon.ask_at_look(look);
                let abandoned = train();
                let is_given_up = matches!(abandoned, Err(EngineError::Abandoned));
                assert!(is_given_up, "slot {slot}, look {look}: {abandoned:?}");
            }
            abandon.ask_at_look(looks + 1);
            train().unwrap();
        }
        trainer.apply_held(1e-2).unwrap();
        let digest = trainer.weights_digest().unwrap();
        assert_eq!(digest, quiet.weights_digest().unwrap());
    }
}

#[test]
fn a_state_goes_from_one_trainer_to_another() {
    let Some(gpu) = gpu() else { return };
    let dir = model("LlamaForCausalLM");
    let job = job(Method::Full);
    let mut first = load_on(gpu.clone(), dir.path(), job.clone(), 1);
    step(&mut first, &blocks(), 1e-2);
    let mut second = load_on(gpu, dir.path(), job, 1);
    second.restore(&first.snapshot().unwrap()).unwrap();
    assert_eq!(
        step(&mut second, &blocks(), 1e-2),
        step(&mut first, &blocks(), 1e-2)
    );
    assert_eq!(
        second.weights_digest().unwrap(),
        first.weights_digest().unwrap()
    );
}

#[test]
fn gradients_that_are_not_finite_skip_the_update() {
    let Some(gpu) = gpu() else { return };
    let dir = model("LlamaForCausalLM");
    let mut trainer = load_on(gpu, dir.path(), job(lora(TargetModules::AllLinear, 0.0)), 1);
    let mut broken = trainer.snapshot().unwrap();
    let scalars = broken.layout.scalars;
    broken.weights = vec![f32::INFINITY; scalars].into();
    trainer.restore(&broken).unwrap();
    let blocks = blocks();
    let tokens = blocks.iter().map(Block::trained_tokens).sum();
    trainer.begin_step(0, tokens, 1).unwrap();
    assert!(trainer.train_slot(0, &blocks).unwrap().invalid_scalars > 0);
    let before = trainer.weights_digest().unwrap();
    assert!(trainer.apply_held(1e-2).unwrap().skipped);
    assert_eq!(trainer.weights_digest().unwrap(), before);
}

#[test]
fn a_slot_that_does_not_fit_is_told_what_to_lower() {
    let Some(ComputeDevice::Cuda { gpu, .. }) = gpu() else {
        return;
    };
    let error = gpu.take::<u8>(1 << 45).err().unwrap();
    let error = super::explain(error, &job(Method::Full), false).to_string();
    for said in [
        "out of GPU memory",
        "micro_batch_size 1",
        "sequence_len 64",
        "gradient_checkpointing",
    ] {
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn heads_that_no_kernel_computes_are_refused_before_anything_is_loaded() {
    let Some(device) = gpu() else { return };
    let mut wide = config("LlamaForCausalLM");
    wide["head_dim"] = 12.into();
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &wide, 7);
    let options = TrainerOptions {
        job: Arc::new(job(Method::Full)),
        model_dir: dir.path().to_owned(),
        adapter_dir: None,
        threads: 1,
        device,
    };
    let error = Trainer::load(options).err().unwrap().to_string();
    assert!(
        error.contains("heads of 12") && error.contains("--device cpu"),
        "{error}"
    );
}

#[test]
fn losses_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    let eaft = |alpha, k, divisor| TokenLoss::Eaft(Eaft { alpha, k, divisor });
    for token_loss in [
        TokenLoss::Dft,
        eaft(1.0, 20, 3.0),
        eaft(0.5, 3, 1.0),
        eaft(2.0, 1000, 1.0),
        TokenLoss::Smoothed { share: 0.2 },
    ] {
        let job = JobSpec {
            token_loss,
            ..job(Method::Full)
        };
        let run = |device| slot_sums(&mut trained(device, dir.path(), job.clone()), 1, &blocks());
        let (found, expected) = (run(gpu.clone()), run(ComputeDevice::Cpu));
        let apart = distance(&found.0, &expected.0);
        assert!(apart < 1e-5, "{token_loss:?}: gradients are {apart} apart");
        assert!((found.1 / expected.1 - 1.0).abs() < 1e-5, "{token_loss:?}");
    }
}

#[test]
fn every_optimizer_follows_the_processor_and_resumes_to_the_bit() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    let sgd = |momentum| Optimizer::Sgd {
        momentum,
        dampening: 0.0,
        nesterov: false,
    };
    for (optimizer, rate) in [
        (Optimizer::Adamw8bit, 1e-4),
        (Optimizer::Lion, 1e-4),
        (Optimizer::Lion8bit, 1e-4),
        (sgd(0.0), 1e-1),
        (sgd(0.9), 1e-1),
    ] {
        let job = JobSpec {
            optimizer,
            lr_groups: RateGroups::LoraPlus {
                ratio: 2.0,
                embedding: None,
            },
            ..job(lora(TargetModules::AllLinear, 0.0))
        };
        let mut whole = load_on(gpu.clone(), dir.path(), job.clone(), 2);
        let mut on_cpu = load(dir.path(), job.clone(), 2);
        for _ in 0..2 {
            let found = step(&mut whole, &blocks(), rate);
            let expected = step(&mut on_cpu, &blocks(), rate);
            assert!((found / expected - 1.0).abs() < 1e-4, "{optimizer}");
        }
        let saved = whole.snapshot().unwrap();
        assert_eq!(saved.moments.len(), optimizer.moments().count);
        let mut resumed = load_on(gpu.clone(), dir.path(), job, 2);
        resumed.restore(&saved).unwrap();
        for trainer in [&mut whole, &mut resumed] {
            step(trainer, &blocks(), rate);
        }
        assert_eq!(resumed.snapshot().unwrap(), whole.snapshot().unwrap());
    }
}

#[test]
fn an_optimizer_that_gpus_have_not_is_refused_when_a_job_is_loaded() {
    let Some(gpu) = gpu() else { return };
    let dir = model("Qwen3ForCausalLM");
    let muon = JobSpec {
        optimizer: Optimizer::Muon {
            trains_vectors: true,
        },
        ..job(Method::Full)
    };
    let refused = Trainer::load(TrainerOptions {
        job: Arc::new(muon),
        model_dir: dir.path().to_owned(),
        adapter_dir: None,
        threads: 1,
        device: gpu,
    });
    let Err(error) = refused else {
        panic!("it was loaded")
    };
    assert!(
        error.to_string().contains("Muon is not done on GPUs"),
        "{error}"
    );
}

#[test]
fn adapters_that_gpus_have_not_are_refused_when_a_job_is_loaded() {
    let Some(gpu) = gpu() else { return };
    let (dense, mixture) = (model("Qwen2ForCausalLM"), model("Qwen3MoeForCausalLM"));
    type Change = fn(&mut LoraSpec);
    let kinds: [(Change, &str); 7] = [
        (|spec| spec.use_dora = true, "use_dora"),
        (|spec| spec.init = AdapterInit::Olora, "init_lora_weights"),
        (|spec| spec.biases = TrainedBiases::LoraOnly, "bias"),
        (|spec| spec.lora_bias = true, "lora_bias"),
        (
            |spec| spec.target_modules = TargetModules::Named(vec!["embed_tokens".to_owned()]),
            "lora_target_modules",
        ),
        (
            |spec| spec.target_modules = TargetModules::Named(vec!["lm_head".to_owned()]),
            "lora_target_modules",
        ),
        (
            |spec| spec.shape.parameters = vec!["experts.down_proj".to_owned()],
            "lora_target_parameters",
        ),
    ];
    for (change, field) in kinds {
        let names = ["q_proj".to_owned(), "v_proj".to_owned()];
        let Method::Lora(mut spec) = lora(TargetModules::Named(names.into()), 0.0) else {
            panic!("no adapter")
        };
        change(&mut spec);
        let dir = match spec.shape.parameters.is_empty() {
            true => &dense,
            false => &mixture,
        };
        let refused = Trainer::load(TrainerOptions {
            job: Arc::new(job(Method::Lora(spec))),
            model_dir: dir.path().to_owned(),
            adapter_dir: None,
            threads: 1,
            device: gpu.clone(),
        });
        let Err(error) = refused else {
            panic!("{field}: it was loaded")
        };
        let told = error.to_string();
        assert!(
            told.contains(field) && told.contains("--device cpu"),
            "{told}"
        );
    }
}
