//! The feed-forward half of a decoder layer.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{Norm, Pass};
use crate::engine::ops::projection::{Linear, project, project_onto};
use crate::engine::ops::rms_norm::rms_norm;
use crate::engine::ops::swiglu::swiglu;

pub struct Mlp {
    pub norm: Norm,
    /// Gate, up.
    pub gate_up: Arc<Vec<Linear>>,
    pub down: Arc<Vec<Linear>>,
}

impl Mlp {
    /// `x + down(swiglu(gate_up(norm(x))))`, all `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let normed = rms_norm(x, &self.norm.weight, self.norm.epsilon)?;
        let gate_up = project(&normed, &self.gate_up, pass.mask)?;
        project_onto(x, &swiglu(&gate_up)?, &self.down, pass.mask)
    }
}
