//! The attention half of a decoder layer.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{Norm, Pass};
use crate::engine::ops::attention::attention;
use crate::engine::ops::projection::{Linear, project, project_onto};
use crate::engine::ops::rms_norm::rms_norm;
use crate::engine::ops::rope::{HeadLayout, HeadNorms, rope};

pub struct AttentionBlock {
    pub norm: Norm,
    /// Queries, keys, values.
    pub qkv: Arc<Vec<Linear>>,
    pub output: Arc<Vec<Linear>>,
    pub layout: HeadLayout,
    pub head_norms: Option<HeadNorms>,
}

impl AttentionBlock {
    /// `x + output(attention(rope(qkv(norm(x)))))`, all `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let normed = rms_norm(x, &self.norm.weight, self.norm.epsilon)?;
        let qkv = project(&normed, &self.qkv, pass.mask)?;
        let qkv = rope(
            &qkv,
            self.layout,
            self.head_norms.clone(),
            pass.positions.clone(),
            pass.rope.clone(),
        )?;
        let context = attention(&qkv, self.layout, pass.segments.clone())?;
        project_onto(x, &context, &self.output, pass.mask)
    }
}
