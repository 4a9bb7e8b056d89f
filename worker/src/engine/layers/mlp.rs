//! The feed-forward half of a decoder layer: `x + down(swiglu(gate_up(norm(x))))`, all `[tokens, hidden]`.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::Pass;
use super::chain::Chain;
use crate::engine::ops::projection::{Linear, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::swiglu::Swiglu;

pub struct Mlp {
    pub norm: RmsNorm,
    /// Gate, up.
    pub gate_up: Arc<Vec<Linear>>,
    pub down: Arc<Vec<Linear>>,
}

impl Mlp {
    pub fn forward(&self, x: &Tensor, pass: &Pass, chain: &mut Chain) -> Result<Tensor> {
        let activated = self.activate(x, pass, chain)?;
        chain.apply_onto(Projection::new(&self.down, pass.mask), &activated, x)
    }

    /// The forward pass once more, only as far as the backward pass needs it.
    pub fn recompute(&self, x: &Tensor, pass: &Pass, chain: &mut Chain) -> Result<()> {
        let activated = self.activate(x, pass, chain)?;
        chain.defer(Projection::new(&self.down, pass.mask), &activated);
        Ok(())
    }

    fn activate(&self, x: &Tensor, pass: &Pass, chain: &mut Chain) -> Result<Tensor> {
        let normed = chain.apply(self.norm.clone(), x)?;
        let gate_up = chain.apply(Projection::new(&self.gate_up, pass.mask), &normed)?;
        chain.apply(Swiglu, &gate_up)
    }
}
