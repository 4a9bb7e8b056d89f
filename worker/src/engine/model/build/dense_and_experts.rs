//! Experts beside a dense half (Gemma 4), which a layer has in two tensors.

use common::model::{self, BESIDE_NORMS, LinearShape, ROUTER_SCALES, STACKED_EXPERTS};

use super::Parts;
use crate::engine::EngineError;
use crate::engine::model::layers::dense_and_experts::DenseAndExperts;
use crate::engine::model::layers::expert::{Expert, ExpertLinear, Gating};
use crate::engine::model::layers::experts::{Experts, OwnRouting};
use crate::engine::model::weight_parts::TensorPart;
use crate::engine::ops::projection::{Linear, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::routing::Routing;

impl Parts<'_> {
    /// A half that is dense, by its linears, and has experts, by the linear that is their router.
    pub(super) fn dense_and_experts(
        &self,
        prefix: &str,
        experts: &model::Experts,
        dense: [&[LinearShape]; 2],
        router: &[LinearShape],
    ) -> Result<DenseAndExperts, EngineError> {
        let needed = |name: &str| self.norm(&format!("{prefix}{name}.weight"));
        let [dense_output, read, experts_output] = BESIDE_NORMS;
        let output = self.config.norms.mlp_output.unwrap_or_default();
        let sizes = &experts.sizes;
        let [scale, per_expert] = ROUTER_SCALES.map(|name| format!("{prefix}{name}"));
        let stacked = |index: usize| self.stacked_expert(prefix, experts, index);
        Ok(DenseAndExperts {
            dense: self.mlp(prefix, dense, Some(dense_output))?,
            experts: Experts {
                norm: self.layer_norm(prefix, Some(read))?,
                router: self.projection(prefix, router)?,
                own_routing: Some(OwnRouting {
                    norm: RmsNorm {
                        weight: self.weight(&scale, &[self.config.hidden_size])?,
                        epsilon: self.config.rms_norm_epsilon as f32,
                        offset: false,
                    },
                    factor: (1.0 / (self.config.hidden_size as f64).sqrt()) as f32,
                    scales: self.weight(&per_expert, &[sizes.count])?,
                }),
                routing: Routing {
                    experts: sizes.count,
                    per_token: sizes.per_token,
                    normalises: experts.normalises,
                },
                experts: (0..sizes.count).map(stacked).collect::<Result<_, _>>()?,
                shared: None,
                gating: Gating::Halves(self.config.activation),
            },
            experts_norm: needed(experts_output)?,
            output_norm: needed(output)?,
        })
    }

    /// An expert whose matrices are parts of tensors that have those of all, gate and up as one.
    fn stacked_expert(
        &self,
        prefix: &str,
        experts: &model::Experts,
        index: usize,
    ) -> Result<Expert, EngineError> {
        let (count, width) = (experts.sizes.count, experts.sizes.width);
        let hidden = self.config.hidden_size;
        let linear = |name: &str, [out, input]: [usize; 2]| -> Result<_, EngineError> {
            let name = format!("{prefix}{name}");
            let part = TensorPart {
                name: &name,
                shape: &[count, out, input],
                index,
            };
            Ok(ExpertLinear::Apart(Projection(vec![Linear {
                weight: self.part(part)?,
                bias: None,
                lora: None,
            }])))
        };
        let [gate_up, down] = STACKED_EXPERTS;
        Ok(Expert {
            gate_up: linear(gate_up, [2 * width, hidden])?,
            down: linear(down, [hidden, width])?,
        })
    }
}
