//! The plan: what it names of a job.

use common::data::DataCounts;
use common::memory::Bytes;

use super::*;
use crate::prepare::Need;

fn taking(mebibytes: u64) -> Bytes {
    Bytes {
        weights: mebibytes << 20,
        ..Bytes::default()
    }
}

fn plan_text(job: &JobSpec) -> String {
    plan_in(job, None)
}

fn plan_in(job: &JobSpec, columns: Option<usize>) -> String {
    let counts = DataCounts {
        rows: 1000,
        examples: 1000,
        eval_examples: 50,
        blocks: 64,
        tokens: 123_456,
        trained_tokens: 61_728,
        padding_tokens: 1000,
        longest: 321,
        ..DataCounts::default()
    };
    let plan = PlanView {
        job,
        counts: &counts,
        architecture: "Qwen3",
        quantization: job.quantization,
        parameters: 1_234_567,
        active_parameters: 1_234_567,
        trainable_parameters: 12_345,
        total_steps: 24,
        slots_per_step: 4,
        epochs: 3.0,
        memory: Need {
            keeping: Some(taking(400)),
            recomputing: Some(taking(300)),
        },
        gpu_memory: Need {
            keeping: Some(taking(500)),
            recomputing: None,
        },
        notices: vec!["2 examples were cut".to_owned()],
    };
    plan::render(&plan, PLAIN, columns)
}

#[test]
fn the_plan_names_optimizer_rates_and_loss_where_they_are_not_the_usual_ones() {
    let text = plan_text(&job(&[
        ("adapter", "lora"),
        ("learning_rate", "1e-3"),
        ("optimizer", "sgd"),
        ("optim_args", "momentum=0.9,nesterov=true"),
        ("loraplus_lr_ratio", "16"),
        ("loss_type", "dft"),
    ]));
    for part in [
        "learning rate  1e-3, cosine, warm-up 3.0%, of B 16 times as much (LoRA+)",
        "optimizer      SGD, Nesterov momentum 0.9",
        "loss           dynamic fine-tuning (cross-entropy times probability)",
    ] {
        assert!(text.lines().any(|line| line == part), "{part}\n{text}");
    }
    let groups = r#"[{"name": "output", "modules": ["o_proj"], "lr": 1e-5}]"#;
    let text = plan_text(&job(&[("lr_groups", groups), ("embedding_lr", "2e-6")]));
    assert!(text.contains(", embedding 2e-6, output 1e-5\n"), "{text}");
    let usual = plan_text(&job(&[]));
    assert!(
        !usual.contains("optimizer") && !usual.contains("loss  "),
        "{usual}"
    );
}

#[test]
fn the_plan_names_the_parameters_of_experts_beside_linears_or_alone() {
    let method = |flags: &[(&str, &str)]| {
        let parameters = ("lora_target_parameters", "[up.b, a]");
        let text = plan_text(&job(&[&[("adapter", "lora"), parameters], flags].concat()));
        let line = text.lines().find(|line| line.starts_with("method "));
        line.unwrap().to_owned()
    };
    let named = |on: &str| format!("method         LoRA, rank 16, alpha 32 on {on}");
    assert_eq!(method(&[]), named("a, up.b"));
    assert_eq!(method(&[("layers_to_transform", "[1]")]), named("a, up.b"));
    let beside = [
        ("lora_target_modules", "[q_proj]"),
        ("layers_to_transform", "[1]"),
    ];
    assert_eq!(method(&beside), named("q_proj of layers 1 and on a, up.b"));
}

#[test]
fn the_plan_names_everything_that_decides_the_run() {
    let text = plan_text(&job(&[
        ("adapter", "lora"),
        ("micro_batch_size", "2"),
        ("learning_rate", "1e-3"),
    ]));
    for part in [
        "model          models/tiny (Qwen3, 1,234,567 parameters, float32)",
        "method         LoRA, rank 16, alpha 32 on all linear layers",
        "trainable      12,345 parameters (1.00%)",
        "dataset        1,000 examples, 50 held out, 123,456 tokens, 50% of them trained, longest 321",
        "blocks         64 of 2,048 tokens, packed, 0.8% padding",
        "steps          24 (3 epochs)",
        "batch          8 blocks a step, in 4 slots of 2",
        "learning rate  1e-3, cosine, warm-up 3.0%",
        "memory         400.0 MiB in each worker, or 300.0 MiB with gradient checkpointing",
        "output         out",
        "note           2 examples were cut",
    ] {
        assert!(text.lines().any(|line| line == part), "{part}\n{text}");
    }
    assert!(plan_text(&job(&[])).contains("full fine-tuning"));
    let narrow = plan_in(&job(&[("adapter", "lora")]), Some(60));
    assert!(
        narrow.lines().all(|line| line.chars().count() <= 60),
        "{narrow}"
    );
    assert!(
        narrow.contains(
            "model          models/tiny (Qwen3, 1,234,567 parameters,\n               float32)\n"
        ),
        "{narrow}"
    );
    let of_gpus = text.contains("GPU memory     500.0 MiB in each worker");
    assert_eq!(of_gpus, cfg!(feature = "cuda"), "{text}");
}
