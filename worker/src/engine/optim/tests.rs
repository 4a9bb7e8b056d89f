//! Ten steps of each optimizer, and the groups of weights, as their owners' code has them (`golden/make.py`).

use common::files::Moment;
use common::files::layout::Layout;
use serde_json::Value;

use super::*;
use crate::engine::testing::{job, lora};
use common::job::{Method, TargetModules};

const STEPS: &str = include_str!("golden/steps.json");
const GROUPS: &str = include_str!("golden/groups.json");

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn layout(golden: &Value) -> Layout {
    let shapes: Vec<(String, Vec<usize>)> =
        serde_json::from_value(golden["shapes"].clone()).unwrap();
    Layout::new(shapes)
}

fn optimizer(case: &Value) -> Optimizer {
    let kind = serde_json::from_value(case["optimizer"].clone()).unwrap();
    Optimizer::from_job(&JobSpec {
        optimizer: kind,
        adam_beta1: case["beta1"].as_f64().unwrap(),
        adam_beta2: case["beta2"].as_f64().unwrap(),
        weight_decay: 0.1,
        ..job(Method::Full)
    })
}

/// The weights after all steps of a golden file.
fn trained(golden: &Value, optimizer: &Optimizer) -> Vec<f32> {
    let layout = layout(golden);
    let mut weights = numbers(&golden["weights"]);
    let layout = layout.with_moments(optimizer.kind.moments());
    let mut moments = vec![Moment::zeros(&layout); layout.moments.count];
    let gradients = golden["gradients"].as_array().unwrap();
    for (step, gradient) in gradients.iter().enumerate() {
        let gradient = numbers(gradient);
        let share = 1.0 - step as f64 / gradients.len() as f64;
        let update = Update {
            number: step as u64 + 1,
            learning_rate: golden["rate"].as_f64().unwrap() * share,
            gradient_scale: 1.0,
        };
        let moments = moments.iter_mut();
        let mut moments: Vec<_> = moments.map(|moment| moment.parts_mut(&layout)).collect();
        for tensor in &layout.tensors {
            let range = tensor.offset..tensor.offset + tensor.scalars();
            let moments = moments.iter_mut().filter_map(Iterator::next).collect();
            let mean = (MeanSource::Values(&gradient), tensor.offset);
            let rule = optimizer.of_tensor(tensor);
            rule.apply_f32(&update, &mut weights[range], moments, mean);
        }
    }
    weights
}

#[test]
fn ten_steps_of_each_optimizer_are_its_owner_s() {
    let golden: Value = serde_json::from_str(STEPS).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 9);
    let start = numbers(&golden["weights"]);
    for case in cases {
        let expected = numbers(&case["weights"]);
        let found = trained(&golden, &optimizer(case));
        let moved = start.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        let moved = moved.fold(0.0, f32::max);
        // Newton-Schulz makes small singular values larger, and with them what is rounded.
        let allowed = match case["optimizer"].get("muon") {
            Some(_) => 2e-4 * moved,
            None => 4e-6 * moved,
        };
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let off = (found - expected).abs();
            assert!(
                off <= allowed + 2e-7,
                "{}: {index}: {off}",
                case["optimizer"]
            );
        }
    }
}

#[test]
fn muon_as_in_axolotl_leaves_vectors_as_they_are() {
    let golden: Value = serde_json::from_str(STEPS).unwrap();
    let start = numbers(&golden["weights"]);
    let layout = layout(&golden);
    let norm = layout.find("model.norm.weight").unwrap();
    for trains_vectors in [false, true] {
        let case = serde_json::json!({"optimizer": {"muon": {"trains_vectors": trains_vectors}}, "beta1": 0.9, "beta2": 0.9});
        let found = trained(&golden, &optimizer(&case));
        let is_moved = found[norm.offset..] != start[norm.offset..];
        assert_eq!(is_moved, trains_vectors);
    }
}

#[test]
fn muon_takes_neither_fused_experts_nor_their_biases_for_matrices() {
    let rule = |name: &str, shape: &[usize], trains_vectors: bool| {
        let optimizer = Optimizer::from_job(&JobSpec {
            optimizer: Kind::Muon { trains_vectors },
            ..job(Method::Full)
        });
        let tensor = TensorLayout {
            name: name.to_owned(),
            shape: shape.to_vec(),
            offset: 0,
        };
        optimizer.of_tensor(&tensor).rule
    };
    let experts = "model.layers.0.mlp.experts.down_proj";
    for trains_vectors in [false, true] {
        let of_bias = rule(&format!("{experts}_bias"), &[4, 64], trains_vectors);
        match trains_vectors {
            false => assert_eq!(of_bias, Rule::Fixed),
            true => assert!(matches!(of_bias, Rule::AdamW(_)), "{of_bias:?}"),
        }
        let of_experts = rule(experts, &[4, 48, 64], trains_vectors);
        assert!(matches!(of_experts, Rule::AdamW(_)), "{of_experts:?}");
        let of_router = rule("model.layers.0.mlp.router.weight", &[4, 64], trains_vectors);
        assert!(matches!(of_router, Rule::Muon(_)), "{of_router:?}");
    }
}

#[test]
fn each_tensor_has_the_rate_and_the_decay_of_its_owner_s_group() {
    let golden: Value = serde_json::from_str(GROUPS).unwrap();
    let cases = golden.as_array().unwrap();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let optimizer = Optimizer::from_job(&JobSpec {
            lr_groups: serde_json::from_value(case["rates"].clone()).unwrap(),
            learning_rate: 1e-4,
            weight_decay: 0.1,
            ..job(lora(TargetModules::AllLinear, 0.0))
        });
        let tensors = case["tensors"].as_object().unwrap();
        assert!(tensors.len() > 10 || tensors.keys().all(|name| name.contains("lora")));
        for (name, group) in tensors {
            let shape: Vec<usize> = serde_json::from_value(group[0].clone()).unwrap();
            let tensor = TensorLayout {
                name: name.clone(),
                shape,
                offset: 0,
            };
            let found = optimizer.of_tensor(&tensor);
            let Rule::AdamW(rule) = found.rule else {
                panic!("{found:?}")
            };
            let (rate, decay) = (group[1].as_f64().unwrap(), group[2].as_f64().unwrap());
            assert!(
                (found.rate * 1e-4 / rate - 1.0).abs() < 1e-12,
                "{name}: {found:?}"
            );
            assert_eq!(rule.weight_decay, decay, "{name}");
        }
    }
}

/// As Transformers 5.24's `Trainer.get_decay_parameter_names` has it of GPT-OSS and of Qwen3.5.
#[test]
fn what_decays_is_told_by_names_where_dimensions_do_not_tell_it() {
    let optimizer = Optimizer::from_job(&JobSpec {
        weight_decay: 0.1,
        ..job(Method::Full)
    });
    for (name, shape, decays) in [
        ("self_attn.sinks", vec![4], true),
        ("mlp.router.bias", vec![4], false),
        ("mlp.experts.gate_up_proj", vec![4, 8, 12], true),
        ("mlp.experts.gate_up_proj_bias", vec![4, 12], false),
        ("mlp.experts.down_proj_bias", vec![4, 8], false),
        ("linear_attn.conv1d.weight", vec![12, 1, 4], true),
        ("linear_attn.A_log", vec![4], true),
        ("linear_attn.dt_bias", vec![4], false),
        ("linear_attn.norm.weight", vec![8], false),
    ] {
        let rule = optimizer.of_tensor(&TensorLayout {
            name: format!("model.layers.0.{name}"),
            shape,
            offset: 0,
        });
        let Rule::AdamW(rule) = rule.rule else {
            panic!("{rule:?}")
        };
        assert_eq!(rule.weight_decay > 0.0, decays, "{name}");
    }
}

#[test]
fn a_matrix_of_muon_has_the_same_bits_for_any_number_of_threads() {
    let (rows, columns) = (130, 67);
    let values = |seed: u64| crate::engine::testing::random_values(rows * columns, seed);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let (mut weights, gradient) = (values(1), values(2));
            let mut momentum = vec![0.0; weights.len()];
            let muon = Muon {
                rows,
                columns,
                weight_decay: 0.0,
            };
            let update = Update {
                number: 1,
                learning_rate: 0.1,
                gradient_scale: 1.0,
            };
            let mean = (MeanSource::Values(&gradient), 0);
            muon.update(&update, &mut weights, &mut momentum, mean);
            weights
        })
    };
    let expected = run(1);
    assert_eq!(run(2), expected);
    assert_eq!(run(5), expected);
}
