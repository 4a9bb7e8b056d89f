//! One decoder layer: attention, then feed-forward, each on the residual.

use candle_core::{Result, Tensor};

use super::Pass;
use super::attention::AttentionBlock;
use super::mlp::Mlp;

pub struct DecoderLayer {
    pub attention: AttentionBlock,
    pub mlp: Mlp,
}

impl DecoderLayer {
    /// `[tokens, hidden]` to the same.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.mlp.forward(&self.attention.forward(x, pass)?, pass)
    }
}
