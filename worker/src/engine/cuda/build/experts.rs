//! The feed-forward half of a layer with experts, on the GPU.

use common::model::{self, FUSED_BIAS, FusedExperts, LinearShape};

use super::Parts;
use crate::engine::EngineError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::layers::experts::Experts;
use crate::engine::cuda::layers::shared_expert::SharedExpert;
use crate::engine::cuda::ops::expert_linear::{ExpertBiases, ExpertLinear, ExpertSizes, Stored};
use crate::engine::cuda::ops::frozen::Frozen;
use crate::engine::cuda::ops::projection::{Linear, Projection, Staged};
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::model::layers::expert::Gating;
use crate::engine::model::weight_parts::TensorPart;
use crate::engine::ops::clamped_swiglu::ClampedSwiglu;
use crate::engine::ops::element::Element;
use crate::engine::ops::routing::Routing;

impl Parts<'_> {
    /// The experts of a layer; `shared` are the linears of the one that every token goes through, where there is one.
    pub(super) fn experts<E: Element + GpuElement>(
        &self,
        prefix: &str,
        experts: &model::Experts,
        norm: Option<RmsNorm>,
        shared: &[Vec<LinearShape>; 3],
    ) -> Result<Experts<E>, EngineError> {
        let sizes = &experts.sizes;
        let [gate_up, down, gate] = shared;
        let shared = match sizes.shared {
            None => None,
            Some(_) => Some(SharedExpert {
                gate_up: self.projection(prefix, gate_up)?,
                down: self.projection(prefix, down)?,
                gate: self.projection(prefix, gate)?,
                activation: self.config.activation,
            }),
        };
        let [gate_up, down] = match &experts.fused {
            None => self.apart(prefix, experts)?,
            Some(_) => self.fused(prefix, experts)?,
        };
        Ok(Experts {
            norm,
            router: self.router(prefix, experts)?,
            routing: Routing {
                experts: sizes.count,
                per_token: sizes.per_token,
                normalises: experts.normalises,
            },
            gate_up,
            down,
            shared,
            gating: match experts.fused {
                None => Gating::Halves(self.config.activation),
                Some(FusedExperts { alpha, limit }) => Gating::Alternating(ClampedSwiglu {
                    alpha: alpha as f32,
                    limit: limit as f32,
                }),
            },
        })
    }

    /// The router of a layer, which is never quantised.
    fn router<E: Element + GpuElement>(
        &self,
        prefix: &str,
        experts: &model::Experts,
    ) -> Result<Projection<E>, EngineError> {
        let (path, count) = (experts.router(), experts.sizes.count);
        let (weight, bias) = (
            format!("{prefix}{path}.weight"),
            format!("{prefix}{path}.bias"),
        );
        let linear = Linear {
            out: count,
            weight: self.range(&weight),
            bias: self.range(&bias),
            lora: None,
        };
        let is_frozen = linear.weight.is_none();
        let mut staged = Staged::<E>::new(vec![linear], self.config.hidden_size);
        if is_frozen {
            let shape = [count, self.config.hidden_size];
            let weight = self.source.tensor(&weight, &shape, self.dtype)?;
            staged.set(0, weight.read().elements());
        }
        let bias = match experts.fused {
            None => None,
            Some(_) => Some(self.values(&bias, &[count])?),
        };
        Ok(staged.upload(self.gpu, bias.as_deref())?)
    }

    /// The layers of experts whose matrices are tensors of their own: gate and up, and down.
    fn apart<E: Element + GpuElement>(
        &self,
        prefix: &str,
        experts: &model::Experts,
    ) -> Result<[ExpertLinear<E>; 2], EngineError> {
        let (count, width) = (experts.sizes.count, experts.sizes.width);
        let hidden = self.config.hidden_size;
        let layer = |input: usize, out: usize, names: Vec<String>| {
            let sizes = ExpertSizes {
                experts: count,
                input,
                out,
                stored: Stored::OutByIn,
                parts: names.len() / count,
            };
            let (how, shape) = (self.quantization_of_experts(), [out / sizes.parts, input]);
            if names.iter().any(|name| self.has_four_bits(name, how)) {
                let matrices = names.iter().map(|name| self.frozen(name, &shape, how));
                let matrices = matrices.collect::<Result<_, _>>()?;
                return Ok(ExpertLinear::frozen(sizes, matrices, None, &self.scratch));
            }
            let ranges: Vec<_> = names.iter().map(|name| self.range(name)).collect();
            let mut linear = ExpertLinear::<E>::new(self.gpu, sizes, ranges, None)?;
            for (number, name) in names.iter().enumerate() {
                if self.range(name).is_none() {
                    let weight = self.source.tensor(name, &shape, self.dtype)?;
                    linear.set(self.gpu, number, weight.read().elements())?;
                }
            }
            Ok::<_, EngineError>(linear)
        };
        let named = |path: String| format!("{prefix}{path}.weight");
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for index in 0..count {
            let [gate, up, last] = experts.matrices(index).map(named);
            gate_up.extend([gate, up]);
            down.push(last);
        }
        Ok([
            layer(hidden, 2 * width, gate_up)?,
            layer(width, hidden, down)?,
        ])
    }

    /// The layers of experts that are parts of tensors with those of all: gate and up, and down.
    fn fused<E: Element + GpuElement>(
        &self,
        prefix: &str,
        experts: &model::Experts,
    ) -> Result<[ExpertLinear<E>; 2], EngineError> {
        let (count, width) = (experts.sizes.count, experts.sizes.width);
        let hidden = self.config.hidden_size;
        let layer = |input: usize, out: usize, name: String| {
            let name = format!("{prefix}{name}");
            let biases = format!("{name}{FUSED_BIAS}");
            let sizes = ExpertSizes {
                experts: count,
                input,
                out,
                stored: Stored::InByOut,
                parts: 1,
            };
            let range = self.range(&name);
            let scalars = input * out;
            let own = |index| range.map(|range| range.part(index * scalars, scalars));
            let biases = ExpertBiases {
                values: self.gpu.upload(&self.values(&biases, &[count, out])?)?,
                range: self.range(&biases),
            };
            let shape = [count, input, out];
            let how = self.quantization_of_experts();
            let weight = |index| {
                let (name, shape) = (&name[..], &shape[..]);
                let part = TensorPart { name, shape, index };
                self.source.part(part, self.dtype, how)
            };
            if range.is_none() && self.source.quantises_parts(how) {
                let matrices = (0..count).map(|index| {
                    let matrix = Frozen::upload(self.gpu, &weight(index)?)?;
                    Ok::<_, EngineError>(matrix)
                });
                let matrices = matrices.collect::<Result<_, _>>()?;
                let biases = Some(biases);
                return Ok(ExpertLinear::frozen(sizes, matrices, biases, &self.scratch));
            }
            let mut linear = ExpertLinear::<E>::new(
                self.gpu,
                sizes,
                (0..count).map(own).collect(),
                Some(biases),
            )?;
            for index in (0..count).filter(|_| range.is_none()) {
                linear.set(self.gpu, index, weight(index)?.read().elements())?;
            }
            Ok::<_, EngineError>(linear)
        };
        let [gate_up, down] = experts.fused_tensors();
        Ok([
            layer(hidden, 2 * width, gate_up)?,
            layer(width, hidden, down)?,
        ])
    }
}
