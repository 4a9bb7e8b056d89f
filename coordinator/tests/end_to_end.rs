//! Real runs with real processes: whatever happens to them, the same weights come out.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use common::files::tensors::TensorFile;
use futures::StreamExt;
use proto::v1;
use proto::v1::coordinator_client::CoordinatorClient;
use serde_json::{Value, json};
use support::{Run, Site, free_port};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use worker::{JoinOptions, WorkerError};

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

fn join(options: JoinOptions) -> Result<worker::Finished, WorkerError> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(worker::join(options, CancellationToken::new()))
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_weights() {
    let site = Site::new();
    let quiet = site.train("one", &["--threads", "1"]);
    for (workers, threads) in [("1", "2"), ("2", "1"), ("3", "2"), ("4", "1")] {
        let output = format!("{workers}-{threads}");
        let options = ["--local-workers", workers, "--threads", threads];
        assert_eq!(site.train(&output, &options), quiet, "{workers} workers");
    }
    let digests = |output: &str| -> Vec<Value> {
        let steps = site.steps(output);
        steps
            .iter()
            .map(|step| step["weights_digest"].clone())
            .collect()
    };
    assert_eq!(digests("3-2"), digests("one"));
    assert_eq!(digests("one").len(), 6);
}

#[test]
fn one_process_alone_waits_for_nobody_and_may_be_open_to_others() {
    let site = Site::new();
    let short = ["--max-steps", "2", "--local-workers", "2"];
    let alone = site.train("alone", &[&short[..], &["--min-workers", "5"]].concat());
    let open = site.train("open", &[&short[..], &["--listen", "0.0.0.0:0"]].concat());
    assert_eq!(open, alone);
}

#[test]
fn full_training_gives_the_same_weights_with_two_workers() {
    let site = Site::new();
    for dtype in ["float32", "bfloat16"] {
        let dtype_field = format!("base_dtype={dtype}");
        let options = ["full", "--max-steps", "3", "--set", &dtype_field];
        let quiet = site.train(dtype, &options);
        let output = format!("{dtype}-two");
        let two = site.train(&output, &[&options[..], &["--local-workers", "2"]].concat());
        assert_eq!(two, quiet, "{dtype}");
        assert!(site.path(&output).join("model.safetensors").is_file());
        assert_eq!(site.json(&format!("{output}/config.json"))["dtype"], dtype);
    }
}

/// What is left as it is is larger than what a state has of other things.
#[test]
fn some_of_the_weights_are_trained_and_the_whole_model_is_written() {
    let site = Site::new();
    let mut config = site.json("model/config.json");
    config["intermediate_size"] = (1 << 18).into();
    std::fs::write(site.path("model/config.json"), config.to_string()).unwrap();
    let random = ["full", "--max-steps", "1", "--set", "init_weights=random"];
    site.train("base", &random);
    let some = ["full", "--max-steps", "2", "--set", "base_model=base"];
    let some = [
        &some[..],
        &["--set", "unfrozen_parameters=layers.0.self_attn"],
    ]
    .concat();
    let quiet = site.train("one", &some);
    let two = site.train("two", &[&some[..], &["--local-workers", "2"]].concat());
    assert_eq!(two, quiet);
    let [before, after] = ["base", "two"].map(|folder| {
        TensorFile::open(&site.path(&format!("{folder}/model.safetensors"))).unwrap()
    });
    assert!(std::fs::metadata(after.path()).unwrap().len() > 80 << 20);
    for name in before.names() {
        let is_same = before.get(name).unwrap().bytes == after.get(name).unwrap().bytes;
        assert_eq!(
            is_same,
            !name.starts_with("model.layers.0.self_attn"),
            "{name}"
        );
    }
}

#[test]
fn fused_experts_and_sinks_are_the_same_with_two_workers() {
    let site = Site::new();
    let mut config = site.json("model/config.json");
    for (key, value) in [
        ("architectures", json!(["GptOssForCausalLM"])),
        ("model_type", "gpt_oss".into()),
        ("attention_bias", true.into()),
        ("num_local_experts", 5.into()),
        ("num_experts_per_tok", 2.into()),
        ("sliding_window", 16.into()),
        ("tie_word_embeddings", false.into()),
    ] {
        config[key] = value;
    }
    std::fs::write(site.path("model/config.json"), config.to_string()).unwrap();
    let options = ["full", "--max-steps", "3", "--set", "init_weights=random"];
    let quiet = site.train("one", &options);
    let two = site.train("two", &[&options[..], &["--local-workers", "2"]].concat());
    assert_eq!(two, quiet);
    let file = TensorFile::open(&site.path("two/model.safetensors")).unwrap();
    let shape = |name: &str| file.get(&format!("model.layers.0.{name}")).unwrap().shape;
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    assert_eq!(shape("self_attn.sinks"), [size("num_attention_heads")]);
    let (hidden, width) = (size("hidden_size"), size("intermediate_size"));
    assert_eq!(shape("mlp.experts.gate_up_proj"), [5, hidden, 2 * width]);

    // Adapters on them, on what comes of it.
    let parameters = "lora_target_parameters=[experts.gate_up_proj, experts.down_proj]";
    let lora = ["--max-steps", "3", "--set", "base_model=one"];
    let lora = [&lora[..], &["--set", parameters]].concat();
    let quiet = site.train("one-lora", &lora);
    let two = site.train("two-lora", &[&lora[..], &["--local-workers", "2"]].concat());
    assert_eq!(two, quiet);
    let said = site.json("two-lora/adapter_config.json");
    assert_eq!(said["target_modules"], json!([]));
    let names = ["experts.down_proj", "experts.gate_up_proj"];
    assert_eq!(said["target_parameters"], json!(names));
    let file = TensorFile::open(&site.path("two-lora/adapter_model.safetensors")).unwrap();
    let path = "base_model.model.model.layers.0.mlp.experts";
    let shape = |name: &str| file.get(&format!("{path}.{name}.weight")).unwrap().shape;
    let ranks = 5 * said["r"].as_u64().unwrap() as usize;
    assert_eq!(shape("base_layer.lora_A"), [ranks, hidden]);
    assert_eq!(shape("lora_B"), [hidden, ranks]);
    // As one that is there already.
    let options = ["--max-steps", "2", "--set", "base_model=one"];
    let options = [&options[..], &["--set", "lora_model_dir=one-lora"]].concat();
    site.train("on", &options);
    assert_eq!(
        site.json("on/adapter_config.json")["target_parameters"],
        json!(names)
    );
}

#[test]
fn linear_attention_is_the_same_with_two_workers() {
    two_workers_with("Qwen3_5ForCausalLM", "qwen3_5_text", json!({}));
}

#[test]
fn linear_attention_with_experts_is_the_same_with_two_workers() {
    two_workers_with("Qwen3NextForCausalLM", "qwen3_next", json!({}));
    two_workers_with("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", json!({}));
}

/// The last two layers have the keys and values of the first two, and all have inputs of their own.
#[test]
fn layers_that_share_keys_are_the_same_with_two_workers() {
    let kinds = ["sliding_attention", "full_attention"];
    let kinds = [kinds, kinds].concat();
    let own = json!({
        "num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 16,
        "global_head_dim": 32, "num_kv_shared_layers": 2, "use_double_wide_mlp": true,
        "hidden_size_per_layer_input": 8, "hidden_activation": "gelu_pytorch_tanh"
    });
    two_workers_with("Gemma4ForCausalLM", "gemma4_text", own);
}

/// A family with what it has of its own, with all weights, and with an adapter on what comes of that.
fn two_workers_with(class: &str, model_type: &str, own: Value) {
    let site = Site::new();
    let mut config = site.json("model/config.json");
    for (key, value) in [
        ("architectures", json!([class])),
        ("model_type", model_type.into()),
        // Of experts, where a model has some.
        ("num_experts", 5.into()),
        ("num_experts_per_tok", 2.into()),
        ("moe_intermediate_size", 24.into()),
        ("shared_expert_intermediate_size", 40.into()),
        ("full_attention_interval", 2.into()),
        ("linear_num_key_heads", 2.into()),
        ("linear_num_value_heads", 4.into()),
        ("linear_key_head_dim", 16.into()),
        ("linear_value_head_dim", 24.into()),
    ] {
        config[key] = value;
    }
    for (key, value) in own.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(site.path("model/config.json"), config.to_string()).unwrap();
    let full = ["full", "--set", "init_weights=random"];
    // On what comes of it.
    let lora = ["--set", "base_model=one-full"];
    for (name, options) in [("full", &full[..]), ("lora", &lora)] {
        let options = [options, &["--max-steps", "3"]].concat();
        let quiet = site.train(&format!("one-{name}"), &options);
        let two_workers = [&options[..], &["--local-workers", "2"]].concat();
        let two = site.train(&format!("two-{name}"), &two_workers);
        assert_eq!(two, quiet, "{name}");
    }
    let file = TensorFile::open(&site.path("two-full/model.safetensors")).unwrap();
    let shape = |name: &str| file.get(&format!("model.layers.0.{name}")).unwrap().shape;
    let expected: &[(&str, &[usize])] = match class {
        "Gemma4ForCausalLM" => &[
            ("layer_scalar", &[1]),
            ("per_layer_input_gate.weight", &[8, 32]),
        ],
        _ => &[
            ("linear_attn.conv1d.weight", &[2 * 32 + 96, 1, 4]),
            ("linear_attn.A_log", &[4]),
        ],
    };
    for (name, expected) in expected {
        assert_eq!(shape(name), *expected, "{name}");
    }
}

#[test]
fn an_adapter_on_a_base_of_4_bits_is_the_same_with_two_workers() {
    let site = Site::new();
    let options = ["--set", "load_in_4bit=true", "--max-steps", "3"];
    let quiet = site.train("one", &options);
    let two = site.train("two", &[&options[..], &["--local-workers", "2"]].concat());
    assert_eq!(two, quiet);
    assert_ne!(
        site.train(
            "dense",
            &["--set", "base_dtype=bfloat16", "--max-steps", "3"]
        ),
        quiet
    );
    let job = &site.json("one/run.json")["job"];
    assert_eq!(job["quantization"]["nested_scales"], true);
    assert!(site.path("one/adapter_model.safetensors").is_file());
}

#[test]
fn gradient_checkpointing_changes_no_bit() {
    let site = Site::new();
    let plain = site.train("plain", &[]);
    let options = ["--set", "gradient_checkpointing=true"];
    assert_eq!(site.train("checkpointed", &options), plain);
}

#[cfg(unix)]
#[test]
fn one_signal_ends_a_process_that_only_answers_test_prompts() {
    let site = Site::new();
    // The base model is not asked where it is random.
    let mut options = vec!["full", "--single-node", "--max-steps", "1"];
    options.extend(["--set", "init_weights=random"]);
    for _ in 0..200 {
        options.extend(["--test-prompt", "What is number 3?"]);
    }
    let mut run = Run::of(&mut site.start("out", &options));
    run.until("done after").process.signal("-INT");
    let run = run.end();
    assert_eq!(run.status.code(), Some(130), "{run:?}");
    assert!(!run.stdout.contains("What is number 3?"), "{run:?}");
    site.digest("out");
}

#[test]
fn data_that_was_packed_for_an_earlier_job_makes_room() {
    let site = Site::new();
    let folder = site.path("out/.muster");
    std::fs::create_dir_all(&folder).unwrap();
    // A start that packed its data, and whose job was changed before it began.
    let earlier = folder.join("blocks-0123456789abcdef.bin");
    std::fs::write(&earlier, "packed").unwrap();
    site.train("out", &["--max-steps", "1"]);
    assert!(!earlier.exists());
    let entries = std::fs::read_dir(&folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with("blocks-")).count(), 1);
}

#[test]
fn training_goes_on_from_an_adapter() {
    let site = Site::new();
    let first = site.train("first", &[]);
    let options = ["--set", "lora_model_dir=first"];
    let second = site.train("second", &options);
    assert_ne!(second, first);
    let loss = |output: &str| site.steps(output)[0]["loss"].as_f64().unwrap();
    assert!(loss("second") < loss("first"));
    let two = site.train("two", &[&options[..], &["--local-workers", "2"]].concat());
    assert_eq!(two, second);
}

#[test]
fn the_output_folder_holds_an_adapter_and_the_record_of_the_run() {
    let site = Site::new();
    let digest = site.train(
        "out",
        &["--set", "save_steps=2", "--set", "save_total_limit=1"],
    );
    let original = std::fs::read(site.path("model/tokenizer.json")).unwrap();
    assert_eq!(
        std::fs::read(site.path("out/tokenizer.json")).unwrap(),
        original
    );
    assert_eq!(site.json("out/adapter_config.json")["peft_type"], "LORA");
    assert!(site.path("out/adapter_model.safetensors").is_file());
    assert_eq!(site.json("out/trainer_state.json")["global_step"], 6);
    let steps = site.steps("out");
    assert_eq!(steps.len(), 6);
    assert_eq!(steps[5]["weights_digest"], digest.as_str());
    assert!(steps[5]["loss"].as_f64() < steps[0]["loss"].as_f64());
    assert!(!site.path("out/checkpoint-2").exists());
    let manifest = site.json("out/checkpoint-4/manifest.json");
    assert_eq!(manifest["weights_digest"], steps[3]["weights_digest"]);
    assert_eq!(
        site.json("out/checkpoint-4/trainer_state.json")["global_step"],
        4
    );

    // Done is done.
    let again = Run::of(&mut site.start("out", &["--single-node"])).end();
    assert!(
        again.status.success() && again.stdout.contains("done already"),
        "{again:?}"
    );
    assert_eq!(site.steps("out").len(), 6);
}

#[test]
fn a_run_that_was_stopped_and_killed_ends_with_the_weights_of_a_quiet_one() {
    let site = Site::new();
    let options = [
        "--single-node",
        "--max-steps",
        "150",
        "--set",
        "save_steps=5",
    ];
    let quiet = site.train("quiet", &options[1..]);

    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(3).process.signal("-INT");
    let run = run.end();
    assert_eq!(run.status.code(), Some(130), "{run:?}");
    assert!(run.stdout.contains("to go on: "), "{run:?}");

    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(7).process.signal("-TERM");
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");

    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(9).process.kill();
    drop(run);

    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(run.status.success(), "{run:?}");
    assert!(run.stdout.contains("checkpoint-"), "{run:?}");
    assert_eq!(site.digest("out"), quiet);
    let numbers = |output: &str| -> Vec<(Value, Value)> {
        let steps = site.steps(output);
        steps
            .iter()
            .map(|step| (step["step"].clone(), step["loss"].clone()))
            .collect()
    };
    assert_eq!(numbers("out"), numbers("quiet"));
}

#[test]
fn moments_of_8_bits_are_the_same_with_three_workers_after_a_kill_and_for_who_joins() {
    let site = Site::new();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    // Factors of this rank are large enough for 8 bits.
    let mut options = vec!["--set", "optimizer=adamw_8bit", "--set", "lora_r=128"];
    options.extend(["--max-steps", "100", "--set", "save_steps=5"]);
    let with = |more: &[&'static str]| [&options[..], more].concat();
    let quiet = site.train("quiet", &options);
    assert_eq!(site.train("three", &with(&["--local-workers", "3"])), quiet);
    let in_float32 = [&options[2..], &["--local-workers", "1"]].concat();
    assert_ne!(site.train("float32", &in_float32), quiet);

    let mut run = Run::of(&mut site.start("out", &with(&["--single-node"])));
    run.steps(8).process.kill();
    drop(run);
    let run = Run::of(&mut site.start("out", &with(&["--single-node"]))).end();
    assert!(run.status.success(), "{run:?}");
    assert!(run.stdout.contains("checkpoint-"), "{run:?}");
    assert_eq!(site.digest("out"), quiet);

    let listening = [&options[..], &["--listen", &listen]].concat();
    let mut run = Run::of(&mut site.start("joined", &listening));
    let mut first = site.join("first", port);
    run.steps(5);
    let mut second = site.join("second", port);
    run.until("joined").steps(3);
    first.kill();
    let run = run.end();
    assert!(run.status.success() && second.wait().success(), "{run:?}");
    assert_eq!(site.digest("joined"), quiet);
}

#[test]
fn a_run_that_begins_anew_leaves_nothing_of_the_one_before_to_go_on_from() {
    let site = Site::new();
    let options = ["--max-steps", "60", "--set", "save_steps=20"];
    let anew = [&options[..], &["--resume", "never"]].concat();
    let first = site.train("out", &options);
    let single = [&["--single-node"], &anew[..]].concat();
    let mut run = Run::of(&mut site.start("out", &single));
    run.steps(3).process.signal("-TERM");
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");
    assert!(run.stdout.contains("checkpoint-40.old"), "{run:?}");
    let command = run
        .stdout
        .lines()
        .find(|line| line.starts_with("to go on: "));
    assert!(command.unwrap().ends_with("--resume auto"), "{run:?}");
    assert_eq!(site.train("out", &options), first);
    assert_eq!(site.steps("out").len(), 60);
}

#[test]
fn workers_that_die_and_join_change_nothing() {
    let site = Site::new();
    let options = ["--max-steps", "200"];
    let quiet = site.train("quiet", &options);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let options = [
        "--max-steps",
        "200",
        "--listen",
        &listen,
        "--min-workers",
        "2",
    ];
    let mut run = Run::of(&mut site.start("out", &options));
    let mut first = site.join("first", port);
    let mut second = site.join("second", port);
    run.steps(8);
    let mut third = site.join("third", port);
    first.kill();
    run.until("joined").steps(3);
    second.kill();
    let mut fourth = site.join("fourth", port);
    run.until("joined");
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(third.wait().success() && fourth.wait().success());
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 200);
}

/// What a worker says first, of this version and class but for what `change` sets. The answer.
fn knock(
    address: &str,
    change: impl FnOnce(&mut v1::Join),
) -> Result<v1::CoordinatorMessage, Status> {
    let mut join = v1::Join {
        version: worker::VERSION.to_owned(),
        name: "knocker".to_owned(),
        exchange_port: 9,
        numerics_class: worker::ComputeDevice::Cpu.numerics_class(),
        ..v1::Join::default()
    };
    change(&mut join);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut client = CoordinatorClient::connect(format!("http://{address}"))
            .await
            .unwrap();
        let first = common::wire::up(v1::worker_message::Message::Join(join));
        let messages = futures::stream::iter([first]).chain(futures::stream::pending());
        let mut answers = client.session(messages).await?.into_inner();
        Ok(answers.message().await?.unwrap())
    })
}

#[test]
fn a_worker_of_another_version_is_refused_and_both_are_named() {
    let site = Site::new();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut run = Run::of(&mut site.start("out", &["--listen", &listen]));
    run.until("workers join with");
    for other in ["0.1.9", "0.0.1", ""] {
        let refused = knock(&listen, |join| join.version = other.to_owned()).unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        let named = format!(
            "runs Muster {other} but the coordinator runs {}",
            coordinator::VERSION
        );
        assert!(refused.message().contains(&named), "{refused}");
        run.until("install the same version on both");
    }
    assert!(knock(&listen, |_| ()).is_ok());
}

#[test]
fn a_worker_without_the_token_is_refused() {
    let site = Site::new();
    std::fs::write(site.path("token"), "secret\n").unwrap();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut run = Run::of(&mut site.start("out", &["--listen", &listen, "--token-file", "token"]));
    run.until("workers join with");
    let options = |token: Option<&str>| {
        let mut options = JoinOptions::new(listen.clone());
        options.token = token.map(str::to_owned);
        options.threads = Some(1);
        options.connect_timeout = Duration::from_secs(20);
        options
    };
    for wrong in [None, Some("guess")] {
        let refused = join(options(wrong)).unwrap_err();
        assert!(matches!(refused, WorkerError::Refused { .. }), "{refused}");
    }
    join(options(Some("secret"))).unwrap();
    assert!(run.end().status.success());
}

#[test]
fn a_worker_that_nobody_reaches_is_named_and_the_others_go_on_without_it() {
    let site = Site::new();
    let quiet = site.train("quiet", &[]);
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let two = ["--set", "cluster.min_workers=2", "--listen", &listen];
    let mut run = Run::of(&mut site.start("out", &two));
    run.until("workers join with");
    let mut options = JoinOptions::new(listen.clone());
    options.threads = Some(1);
    options.name = Some("lost".to_owned());
    // Of a range that nobody uses.
    options.exchange_host = Some("240.0.0.1".to_owned());
    options.cache_dir = Some(site.path("cache-lost"));
    let lost = std::thread::spawn(move || join(options));
    run.until("worker lost joined");
    let mut first = site.join("first", port);
    run.until("cannot reach worker lost at 240.0.0.1:");
    let mut second = site.join("second", port);
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(first.wait().success() && second.wait().success());
    assert!(lost.join().unwrap().is_ok());
    assert_eq!(site.digest("out"), quiet);
}

/// The same path means another folder to a process that runs elsewhere, as it does on another machine.
#[cfg(target_os = "linux")]
#[test]
fn a_worker_without_the_model_fetches_it() {
    let site = Site::new();
    let quiet = site.train("quiet", &[]);
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let model = ["--set", "base_model=/proc/self/cwd/model"];
    let run = Run::of(&mut site.start("out", &[&model[..], &["--listen", &listen]].concat()));
    let mut worker = site.join("far", port);
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(worker.wait().success());
    assert_eq!(site.digest("out"), quiet);
    let original = std::fs::read(site.path("model/model.safetensors")).unwrap();
    let fetched = support::find(&site.path("cache-far"), "model.safetensors").unwrap();
    assert!(std::fs::read(fetched).unwrap() == original);
}
