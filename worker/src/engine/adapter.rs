//! LoRA: which linears get an adapter, what its tensors are called, and the values they start from.

use std::path::Path;

use common::files::adapter::{
    ADAPTER_WEIGHTS, AdapterConfig, Factor, is_kept_beside_tokens, tensor_name,
};
use common::files::layout::Layout;
use common::files::snapshot::read_weights;
use common::files::tensors::TensorFile;
use common::job::{AdapterSizes, LoraSpec};
use common::model::AdaptedModule;
use common::rng::CounterRng;

use super::EngineError;
use super::ops::lora_linear::Lora;
use super::params::Parameters;
use crate::engine::model::weights::name_key;

/// Stream of the counter-based generator from which adapters' starting values are drawn.
const STREAM_ADAPTER: u64 = 0x6c6f_7261;

/// The adapter's trainable tensors: the factors of its modules, and what is trained `beside` them.
pub fn adapter_layout(modules: &[AdaptedModule], beside: Vec<(String, Vec<usize>)>) -> Layout {
    let factors = modules.iter().flat_map(|module| {
        [
            (
                tensor_name(&module.path, Factor::A),
                vec![module.rank, module.shape.width],
            ),
            (
                tensor_name(&module.path, Factor::B),
                vec![module.shape.out, module.rank],
            ),
        ]
    });
    Layout::new(factors.chain(beside))
}

/// Starting values of all adapters, in layout order, as PEFT draws them: `A` uniform in `±1/sqrt(in)` (Kaiming with
/// a = sqrt 5), and all others zero.
///
/// # Errors
/// Where the machine has not the memory.
pub fn initial_values(layout: &Layout, seed: u64) -> Result<Vec<f32>, EngineError> {
    let scalars = layout.scalars;
    let mut flat = Vec::new();
    flat.try_reserve_exact(scalars)
        .map_err(|_| EngineError::Memory { scalars })?;
    for tensor in &layout.tensors {
        let scalars: usize = tensor.shape.iter().product();
        if !tensor.name.ends_with(".lora_A.weight") {
            flat.resize(flat.len() + scalars, 0.0);
            continue;
        }
        let bound = 1.0 / (tensor.shape[1] as f64).sqrt();
        let mut rng = CounterRng::new(seed, &[STREAM_ADAPTER, name_key(&tensor.name)]);
        flat.extend((0..scalars).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32));
    }
    Ok(flat)
}

/// Reads starting values from a PEFT adapter, which must have the job's rank and exactly its tensors, for a model whose output
/// layer is the embedding where it is `tied`.
pub fn values_from(
    dir: &Path,
    layout: &Layout,
    lora: &LoraSpec,
    tied: bool,
) -> Result<Vec<f32>, EngineError> {
    let config = AdapterConfig::read(dir)?;
    if config.r != lora.r {
        return Err(EngineError::RankMismatch {
            path: dir.to_owned(),
            found: config.r,
            expected: lora.r,
        });
    }
    let values = read_weights(dir, layout)?;
    let path = dir.join(ADAPTER_WEIGHTS);
    let file = TensorFile::open(&path)?;
    let is_kept = |name: &str| is_kept_beside_tokens(name, &config.tokens, tied);
    let is_unexpected = |name: &&str| layout.find(name).is_none() && !is_kept(name);
    let unexpected = file.names().find(is_unexpected);
    match unexpected.map(str::to_owned) {
        Some(name) => Err(EngineError::UnexpectedTensor { path, name }),
        None => Ok(values),
    }
}

/// The adapter that a job puts on a model.
pub struct JobAdapter<'a> {
    pub spec: &'a LoraSpec,
    pub sizes: AdapterSizes,
}

impl<'a> JobAdapter<'a> {
    pub fn of(spec: &'a LoraSpec) -> Self {
        Self {
            spec,
            sizes: spec.sizes(),
        }
    }

    /// The adapter of the linear at this path, or None where it has none.
    pub fn on(&self, path: &str, parameters: &Parameters) -> Option<Lora> {
        Some(Lora {
            a: parameters.weight(&tensor_name(path, Factor::A))?,
            b: parameters.weight(&tensor_name(path, Factor::B))?,
            scale: self.sizes.scale(path) as f32,
            dropout: self.spec.dropout,
            module: name_key(path),
        })
    }
}
