//! Merges adapters on the parameters of experts into the weights of each expert and of the router, as the model's files have them.

use std::collections::HashMap;

use candle_core::Tensor;
use common::files::adapter::{Factor, tensor_name};
use common::files::tensors::TensorFile;
use common::job::{AdapterSizes, ExpertParameter, named_parameters};
use common::model::{Experts, ModelConfig};

use super::adapter_tensor::read_tensor;
use super::error::InferenceError;

/// The adapters on parameters of experts that an adapter's config names, with the layers that have them.
pub(super) struct StackedAdapters<'a> {
    hidden: usize,
    layers: Vec<(String, &'a Experts, [Option<ExpertParameter>; 3])>,
}

impl<'a> StackedAdapters<'a> {
    pub fn of(config: &'a ModelConfig, targets: &[String]) -> Self {
        let layers = (0..config.layers).filter_map(|layer| {
            let (prefix, experts) = (format!("model.layers.{layer}."), config.experts_of(layer)?);
            let found = named_parameters((&prefix, experts.names.router), targets);
            Some((prefix, experts, found))
        });
        Self {
            hidden: config.hidden_size,
            layers: layers.collect(),
        }
    }

    /// Whether this factor of the module at this path is one of theirs.
    pub fn has(&self, module: &str, factor: Factor) -> bool {
        let all = self.layers.iter().flat_map(|(_, _, found)| found);
        matches!(factor, Factor::A | Factor::B) && all.flatten().any(|found| found.module == module)
    }

    /// Adds `scale · B A` of every expert to its weights.
    pub fn merge(
        &self,
        weights: &mut HashMap<String, Tensor>,
        (file, sizes): (&TensorFile, &AdapterSizes),
    ) -> Result<(), InferenceError> {
        for (prefix, experts, [gate_up, down, router]) in &self.layers {
            if let Some(router) = router {
                let sides = [self.hidden, experts.sizes.count];
                let name = format!("{prefix}{}.weight", experts.router());
                for added in added(router, (1, sides), file, sizes)? {
                    add(weights, &name, &added)?;
                }
            }
            let inner = experts.sizes.width;
            let sides = [[self.hidden, 2 * inner], [inner, self.hidden]];
            for (index, parameter) in [gate_up, down].into_iter().enumerate() {
                let Some(parameter) = parameter else {
                    continue;
                };
                let added = added(parameter, (experts.sizes.count, sides[index]), file, sizes)?;
                match &experts.fused {
                    Some(_) => {
                        let name = format!("{prefix}{}", experts.fused_tensors()[index]);
                        // Of each expert as it is stored, `[in][out]`.
                        let turned = added.iter().map(Tensor::t).collect::<Result<Vec<_>, _>>()?;
                        add(weights, &name, &Tensor::stack(&turned, 0)?)?;
                    }
                    None => merge_apart(weights, (prefix, experts), index, &added)?,
                }
            }
        }
        Ok(())
    }
}

/// Adds what each expert gains to the matrices that it has of its own: gate and up where that is of both together, or down.
fn merge_apart(
    weights: &mut HashMap<String, Tensor>,
    (prefix, experts): (&str, &Experts),
    parameter: usize,
    added: &[Tensor],
) -> Result<(), InferenceError> {
    for (expert, added) in added.iter().enumerate() {
        let [gate, up, down] = experts.matrices(expert);
        let inner = experts.sizes.width;
        let parts = match parameter {
            0 => vec![
                (gate, added.narrow(0, 0, inner)?),
                (up, added.narrow(0, inner, inner)?),
            ],
            _ => vec![(down, added.clone())],
        };
        for (path, added) in parts {
            add(weights, &format!("{prefix}{path}.weight"), &added)?;
        }
    }
    Ok(())
}

/// `scale · B A` of each expert, `[out][in]`.
fn added(
    parameter: &ExpertParameter,
    (experts, [width, out]): (usize, [usize; 2]),
    file: &TensorFile,
    sizes: &AdapterSizes,
) -> Result<Vec<Tensor>, InferenceError> {
    let ExpertParameter { path, module } = parameter;
    let (rank, scale) = (sizes.rank(path), sizes.scale(path));
    let read = |factor, shape: &[usize]| read_tensor(file, &tensor_name(module, factor), shape);
    let a = read(Factor::A, &[experts * rank, width])?;
    let b = read(Factor::B, &[out, rank * experts])?;
    // The columns of an expert stand apart.
    let b = b.reshape((out, rank, experts))?;
    (0..experts)
        .map(|expert| {
            let a = a.narrow(0, expert * rank, rank)?;
            let b = b.narrow(2, expert, 1)?.squeeze(2)?.contiguous()?;
            Ok((b.matmul(&a)? * scale)?)
        })
        .collect()
}

fn add(
    weights: &mut HashMap<String, Tensor>,
    name: &str,
    added: &Tensor,
) -> Result<(), InferenceError> {
    let weight = weights
        .get_mut(name)
        .expect("the experts of the model have weights");
    *weight = (&*weight + added)?;
    Ok(())
}
