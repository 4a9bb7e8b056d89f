//! Operations one after another, and back again. A layer is such a line but for its residuals, so its backward pass
//! needs no graph: each operation's gradient is the next one's, handed on without a copy or a sum. (Candle's walk adds
//! every gradient to a tensor of zeros, on threads of its own.)

use candle_core::{CustomOp1, Result, Tensor};

use crate::engine::ops::projection::Projection;

/// What the backward pass of a line of operations needs.
#[derive(Default)]
pub struct Chain {
    /// Whether anything is kept at all.
    recording: bool,
    links: Vec<Link>,
}

struct Link {
    op: Box<dyn CustomOp1 + Send + Sync>,
    input: Tensor,
    output: Tensor,
}

impl Chain {
    pub fn recording() -> Self {
        Self {
            recording: true,
            links: Vec::new(),
        }
    }

    /// Keeps nothing, for passes that are never walked back.
    pub fn forgetting() -> Self {
        Self::default()
    }

    /// Runs an operation.
    pub fn apply<C: CustomOp1 + Send + Sync + 'static>(
        &mut self,
        op: C,
        input: &Tensor,
    ) -> Result<Tensor> {
        let output = input.apply_op1_no_bwd(&op)?;
        self.keep(op, input, &output);
        Ok(output)
    }

    /// Runs a projection onto a residual, whose gradient is the caller's to add.
    pub fn apply_onto(
        &mut self,
        op: Projection,
        input: &Tensor,
        residual: &Tensor,
    ) -> Result<Tensor> {
        let output = input.apply_op2_no_bwd(residual, &op)?;
        self.keep(op, input, &output);
        Ok(output)
    }

    /// Keeps a projection that need not run again: its backward pass reads no output.
    pub fn defer(&mut self, op: Projection, input: &Tensor) {
        self.keep(op, input, input);
    }

    fn keep<C: CustomOp1 + Send + Sync + 'static>(
        &mut self,
        op: C,
        input: &Tensor,
        output: &Tensor,
    ) {
        if self.recording {
            self.links.push(Link {
                op: Box::new(op),
                input: input.clone(),
                output: output.clone(),
            });
        }
    }

    /// From the gradient of the last output to that of the first input. Gives memory back link by link.
    pub fn backward(mut self, gradient: &Tensor) -> Result<Tensor> {
        let mut gradient = gradient.clone();
        while let Some(Link { op, input, output }) = self.links.pop() {
            gradient = match op.bwd(&input, &output, &gradient)? {
                Some(gradient) => gradient,
                None => candle_core::bail!("{} has no backward pass", op.name()),
            };
        }
        Ok(gradient)
    }
}
