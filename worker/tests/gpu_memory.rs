//! What the GPU's buffers take at their peak, against what was expected before anything was loaded; and what is said where it
//! does not suffice. On the emulator where there is no GPU. A process of its own, because the peak is the device's.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use common::data::block::Block;
use common::job::{self, InitWeights, JobSources, JobSpec};
use common::model::ModelConfig;
use serde_json::{Value, json};
use worker::collective::nccl::{self, NcclEvent, NcclTimeouts};
use worker::collective::{Collective, Membership, PeerAddress};
use worker::engine::cuda::Gpu;
use worker::engine::cuda::engine::GpuMeanGradient;
use worker::engine::estimate::estimate;
use worker::engine::{Trainer, TrainerOptions};
use worker::{ComputeDevice, Device};

/// Shares of what was found, the library's workspace not counted: it would hide what is wrong with the rest. A driver rounds
/// buffers up; the emulator counts what was asked for, and there a buffer that is forgotten must not pass.
const TOLERANCE: f64 = 0.10;
const EMULATED_TOLERANCE: f64 = 0.01;
/// Tokens of a block.
const LENGTH: u32 = 70;

/// For one test at a time: what another one takes would be counted.
fn device() -> Option<(ComputeDevice, MutexGuard<'static, ()>)> {
    static ONE: Mutex<()> = Mutex::new(());
    let turn = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::Cuda(0).open() {
        Ok(device) => Some((device, turn)),
        Err(error) => {
            assert!(std::env::var_os("MUSTER_NEEDS_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Wide layers, a large vocabulary, many layers; norms before and behind the halves of layers, behind alone, results that are
/// multiplied, windows, and tables of their own for layers with one; narrow experts and wide ones, beside a shared one, and fused;
/// linear attention, with states between chunks and without, and attention with a gate.
fn shapes() -> [Value; 13] {
    let shape = |architecture: &str, vocabulary: usize, hidden: usize, layers: usize| {
        json!({
            "architectures": [architecture], "vocab_size": vocabulary, "hidden_size": hidden,
            "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "attention_bias": false, "initializer_range": 0.02,
            "tie_word_embeddings": architecture == "Qwen3ForCausalLM"
        })
    };
    let with = |mut shape: Value, settings: Value| {
        for (key, value) in settings.as_object().unwrap() {
            shape[key] = value.clone();
        }
        shape
    };
    [
        shape("LlamaForCausalLM", 100, 256, 2),
        shape("Qwen3ForCausalLM", 3000, 64, 2),
        shape("Qwen2ForCausalLM", 100, 64, 6),
        with(
            shape("Gemma3ForCausalLM", 100, 256, 4),
            json!({"sliding_window": 20, "sliding_window_pattern": 2, "intermediate_size": 64}),
        ),
        with(
            shape("Olmo3ForCausalLM", 500, 128, 3),
            json!({"sliding_window": 20, "intermediate_size": 16}),
        ),
        with(
            shape("GraniteForCausalLM", 100, 128, 1),
            json!({"residual_multiplier": 0.3}),
        ),
        with(
            shape("Qwen2MoeForCausalLM", 100, 128, 3),
            json!({
                "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 512, "mlp_only_layers": [1], "intermediate_size": 64
            }),
        ),
        with(
            shape("Qwen3MoeForCausalLM", 100, 256, 2),
            json!({"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 16}),
        ),
        with(
            shape("MixtralForCausalLM", 500, 64, 2),
            json!({"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 320}),
        ),
        with(
            shape("GptOssForCausalLM", 100, 128, 2),
            json!({
                "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 64,
                "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]
            }),
        ),
        with(
            shape("Qwen3_5ForCausalLM", 100, 128, 3),
            json!({
                "full_attention_interval": 2, "intermediate_size": 64, "linear_num_key_heads": 2,
                "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 32
            }),
        ),
        // Attention takes the most.
        with(
            shape("Qwen3_5ForCausalLM", 100, 64, 2),
            json!({
                "full_attention_interval": 2, "intermediate_size": 64, "linear_num_key_heads": 1,
                "linear_num_value_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                "num_attention_heads": 12, "head_dim": 64
            }),
        ),
        with(
            shape("Qwen3NextForCausalLM", 100, 64, 2),
            json!({
                "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                "linear_key_head_dim": 16, "linear_value_head_dim": 64, "num_experts": 4,
                "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 32, "intermediate_size": 64
            }),
        ),
    ]
}

fn job(folder: &std::path::Path, flags: &[(&str, &str)], checkpointing: bool) -> JobSpec {
    let config = folder.join("config.json").display().to_string();
    let common = [
        ("base_model", folder.display().to_string()),
        ("dataset", config),
        ("sequence_len", LENGTH.to_string()),
        ("micro_batch_size", "2".to_owned()),
        ("global_batch_size", "2".to_owned()),
        ("gradient_checkpointing", checkpointing.to_string()),
    ];
    let given = flags
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()));
    let flags = common.into_iter().chain(given);
    let job = job::load(JobSources {
        flags: flags
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        ..JobSources::default()
    });
    JobSpec {
        init_weights: InitWeights::Random,
        ..job.unwrap()
    }
}

fn block(vocabulary: u32) -> Block {
    Block {
        tokens: (0..LENGTH).map(|token| token * 7 % vocabulary).collect(),
        segments: vec![1; LENGTH as usize],
        trained: (0..LENGTH).map(|token| token > 0).collect(),
    }
}

/// Bytes at the peak of a step, and those that were expected, both without the workspace.
fn peak(
    device: &ComputeDevice,
    shape: &Value,
    flags: &[(&str, &str)],
    checkpointing: bool,
) -> (f64, f64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, shape.to_string()).unwrap();
    let job = Arc::new(job(folder.path(), flags, checkpointing));
    let config = ModelConfig::parse(shape, &path).unwrap();
    let expected = estimate(&config, &job, device, checkpointing).unwrap();
    let mut trainer = Trainer::load(TrainerOptions {
        job,
        model_dir: folder.path().to_owned(),
        adapter_dir: None,
        threads: 1,
        device: device.clone(),
    })
    .unwrap();
    device.reset_peak_memory();
    let blocks = [block(100), block(100)];
    let trained = blocks.iter().map(Block::trained_tokens).sum();
    trainer.begin_step(0, trained, 1).unwrap();
    trainer.train_slot(0, &blocks).unwrap();
    trainer.apply_held(1e-3).unwrap();
    let found = device.peak_memory_bytes() - expected.libraries;
    (found as f64, (expected.total() - expected.libraries) as f64)
}

/// The flags without what only a shape with `down_proj` linears has, where this one has experts in their place.
fn for_shape<'a>(flags: &[(&'a str, &'a str)], shape: &Value) -> Vec<(&'a str, &'a str)> {
    let kinds = [
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "MixtralForCausalLM",
        "GptOssForCausalLM",
    ];
    let of_experts = kinds.iter().any(|kind| shape["architectures"][0] == *kind);
    let flags = flags.iter().map(|(name, value)| match *value {
        "q_proj,down_proj" if of_experts => (*name, "q_proj,o_proj"),
        _ => (*name, *value),
    });
    flags.collect()
}

#[test]
fn the_peak_is_what_was_expected() {
    let Some((device, _turn)) = device() else {
        return;
    };
    let methods: [&[(&str, &str)]; 6] = [
        &[("adapter", "full"), ("base_dtype", "float32")],
        &[
            ("adapter", "full"),
            ("base_dtype", "bfloat16"),
            ("reduction", "fast"),
        ],
        &[
            ("adapter", "lora"),
            ("base_dtype", "bfloat16"),
            ("lora_r", "4"),
        ],
        &[
            ("adapter", "lora"),
            ("base_dtype", "float32"),
            ("lora_dropout", "0.1"),
            ("lora_target_modules", "q_proj,down_proj"),
        ],
        &[
            ("adapter", "lora"),
            ("load_in_4bit", "true"),
            ("quantize_moe_experts", "true"),
            ("lora_r", "4"),
        ],
        &[
            ("adapter", "lora"),
            ("load_in_4bit", "true"),
            ("bnb_4bit_use_double_quant", "false"),
            ("quantize_embeddings", "true"),
            ("base_dtype", "float32"),
            ("lora_dropout", "0.1"),
        ],
    ];
    let tolerance = match device.to_string().contains("emulated") {
        true => EMULATED_TOLERANCE,
        false => TOLERANCE,
    };
    let mut wrong = Vec::new();
    for shape in shapes() {
        for flags in methods {
            let flags = &for_shape(flags, &shape)[..];
            for checkpointing in [false, true] {
                let (found, expected) = peak(&device, &shape, flags, checkpointing);
                let apart = expected / found - 1.0;
                let told = format!(
                    "{} {flags:?}, checkpointing {checkpointing}: {expected} expected, {found} found ({:+.1}%)",
                    shape["architectures"][0],
                    100.0 * apart
                );
                println!("{told}");
                if apart.abs() > tolerance {
                    wrong.push(told);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What a base takes less in 4 bits is what its weights do: nothing beside them grows but the memory that they are widened to.
#[test]
fn a_base_of_4_bits_takes_as_much_less_as_its_weights_do() {
    let Some((device, _turn)) = device() else {
        return;
    };
    let mut shape = shapes()[0].clone();
    shape["num_hidden_layers"] = 8.into();
    let flags = [
        ("adapter", "lora"),
        ("lora_r", "4"),
        ("base_dtype", "bfloat16"),
    ];
    let quantised = [&flags[..], &[("load_in_4bit", "true")]].concat();
    let (wide, _) = peak(&device, &shape, &flags, true);
    let (narrow, expected) = peak(&device, &shape, &quantised, true);
    let (hidden, inner, layers) = (256.0, 768.0, 8.0);
    let of_layer = hidden * (2.0 * 128.0 + 2.0 * 64.0) + 3.0 * hidden * inner;
    let linears = 2.0 * layers * of_layer;
    // Gate and up with the factors of their adapters, each rank filled up to 8.
    let widened = 2.0 * (2.0 * inner + 16.0) * (hidden + 16.0);
    let told = format!("{narrow} bytes instead of {wide}, {expected} expected");
    assert!(wide - narrow > (1.0 - 0.27) * linears - widened, "{told}");
    assert!(narrow < 0.65 * wide, "{told}");
}

/// Two ranks on the one GPU, as only the stand-in for NCCL lets them.
#[test]
fn an_exchange_over_nccl_leaves_no_more_memory_taken_than_before() {
    let Some((device, _turn)) = device() else {
        return;
    };
    if !device.to_string().contains("emulated") {
        return;
    }
    let ComputeDevice::Cuda { gpu, .. } = &device else {
        panic!("{device} is no GPU");
    };
    let members = members(gpu);
    let folder = tempfile::tempdir().unwrap();
    let shape = &shapes()[0];
    std::fs::write(folder.path().join("config.json"), shape.to_string()).unwrap();
    for reduction in ["exact", "fast"] {
        let flags = [("adapter", "full"), ("reduction", reduction)];
        let job = Arc::new(job(folder.path(), &flags, false));
        let load = |_: &Collective| {
            let trainer = Trainer::load(TrainerOptions {
                job: job.clone(),
                model_dir: folder.path().to_owned(),
                adapter_dir: None,
                threads: 1,
                device: device.clone(),
            });
            trainer.unwrap()
        };
        let mut trainers: Vec<Trainer> = members.iter().map(load).collect();
        let free = || gpu.memory().unwrap().0;
        for step in 0..2 {
            let blocks = [block(100), block(100)];
            let trained: u64 = blocks.iter().map(Block::trained_tokens).sum();
            for (slot, trainer) in (0..).zip(&mut trainers) {
                trainer.begin_step(step, 2 * trained, 2).unwrap();
                trainer.train_slot(slot, &blocks).unwrap();
            }
            let before = free();
            gpu.reset_peak_memory().unwrap();
            let already = gpu.peak_memory().unwrap();
            let means = all_reduce(&trainers, &members);
            let scalars = trainers.len() * trainers[0].layout().scalars;
            // The mean gradient, and half of the sums, which are no more than a bucket.
            let each = if reduction == "exact" { 8.0 } else { 4.0 };
            let meanwhile = (gpu.peak_memory().unwrap() - already) as f64;
            let apart = meanwhile / (each * scalars as f64) - 1.0;
            assert!(apart.abs() < EMULATED_TOLERANCE, "{reduction}: {meanwhile}");
            let taken = scalars * size_of::<f32>();
            assert_eq!(before - free(), taken, "{reduction}, step {step}");
            for (trainer, mean) in trainers.iter_mut().zip(means) {
                trainer.apply_on_gpu(&mean, 0, 1e-3).unwrap();
            }
            assert_eq!(free(), before, "{reduction}, step {step}");
        }
    }
}

/// The mean gradient of each member.
fn all_reduce(trainers: &[Trainer], members: &[Collective]) -> Vec<GpuMeanGradient> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = trainers
            .iter()
            .zip(members)
            .map(|(trainer, member)| {
                let group = member.group(0).unwrap();
                scope.spawn(move || nccl::all_reduce(&group, &trainer.sums_on_gpu()).unwrap())
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Both members of generation 0, their groups on the way.
fn members(gpu: &Arc<Gpu>) -> Vec<Collective> {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let collectives: Vec<_> = (0..2).map(|_| Collective::bind(host).unwrap()).collect();
    let addresses: Vec<_> = collectives
        .iter()
        .map(|collective| PeerAddress {
            name: "a member".to_owned(),
            address: format!("127.0.0.1:{}", collective.port()),
        })
        .collect();
    let (tell, words) = mpsc::channel();
    for (rank, collective) in (0..).zip(&collectives) {
        let membership = Membership {
            run_id: [1; 32],
            generation: 0,
            rank,
            members: addresses.clone(),
            silence: Duration::from_secs(20),
        };
        let (timeouts, tell) = (NcclTimeouts::beyond(membership.silence), tell.clone());
        collective.enter(membership.clone());
        collective.group_up(&membership, gpu.clone(), timeouts, move |word| {
            tell.send(word).unwrap_or_default();
        });
    }
    let Ok(NcclEvent::IdCreated(id)) = words.recv() else {
        panic!("NCCL has no identifier");
    };
    for collective in &collectives {
        collective.group(0).unwrap().identify(&id);
    }
    collectives
}

/// In a process that the emulator refuses memory beyond a limit.
#[test]
fn where_memory_is_out_one_line_says_what_to_lower() {
    let Some((device, _turn)) = device() else {
        return;
    };
    if !device.to_string().contains("emulated") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shape.json");
    std::fs::write(&path, shapes()[0].to_string()).unwrap();
    let bench = |megabytes: &str, more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_worker"))
            .args(["bench", "--device", "cuda", "--steps", "1", "--warmup", "0"])
            .args(["--batch", "4", "--seq", "160", "--config"])
            .arg(&path)
            .args(more)
            .env("EMULATED_MB", megabytes)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let message = bench("40", &[]);
    for told in [
        "out of GPU memory",
        "micro_batch_size 4",
        "sequence_len 160",
        "lower one of them",
        "gradient_checkpointing: true",
    ] {
        assert!(message.contains(told), "{told}: {message}");
    }
    assert_eq!(message.trim().lines().count(), 1, "{message}");
    // Of no use where activations are computed again already.
    let message = bench("40", &["--gradient-checkpointing"]);
    assert!(message.contains("micro_batch_size 4") && !message.contains("gradient_checkpointing"));
    let message = bench("33", &[]);
    assert!(
        message.contains("weights and optimizer alone need"),
        "{message}"
    );
}

#[test]
fn a_driver_older_than_the_kernels_is_named_before_anything_else() {
    let Some((device, _turn)) = device() else {
        return;
    };
    if !device.to_string().contains("emulated") {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["self-check", "--device", "cuda"])
        .env("EMULATED_DRIVER", "12040")
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(
        message.contains("CUDA 12.4") && message.contains("CUDA 13"),
        "{message}"
    );
    assert_eq!(message.trim().lines().count(), 1, "{message}");
}
