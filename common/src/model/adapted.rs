//! Which linears and parameters of a model a job puts an adapter on, and which matrices it trains.

use std::collections::HashMap;

use super::adapted_module::AdaptedModule;
use super::config::ModelConfig;
use super::expert_parameters::{parameter_modules, parameter_paths};
use super::experts::ExpertNames;
use super::geometry::{LinearShape, input_projection, linears, token_tensors};
use super::unmatched_target::UnmatchedTarget;
use crate::files::adapter::{Factor, adapter_tensors, tensor_name};
use crate::job::{
    AdapterSizes, JobSpec, LoraSpec, Method, TOKEN_MODULES, TargetModules, TrainedBiases, is_named,
    spellings, whole_path,
};
use crate::memory::{LINEARS, Ranks};

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

/// The modules that the job puts an adapter on, as PEFT matches them: by last name or by the end of the path, but for those that
/// are excluded, in the layers that are named; and behind them the parameters of experts.
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
        let matches = excluded.matcher();
        modules.retain(|module| !matches(&module.path));
    }
    let parameters = parameter_modules(config, lora, modules.is_empty())?;
    if modules.is_empty() && parameters.is_empty() {
        return Err(UnmatchedTarget::NothingLeft);
    }
    check_token_modules(config, lora, &modules)?;
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
    modules.extend(parameters);
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

/// Refuses adapters on the embedding or the output layer that go with nothing else that the job asks for.
fn check_token_modules(
    config: &ModelConfig,
    lora: &LoraSpec,
    modules: &[AdaptedModule],
) -> Result<(), UnmatchedTarget> {
    if modules.iter().any(AdaptedModule::is_embedding) {
        let field = match (lora.use_dora, lora.init.is_from_base()) {
            (true, _) => Some("use_dora"),
            (false, true) => Some("init_lora_weights"),
            (false, false) => None,
        };
        if let Some(field) = field {
            return Err(UnmatchedTarget::EmbeddingKind { field });
        }
    }
    let tokens = &lora.tokens;
    // Rows of the embedding are those of an output layer that is the same.
    let of_both = config.tied && !tokens.embedding.listed().is_empty();
    let trained = [
        !tokens.embedding.is_none(),
        !tokens.head.is_none() || of_both,
    ];
    let is_adapted = |path: &str| modules.iter().any(|module| module.path == path);
    let mut twice = TOKEN_MODULES.into_iter().zip(trained);
    match twice.find(|(path, is_trained)| *is_trained && is_adapted(path)) {
        Some((path, _)) => Err(UnmatchedTarget::TrainedTwice { path }),
        None => Ok(()),
    }
}

/// The embedding and the output layer, as adapters take them.
fn token_modules(config: &ModelConfig) -> [AdaptedModule; 2] {
    let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
    let [embedding, head] = TOKEN_MODULES;
    let sizes = [(embedding, vocabulary, hidden), (head, hidden, vocabulary)];
    sizes.map(|(path, width, out)| AdaptedModule {
        path: path.to_owned(),
        shape: LinearShape {
            path,
            slot: LINEARS,
            out,
            width,
            bias: false,
        },
        rank: 0,
        stack: None,
    })
}

/// All modules that adapters are put on where they are named.
fn nameable_modules(config: &ModelConfig) -> impl Iterator<Item = AdaptedModule> {
    decoder_linears(config).chain(token_modules(config))
}

/// The modules that are named as targets.
fn targets(
    config: &ModelConfig,
    targets: &TargetModules,
) -> Result<Vec<AdaptedModule>, UnmatchedTarget> {
    let all: Vec<AdaptedModule> = nameable_modules(config).collect();
    let names = match targets {
        TargetModules::AllLinear => return Ok(decoder_linears(config).collect()),
        TargetModules::Named(names) => names,
        TargetModules::Matching(pattern) => return matching(all, pattern, config),
    };
    if let Some(name) = names.iter().find(|name| is_of_experts(config, name)) {
        return Err(UnmatchedTarget::Experts {
            target: name.clone(),
            known: linear_names(config),
        });
    }
    let is_found = |name: &String| all.iter().any(|module| is_named(&module.path, name));
    // Names of other models are passed over beside those of this one.
    if let Some(name) = names.first().filter(|_| !names.iter().any(is_found)) {
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

/// The names among a job's targets that no module of the model has, where others do: PEFT passes them over.
pub fn absent_targets(config: &ModelConfig, targets: &TargetModules) -> Vec<String> {
    let TargetModules::Named(names) = targets else {
        return Vec::new();
    };
    let is_absent =
        |name: &&String| !nameable_modules(config).any(|module| is_named(&module.path, name));
    names.iter().filter(is_absent).cloned().collect()
}

/// Whether a target names routers or experts, which are no linears.
fn is_of_experts(config: &ModelConfig, name: &str) -> bool {
    let Some(experts) = &config.experts else {
        return false;
    };
    // There the router is a linear.
    if experts.sizes.beside_dense {
        return name.rsplit('.').next() == Some("experts");
    }
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
    // PEFT goes by the last name of what a pattern matches.
    let is_shared = experts.sizes.shared.is_some();
    (0..config.layers).any(|layer| {
        [experts.names.block, "mlp"].into_iter().any(|block| {
            let block = format!("model.layers.{layer}.{block}");
            matches(&format!("{block}.gate"))
                || [gate, up, down, "gate_up_proj"].into_iter().any(|name| {
                    matches(&format!("{block}.experts.{name}"))
                        || matches(&format!("{block}.experts.0.{name}"))
                        || (is_shared && matches(&format!("{block}.shared_expert.{name}")))
                })
        })
    })
}

/// All linears of all layers that adapters may be put on, and the one that projects the layers' own inputs.
fn decoder_linears(config: &ModelConfig) -> impl Iterator<Item = AdaptedModule> {
    // PEFT would take the names of what a dense layer has behind its attention, and a shared expert, for those of experts.
    let taken = config.experts.as_ref().map(|experts| experts.names);
    let taken = taken.filter(|names| names.are_parameters);
    let is_taken = move |name: &str| {
        taken.is_some_and(|names| [names.gate, names.up, names.down].contains(&name))
    };
    let of_inputs = input_projection(config).map(|shape| AdaptedModule {
        path: shape.path.to_owned(),
        shape,
        rank: 0,
        stack: None,
    });
    let of_layers = (0..config.layers).flat_map(move |layer| {
        let linears = linears(config, layer).into_iter();
        let linears = linears.filter(move |linear| !is_taken(linear.name()));
        linears.map(move |shape| AdaptedModule {
            path: format!("model.layers.{layer}.{}", shape.path),
            shape,
            rank: 0,
            stack: None,
        })
    });
    of_layers.chain(of_inputs)
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
    // By the names, too, that a job for a model that sees has for its decoder.
    let fits = |path: &str| spellings(path).iter().any(|path| regex.is_match(path));
    if matches_experts(config, fits) {
        return Err(UnmatchedTarget::Experts {
            target: pattern.to_owned(),
            known: linear_names(config),
        });
    }
    let matched: Vec<AdaptedModule> = all
        .into_iter()
        .filter(|module| fits(&module.path))
        .collect();
    match matched.is_empty() {
        true => Err(unmatched()),
        false => Ok(matched),
    }
}

/// Ranks of the adapters that the job puts on the model's modules, with a second half that is not trained where they have one.
/// Empty where the job trains all weights.
pub fn adapter_ranks(config: &ModelConfig, job: &JobSpec) -> Result<Ranks, UnmatchedTarget> {
    ranks(config, job, |_, module| module.rank)
}

/// The ranks that are trained of the adapters, as in [`adapter_ranks`].
pub fn trained_ranks(config: &ModelConfig, job: &JobSpec) -> Result<Ranks, UnmatchedTarget> {
    ranks(config, job, |sizes, module| {
        sizes.trained_rank(&module.path)
    })
}

fn ranks(
    config: &ModelConfig,
    job: &JobSpec,
    rank: impl Fn(&AdapterSizes, &AdaptedModule) -> usize,
) -> Result<Ranks, UnmatchedTarget> {
    let Method::Lora(lora) = &job.method else {
        return Ok(Ranks::default());
    };
    let (modules, sizes) = (adapted_modules(config, lora)?, lora.sizes());
    let ranks: HashMap<&str, usize> = modules
        .iter()
        .map(|module| (module.path.as_str(), rank(&sizes, module)))
        .collect();
    let rank_at = |path: &str| ranks.get(path).copied().unwrap_or(0);
    let rank = |layer: usize, path: &str| rank_at(&format!("model.layers.{layer}.{path}"));
    let of_layer = |layer: usize| {
        let mut adapted = [0; LINEARS];
        for linear in linears(config, layer) {
            adapted[linear.slot] = rank(layer, linear.path);
        }
        adapted
    };
    let of_experts = |layer: usize| {
        let paths = config.experts_of(layer).map(parameter_paths);
        paths.map_or([0; 3], |paths| paths.map(|path| rank(layer, path)))
    };
    Ok(Ranks {
        layers: (0..config.layers).map(of_layer).collect(),
        experts: (0..config.layers).map(of_experts).collect(),
        tokens: TOKEN_MODULES.map(rank_at),
        inputs: input_projection(config).map_or(0, |linear| rank_at(linear.path)),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
