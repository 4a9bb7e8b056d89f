//! Which linears of a model a job puts an adapter on, and which matrices it trains.

use std::collections::HashMap;

use thiserror::Error;

use super::config::ModelConfig;
use super::experts::ExpertNames;
use super::geometry::{LinearShape, linears, token_tensors};
use crate::files::adapter::{Adapted, Factor, adapter_tensors, tensor_name};
use crate::job::{
    AdapterSizes, JobSpec, LoraSpec, Method, TargetModules, TrainedBiases, whole_path,
};
use crate::memory::LINEARS;

/// One linear of a layer, as adapters name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdaptedModule {
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    pub shape: LinearShape,
    pub rank: usize,
}

impl From<&AdaptedModule> for Adapted {
    fn from(module: &AdaptedModule) -> Self {
        Self {
            path: module.path.clone(),
            rank: module.rank,
            inputs: module.shape.width,
            outputs: module.shape.out,
            has_bias: module.shape.bias,
        }
    }
}

/// The tensors that the job trains of an adapter's linears, with their shapes.
pub fn module_tensors(
    modules: &[AdaptedModule],
    lora: &LoraSpec,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    modules.iter().flat_map(|module| {
        let tensors: Vec<_> = adapter_tensors(&module.into(), lora).collect();
        tensors
    })
}

/// What the job trains beside the factors of its adapter, with shapes: of embedding and output layer, and the biases of linears without
/// an adapter.
pub fn tensors_beside(
    config: &ModelConfig,
    modules: &[AdaptedModule],
    lora: &LoraSpec,
) -> Vec<(String, Vec<usize>)> {
    let mut beside = token_tensors(config, &lora.tokens);
    if lora.biases != TrainedBiases::All {
        return beside;
    }
    for layer in 0..config.layers {
        for linear in linears(config, layer)
            .into_iter()
            .filter(|linear| linear.bias)
        {
            let path = format!("model.layers.{layer}.{}", linear.path);
            if !modules.iter().any(|module| module.path == path) {
                beside.push((tensor_name(&path, Factor::BiasAlone), vec![linear.out]));
            }
        }
    }
    beside
}

/// The linears that the job puts an adapter on, as PEFT matches them: by last name or by the end of the path, but for those that
/// are excluded, in the layers that are named.
pub fn adapted_modules(
    config: &ModelConfig,
    lora: &LoraSpec,
) -> Result<Vec<AdaptedModule>, UnmatchedTarget> {
    if let (TrainedBiases::All, Some(experts)) = (lora.biases, &config.experts)
        && experts.sizes.biased
    {
        return Err(UnmatchedTarget::RouterBias {
            router: format!("{}.bias", experts.router()),
        });
    }
    let mut modules = targets(config, &lora.target_modules)?;
    if let Some(numbers) = &lora.shape.layers {
        if let Some(absent) = numbers.iter().find(|number| **number >= config.layers) {
            return Err(UnmatchedTarget::Layer {
                absent: *absent,
                layers: config.layers,
            });
        }
        modules.retain(|module| {
            let is_of =
                |number: &usize| module.path.starts_with(&format!("model.layers.{number}."));
            numbers.iter().any(is_of)
        });
    }
    if let Some(excluded) = &lora.shape.excluded {
        let matches = matcher(excluded);
        modules.retain(|module| !matches(&module.path));
    }
    if modules.is_empty() {
        return Err(UnmatchedTarget::NothingLeft);
    }
    let sizes = lora.sizes();
    for module in &mut modules {
        module.rank = sizes.rank(&module.path);
        let (rank, side) = (
            sizes.trained_rank(&module.path),
            module.shape.width.min(module.shape.out),
        );
        if lora.lora_bias && !module.shape.bias {
            return Err(UnmatchedTarget::NoBias {
                path: module.path.clone(),
            });
        }
        if lora.init.is_from_base() && rank > side {
            return Err(UnmatchedTarget::Directions {
                rank,
                side,
                path: module.path.clone(),
            });
        }
    }
    Ok(modules)
}

/// Last names of the linears that adapters may be put on, for people.
pub fn linear_names(config: &ModelConfig) -> String {
    let mut names: Vec<&str> = Vec::new();
    for module in decoder_linears(config) {
        let name = module.shape.name();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

/// What says whether the path of a module is among those that are named.
fn matcher(modules: &TargetModules) -> Box<dyn Fn(&str) -> bool + '_> {
    match modules {
        TargetModules::AllLinear => Box::new(|_| true),
        TargetModules::Named(names) => {
            Box::new(move |path| names.iter().any(|name| is_named(path, name)))
        }
        TargetModules::Matching(pattern) => {
            let regex = whole_path(pattern).ok();
            Box::new(move |path| regex.as_ref().is_some_and(|regex| regex.is_match(path)))
        }
    }
}

/// The linears that are named as targets.
fn targets(
    config: &ModelConfig,
    targets: &TargetModules,
) -> Result<Vec<AdaptedModule>, UnmatchedTarget> {
    let all: Vec<AdaptedModule> = decoder_linears(config).collect();
    let names = match targets {
        TargetModules::AllLinear => return Ok(all),
        TargetModules::Named(names) => names,
        TargetModules::Matching(pattern) => return matching(all, pattern, config),
    };
    if let Some(name) = names.iter().find(|name| is_of_experts(config, name)) {
        return Err(UnmatchedTarget::Experts {
            target: name.clone(),
            known: linear_names(config),
        });
    }
    // Layers that the model has and that no adapter can be put on here are another matter than names of other models.
    let of_tokens = |name: &&String| {
        let last = name.rsplit('.').next();
        matches!(last, Some("lm_head" | "embed_tokens"))
    };
    let is_found = |name: &String| all.iter().any(|module| is_named(&module.path, name));
    let wrong = match names.iter().any(is_found) {
        true => names.iter().find(of_tokens),
        false => names.first(),
    };
    if let Some(name) = wrong {
        return Err(UnmatchedTarget::Target {
            target: name.clone(),
            known: linear_names(config),
        });
    }
    Ok(all
        .into_iter()
        .filter(|module| names.iter().any(|name| is_named(&module.path, name)))
        .collect())
}

/// The names among a job's targets that no linear of the model has, where others do: PEFT passes them over.
pub fn absent_targets(config: &ModelConfig, targets: &TargetModules) -> Vec<String> {
    let TargetModules::Named(names) = targets else {
        return Vec::new();
    };
    let is_absent =
        |name: &&String| !decoder_linears(config).any(|module| is_named(&module.path, name));
    names.iter().filter(is_absent).cloned().collect()
}

/// Whether a target names routers or experts, which are no linears.
fn is_of_experts(config: &ModelConfig, name: &str) -> bool {
    let Some(experts) = &config.experts else {
        return false;
    };
    let last = name.rsplit('.').next().unwrap_or(name);
    let ExpertNames {
        router,
        gate,
        up,
        down,
        ..
    } = experts.names;
    match last {
        "experts" => true,
        _ if last == router => true,
        _ => experts.names.are_parameters && [gate, up, down].contains(&last),
    }
}

/// Whether a pattern matches a router or experts, by the names that these have in files or in Transformers 5.
fn matches_experts(config: &ModelConfig, matches: impl Fn(&str) -> bool) -> bool {
    let Some(experts) = config.experts.as_ref().filter(|e| e.names.are_parameters) else {
        return false;
    };
    let ExpertNames { gate, up, down, .. } = experts.names;
    (0..config.layers).any(|layer| {
        [experts.names.block, "mlp"].into_iter().any(|block| {
            let block = format!("model.layers.{layer}.{block}");
            matches(&format!("{block}.gate"))
                || [gate, up, down, "gate_up_proj"].into_iter().any(|name| {
                    matches(&format!("{block}.experts.{name}"))
                        || matches(&format!("{block}.experts.0.{name}"))
                })
        })
    })
}

/// All linears of all layers that adapters may be put on.
fn decoder_linears(config: &ModelConfig) -> impl Iterator<Item = AdaptedModule> {
    // PEFT would take the names of what a dense layer has behind its attention for those of experts.
    let experts = config.experts.as_ref();
    let of_attention = experts.is_some_and(|experts| experts.names.are_parameters);
    (0..config.layers).flat_map(move |layer| {
        let linears = linears(config, layer).into_iter();
        let linears = linears.filter(move |linear| !of_attention || linear.is_of_attention());
        linears.map(move |shape| AdaptedModule {
            path: format!("model.layers.{layer}.{}", shape.path),
            shape,
            rank: 0,
        })
    })
}

/// Whether a target names the module of that path: the path itself, or its end.
fn is_named(path: &str, name: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|rest| rest.ends_with('.'))
}

/// The modules whose whole path the pattern matches, as Python's `re.fullmatch` would.
fn matching(
    all: Vec<AdaptedModule>,
    pattern: &str,
    config: &ModelConfig,
) -> Result<Vec<AdaptedModule>, UnmatchedTarget> {
    let unmatched = || UnmatchedTarget::Target {
        target: pattern.to_owned(),
        known: linear_names(config),
    };
    let regex = whole_path(pattern).map_err(|_| unmatched())?;
    if matches_experts(config, |path| regex.is_match(path)) {
        return Err(UnmatchedTarget::Experts {
            target: pattern.to_owned(),
            known: linear_names(config),
        });
    }
    let matched: Vec<AdaptedModule> = all
        .into_iter()
        .filter(|module| regex.is_match(&module.path))
        .collect();
    match matched.is_empty() {
        true => Err(unmatched()),
        false => Ok(matched),
    }
}

/// A job names a linear that the model does not have.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnmatchedTarget {
    #[error("lora_target_modules: no linear of the model is called {target} (it has {known})")]
    Target { target: String, known: String },
    #[error(
        "lora_target_modules: {target} means the router or experts of this model, which get no adapter here; name linears instead: {known}"
    )]
    Experts { target: String, known: String },
    #[error(
        "layers_to_transform: the model has no layer {absent} (it has {layers}, counted from 0)"
    )]
    Layer { absent: usize, layers: usize },
    #[error(
        "exclude_modules and layers_to_transform leave none of lora_target_modules: nothing would be trained"
    )]
    NothingLeft,
    #[error(
        "lora_bias: {path} has no bias in this model, so that an adapter with one could never be merged into it; name linears with a bias in lora_target_modules, or remove it"
    )]
    NoBias { path: String },
    #[error(
        "unfrozen_parameters: no weight of the model has a name in which one of them fits, so that nothing would be trained (a name is model.layers.0.self_attn.q_proj.weight)"
    )]
    AllFrozen,
    #[error("unfrozen_parameters {0}")]
    Unfrozen(String),
    #[error(
        "bias: `all` would train the bias of each router too ({router}), as PEFT does, and routers stay as they are here; use bias: lora_only"
    )]
    RouterBias { router: String },
    #[error(
        "init_lora_weights: an adapter of rank {rank} begins with as many directions of {path}, which has {side}; lower lora_r, or give it another rank or none"
    )]
    Directions {
        rank: usize,
        side: usize,
        path: String,
    },
}

/// By layer: the rank of the adapter that the job puts on the linear in each slot, with a second half that is not trained where it
/// has one; 0 for none. Empty where the job trains all weights.
pub fn adapted_by_layer(
    config: &ModelConfig,
    job: &JobSpec,
) -> Result<Vec<[usize; LINEARS]>, UnmatchedTarget> {
    by_layer(config, job, |_, module| module.rank)
}

/// By layer: the rank that is trained of the adapter on the linear in each slot, as in [`adapted_by_layer`].
pub fn trained_by_layer(
    config: &ModelConfig,
    job: &JobSpec,
) -> Result<Vec<[usize; LINEARS]>, UnmatchedTarget> {
    by_layer(config, job, |sizes, module| {
        sizes.trained_rank(&module.path)
    })
}

fn by_layer(
    config: &ModelConfig,
    job: &JobSpec,
    rank: impl Fn(&AdapterSizes, &AdaptedModule) -> usize,
) -> Result<Vec<[usize; LINEARS]>, UnmatchedTarget> {
    let Method::Lora(lora) = &job.method else {
        return Ok(Vec::new());
    };
    let (modules, sizes) = (adapted_modules(config, lora)?, lora.sizes());
    let ranks: HashMap<&str, usize> = modules
        .iter()
        .map(|module| (module.path.as_str(), rank(&sizes, module)))
        .collect();
    let rank = |layer: usize, path: &str| {
        let path = format!("model.layers.{layer}.{path}");
        ranks.get(path.as_str()).copied().unwrap_or(0)
    };
    let of_layer = |layer: usize| {
        let mut adapted = [0; LINEARS];
        for linear in linears(config, layer) {
            adapted[linear.slot] = rank(layer, linear.path);
        }
        adapted
    };
    Ok((0..config.layers).map(of_layer).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn config(class: &str) -> ModelConfig {
        let json = json!({
            "architectures": [class], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]
        });
        ModelConfig::parse(&json, Path::new("config.json")).unwrap()
    }

    fn named(names: &[&str]) -> TargetModules {
        TargetModules::Named(names.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn adapters_go_on_the_matrix_that_is_there() {
        let config = config("Phi3ForCausalLM");
        let modules = targets(&config, &named(&["qkv_proj", "gate_up_proj"])).unwrap();
        let paths: Vec<&str> = modules.iter().map(|module| module.path.as_str()).collect();
        let expected = [
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.1.self_attn.qkv_proj",
            "model.layers.1.mlp.gate_up_proj",
        ];
        assert_eq!(paths, expected);
        let all = targets(&config, &TargetModules::AllLinear).unwrap();
        assert_eq!(all.len(), 8);
        let message = targets(&config, &named(&["q_proj", "v_proj"])).unwrap_err();
        assert_eq!(
            message.to_string(),
            "lora_target_modules: no linear of the model is called q_proj (it has qkv_proj, o_proj, gate_up_proj, down_proj)"
        );
        let some = named(&["o_proj", "q_proj"]);
        assert_eq!(absent_targets(&config, &some), ["q_proj"]);
    }

    /// As PEFT 0.21 has it: it takes the names of experts for parameters where Transformers 5 made them of linears, but not in
    /// Qwen2-MoE.
    #[test]
    fn routers_and_experts_get_no_adapter_and_are_named() {
        let qwen3 = config("Qwen3MoeForCausalLM");
        assert_eq!(linear_names(&qwen3), "q_proj, k_proj, v_proj, o_proj");
        let all = targets(&qwen3, &TargetModules::AllLinear).unwrap();
        assert_eq!(all.len(), 8, "a dense layer is no exception");
        let pattern = |pattern: &str| TargetModules::Matching(pattern.to_owned());
        for target in [
            named(&["q_proj", "gate_proj"]),
            named(&["q_proj", "mlp.gate"]),
            pattern(r".*_proj"),
            pattern(r".*layers\.1\.mlp\.experts\.\d+\.up_proj|.*q_proj"),
        ] {
            let refused = targets(&qwen3, &target);
            assert!(matches!(refused, Err(UnmatchedTarget::Experts { .. })));
        }
        assert_eq!(
            targets(&qwen3, &pattern(r".*self_attn\..*")).unwrap().len(),
            8
        );
        let mixtral = config("MixtralForCausalLM");
        assert!(targets(&mixtral, &named(&["q_proj", "w1"])).is_err());

        let qwen2 = config("Qwen2MoeForCausalLM");
        let paths = |target: &TargetModules| -> Vec<String> {
            let modules = targets(&qwen2, target).unwrap().into_iter();
            modules.map(|module| module.path).collect()
        };
        assert_eq!(
            paths(&named(&["gate_proj", "shared_expert_gate"])),
            [
                "model.layers.0.mlp.shared_expert.gate_proj",
                "model.layers.0.mlp.shared_expert_gate",
                "model.layers.1.mlp.gate_proj",
            ]
        );
        assert_eq!(paths(&TargetModules::AllLinear).len(), 8 + 7);
        assert!(targets(&qwen2, &named(&["q_proj", "gate"])).is_err());
    }

    #[test]
    fn biases_of_routers_are_not_left_out_in_silence() {
        let lora = |biases| LoraSpec {
            r: 4,
            alpha: 8.0,
            dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            use_rslora: false,
            use_dora: false,
            biases,
            lora_bias: false,
            init: Default::default(),
            shape: Default::default(),
            tokens: Default::default(),
            model_dir: None,
            model_source: None,
        };
        let gpt_oss = config("GptOssForCausalLM");
        let refused = adapted_modules(&gpt_oss, &lora(TrainedBiases::All)).unwrap_err();
        let told = refused.to_string();
        assert!(
            told.contains("mlp.router.bias") && told.ends_with("use bias: lora_only"),
            "{told}"
        );
        adapted_modules(&gpt_oss, &lora(TrainedBiases::LoraOnly)).unwrap();
        let others = config("Qwen2MoeForCausalLM");
        adapted_modules(&others, &lora(TrainedBiases::All)).unwrap();
    }
}
