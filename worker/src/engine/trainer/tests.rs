//! What a user of the trainer relies on: it learns, and its bits depend on its inputs alone.

use std::path::Path;

use common::job::{BaseDtype, Checkpointing, LoraSpec, TargetModules, TrainedBiases};
use common::model::linears;

use super::*;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::optim::gradient_norm;
use crate::engine::testing::{block, config, job, load, lora, slot_sums, step, write_model};

mod adapters;
mod bfloat16;
mod eight_bits;
mod four_bits;
mod optimizers;
mod slots;
mod unfrozen;

const FAMILIES: [&str; 22] = [
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma4ForCausalLM",
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
    "Qwen3_5MoeForCausalLM",
    "Qwen3NextForCausalLM",
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
        "Qwen3NextForCausalLM" => ["out_proj", "o_proj"],
        "Qwen3_5MoeForCausalLM" => ["out_proj", "mlp.shared_expert.down_proj"],
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

/// A run of four steps on one thread learns, and ends as one of three threads does that goes on with two behind its second step.
/// Returns the states at its start and end.
fn check_resumed(model: &Path, job: &JobSpec, rate: f64, name: &str) -> [Snapshot; 2] {
    let mut whole = load(model, job.clone(), 1);
    let start = whole.snapshot().unwrap();
    let losses: Vec<f64> = (0..4).map(|_| step(&mut whole, &blocks(), rate)).collect();
    assert!(losses[3] < 0.99 * losses[0], "{name}: {losses:?}");
    let mut first = load(model, job.clone(), 3);
    for _ in 0..2 {
        step(&mut first, &blocks(), rate);
    }
    let mut resumed = load(model, job.clone(), 2);
    resumed.restore(&first.snapshot().unwrap()).unwrap();
    for _ in 2..4 {
        step(&mut resumed, &blocks(), rate);
    }
    let end = whole.snapshot().unwrap();
    assert_eq!(resumed.snapshot().unwrap(), end, "{name}");
    [start, end]
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
        "Qwen3NextForCausalLM",
        "Gemma4ForCausalLM",
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
        "Qwen3NextForCausalLM",
        "Gemma4ForCausalLM",
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
    broken.buffers_mut()[0][12..16].copy_from_slice(&f32::NAN.to_le_bytes());
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
