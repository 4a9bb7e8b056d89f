//! The parameters of experts and routers that a job puts an adapter on, with their shapes as Transformers 5 has them, and what is refused.

use super::adapted_module::{AdaptedModule, Stack};
use super::config::ModelConfig;
use super::experts::Experts;
use super::geometry::{LinearShape, base_tensors};
use super::unmatched_target::UnmatchedTarget;
use crate::job::{EXPERT_PARAMETERS, LoraSpec, is_parameter, named_parameters, router_parameter};
use crate::memory::LINEARS;

/// The parameters that the job puts an adapter on, of all layers: neither what is excluded nor layers by number leave any out. Names
/// that no parameter has are passed over where something else has an adapter.
pub(super) fn parameter_modules(
    config: &ModelConfig,
    lora: &LoraSpec,
    are_alone: bool,
) -> Result<Vec<AdaptedModule>, UnmatchedTarget> {
    let targets = &lora.shape.parameters;
    let beside = config
        .experts
        .as_ref()
        .filter(|experts| experts.sizes.beside_dense);
    if let (Some(_), Some(target)) = (beside, targets.first()) {
        return Err(UnmatchedTarget::Beside {
            target: target.clone(),
        });
    }
    check_others(config, targets)?;
    let sizes = lora.sizes();
    let modules = (0..config.layers).filter_map(|layer| {
        let experts = config.experts_of(layer)?;
        let place = format!("model.layers.{layer}.");
        let found = named_parameters((&place, experts.names.router), targets);
        let modules = found.into_iter().zip(shapes(config.hidden_size, experts));
        let modules = modules.filter_map(|(parameter, (experts, shape))| {
            let parameter = parameter?;
            Some(AdaptedModule {
                rank: sizes.rank(&parameter.path),
                path: parameter.path,
                shape,
                stack: Some(Stack {
                    module: parameter.module,
                    experts,
                }),
            })
        });
        Some(modules.collect::<Vec<_>>())
    });
    let modules: Vec<AdaptedModule> = modules.flatten().collect();
    match targets.first().filter(|_| are_alone && modules.is_empty()) {
        None => Ok(modules),
        Some(target) if config.experts.is_none() => Err(UnmatchedTarget::NoExperts {
            target: target.clone(),
        }),
        Some(target) => Err(UnmatchedTarget::Parameter {
            target: target.clone(),
        }),
    }
}

/// The names among a job's target parameters that no parameter of the model's experts has: PEFT passes them over.
pub fn absent_parameters(config: &ModelConfig, targets: &[String]) -> Vec<String> {
    let paths: Vec<String> = paths(config).collect();
    let is_absent = |target: &&String| !paths.iter().any(|path| is_parameter(path, target));
    targets.iter().filter(is_absent).cloned().collect()
}

/// Refuses names of other parameters of the model, on which PEFT would put an adapter too.
fn check_others(config: &ModelConfig, targets: &[String]) -> Result<(), UnmatchedTarget> {
    let absent = absent_parameters(config, targets);
    if absent.is_empty() {
        return Ok(());
    }
    let block = config.experts.as_ref().map(|experts| experts.names.block);
    let is_there = |target: &&String| {
        base_tensors(config).iter().any(|(name, _)| {
            // In Transformers 5 the block is called so in every family.
            let renamed = block.map(|block| name.replace(&format!(".{block}."), ".mlp."));
            is_parameter(name, target) || renamed.is_some_and(|name| is_parameter(&name, target))
        })
    };
    match absent.iter().find(is_there) {
        Some(target) => Err(UnmatchedTarget::Parameter {
            target: target.clone(),
        }),
        None => Ok(()),
    }
}

/// Paths within a layer of the parameters that have an adapter where they are named: those of experts, and that of their router.
pub(super) fn parameter_paths(experts: &Experts) -> [&'static str; 3] {
    let [gate_up, down] = EXPERT_PARAMETERS;
    [gate_up, down, router_parameter(experts.names.router)]
}

/// Those of all layers.
fn paths(config: &ModelConfig) -> impl Iterator<Item = String> {
    (0..config.layers).flat_map(|layer| {
        let found = config.experts_of(layer).map(parameter_paths);
        let found = found.into_iter().flatten();
        found.map(move |name| format!("model.layers.{layer}.{name}"))
    })
}

/// How many experts each of a layer's parameters has, and what it has of one: it reads and gives so much. A router is one.
fn shapes(hidden: usize, experts: &Experts) -> [(usize, LinearShape); 3] {
    let (count, inner) = (experts.sizes.count, experts.sizes.width);
    let [gate_up, down, router] = parameter_paths(experts);
    let sizes = [
        (count, gate_up, hidden, 2 * inner),
        (count, down, inner, hidden),
        (1, router, hidden, count),
    ];
    sizes.map(|(parts, path, width, out)| {
        let shape = LinearShape {
            path,
            slot: LINEARS,
            out,
            width,
            bias: false,
        };
        (parts, shape)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::job::TargetModules;
    use crate::model::{adapted_modules, module_tensors};

    const FAMILIES: [&str; 5] = [
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "GptOssForCausalLM",
    ];

    fn config(class: &str) -> ModelConfig {
        let json = json!({
            "architectures": [class], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40
        });
        ModelConfig::parse(&json, Path::new("config.json")).unwrap()
    }

    fn lora(modules: &[&str], parameters: &[&str]) -> LoraSpec {
        let texts = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let mut lora = LoraSpec {
            r: 3,
            alpha: 8.0,
            dropout: 0.0,
            target_modules: TargetModules::Named(texts(modules)),
            use_rslora: false,
            use_dora: false,
            biases: Default::default(),
            lora_bias: false,
            init: Default::default(),
            shape: Default::default(),
            tokens: Default::default(),
            model_dir: None,
            model_source: None,
        };
        lora.shape.parameters = texts(parameters);
        lora
    }

    fn tensors(config: &ModelConfig, lora: &LoraSpec) -> Vec<(String, Vec<usize>)> {
        let modules = adapted_modules(config, lora).unwrap();
        module_tensors(&modules, lora).collect()
    }

    #[test]
    fn factors_are_named_and_shaped_as_peft_s_in_every_family() {
        let names = ["experts.down_proj", "mlp.experts.gate_up_proj"];
        let mut lora = lora(&[], &names);
        lora.shape.ranks = vec![("layers.1.mlp.experts.down_proj".to_owned(), 5)];
        // Of all layers, as PEFT has it.
        lora.shape.layers = Some(vec![0]);
        let expected = |layer: usize, rank: usize| {
            let path = format!("base_model.model.model.layers.{layer}.mlp.experts");
            let named = |name: &str, shape: [usize; 2]| (format!("{path}.{name}"), shape.to_vec());
            [
                named("base_layer.lora_A.weight", [3 * 4, 64]),
                named("base_layer.lora_B.weight", [48, 3 * 4]),
                named("lora_A.weight", [rank * 4, 24]),
                named("lora_B.weight", [64, rank * 4]),
            ]
        };
        let expected = [expected(0, 3), expected(1, 5)].concat();
        for class in FAMILIES {
            assert_eq!(tensors(&config(class), &lora), expected, "{class}");
        }
        lora.shape.parameters = vec!["router.weight".to_owned()];
        let router = tensors(&config("GptOssForCausalLM"), &lora);
        let path = "base_model.model.model.layers.1.mlp.router";
        let expected = [
            (format!("{path}.lora_A.weight"), vec![3, 64]),
            (format!("{path}.lora_B.weight"), vec![4, 3]),
        ];
        assert_eq!(router[2..], expected);
    }

    #[test]
    fn a_parameter_alone_stands_beside_linears_where_layers_have_experts() {
        let mut some = config("Qwen3MoeForCausalLM");
        some.experts.as_mut().unwrap().sizes.layers = vec![true, false];
        let lora = lora(&["q_proj"], &["gate_up_proj"]);
        let names: Vec<String> = tensors(&some, &lora).into_iter().map(|t| t.0).collect();
        let path = |rest: &str| format!("base_model.model.model.layers.{rest}.weight");
        let expected = [
            path("0.self_attn.q_proj.lora_A"),
            path("0.self_attn.q_proj.lora_B"),
            path("1.self_attn.q_proj.lora_A"),
            path("1.self_attn.q_proj.lora_B"),
            path("0.mlp.experts.lora_A"),
            path("0.mlp.experts.lora_B"),
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn what_is_no_parameter_of_experts_is_refused_or_told() {
        let refused = |class: &str, modules: &[&str], parameters: &[&str]| {
            let lora = lora(modules, parameters);
            let refused = adapted_modules(&config(class), &lora).unwrap_err();
            refused.to_string()
        };
        let q = &["q_proj"][..];
        for (class, modules, parameters, name) in [
            (
                "Qwen3MoeForCausalLM",
                &[][..],
                &["experts.up_proj"][..],
                "up_proj",
            ),
            (
                "Qwen3MoeForCausalLM",
                q,
                &["q_proj.weight", "experts.down_proj"],
                "q_proj.weight",
            ),
            (
                "MixtralForCausalLM",
                q,
                &["experts.down_proj", "block_sparse_moe.gate.weight"],
                "block_sparse_moe.gate.weight",
            ),
            (
                "GptOssForCausalLM",
                q,
                &["experts.down_proj", "experts.down_proj_bias"],
                "down_proj_bias",
            ),
        ] {
            let told = refused(class, modules, parameters);
            let advice = "name experts.gate_up_proj, experts.down_proj";
            assert!(told.contains(name) && told.contains(advice), "{told}");
        }
        let downs = ["experts.down_proj"];
        let told = refused("Qwen2ForCausalLM", &[], &downs);
        assert!(told.contains("the model has no experts"), "{told}");
        // As PEFT passes over what something else stands beside.
        let beside = tensors(&config("Qwen2ForCausalLM"), &lora(q, &downs));
        assert_eq!(beside.len(), 4);
        let some = ["gate.weight", "router.weight"].map(str::to_owned);
        let qwen3 = config("Qwen3MoeForCausalLM");
        assert_eq!(absent_parameters(&qwen3, &some), some[1..]);
        let both = ["experts.down_proj", "feed_forward.experts.down_proj"].map(str::to_owned);
        let mixtral = config("MixtralForCausalLM");
        assert_eq!(absent_parameters(&mixtral, &both), both[1..]);
    }
}
