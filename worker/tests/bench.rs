//! `worker bench` as a user runs it.

#![allow(clippy::unwrap_used)]

use std::process::Command;

const CONFIG: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 61, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;

fn bench(config: &str, arguments: &[&str]) -> (bool, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shape.json");
    std::fs::write(&path, config).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["bench", "--config"])
        .arg(&path)
        .args(["--steps", "2", "--threads", "1"])
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.success(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn every_mode_and_dtype_reports_speed_and_size() {
    // Embeddings, then per layer: attention, MLP, two norms and two head norms; the last norm.
    let attention = 32 * (32 + 16 + 16 + 32);
    let parameters = 61 * 32 + 2 * (attention + 3 * 32 * 48 + 2 * 32 + 2 * 8) + 32;
    for mode in ["lora", "full"] {
        for dtype in ["float32", "bfloat16"] {
            let arguments = ["--mode", mode, "--dtype", dtype, "--json"];
            let batch = ["--batch", "2", "--seq", "16"];
            let (success, stdout, stderr) = bench(CONFIG, &[&arguments[..], &batch].concat());
            assert!(success, "{stderr}");
            let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
            assert!(report["tokens_per_second_median"].as_f64().unwrap() > 0.0);
            assert_eq!(report["tokens_per_step"], 32);
            let trainable = report["trainable"].as_u64().unwrap();
            let base = report["parameters"].as_u64().unwrap();
            match mode {
                "full" => assert_eq!((base, trainable), (parameters, parameters)),
                _ => assert_eq!(base, parameters + trainable),
            }
        }
    }
}

/// A model that is large beside the program, and small enough for a test.
const LARGER: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 8000, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;

/// Three layers of linear attention and one of attention.
#[cfg(target_os = "linux")]
const HYBRID: &str = r#"{"architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 1000, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;

/// Heads of two sizes, inputs of the layers' own, and two layers that have the keys and values of two others.
#[cfg(target_os = "linux")]
const DIFFERING: &str = r#"{"architectures": ["Gemma4ForCausalLM"], "vocab_size": 1000, "hidden_size": 512,
    "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "global_head_dim": 128, "sliding_window": 64, "num_kv_shared_layers": 2, "use_double_wide_mlp": true,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention",
    "full_attention"], "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 1000}"#;

#[cfg(target_os = "linux")]
#[test]
fn the_memory_that_a_step_takes_was_expected() {
    for mode in ["lora", "full"] {
        for more in [
            &["--gradient-checkpointing"][..],
            &[],
            &["--optimizer", "adamw_8bit"],
        ] {
            check_memory(LARGER, mode, more);
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_memory_that_layers_of_two_kinds_take_was_expected() {
    for more in [&["--gradient-checkpointing"][..], &[]] {
        check_memory(HYBRID, "lora", more);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_memory_that_layers_take_which_share_keys_was_expected() {
    for mode in ["lora", "full"] {
        for more in [&["--gradient-checkpointing"][..], &[]] {
            check_memory(DIFFERING, mode, more);
        }
    }
}

#[cfg(target_os = "linux")]
fn check_memory(config: &str, mode: &str, more: &[&str]) {
    /// Of what was measured. Beside the buffers that are counted there are code, stacks and what threads keep.
    const TOLERANCE: f64 = 0.15;
    let arguments = ["--mode", mode, "--batch", "4", "--seq", "256", "--json"];
    let (success, stdout, stderr) = bench(config, &[&arguments, more].concat());
    assert!(success, "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let found = report["peak_memory_bytes"].as_f64().unwrap();
    let expected = report["estimated_memory_bytes"].as_f64().unwrap();
    let apart = expected / found - 1.0;
    println!("{mode} {more:?}: {expected} expected, {found} found");
    assert!(apart.abs() <= TOLERANCE, "{mode} {more:?}: {apart:+.3}");
}

#[test]
fn an_unsupported_shape_is_named() {
    let (success, _, stderr) = bench(&CONFIG.replace("Qwen3", "Bert"), &[]);
    assert!(!success && stderr.contains("BertForCausalLM"), "{stderr}");
}

#[test]
fn an_exchange_over_the_loopback_reports_its_seconds() {
    let output = Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["bench-exchange", "--ranks", "3", "--scalars", "100001"])
        .args(["--steps", "2", "--json"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let seconds = |name: &str| report[name].as_f64().unwrap();
    assert!(0.0 < seconds("seconds_best") && seconds("seconds_best") <= seconds("seconds_median"));
    assert_eq!(
        (&report["ranks"], &report["scalars"]),
        (&3.into(), &100_001.into())
    );
}
