//! What layers have of each token beside the residual, where they have such (Gemma 4), and the numbers that they multiply by.

use common::model::{
    INPUT_EMBEDDING, INPUT_MIX_NORM, INPUT_NORM, LAYER_SCALAR, LinearShape, input_projection,
};
use half::bf16;

use super::Parts;
use crate::engine::EngineError;
use crate::engine::model::layers::own_input::OwnInput;
use crate::engine::model::layers::residual::Residual;
use crate::engine::model::own_inputs::OwnInputs;
use crate::engine::ops::projection::Projection;
use crate::engine::ops::token_matrix::TokenMatrix;
use common::job::BaseDtype;

impl Parts<'_> {
    /// What the inputs of all layers are computed from.
    pub(super) fn own_inputs(&self) -> Result<Option<OwnInputs>, EngineError> {
        let config = self.config;
        let (Some(sizes), Some(projection)) = (config.layer_inputs, input_projection(config))
        else {
            return Ok(None);
        };
        let shape = [sizes.vocabulary, projection.out];
        let quantization = self.quantization.filter(|how| how.embeddings);
        let matrix = TokenMatrix::from(self.matrix(INPUT_EMBEDDING, &shape, quantization)?);
        let scale = (sizes.width as f64).sqrt() as f32;
        Ok(Some(OwnInputs {
            embedding: matrix.into(),
            // Rounded as that of the embedding is.
            scale: match self.dtype {
                BaseDtype::Float32 => scale,
                BaseDtype::Bfloat16 => bf16::from_f32(scale).to_f32(),
            },
            projection: Projection(vec![self.linear("", &projection)?]),
            norm: self.norm_of(INPUT_NORM, sizes.width)?,
            width: sizes.width,
            layers: config.layers,
        }))
    }

    /// The part of a layer that mixes in its own input, by the linears of its gate and its output.
    pub(super) fn own_input(
        &self,
        layer: usize,
        prefix: &str,
        [gate, output]: [&[LinearShape]; 2],
    ) -> Result<Option<OwnInput>, EngineError> {
        if self.config.layer_inputs.is_none() {
            return Ok(None);
        }
        Ok(Some(OwnInput {
            layer,
            gate: self.projection(prefix, gate)?,
            output: self.projection(prefix, output)?,
            residual: Residual {
                norm: Some(self.norm(&format!("{prefix}{INPUT_MIX_NORM}"))?),
                scale: 1.0,
            },
            activation: self.config.activation,
        }))
    }

    /// What a layer's result is multiplied by.
    pub(super) fn layer_scale(&self, prefix: &str) -> Result<f32, EngineError> {
        let mut scale = [1.0];
        if self.config.layer_scalars {
            let name = format!("{prefix}{LAYER_SCALAR}");
            self.source.read_f32(&name, &[1], &mut scale)?;
        }
        let [scale] = scale;
        Ok(scale)
    }
}
