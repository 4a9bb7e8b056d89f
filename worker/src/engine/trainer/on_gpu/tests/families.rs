//! Every family trains on the GPU as on the processor, each with all that tells it from the others.

use common::model::ModelConfig;
use serde_json::{Value, json};

use super::*;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::optim::gradient_norm;

/// The families, with settings that change something: windows shorter than the segments, limits that limit, factors that are not
/// one. One family has two, so that each kind of rotary table is met.
fn families() -> Vec<Value> {
    let with = |architecture: &str, settings: Value| {
        let mut json = config(architecture);
        for (key, value) in settings.as_object().unwrap() {
            json[key] = value.clone();
        }
        json
    };
    const EPSILON: f64 = 1e-2;
    let yarn = json!({
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 8, "attention_factor": 1.3
    });
    let plain = json!({"rope_type": "default", "rope_theta": 500.0});
    let long = json!({
        "type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0]
    });
    vec![
        // An output layer of its own.
        with("LlamaForCausalLM", json!({})),
        with(
            "LlamaForCausalLM",
            json!({"attention_bias": true, "mlp_bias": true, "rope_scaling": yarn}),
        ),
        with("Qwen2ForCausalLM", json!({})),
        with("Qwen3ForCausalLM", json!({})),
        with(
            "Qwen3ForCausalLM",
            json!({
                "use_sliding_window": true, "sliding_window": 6, "max_window_layers": 1
            }),
        ),
        with("MistralForCausalLM", json!({"sliding_window": 7})),
        with(
            "Gemma2ForCausalLM",
            json!({
                "sliding_window": 5, "query_pre_attn_scalar": 3.0, "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 4.0
            }),
        ),
        with(
            "Gemma3ForCausalLM",
            json!({
                "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}
            }),
        ),
        with(
            "GraniteForCausalLM",
            json!({
                "embedding_multiplier": 3.0, "attention_multiplier": 0.6, "residual_multiplier": 0.4,
                "logits_scaling": 0.5, "attention_bias": true, "mlp_bias": true
            }),
        ),
        with("SmolLM3ForCausalLM", json!({"no_rope_layers": [0, 1]})),
        with("Olmo2ForCausalLM", json!({})),
        with(
            "Olmo3ForCausalLM",
            json!({
                "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
                "rope_parameters": {"full_attention": yarn, "sliding_attention": plain}
            }),
        ),
        with(
            "Phi3ForCausalLM",
            json!({
                "sliding_window": 9, "partial_rotary_factor": 0.75, "rope_scaling": long,
                "original_max_position_embeddings": 16, "max_position_embeddings": 64
            }),
        ),
        with("GlmForCausalLM", json!({"attention_bias": true})),
        with("Glm4ForCausalLM", json!({})),
        // A shared expert, and a dense layer behind.
        with("Qwen2MoeForCausalLM", json!({})),
        with(
            "Qwen3MoeForCausalLM",
            json!({"mlp_only_layers": [], "num_experts": 7, "num_experts_per_tok": 3}),
        ),
        with("MixtralForCausalLM", json!({"sliding_window": 7})),
        with("OlmoeForCausalLM", json!({"norm_topk_prob": false})),
        with(
            "GptOssForCausalLM",
            json!({
                "attention_bias": true, "sliding_window": 6, "swiglu_limit": 0.5,
                "layer_types": ["sliding_attention", "full_attention"]
            }),
        ),
        // Linear attention, then attention with gates, of whose dimensions a quarter are rotated unless it is said; keys that several
        // value heads share, and keys that none do. A text's first token reads a multiple of its own value, whose size the norm behind
        // takes away: where the multiple is small, nothing but rounding is left of its gradient, which the epsilon bounds.
        with(
            "Qwen3_5ForCausalLM",
            json!({"partial_rotary_factor": 0.5, "rms_norm_eps": EPSILON}),
        ),
        with(
            "Qwen3_5ForCausalLM",
            json!({
                "rms_norm_eps": EPSILON, "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 12,
                "linear_value_head_dim": 40, "linear_conv_kernel_dim": 2
            }),
        ),
        with("Qwen3_5MoeForCausalLM", json!({"rms_norm_eps": EPSILON})),
        with(
            "Qwen3NextForCausalLM",
            json!({"mlp_only_layers": [], "rms_norm_eps": EPSILON}),
        ),
    ]
}

/// Those of them that have experts.
fn mixtures() -> Vec<Value> {
    let all = families().into_iter();
    all.filter(|json| {
        let path = "config.json".as_ref();
        ModelConfig::parse(json, path).unwrap().experts.is_some()
    })
    .collect()
}

/// Runs `work` with a folder of each family, and with what it is called.
fn for_each(work: impl Fn(&Path, &str)) {
    for_each_of(families(), work);
}

fn for_each_of(configs: Vec<Value>, work: impl Fn(&Path, &str)) {
    for config in configs {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, 7);
        work(dir.path(), &config.to_string());
    }
}

/// All weights, and adapters that drop some inputs.
fn methods() -> [Method; 2] {
    [Method::Full, lora(TargetModules::AllLinear, 0.1)]
}

#[test]
fn a_slot_s_gradient_and_loss_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for_each(|dir, what| {
        for method in methods() {
            let job = job(method.clone());
            let run = |device| slot_sums(&mut trained(device, dir, job.clone()), 1, &blocks());
            let (found, expected) = (run(gpu.clone()), run(ComputeDevice::Cpu));
            let apart = distance(&found.0, &expected.0);
            assert!(
                apart < 1e-5,
                "{what} {method:?}: gradients are {apart} apart"
            );
            let apart = found.1 / expected.1 - 1.0;
            assert!(apart.abs() < 1e-5, "{what} {method:?}: {apart}");
        }
    });
}

/// A token goes through all experts that there are: else rounding sends one through another, here or there.
#[test]
fn a_bfloat16_base_is_as_close_to_a_float32_one_as_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    let configs = families().into_iter().map(|mut config| {
        config["num_experts_per_tok"] = config["num_experts"].clone();
        config
    });
    for_each_of(configs.collect(), |dir, what| {
        let run = |device, base_dtype| {
            let job = JobSpec {
                base_dtype,
                ..job(lora(TargetModules::AllLinear, 0.0))
            };
            slot_sums(&mut trained(device, dir, job), 1, &blocks())
        };
        let exact = run(ComputeDevice::Cpu, BaseDtype::Float32);
        let expected = run(ComputeDevice::Cpu, BaseDtype::Bfloat16);
        let found = run(gpu.clone(), BaseDtype::Bfloat16);
        let apart = distance(&found.0, &exact.0);
        let allowed = 1.5 * distance(&expected.0, &exact.0);
        assert!(
            apart < allowed,
            "{what}: gradients are {apart} apart, {allowed} are allowed"
        );
        assert!((found.1 / exact.1 - 1.0).abs() < 1e-2, "{what}");
    });
}

/// Sums, loss and the weights after an update.
#[test]
fn bits_depend_neither_on_what_ran_before_nor_on_checkpointing() {
    let Some(gpu) = gpu() else { return };
    for_each(|dir, what| {
        for method in methods() {
            let base_dtype = match method {
                Method::Full => BaseDtype::Float32,
                Method::Lora(_) => BaseDtype::Bfloat16,
            };
            let run = |gradient_checkpointing, runs_before: bool| {
                let job = JobSpec {
                    gradient_checkpointing,
                    base_dtype,
                    ..job(method.clone())
                };
                let mut trainer = trained(gpu.clone(), dir, job);
                if runs_before {
                    slot_sums(&mut trainer, 1, &[block(&[15], 9)]);
                }
                let sums = slot_sums(&mut trainer, 5, &blocks()[..1]);
                trainer.apply_held(1e-2).unwrap();
                (sums, trainer.weights_digest().unwrap())
            };
            let after_another = run(Checkpointing::Never, true);
            let alone = run(Checkpointing::Always, false);
            assert!(after_another == alone, "{what} {method:?}");
        }
    });
}

#[test]
fn a_packed_block_equals_its_documents_one_by_one() {
    let Some(gpu) = gpu() else { return };
    for_each(|dir, what| {
        let mut trainer = trained(gpu.clone(), dir, job(Method::Full));
        let packed = block(&[20, 17, 9], 1);
        let document = |range: std::ops::Range<usize>| Block {
            tokens: packed.tokens[range.clone()].to_vec(),
            segments: vec![1; range.len()],
            trained: packed.trained[range].to_vec(),
        };
        let alone = [document(0..20), document(20..37), document(37..46)];
        let whole = slot_sums(&mut trainer, 1, std::slice::from_ref(&packed));
        // The same divisor for all, so that the sums can be added.
        trainer.begin_step(2, packed.trained_tokens(), 3).unwrap();
        let mut loss = 0.0;
        for (slot, document) in alone.iter().enumerate() {
            let outcome = trainer.train_slot(slot as u32, std::slice::from_ref(document));
            loss += outcome.unwrap().loss_sum;
        }
        assert!(
            (loss - whole.1).abs() < 1e-5 * loss,
            "{what}: {loss} {}",
            whole.1
        );
        trainer.collect().unwrap();
        let mean = trainer.accumulator().mean();
        let expected: Vec<f32> = whole.0.iter().map(|sum| dequantize(*sum)).collect();
        let norm = gradient_norm(MeanSource::Values(&expected));
        let difference: Vec<f32> = mean.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let apart = gradient_norm(MeanSource::Values(&difference)) / norm;
        assert!(apart < 1e-5, "{what}: {apart}");
    });
}

/// With states between chunks, and others that begin anew behind them.
#[test]
fn texts_of_several_chunks_have_the_processor_s_gradients_and_the_same_bits_again() {
    let Some(gpu) = gpu() else { return };
    let linear = families().into_iter().filter(|json| {
        let path = "config.json".as_ref();
        let config = ModelConfig::parse(json, path).unwrap();
        config.linear_attention.is_some()
    });
    let blocks = [block(&[150, 37], 3), block(&[70, 64, 65], 4)];
    for_each_of(linear.collect(), |dir, what| {
        for method in methods() {
            let run = |device, gradient_checkpointing| {
                let job = JobSpec {
                    gradient_checkpointing,
                    ..job(method.clone())
                };
                slot_sums(&mut trained(device, dir, job), 1, &blocks)
            };
            let found = run(gpu.clone(), Checkpointing::Never);
            let expected = run(ComputeDevice::Cpu, Checkpointing::Never);
            let apart = distance(&found.0, &expected.0);
            assert!(apart < 1e-5, "{what} {method:?}: {apart}");
            let apart = found.1 / expected.1 - 1.0;
            assert!(apart.abs() < 1e-5, "{what} {method:?}: {apart}");
            let again = run(gpu.clone(), Checkpointing::Always);
            assert!(found == again, "{what} {method:?}");
        }
    });
}

/// In which it is told from the loss of the tokens: its coefficient is large, and few experts have most of the tokens.
#[test]
fn the_router_s_loss_is_that_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for mut config in mixtures() {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, 7);
        config["output_router_logits"] = true.into();
        config["router_aux_loss_coef"] = 0.5.into();
        let folder = dir.path().join("config.json");
        let losses = |device: &ComputeDevice, method: Method| {
            let mut trainer = trained(device.clone(), dir.path(), job(method));
            let slot = slot_sums(&mut trainer, 1, &blocks());
            let evaluated = trainer.eval_slot(&blocks()).unwrap();
            (slot, evaluated.loss_sum)
        };
        let without = losses(&gpu, Method::Full).1;
        std::fs::write(&folder, config.to_string()).unwrap();
        for method in methods() {
            let found = losses(&gpu, method.clone());
            let expected = losses(&ComputeDevice::Cpu, method.clone());
            let apart = distance(&found.0.0, &expected.0.0);
            assert!(apart < 1e-5, "{config} {method:?}: {apart}");
            for (found, expected) in [(found.0.1, expected.0.1), (found.1, expected.1)] {
                let apart = found / expected - 1.0;
                assert!(apart.abs() < 1e-5, "{config} {method:?}: {apart}");
            }
            assert!(found.1 > 1.01 * without, "{config}");
        }
        let bits = |gradient_checkpointing| {
            let job = JobSpec {
                gradient_checkpointing,
                ..job(Method::Full)
            };
            slot_sums(&mut trained(gpu.clone(), dir.path(), job), 1, &blocks())
        };
        assert!(bits(Checkpointing::Never) == bits(Checkpointing::Always));
    }
}

#[test]
fn logits_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for_each(|dir, what| {
        let run = |device| {
            let mut trainer = load_on(device, dir, job(Method::Full), 1);
            let evaluated = trainer.eval_slot(&blocks()).unwrap();
            let tokens: Vec<u32> = (0..24).map(|token| token * 7 % 61).collect();
            (trainer.logits(&tokens).unwrap(), evaluated)
        };
        let (found, expected) = (run(gpu.clone()), run(ComputeDevice::Cpu));
        crate::engine::cuda::testing::assert_near(what, &found.0, &expected.0, 1e-5);
        assert_eq!(found.1.correct_tokens, expected.1.correct_tokens, "{what}");
        let apart = found.1.loss_sum / expected.1.loss_sum - 1.0;
        assert!(apart.abs() < 1e-5, "{what}: {apart}");
    });
}
