//! The attention half of a decoder layer: `x + output(attention(rope(qkv(norm(x)))))`, all `[tokens, hidden]`.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::Pass;
use super::chain::Chain;
use crate::engine::ops::attention::Attention;
use crate::engine::ops::projection::{Linear, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::rope::{HeadLayout, HeadNorms, Rope};

pub struct AttentionBlock {
    pub norm: RmsNorm,
    /// Queries, keys, values.
    pub qkv: Arc<Vec<Linear>>,
    pub output: Arc<Vec<Linear>>,
    pub layout: HeadLayout,
    pub head_norms: Option<HeadNorms>,
}

impl AttentionBlock {
    pub fn forward(&self, x: &Tensor, pass: &Pass, chain: &mut Chain) -> Result<Tensor> {
        let normed = chain.apply(self.norm.clone(), x)?;
        let qkv = chain.apply(Projection::new(&self.qkv, pass.mask), &normed)?;
        let rope = Rope::new(
            self.layout,
            self.head_norms.clone(),
            pass.positions.clone(),
            pass.rope.clone(),
        )?;
        let qkv = chain.apply(rope, &qkv)?;
        let context = chain.apply(Attention::new(self.layout, pass.segments.clone()), &qkv)?;
        chain.apply_onto(Projection::new(&self.output, pass.mask), &context, x)
    }
}
