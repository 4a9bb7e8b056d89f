//! Model folders and adapters as users have them: `check` finds what `start` would find, in the same words and with the same
//! exit code, and what can be trained is.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod site;
mod tokenizer_model;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::files::tensors::Dtype;
use serde_json::{Value as Json, json};
use site::{Site, Tensors, WEIGHTS};

/// A change to a fresh copy of the model is refused.
fn refused(change: impl FnOnce(&Site), words: &[&str]) {
    let site = Site::new();
    change(&site);
    site.refused(&[], words);
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn weights_of_another_model_are_refused_by_name() {
    // Norms of queries and keys are dropped by a Llama.
    let as_llama = |site: &Site| {
        site.config(|config| {
            config["architectures"] = json!(["LlamaForCausalLM"]);
            config["model_type"] = json!("llama");
        });
    };
    refused(
        as_llama,
        &[
            "model.layers.0.self_attn.k_norm.weight",
            "LlamaForCausalLM",
            "Qwen3ForCausalLM",
        ],
    );
    let fewer_layers = |site: &Site| site.config(|config| config["num_hidden_layers"] = json!(3));
    refused(
        fewer_layers,
        &["model.layers.3.", "num_hidden_layers in config.json is 3"],
    );
    let bias = |site: &Site| {
        site.tensors("model/model.safetensors", |tensors| {
            let name = "model.layers.1.self_attn.q_proj.bias".to_owned();
            tensors.push((name, Dtype::F32, vec![128], vec![0; 512]));
        });
    };
    refused(
        bias,
        &["model.layers.1.self_attn.q_proj.bias", "attention_bias"],
    );
    let kind = |site: &Site| site.config(|config| config["model_type"] = json!("mistral"));
    refused(kind, &["config.json", "Qwen3ForCausalLM", "mistral"]);
}

#[test]
fn tensors_that_matter_to_nobody_are_a_notice() {
    let site = Site::new();
    site.tensors("model/model.safetensors", |tensors| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
        tensors.push((name, Dtype::F32, vec![2], vec![0; 8]));
    });
    let said = site.taken(&[]);
    let notice = said
        .lines()
        .find(|line| line.contains("rotary_emb.inv_freq"));
    assert!(
        notice.is_some_and(|line| line.starts_with("note")),
        "{said}"
    );
}

#[test]
fn weights_in_double_precision_are_read() {
    let (plain, double) = (Site::new(), Site::new());
    double.tensors("model/model.safetensors", |tensors| {
        for (_, dtype, _, bytes) in tensors {
            let (words, _) = bytes.as_chunks();
            let wide = words
                .iter()
                .flat_map(|word| f64::from(f32::from_le_bytes(*word)).to_le_bytes());
            *bytes = wide.collect();
            *dtype = Dtype::F64;
        }
    });
    let digest = |site: &Site| {
        site.taken(&[]);
        let record: Json =
            serde_json::from_slice(&fs::read(site.path("out/run.json")).unwrap()).unwrap();
        record["weights_digest"].clone()
    };
    assert_eq!(digest(&double), digest(&plain));
}

#[test]
fn weights_of_a_type_that_is_not_read_are_refused_by_name() {
    for (dtype, word) in [
        (Dtype::F8_E4M3, "F8_E4M3"),
        (Dtype::I8, "I8"),
        (Dtype::BOOL, "BOOL"),
    ] {
        let change = |site: &Site| {
            site.tensors("model/model.safetensors", |tensors| {
                let tensor = tensors
                    .iter_mut()
                    .find(|tensor| tensor.0 == Q_PROJ)
                    .unwrap();
                tensor.1 = dtype;
                tensor.3.truncate(tensor.3.len() / 4);
            });
        };
        refused(change, &[Q_PROJ, word]);
    }
}

#[test]
fn a_tied_embedding_stored_as_the_output_layer_is_read() {
    let site = Site::new();
    let rename = |tensors: &mut Tensors| {
        let tensor = tensors
            .iter_mut()
            .find(|tensor| tensor.0.contains("embed_tokens"));
        tensor.unwrap().0 = "lm_head.weight".to_owned();
    };
    site.tensors("model/model.safetensors", rename);
    site.taken(&[]);
}

#[test]
fn files_that_are_not_what_they_should_be_are_named_with_the_remedy() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3418352\n";
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        WEIGHTS,
        "chat_template.jinja",
        "vocab.json",
    ] {
        refused(
            |site| fs::write(site.model(name), pointer).unwrap(),
            &[name, "git lfs pull"],
        );
    }
    let truncated = |site: &Site| {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(site.model(WEIGHTS))
            .unwrap();
        file.set_len(1_000_000).unwrap();
    };
    refused(truncated, &[WEIGHTS, "truncated", "download it again"]);
    let rename = |to: &'static str| {
        move |site: &Site| fs::rename(site.model(WEIGHTS), site.model(to)).unwrap()
    };
    refused(rename("model.gguf"), &["model.gguf", "GGUF"]);
    refused(
        rename("pytorch_model.bin"),
        &["pytorch_model.bin", "safetensors"],
    );
    let shard = "model-00001-of-00002.safetensors";
    refused(rename(shard), &[shard, "model.safetensors.index.json"]);
    let missing = |site: &Site| {
        fs::rename(site.model(WEIGHTS), site.model(shard)).unwrap();
        let index = json!({"weight_map": {Q_PROJ: shard, "lm_head.weight": "model-00002-of-00002.safetensors"}});
        fs::write(
            site.model("model.safetensors.index.json"),
            index.to_string(),
        )
        .unwrap();
    };
    refused(missing, &["model-00002-of-00002.safetensors", "is missing"]);
}

#[test]
fn what_is_no_model_folder_is_told_from_one() {
    let site = Site::new();
    site.refused(
        &["--base-model", "Qwen/Qwen3-0.6B"],
        &[
            "Qwen/Qwen3-0.6B: there is no such folder",
            "HF_HUB_OFFLINE is set",
        ],
    );
    fs::write(site.path("model.gguf"), "GGUF\x03").unwrap();
    site.refused(&["--base-model", "model.gguf"], &["model.gguf", "GGUF"]);
    site.taken(&[]);
    let adapter = ["--base-model", "out", "--output-dir", "other"];
    site.run("check", &adapter);
    let output = site.run("check", &adapter);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{errors}");
    assert!(
        errors.contains("adapter") && errors.contains("(model)"),
        "{errors}"
    );
}

#[test]
fn an_unknown_family_is_named_with_those_that_are_known() {
    let other = |site: &Site| {
        site.config(|config| {
            config["architectures"] = json!(["GemmaForCausalLM"]);
            config["model_type"] = json!("gemma");
        });
    };
    let known = [
        "GemmaForCausalLM",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "OlmoeForCausalLM",
        "GptOssForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Gemma4ForCausalLM",
    ];
    refused(other, &known);
}

/// A Gemma 4 that contradicts itself, or has not what it says.
#[test]
fn a_gemma_4_that_cannot_be_is_refused_in_a_line() {
    let change = |key: &'static str, value: Json| {
        move |site: &Site| {
            site.config(|config| {
                config["architectures"] = json!(["Gemma4ForCausalLM"]);
                config["model_type"] = json!("gemma4_text");
                config["hidden_activation"] = json!("gelu_pytorch_tanh");
                config["sliding_window"] = json!(16);
                config["global_head_dim"] = json!(32);
                config[key] = value.clone();
            });
        }
    };
    for (key, value, words) in [
        (
            "num_kv_shared_layers",
            json!(1000),
            &["num_kv_shared_layers 1000", "none of the"][..],
        ),
        (
            "layer_types",
            json!(["full_attention"]),
            &["layer_types has 1 entries"],
        ),
        ("enable_moe_block", json!(true), &["num_experts is missing"]),
        // What it has of its own is not in the folder.
        (
            "hidden_size_per_layer_input",
            json!(0),
            &["no tensor", "pre_feedforward_layernorm", "layer_scalar"],
        ),
    ] {
        refused(change(key, value), words);
    }
}

#[test]
fn numbers_that_cannot_be_are_refused_with_file_and_key() {
    for (key, value) in [
        ("rms_norm_eps", json!("x")),
        ("rms_norm_eps", json!(0)),
        ("rope_theta", json!("abc")),
        ("rope_theta", json!(-1)),
        ("num_key_value_heads", json!(3)),
        ("hidden_size", json!(16_000_000)),
        ("max_position_embeddings", json!("1024")),
        ("tie_word_embeddings", json!("true")),
    ] {
        let change = |site: &Site| site.config(|config| config[key] = value.clone());
        refused(change, &["config.json", key]);
    }
}

#[cfg(unix)]
#[test]
fn links_that_leave_the_model_folder_are_refused() {
    use std::os::unix::fs::symlink;
    let out = |site: &Site| {
        fs::write(site.path("secret"), "x").unwrap();
        symlink("../secret", site.model("vocab.json")).unwrap();
    };
    refused(
        out,
        &["vocab.json", "leads out of the model folder", "secret"],
    );
    // As the cache of the hub is laid out.
    let site = Site::new();
    let snapshot = site.path("models--a--b/snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::rename(site.path("model"), site.path("models--a--b/blobs")).unwrap();
    for entry in fs::read_dir(site.path("models--a--b/blobs")).unwrap() {
        let name = entry.unwrap().file_name();
        symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
    }
    site.taken(&["--base-model", snapshot.to_str().unwrap()]);
}

#[test]
fn an_adapter_of_other_tensors_is_refused_by_name() {
    let site = Site::new();
    site.taken(&["--output-dir", "adapter"]);
    let options = ["--set", "lora_model_dir=adapter"];
    let file = "adapter/adapter_model.safetensors";
    let original = fs::read(site.path(file)).unwrap();
    let refused = |change: &dyn Fn(&mut Tensors), words: &[&str]| {
        site.tensors(file, change);
        site.refused(&options, words);
        fs::write(site.path(file), &original).unwrap();
    };
    let missing = |tensors: &mut Tensors| tensors.retain(|tensor| !tensor.0.contains(".layers.0."));
    refused(&missing, &["lacks", ".layers.0.", "and 10 more"]);
    let extra = |tensors: &mut Tensors| {
        let name = "base_model.model.lm_head.lora_A.weight".to_owned();
        tensors.push((name, Dtype::F32, vec![1], vec![0; 4]));
    };
    refused(&extra, &["base_model.model.lm_head.lora_A.weight"]);
    let shape = |tensors: &mut Tensors| tensors[0].2.reverse();
    refused(&shape, &["shape", "expected"]);
    let dtype = |tensors: &mut Tensors| {
        tensors[0].1 = Dtype::I32;
    };
    refused(&dtype, &["I32"]);
    site.taken(&options);
}

#[test]
fn what_goes_with_the_model_comes_out_as_it_came() {
    let site = Site::new();
    let files = [
        ("additional_chat_templates/tools.jinja", "{{ messages }}"),
        ("special_tokens_map.json", "{}\r\n"),
        ("merges.txt", "#version: 0.2\n"),
        ("vocab.txt", "a\nb\n"),
        ("spiece.model", "\u{0}binary"),
    ];
    fs::create_dir(site.model("additional_chat_templates")).unwrap();
    for (name, content) in files {
        fs::write(site.model(name), content).unwrap();
    }
    // Twice: what is there already is replaced.
    for seed in ["--seed=1", "--seed=2"] {
        if seed == "--seed=2" {
            fs::remove_file(site.path("out/run.json")).unwrap();
            fs::remove_dir_all(site.path("out/.muster")).unwrap();
        }
        let output = site.run("start", &[seed]);
        assert!(output.status.success(), "{output:?}");
        let companions = files.map(|(name, _)| name);
        for name in companions.iter().chain(&[
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ]) {
            let (came, left) = (
                fs::read(site.model(name)).unwrap(),
                fs::read(site.path("out").join(name)),
            );
            assert_eq!(left.unwrap(), came, "{name}");
        }
    }
}

#[test]
fn special_tokens_of_the_tokenizer_s_config_are_tokens() {
    let declare = |site: &Site, id: &str| {
        let path = site.model("tokenizer_config.json");
        let mut config: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["added_tokens_decoder"] = json!({id: {"content": "<note>", "special": true}});
        fs::write(&path, config.to_string()).unwrap();
    };
    let row = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a <note> b"}]}"#;
    let random = [
        "--set",
        "init_weights=random",
        "--set",
        "adapter=full",
        "--show",
        "1",
    ];
    let check = |id: &str, vocabulary: usize| {
        let site = Site::new();
        declare(&site, id);
        site.config(|config| config["vocab_size"] = json!(vocabulary));
        fs::write(site.path("data.jsonl"), format!("{row}\n")).unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        program
            .current_dir(site.folder.path())
            .args([
                "check",
                "--base-model",
                "model",
                "--dataset",
                "data.jsonl",
                "--output-dir",
                "out",
            ])
            .args(random);
        program.output().unwrap()
    };
    let output = check("512", 640);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("223,512,282,2,201]"), "{said}");
    for (id, vocabulary, words) in [
        ("600", 640, ["\"<note>\"", "600"]),
        ("512", 512, ["token 512", "vocabulary of 512"]),
    ] {
        let output = check(id, vocabulary);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{errors}");
        assert!(words.iter().all(|word| errors.contains(word)), "{errors}");
    }
}
