//! What a job trains of a model: which of its own tensors full training changes and which it leaves as they are, and which matrices
//! learn.

use super::adapted::{adapted_modules, module_tensors, tensors_beside};
use super::adapted_module::AdaptedModule;
use super::config::ModelConfig;
use super::geometry::{EMBEDDING, HEAD, base_tensors, is_never_trained, is_norm_or_bias};
use super::unmatched_target::UnmatchedTarget;
use half::bf16;

use crate::job::{
    BaseDtype, InitWeights, JobSpec, LoraSpec, Method, NamePatterns, Optimizer, Unfrozen,
    is_magnitude,
};
use crate::memory::OwnTensor;

/// Tensors of a model, with their shapes.
type Tensors = Vec<(String, Vec<usize>)>;

/// The tensors that full training changes.
///
/// # Errors
/// Where patterns are given, and none fits a name.
pub fn unfrozen_tensors(
    config: &ModelConfig,
    unfrozen: &Unfrozen,
) -> Result<Tensors, UnmatchedTarget> {
    let (unfrozen, _) = divided(config, unfrozen)?;
    match unfrozen.is_empty() {
        true => Err(UnmatchedTarget::AllFrozen),
        false => Ok(unfrozen),
    }
}

/// The tensors that full training leaves as they are.
pub fn frozen_tensors(
    config: &ModelConfig,
    unfrozen: &Unfrozen,
) -> Result<Tensors, UnmatchedTarget> {
    Ok(divided(config, unfrozen)?.1)
}

/// Bytes that a model which full training writes has of the tensors that it leaves as they are.
pub fn frozen_bytes(job: &JobSpec, config: &ModelConfig) -> u64 {
    if job.method != Method::Full {
        return 0;
    }
    let element = match job.base_dtype {
        BaseDtype::Float32 => size_of::<f32>(),
        BaseDtype::Bfloat16 => size_of::<bf16>(),
    };
    let frozen = frozen_tensors(config, &job.unfrozen).unwrap_or_default();
    let scalars = frozen
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>());
    (scalars.sum::<usize>() * element) as u64
}

/// The tensors that full training changes, and the others.
fn divided(
    config: &ModelConfig,
    unfrozen: &Unfrozen,
) -> Result<(Tensors, Tensors), UnmatchedTarget> {
    let tensors = base_tensors(config).into_iter();
    if unfrozen.is_all() {
        return Ok(tensors.partition(|(name, _)| !is_never_trained(name)));
    }
    let names = unfrozen.names().map_err(UnmatchedTarget::Unfrozen)?;
    Ok(tensors.partition(|(name, _)| names.fit(name) && !is_never_trained(name)))
}

/// The sizes of what full training changes, where that is not the whole model.
///
/// # Errors
/// As [`unfrozen_tensors`].
pub fn unfrozen_sizes(
    config: &ModelConfig,
    job: &JobSpec,
) -> Result<Option<Vec<OwnTensor>>, UnmatchedTarget> {
    if job.method != Method::Full || job.unfrozen.is_all() {
        return Ok(None);
    }
    let tensors = unfrozen_tensors(config, &job.unfrozen)?.into_iter();
    let tensors = tensors.map(|(name, shape)| OwnTensor { name, shape });
    Ok(Some(tensors.collect()))
}

/// Names of the matrices that a job trains.
pub fn trained_matrices(
    config: &ModelConfig,
    job: &JobSpec,
) -> Result<Vec<String>, UnmatchedTarget> {
    let Method::Lora(lora) = &job.method else {
        let matrices = unfrozen_tensors(config, &job.unfrozen)?.into_iter();
        let matrices = matrices.filter(|(name, shape)| !is_norm_or_bias(name, shape.len()));
        return Ok(matrices.map(|(name, _)| name).collect());
    };
    let modules = adapted_modules(config, lora)?;
    let tensors = module_tensors(&modules, lora).chain(tensors_beside(config, &modules, lora));
    // Magnitudes are vectors that learn as matrices do.
    let matrices = tensors.filter(|(name, shape)| shape.len() == 2 || is_magnitude(name));
    Ok(matrices.map(|(name, _)| name).collect())
}

/// Checks the patterns of a job against the names of its model; `config` has the tokens that the job adds. Returns what the user
/// should know.
///
/// # Errors
/// One line, where they leave nothing to train, or not what the job says elsewhere.
pub fn check_unfrozen(config: &ModelConfig, job: &JobSpec) -> Result<Vec<String>, String> {
    if job.unfrozen.is_all() {
        return Ok(Vec::new());
    }
    let names = job.unfrozen.names()?;
    if let Method::Lora(lora) = &job.method {
        return match conflict_of_adapter(config, lora, &names)? {
            Some(conflict) => Err(format!("unfrozen_parameters {conflict}")),
            None => Ok(vec![
                "unfrozen_parameters: changes nothing, because an adapter is trained, and of the model no weight is".to_owned(),
            ]),
        };
    }
    let unfrozen = unfrozen_tensors(config, &job.unfrozen).map_err(|error| error.to_string())?;
    if let Some(conflict) = conflict_of_full(config, job, &unfrozen) {
        return Err(format!("unfrozen_parameters {conflict}"));
    }
    let all = base_tensors(config);
    let idle = names.idle(all.iter().map(|(name, _)| name.as_str()));
    Ok(match idle[..] {
        [] => Vec::new(),
        _ => vec![format!(
            "unfrozen_parameters: no weight of the model has a name in which these fit: {}",
            shown(&idle)
        )],
    })
}

fn has(tensors: &Tensors, wanted: &str) -> bool {
    tensors.iter().any(|(name, _)| name == wanted)
}

/// What else of a job with an adapter the patterns leave no room for.
fn conflict_of_adapter(
    config: &ModelConfig,
    lora: &LoraSpec,
    unfrozen: &NamePatterns,
) -> Result<Option<String>, String> {
    let modules = adapted_modules(config, lora).map_err(|error| error.to_string())?;
    let files = base_tensors(config);
    let is_named = |module: &AdaptedModule| {
        unfrozen.fit(&module.weight())
            || module.stack.is_some() && {
                let layer = module.path.split(".mlp.").next().unwrap_or_default();
                let mut names = files.iter().map(|(name, _)| name);
                names.any(|name| is_of_experts(config, layer, name) && unfrozen.fit(name))
            }
    };
    let left_out = modules.iter().find(|module| !is_named(module));
    Ok(left_out.map(AdaptedModule::weight).map(|name| {
        format!(
            "leaves out {name}, which the job puts an adapter on; name linears in lora_target_modules and layers in \
             layers_to_transform instead, and remove it"
        )
    }))
}

/// Whether a tensor is one of the experts or the router of a layer, by the names that files have, which are not those that adapters
/// on them are named by.
fn is_of_experts(config: &ModelConfig, layer: &str, name: &str) -> bool {
    config.experts.as_ref().is_some_and(|experts| {
        let block = format!("{layer}.{}.", experts.names.block);
        let router = format!("{}.", experts.names.router);
        let within = name.strip_prefix(&block).unwrap_or_default();
        within.starts_with("experts.") || within.starts_with(&router)
    })
}

/// What else of a job of full training the patterns leave no room for.
fn conflict_of_full(config: &ModelConfig, job: &JobSpec, unfrozen: &Tensors) -> Option<String> {
    if job.init_weights == InitWeights::Random {
        let told = "would leave weights as they are drawn (init_weights: random), so all must be trained; remove one of the two";
        return Some(told.to_owned());
    }
    let of_tokens = [Some(EMBEDDING), (!config.tied).then_some(HEAD)];
    let mut of_tokens = of_tokens.into_iter().flatten();
    if let (Some(name), false) = (
        of_tokens.find(|name| !has(unfrozen, name)),
        job.tokens.is_empty(),
    ) {
        return Some(format!(
            "leaves out {name}, and the job adds tokens, whose rows of it must be learned; name it there, too"
        ));
    }
    let leaves_vectors = Optimizer::Muon {
        trains_vectors: false,
    };
    let mut tensors = unfrozen.iter();
    let is_idle = job.optimizer == leaves_vectors
        && tensors.all(|(name, shape)| shape.len() == 1 || is_norm_or_bias(name, shape.len()));
    let told = "names vectors alone, which `optimizer: muon` does not change; name matrices, or another optimizer";
    is_idle.then(|| told.to_owned())
}

/// The first few of some patterns, and how many there are besides.
fn shown(patterns: &[&str]) -> String {
    const FEW: usize = 5;
    let first = patterns[..patterns.len().min(FEW)].join(", ");
    match patterns.len().saturating_sub(FEW) {
        0 => first,
        more => format!("{first}, and {more} more"),
    }
}
