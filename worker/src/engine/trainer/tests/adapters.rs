//! Kinds of adapters: whatever computes them, their bits are the same.

use std::path::Path;

use common::files::adapter::{Factor, tensor_name};
use common::files::model::{
    MAX_SHARD_BYTES, ModelFolder, ModelTensor, Scalars, WeightFiles, write_model,
};
use common::files::tensors::Dtype;
use common::job::{
    AdapterInit, BaseDtype, InitWeights, JobSpec, LoraSpec, Method, Quantization, TargetModules,
    TrainedBiases, TrainedRows,
};
use common::model::{EMBEDDING, HEAD, ModelConfig, base_tensors};

use super::{FAMILIES, blocks, check_resumed, model};
use crate::engine::testing::widened::widened_copy;
use crate::engine::testing::{self, config, job, load, lora, step};

fn adapter(dropout: f64, change: impl FnOnce(&mut LoraSpec)) -> Method {
    let Method::Lora(mut spec) = lora(TargetModules::AllLinear, dropout) else {
        unreachable!("an adapter")
    };
    change(&mut spec);
    Method::Lora(spec)
}

fn dora(dropout: f64) -> Method {
    adapter(dropout, |spec| spec.use_dora = true)
}

fn from_base(init: AdapterInit) -> Method {
    adapter(0.0, |spec| spec.init = init)
}

/// [`check_resumed`], and no trained tensor ends as it started.
fn check_resumed_and_moved(model: &Path, job: &JobSpec, name: &str) {
    let [start, end] = check_resumed(model, job, 1e-2, name);
    for tensor in &end.layout.tensors {
        let range = tensor.offset..tensor.offset + tensor.scalars();
        let is_moved = start.weights.widened(range.clone()) != end.weights.widened(range);
        assert!(is_moved, "{name}: {}", tensor.name);
    }
}

#[test]
fn adapters_from_the_base_learn_to_the_same_bits_and_their_second_halves_stay() {
    let dir = model("Qwen3ForCausalLM");
    let four_bits = Quantization {
        nested_scales: true,
        embeddings: false,
        experts: false,
    };
    for (init, base_dtype, quantization) in [
        (
            AdapterInit::Pissa { iterations: None },
            BaseDtype::Float32,
            None,
        ),
        (AdapterInit::Olora, BaseDtype::Float32, None),
        (AdapterInit::Olora, BaseDtype::Bfloat16, None),
        (
            AdapterInit::Pissa {
                iterations: Some(4),
            },
            BaseDtype::Bfloat16,
            Some(four_bits),
        ),
    ] {
        let job = JobSpec {
            base_dtype,
            quantization,
            weight_decay: 0.1,
            ..job(from_base(init))
        };
        let [start, end] = check_resumed(dir.path(), &job, 3e-3, &init.to_string());

        let halves = |factor, state: &common::files::snapshot::Snapshot| {
            let name = tensor_name("model.layers.0.self_attn.q_proj", factor);
            let tensor = state.layout.find(&name).unwrap().clone();
            let values = state
                .weights
                .widened(tensor.offset..tensor.offset + tensor.scalars());
            let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
            let is_second = |index: usize| match factor {
                Factor::B => index % columns >= columns / 2,
                _ => index / columns >= rows / 2,
            };
            let (mut trained, mut fixed) = (Vec::new(), Vec::new());
            for (index, value) in values.into_iter().enumerate() {
                if is_second(index) {
                    &mut fixed
                } else {
                    &mut trained
                }
                .push(value);
            }
            [trained, fixed]
        };
        for factor in [Factor::A, Factor::B] {
            let ([trained, fixed], [moved, stayed]) =
                (halves(factor, &start), halves(factor, &end));
            assert!(
                trained
                    .iter()
                    .zip(&moved)
                    .all(|(before, after)| before != after)
            );
            assert_eq!(fixed, stayed, "{init}");
        }
    }
}

#[test]
fn magnitudes_are_trained_to_the_same_bits_by_any_threads_and_after_a_resume() {
    for architecture in FAMILIES {
        let dir = model(architecture);
        for (dropout, base_dtype) in [
            (0.0, BaseDtype::Float32),
            (0.1, BaseDtype::Float32),
            (0.1, BaseDtype::Bfloat16),
        ] {
            let job = JobSpec {
                base_dtype,
                weight_decay: 0.01,
                ..job(dora(dropout))
            };
            let name = format!("{architecture}, {dropout}, {base_dtype:?}");
            check_resumed(dir.path(), &job, 1e-2, &name);
        }
    }
}

#[test]
fn biases_and_kinds_together_are_trained_to_the_same_bits_by_any_threads_and_after_a_resume() {
    let dir = model("Qwen2ForCausalLM");
    let with_bias = ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec();
    for method in [
        adapter(0.1, |spec| spec.biases = TrainedBiases::All),
        adapter(0.0, |spec| {
            spec.target_modules = TargetModules::Named(vec!["q_proj".to_owned()]);
            spec.biases = TrainedBiases::All;
        }),
        adapter(0.0, |spec| {
            spec.target_modules = TargetModules::Named(with_bias);
            spec.biases = TrainedBiases::LoraOnly;
            spec.lora_bias = true;
        }),
        adapter(0.1, |spec| {
            spec.use_dora = true;
            spec.biases = TrainedBiases::All;
        }),
        adapter(0.0, |spec| {
            spec.use_dora = true;
            spec.init = AdapterInit::Pissa { iterations: None };
        }),
    ] {
        let job = JobSpec {
            weight_decay: 0.01,
            ..job(method.clone())
        };
        check_resumed_and_moved(dir.path(), &job, &format!("{method:?}"));
    }
}

/// An adapter on the parameters of experts that are named, and on linears of the attention where that is asked for.
fn on_experts(names: &[&str], has_linears: bool) -> Method {
    adapter(0.0, |spec| {
        if !has_linears {
            spec.target_modules = TargetModules::Named(Vec::new());
        }
        spec.shape.parameters = names.iter().map(|name| (*name).to_owned()).collect();
    })
}

const EXPERT_PARAMETERS: [&str; 3] = ["experts.down_proj", "experts.gate_up_proj", "gate.weight"];

#[test]
fn adapters_on_parameters_of_experts_are_trained_to_the_same_bits_by_any_threads_and_after_a_resume()
 {
    let both = || on_experts(&EXPERT_PARAMETERS, true);
    let in_four_bits = Quantization {
        nested_scales: true,
        embeddings: false,
        experts: true,
    };
    for (architecture, method, base_dtype, quantization) in [
        ("Qwen3MoeForCausalLM", both(), BaseDtype::Float32, None),
        (
            "Qwen2MoeForCausalLM",
            on_experts(&["gate_up_proj"], false),
            BaseDtype::Bfloat16,
            None,
        ),
        (
            "MixtralForCausalLM",
            on_experts(&["down_proj"], false),
            BaseDtype::Float32,
            None,
        ),
        (
            "OlmoeForCausalLM",
            both(),
            BaseDtype::Bfloat16,
            Some(in_four_bits),
        ),
        ("GptOssForCausalLM", both(), BaseDtype::Float32, None),
        (
            "GptOssForCausalLM",
            both(),
            BaseDtype::Bfloat16,
            Some(in_four_bits),
        ),
    ] {
        let dir = model(architecture);
        let name = format!("{architecture}, {method:?}, {base_dtype:?}");
        let job = JobSpec {
            base_dtype,
            quantization,
            weight_decay: 0.01,
            ..job(method)
        };
        check_resumed_and_moved(dir.path(), &job, &name);
    }
}

/// Whether gradients are gathered for a slot, or added as they are computed, as beside a whole matrix.
#[test]
fn factors_of_experts_are_trained_beside_a_whole_embedding() {
    let dir = model("Qwen3MoeForCausalLM");
    let Method::Lora(mut spec) = on_experts(&EXPERT_PARAMETERS, true) else {
        unreachable!("an adapter")
    };
    spec.tokens.embedding = TrainedRows::All;
    let job = job(Method::Lora(spec));
    let run = |threads| {
        let mut trainer = load(dir.path(), job.clone(), threads);
        let losses: Vec<f64> = (0..3)
            .map(|_| step(&mut trainer, &blocks(), 1e-2))
            .collect();
        assert!(losses[2] < losses[0], "{losses:?}");
        trainer.weights_digest().unwrap()
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn new_adapters_of_every_kind_leave_the_model_as_it_is() {
    let dir = model("Qwen3MoeForCausalLM");
    let tokens: Vec<u32> = (1..20).collect();
    let logits = |method| {
        let mut trainer = load(dir.path(), job(method), 2);
        trainer.logits(&tokens).unwrap()
    };
    let method = on_experts(&EXPERT_PARAMETERS, false);
    assert_eq!(logits(method), logits(Method::Full));
    let dir = model("Qwen2ForCausalLM");
    let tokens: Vec<u32> = (1..20).collect();
    let logits = |method| {
        let mut trainer = load(dir.path(), job(method), 2);
        trainer.logits(&tokens).unwrap()
    };
    let expected = logits(Method::Full);
    let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for method in [
        dora(0.0),
        adapter(0.0, |spec| spec.init = AdapterInit::Gaussian),
        adapter(0.0, |spec| spec.init = AdapterInit::Orthogonal),
        adapter(0.0, |spec| {
            spec.use_dora = true;
            spec.init = AdapterInit::Orthogonal;
        }),
        from_base(AdapterInit::Pissa { iterations: None }),
        from_base(AdapterInit::Pissa {
            iterations: Some(2),
        }),
        from_base(AdapterInit::Olora),
        adapter(0.0, |spec| spec.biases = TrainedBiases::All),
        on_tokens(0.0, |_| {}),
        on_tokens(0.0, |spec| {
            spec.target_modules = TargetModules::Named(vec!["lm_head".to_owned()]);
            spec.use_dora = true;
        }),
        on_tokens(0.0, |spec| {
            spec.target_modules = TargetModules::Named(vec!["lm_head".to_owned()]);
            spec.init = AdapterInit::Olora;
        }),
    ] {
        for (found, expected) in logits(method.clone()).iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-5 * largest, "{method:?}");
        }
    }
}

/// An adapter on the embedding and the output layer, and on a linear.
fn on_tokens(dropout: f64, change: impl FnOnce(&mut LoraSpec)) -> Method {
    adapter(dropout, |spec| {
        let names = ["embed_tokens", "lm_head", "v_proj"];
        spec.target_modules = TargetModules::Named(names.map(str::to_owned).into());
        change(spec);
    })
}

/// A small model whose output layer is the embedding, or a matrix of its own.
fn model_with_head(tied: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut json = config("Qwen3ForCausalLM");
    json["tie_word_embeddings"] = tied.into();
    testing::write_model(dir.path(), &json, 7);
    dir
}

#[test]
fn adapters_on_embedding_and_output_layer_are_trained_to_the_same_bits_by_any_threads_and_after_a_resume()
 {
    let in_four_bits = Quantization {
        nested_scales: true,
        embeddings: true,
        experts: false,
    };
    let usual = || on_tokens(0.0, |_| {});
    let dora = on_tokens(0.1, |spec| {
        spec.target_modules = TargetModules::Named(vec!["lm_head".to_owned()]);
        spec.use_dora = true;
    });
    let pissa = on_tokens(0.0, |spec| {
        spec.target_modules = TargetModules::Named(vec!["lm_head".to_owned()]);
        spec.init = AdapterInit::Pissa { iterations: None };
    });
    for (tied, method, base_dtype, quantization) in [
        (false, usual(), BaseDtype::Float32, None),
        (true, usual(), BaseDtype::Float32, None),
        (true, on_tokens(0.1, |_| {}), BaseDtype::Bfloat16, None),
        (true, usual(), BaseDtype::Bfloat16, Some(in_four_bits)),
        (true, dora, BaseDtype::Bfloat16, None),
        (true, pissa, BaseDtype::Float32, None),
    ] {
        let dir = model_with_head(tied);
        let name = format!("{method:?}, {base_dtype:?}, tied: {tied}");
        let job = JobSpec {
            base_dtype,
            quantization,
            weight_decay: 0.01,
            ..job(method)
        };
        check_resumed_and_moved(dir.path(), &job, &name);
    }
}

/// The same model with its embedding once more, as an output layer of its own.
fn with_own_head(tied: &Path) -> tempfile::TempDir {
    let folder = ModelFolder::open(tied, InitWeights::Pretrained).unwrap();
    let tensors = base_tensors(&ModelConfig::of(&folder).unwrap());
    let files = WeightFiles::open(&folder, &tensors).unwrap();
    let mut values: Vec<(&str, &[usize], Vec<f32>)> = Vec::new();
    for (name, shape) in &tensors {
        let mut read = vec![0.0; shape.iter().product()];
        files.read_f32(name, shape, &mut read).unwrap();
        if name == EMBEDDING {
            values.push((HEAD, shape, read.clone()));
        }
        values.push((name, shape, read));
    }
    let listed: Vec<ModelTensor> = values
        .iter()
        .map(|(name, shape, scalars)| ModelTensor {
            name,
            shape,
            scalars: Scalars::Here(scalars),
        })
        .collect();
    let mut json = folder.config_json().clone();
    json["tie_word_embeddings"] = false.into();
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &json, &listed, Dtype::F32, MAX_SHARD_BYTES).unwrap();
    dir
}

#[test]
fn an_adapter_on_one_of_two_matrices_that_are_one_leaves_the_other_as_it_is() {
    let tied = model_with_head(true);
    let apart = with_own_head(tied.path());
    for name in ["embed_tokens", "lm_head"] {
        let run = |dir: &Path| {
            let method = adapter(0.0, |spec| {
                spec.target_modules = TargetModules::Named(vec![name.to_owned()]);
            });
            let mut trainer = load(dir, job(method), 2);
            let losses: Vec<f64> = (0..3)
                .map(|_| step(&mut trainer, &blocks(), 1e-2))
                .collect();
            (losses, trainer.snapshot().unwrap())
        };
        assert_eq!(run(tied.path()), run(apart.path()), "{name}");
    }
}

/// As PEFT starts it: a normal B and no A, so that nothing is changed before the first step.
#[test]
fn an_adapter_on_the_embedding_starts_with_a_and_not_with_b_at_zero() {
    let dir = model_with_head(false);
    for init in [
        AdapterInit::Kaiming,
        AdapterInit::Gaussian,
        AdapterInit::Orthogonal,
    ] {
        let trainer = load(dir.path(), job(on_tokens(0.0, |spec| spec.init = init)), 1);
        let state = trainer.snapshot().unwrap();
        let values = |factor| {
            let name = tensor_name("model.embed_tokens", factor);
            let tensor = state.layout.find(&name).unwrap();
            state
                .weights
                .widened(tensor.offset..tensor.offset + tensor.scalars())
        };
        assert!(values(Factor::EmbeddingA).iter().all(|x| *x == 0.0));
        let b = values(Factor::EmbeddingB);
        let squares: f32 = b.iter().map(|x| x * x).sum();
        let deviation = (squares / b.len() as f32).sqrt();
        assert!((0.75..1.25).contains(&deviation), "{init}: {deviation}");
    }
}

#[test]
fn magnitudes_start_with_the_norms_of_the_rows_and_move() {
    let dir = model("Qwen3ForCausalLM");
    let mut trainer = load(dir.path(), job(dora(0.0)), 2);
    let layout = trainer.layout();
    let tensor = layout.find(&tensor_name(
        "model.layers.1.mlp.up_proj",
        Factor::Magnitude,
    ));
    let tensor = tensor.unwrap().clone();
    let magnitudes = |trainer: &crate::engine::Trainer| {
        let weights = trainer.snapshot().unwrap().weights;
        weights.widened(tensor.offset..tensor.offset + tensor.scalars())
    };
    let start = magnitudes(&trainer);
    // 32 inputs of a standard deviation of 0.2.
    let mean = start.iter().sum::<f32>() / start.len() as f32;
    assert!((mean - 0.2 * 32f32.sqrt()).abs() < 0.1, "{mean}");
    step(&mut trainer, &blocks(), 1e-2);
    let moved = magnitudes(&trainer);
    assert!(
        start
            .iter()
            .zip(&moved)
            .all(|(start, moved)| start != moved)
    );
}

#[test]
fn magnitudes_on_4_bits_are_trained_to_the_bits_of_those_on_what_they_leave() {
    let dir = model("Qwen3ForCausalLM");
    let how = Quantization {
        nested_scales: true,
        embeddings: false,
        experts: false,
    };
    let widened = widened_copy(dir.path(), how, BaseDtype::Float32);
    for dropout in [0.0, 0.1] {
        let run = |dir: &std::path::Path, quantization, threads| {
            let job = JobSpec {
                quantization,
                ..job(dora(dropout))
            };
            let mut trainer = load(dir, job, threads);
            for _ in 0..3 {
                step(&mut trainer, &blocks(), 1e-2);
            }
            trainer.weights_digest().unwrap()
        };
        let expected = run(widened.path(), None, 1);
        assert_eq!(run(dir.path(), Some(how), 1), expected);
        assert_eq!(run(dir.path(), Some(how), 3), expected);
    }
}
