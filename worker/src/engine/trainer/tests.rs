//! What a user of the trainer relies on: it learns, and its bits depend on its inputs alone.

use common::job::{
    BaseDtype, Eaft, LoraSpec, Optimizer, RateGroup, RateGroups, TokenLoss, TrainedBiases,
};

use super::*;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::optim::gradient_norm;
use crate::engine::testing::{block, config, job, load, lora, slot_sums, step, write_model};
use common::job::{Checkpointing, TargetModules};
use common::model::linears;

mod adapters;
mod eight_bits;
mod four_bits;
mod unfrozen;

const FAMILIES: [&str; 19] = [
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "GptOssForCausalLM",
    "Qwen3_5ForCausalLM",
];

fn model(architecture: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config(architecture), 7);
    dir
}

fn methods(architecture: &str) -> [Method; 3] {
    let names = match architecture {
        // Experts, and what is named as they are, have no adapter.
        "Qwen3MoeForCausalLM" | "MixtralForCausalLM" | "OlmoeForCausalLM" | "GptOssForCausalLM" => {
            ["v_proj", "o_proj"]
        }
        _ => ["q_proj", "layers.1.mlp.down_proj"],
    };
    [
        Method::Full,
        lora(TargetModules::AllLinear, 0.1),
        lora(TargetModules::Named(names.map(str::to_owned).into()), 0.0),
    ]
}

fn blocks() -> [Block; 2] {
    [block(&[20, 17, 9], 1), block(&[40, 3], 2)]
}

#[test]
fn the_loss_falls_for_every_family_and_method() {
    for architecture in FAMILIES {
        let dir = model(architecture);
        for method in methods(architecture) {
            let mut trainer = load(dir.path(), job(method.clone()), 2);
            let first = step(&mut trainer, &blocks(), 1e-2);
            let mut last = first;
            for _ in 0..20 {
                last = step(&mut trainer, &blocks(), 1e-2);
            }
            assert!(
                last < 0.85 * first,
                "{architecture} {method:?}: {first} -> {last}"
            );
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    for architecture in [
        "Qwen3ForCausalLM",
        "Qwen2MoeForCausalLM",
        "GptOssForCausalLM",
        "Qwen3_5ForCausalLM",
    ] {
        let dir = model(architecture);
        for method in methods(architecture) {
            let run = |threads| {
                let mut trainer = load(dir.path(), job(method.clone()), threads);
                let losses: Vec<f64> = (0..3)
                    .map(|_| step(&mut trainer, &blocks(), 1e-2))
                    .collect();
                (losses, trainer.weights_digest().unwrap())
            };
            let expected = run(1);
            assert_eq!(run(2), expected);
            assert_eq!(run(3), expected);
        }
    }
}

/// Large enough that products are split over threads.
#[test]
fn the_number_of_threads_does_not_change_a_bit_of_a_wider_model() {
    let mut config = config("Qwen3ForCausalLM");
    for (key, value) in [
        ("hidden_size", 192),
        ("intermediate_size", 416),
        ("head_dim", 48),
    ] {
        config[key] = value.into();
    }
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config, 7);
    let blocks = [block(&[64], 1), block(&[30, 34], 2), block(&[5, 50], 3)];
    for (method, base_dtype) in [
        (Method::Full, BaseDtype::Float32),
        (lora(TargetModules::AllLinear, 0.1), BaseDtype::Float32),
        (lora(TargetModules::AllLinear, 0.0), BaseDtype::Bfloat16),
    ] {
        let run = |threads| {
            let job = JobSpec {
                base_dtype,
                gradient_checkpointing: match threads {
                    3 => Checkpointing::Always,
                    5 => Checkpointing::Auto,
                    _ => Checkpointing::Never,
                },
                ..job(method.clone())
            };
            slot_sums(&mut load(dir.path(), job, threads), 0, &blocks)
        };
        let expected = run(1);
        assert!(expected.0.iter().any(|sum| *sum != 0));
        assert_eq!(run(2), expected);
        assert_eq!(run(3), expected);
        assert_eq!(run(5), expected);
    }
}

#[test]
fn checkpointing_does_not_change_a_bit() {
    for architecture in [
        "Qwen3ForCausalLM",
        "Qwen2MoeForCausalLM",
        "GptOssForCausalLM",
        "Qwen3_5ForCausalLM",
    ] {
        let dir = model(architecture);
        for method in methods(architecture) {
            let run = |gradient_checkpointing| {
                let job = JobSpec {
                    gradient_checkpointing,
                    ..job(method.clone())
                };
                slot_sums(&mut load(dir.path(), job, 2), 0, &blocks())
            };
            assert_eq!(run(Checkpointing::Always), run(Checkpointing::Never));
        }
    }
}

/// Of eight experts a token goes through one, so that some see none of a short text.
#[test]
fn an_expert_that_no_token_goes_through_stays_where_it_is() {
    // Mixtral has three matrices for each expert, GPT-OSS a part of four tensors.
    for (architecture, of_one) in [("MixtralForCausalLM", 3), ("GptOssForCausalLM", 4)] {
        let mut config = config(architecture);
        config["num_experts"] = 8.into();
        config["num_experts_per_tok"] = 1.into();
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, 7);
        let mut trainer = load(dir.path(), job(Method::Full), 2);
        let (sums, _) = slot_sums(&mut trainer, 0, &[block(&[3], 1)]);
        let layout = trainer.layout();
        let experts = layout.tensors.iter();
        let experts = experts.filter(|tensor| tensor.name.contains(".experts."));
        let moved = experts.flat_map(|tensor| {
            let parts = if of_one == 4 { 8 } else { 1 };
            let sums = &sums[tensor.offset..][..tensor.scalars()];
            let parts = sums.chunks(tensor.scalars() / parts);
            parts.map(|part| part.iter().any(|sum| *sum != 0))
        });
        let moved: Vec<bool> = moved.collect();
        // In each of two layers at least five of eight.
        assert_eq!(moved.len(), 2 * 8 * of_one);
        assert!(moved.contains(&true));
        assert!(moved.iter().filter(|moved| !**moved).count() >= 2 * 5 * of_one);
    }
}

#[test]
fn a_packed_block_equals_its_documents_one_by_one() {
    for architecture in FAMILIES {
        let dir = model(architecture);
        let method = lora(TargetModules::AllLinear, 0.0);
        for method in [Method::Full, method] {
            let mut trainer = load(dir.path(), job(method), 2);
            step(&mut trainer, &blocks(), 1e-2);
            let packed = block(&[20, 17, 9], 1);
            let document = |range: std::ops::Range<usize>| Block {
                tokens: packed.tokens[range.clone()].to_vec(),
                segments: vec![1; range.len()],
                trained: packed.trained[range].to_vec(),
            };
            let alone = [document(0..20), document(20..37), document(37..46)];
            let whole = slot_sums(&mut trainer, 1, std::slice::from_ref(&packed));
            // The same divisor for all, so that the sums can be added.
            let tokens = packed.trained_tokens();
            trainer.begin_step(2, tokens, 3).unwrap();
            let mut loss = 0.0;
            for (slot, document) in alone.iter().enumerate() {
                let outcome = trainer.train_slot(slot as u32, std::slice::from_ref(document));
                loss += outcome.unwrap().loss_sum;
            }
            assert!((loss - whole.1).abs() < 1e-4 * loss, "{loss} {}", whole.1);
            let mean = trainer.accumulator().mean();
            let expected: Vec<f32> = whole
                .0
                .iter()
                .map(|sum| common::exact::dequantize(*sum))
                .collect();
            let norm = gradient_norm(MeanSource::Values(&expected));
            let difference: Vec<f32> = mean.iter().zip(&expected).map(|(a, b)| a - b).collect();
            assert!(gradient_norm(MeanSource::Values(&difference)) < 1e-4 * norm);
        }
    }
}

#[test]
fn a_slot_gives_the_same_bits_whatever_ran_before() {
    let dir = model("LlamaForCausalLM");
    let job = job(lora(TargetModules::AllLinear, 0.2));
    let mut fresh = load(dir.path(), job.clone(), 2);
    let expected = slot_sums(&mut fresh, 5, &blocks());
    let mut used = load(dir.path(), job, 2);
    slot_sums(&mut used, 3, &[block(&[64], 9)]);
    used.eval_slot(&[block(&[11], 8)]).unwrap();
    assert_eq!(slot_sums(&mut used, 5, &blocks()), expected);
}

#[test]
fn a_held_slot_is_not_added_twice() {
    let dir = model("LlamaForCausalLM");
    let mut trainer = load(dir.path(), job(Method::Full), 1);
    trainer.begin_step(0, 10, 1).unwrap();
    let first = trainer.train_slot(0, &blocks()).unwrap();
    let sums = trainer.accumulator().mean();
    trainer.begin_step(0, 10, 1).unwrap();
    assert_eq!(trainer.train_slot(0, &blocks()).unwrap(), first);
    assert_eq!(trainer.accumulator().mean(), sums);
}

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

#[test]
fn a_bfloat16_base_trains_close_to_the_float32_one() {
    for architecture in ["Qwen3ForCausalLM", "Qwen3_5ForCausalLM"] {
        let dir = model(architecture);
        let run = |base_dtype, threads| {
            let job = JobSpec {
                base_dtype,
                ..job(lora(TargetModules::AllLinear, 0.0))
            };
            let mut trainer = load(dir.path(), job, threads);
            (0..3)
                .map(|_| step(&mut trainer, &blocks(), 1e-2))
                .collect::<Vec<f64>>()
        };
        let (narrow, wide) = (run(BaseDtype::Bfloat16, 1), run(BaseDtype::Float32, 1));
        for (narrow, wide) in narrow.iter().zip(&wide) {
            assert!(
                (narrow - wide).abs() < 0.02 * wide,
                "{architecture}: {narrow} {wide}"
            );
        }
        assert_ne!(narrow, wide);
        assert_eq!(run(BaseDtype::Bfloat16, 3), narrow);
    }
}

#[test]
fn training_starts_from_an_adapter_of_the_job_s_rank_and_targets() {
    use common::files::adapter::AdapterConfig;
    use common::files::snapshot::WeightsFormat;
    let dir = model("LlamaForCausalLM");
    let method = lora(TargetModules::AllLinear, 0.0);
    let mut first = load(dir.path(), job(method.clone()), 1);
    step(&mut first, &blocks(), 1e-2);
    let Method::Lora(spec) = &method else {
        unreachable!("made as LoRA");
    };
    let linears = linears(first.config(), 0).into_iter();
    let names = linears.map(|linear| linear.path.to_owned());
    let config = AdapterConfig::from_lora(spec, "model", names);
    let adapter = tempfile::tempdir().unwrap();
    let format = WeightsFormat::Adapter(config);
    first
        .snapshot()
        .unwrap()
        .write_weights(adapter.path(), &format)
        .unwrap();
    let start = |method: Method| {
        Trainer::load(TrainerOptions {
            job: Arc::new(job(method)),
            model_dir: dir.path().to_owned(),
            adapter_dir: Some(adapter.path().to_owned()),
            threads: 1,
            device: ComputeDevice::Cpu,
        })
    };
    let second = start(method.clone()).unwrap();
    assert_eq!(
        second.weights_digest().unwrap(),
        first.weights_digest().unwrap()
    );
    let other_rank = Method::Lora(LoraSpec {
        r: 8,
        ..spec.clone()
    });
    let message = start(other_rank).err().unwrap().to_string();
    assert!(
        message.contains("rank is 4, the job's lora_r is 8"),
        "{message}"
    );
    type Change = fn(&mut LoraSpec);
    let others: [(Change, &str); 2] = [
        (|spec| spec.use_dora = true, "its use_dora is false"),
        (
            |spec| spec.biases = TrainedBiases::LoraOnly,
            "its bias is none",
        ),
    ];
    for (change, told) in others {
        let mut spec = spec.clone();
        change(&mut spec);
        let message = start(Method::Lora(spec)).err().unwrap().to_string();
        assert!(message.contains(told), "{message}");
    }
    let fewer = lora(TargetModules::Named(vec!["q_proj".to_owned()]), 0.0);
    let message = start(fewer).err().unwrap().to_string();
    assert!(
        message.contains("has, beside what the job trains,"),
        "{message}"
    );
    let mut broken = first.snapshot().unwrap();
    broken.weights[3] = f32::NAN;
    broken.write_weights(adapter.path(), &format).unwrap();
    let message = start(method).err().unwrap().to_string();
    assert!(message.contains("not finite"), "{message}");
}

#[test]
fn a_target_that_matches_nothing_is_named() {
    let dir = model("LlamaForCausalLM");
    let names = vec!["query".to_owned(), "value".to_owned()];
    let options = TrainerOptions {
        job: Arc::new(job(lora(TargetModules::Named(names), 0.0))),
        model_dir: dir.path().to_owned(),
        adapter_dir: None,
        threads: 1,
        device: ComputeDevice::Cpu,
    };
    let message = Trainer::load(options).err().unwrap().to_string();
    assert!(
        message.contains("is called query") && message.contains("up_proj"),
        "{message}"
    );
}

#[test]
fn a_slot_without_trained_tokens_adds_nothing() {
    let dir = model("LlamaForCausalLM");
    let mut trainer = load(dir.path(), job(Method::Full), 1);
    let mut silent = block(&[20], 1);
    silent.trained.fill(false);
    trainer.begin_step(0, 1, 1).unwrap();
    let outcome = trainer.train_slot(0, &[silent]).unwrap();
    assert_eq!(outcome, SlotOutcome::default());
    assert!(trainer.accumulator().mean().iter().all(|g| *g == 0.0));
}

#[test]
fn a_restored_trainer_goes_on_to_the_same_bits() {
    let dir = model("Qwen3ForCausalLM");
    let job = job(lora(TargetModules::AllLinear, 0.1));
    let mut whole = load(dir.path(), job.clone(), 2);
    step(&mut whole, &blocks(), 1e-2);
    let snapshot = whole.snapshot().unwrap();
    step(&mut whole, &blocks(), 1e-2);
    let mut resumed = load(dir.path(), job, 1);
    resumed.restore(&snapshot).unwrap();
    step(&mut resumed, &blocks(), 1e-2);
    assert_eq!(
        resumed.weights_digest().unwrap(),
        whole.weights_digest().unwrap()
    );
    assert_eq!(resumed.snapshot().unwrap(), whole.snapshot().unwrap());
    let mut other = load(dir.path(), crate::engine::testing::job(Method::Full), 1);
    assert!(other.restore(&snapshot).is_err());
}

#[test]
fn an_abandoned_slot_leaves_the_accumulator_as_it_was() {
    for method in methods("Qwen3ForCausalLM") {
        check_abandoned_slots(job(method));
    }
}

fn check_abandoned_slots(job: JobSpec) {
    let dir = model("Qwen3ForCausalLM");
    let quiet = slot_sums(&mut load(dir.path(), job.clone(), 2), 0, &blocks());
    let mut trainer = load(dir.path(), job, 2);
    trainer.begin_step(0, 5, 1).unwrap();
    let abandon = trainer.abandon();
    abandon.ask();
    let refused = trainer.train_slot(0, &blocks());
    assert!(
        matches!(refused, Err(EngineError::Abandoned)),
        "{refused:?}"
    );
    let refused = trainer.eval_slot(&blocks());
    assert!(
        matches!(refused, Err(EngineError::Abandoned)),
        "{refused:?}"
    );
    // At any moment of the pass.
    for microseconds in (0..2000).step_by(100) {
        abandon.clear();
        let asking = abandon.clone();
        let asker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_micros(microseconds));
            asking.ask();
        });
        match trainer.train_slot(0, &blocks()) {
            Ok(_) => trainer.forget_slots(),
            Err(EngineError::Abandoned) => assert!(trainer.accumulator().held().is_empty()),
            Err(error) => panic!("{error}"),
        }
        asker.join().unwrap();
        trainer.begin_step(0, 5, 1).unwrap();
    }
    abandon.clear();
    assert_eq!(slot_sums(&mut trainer, 0, &blocks()), quiet);
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
