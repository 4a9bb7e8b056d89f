//! LoRA: which linears get an adapter, what its tensors are called, and the values they start from (new ones: `start`).

mod from_base;
mod second_half;
mod start;

use std::path::Path;

use common::files::FileError;
use common::files::adapter::{ADAPTER_WEIGHTS, Adapted, Factor, check_adapter, tensor_name};
use common::files::layout::Layout;
use common::files::snapshot::read_weights;
use common::job::{AdapterSizes, ExpertParameter, LoraSpec, TOKEN_MODULES, named_parameters};
use common::model::{AdaptedModule, Experts, module_tensors};

use super::EngineError;
use super::ops::dora::Magnitudes;
use super::ops::lora_embedding::LoraEmbedding;
use super::ops::lora_linear::Lora;
use super::ops::matrix::View;
use super::ops::projection::Linear;
use super::params::Parameters;
use crate::engine::model::weights::name_key;

pub use from_base::factors_of;
pub use second_half::SecondHalves;
pub use start::{initial_values, start_stream};

/// The adapter's trainable tensors: those of its modules, and what is trained `beside` them.
pub fn adapter_layout(
    modules: &[AdaptedModule],
    lora: &LoraSpec,
    beside: Vec<(String, Vec<usize>)>,
) -> Layout {
    Layout::new(module_tensors(modules, lora).chain(beside))
}

/// Reads starting values from a PEFT adapter, which must be of the job's kind and have exactly its tensors: those of its modules,
/// and what is trained `beside` them, on a model whose output layer is the embedding where it is `tied`.
pub fn values_from(
    dir: &Path,
    (modules, beside): (&[AdaptedModule], &[(String, Vec<usize>)]),
    lora: &LoraSpec,
    tied: bool,
) -> Result<Vec<f32>, EngineError> {
    let linears: Vec<Adapted> = modules.iter().map(Adapted::from).collect();
    check_adapter(dir, lora, &linears, beside, tied)?;
    let layout = adapter_layout(modules, lora, beside.to_vec());
    let values = read_weights(dir, &layout)?;
    let tensors = layout.tensors.iter().zip(layout.split(&values));
    let is_broken = |values: &[f32]| !values.iter().all(|value| value.is_finite());
    if let Some((tensor, _)) = { tensors }.find(|(_, values)| is_broken(values)) {
        let name = &tensor.name;
        let reason =
            format!("tensor {name} holds numbers that are not finite: the adapter is of no use");
        return Err(FileError::malformed(&dir.join(ADAPTER_WEIGHTS), reason).into());
    }
    Ok(values)
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

    /// Starts the adapter of a linear, if it begins with a part of the weight: the second halves of its factors take off what the first
    /// ones begin with.
    pub fn start_from(&self, linear: &Linear, path: &str, seed: u64) {
        let Some(lora) = linear
            .lora
            .as_ref()
            .filter(|_| self.spec.init.is_from_base())
        else {
            return;
        };
        let (out, width) = linear.weight.matrix_dims();
        let mut weight = vec![0.0; out * width];
        let reading = linear.weight.read();
        for (row, values) in weight.chunks_exact_mut(width).enumerate() {
            reading.slice().copy_row(row, width, values);
        }
        let (rank, scale) = (self.sizes.trained_rank(path), self.sizes.scale(path));
        let view = View::new(&weight, out, width);
        let mut rng = start_stream(seed, path);
        let Some(factors) = factors_of(self.spec.init, view, (rank, scale), &mut rng) else {
            return;
        };
        lora.a.set(&[&factors.a[..], &factors.a[..]].concat());
        let rows = factors.b.chunks_exact(rank);
        let b = rows.flat_map(|row| row.iter().copied().chain(row.iter().map(|x| -x)));
        lora.b.set(&b.collect::<Vec<f32>>());
    }

    /// The adapter of the embedding, or None where it has none.
    pub fn on_embedding(&self, parameters: &Parameters) -> Option<LoraEmbedding> {
        let path = TOKEN_MODULES[0];
        Some(LoraEmbedding {
            a: parameters.weight(&tensor_name(path, Factor::EmbeddingA))?,
            b: parameters.weight(&tensor_name(path, Factor::EmbeddingB))?,
            scale: self.sizes.scale(path) as f32,
        })
    }

    /// The adapters of the experts of a layer, on gate and up together and on down, and the one of their router; `prefix` is what the
    /// names of the layer's tensors begin with. Empty where there are none. They never drop inputs.
    pub fn on_experts(
        &self,
        prefix: &str,
        experts: &Experts,
        parameters: &Parameters,
    ) -> [Vec<Lora>; 3] {
        let place = (prefix, experts.names.router);
        let found = named_parameters(place, &self.spec.shape.parameters);
        let count = experts.sizes.count;
        let [gate_up, down, router] = found;
        let adapters = [(gate_up, count), (down, count), (router, 1)];
        let adapters: [Option<Vec<Lora>>; 3] = adapters.map(|(parameter, experts)| {
            let ExpertParameter { path, module } = parameter?;
            let a = parameters.rows(&tensor_name(&module, Factor::A), experts)?;
            let b = parameters.columns(&tensor_name(&module, Factor::B), experts)?;
            let adapter = |(a, b)| Lora {
                a,
                b,
                scale: self.sizes.scale(&path) as f32,
                dropout: 0.0,
                module: name_key(&path),
                trained: self.sizes.trained_rank(&path),
                bias: None,
                magnitudes: None,
            };
            Some(a.into_iter().zip(b).map(adapter).collect())
        });
        adapters.map(Option::unwrap_or_default)
    }

    /// The adapter of the linear at this path, or None where it has none.
    pub fn on(&self, path: &str, parameters: &Parameters) -> Option<Lora> {
        Some(Lora {
            a: parameters.weight(&tensor_name(path, Factor::A))?,
            b: parameters.weight(&tensor_name(path, Factor::B))?,
            scale: self.sizes.scale(path) as f32,
            dropout: self.spec.dropout,
            module: name_key(path),
            trained: self.sizes.trained_rank(path),
            bias: parameters.weight(&tensor_name(path, Factor::BiasOfB)),
            magnitudes: parameters
                .weight(&tensor_name(path, Factor::Magnitude))
                .map(Magnitudes::new),
        })
    }
}
