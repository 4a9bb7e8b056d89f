//! One expert: gate and up, what is between, and down, as a family stores them.

use common::model::Activation;

use crate::engine::ops::clamped_swiglu::ClampedSwiglu;
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{Context, LowRank, Projection};
use crate::engine::ops::swiglu;
use crate::engine::ops::transposed_linear::TransposedLinear;
use crate::engine::params::Weight;

/// An expert.
pub struct Expert {
    /// The gate and up projections, side by side or column by column as [`Gating`] has them.
    pub gate_up: ExpertLinear,
    pub down: ExpertLinear,
}

/// A layer of an expert.
pub enum ExpertLinear {
    /// Linears of their own, without biases. What adapts them adapts them together, as Transformers has them in one.
    Apart(Projection),
    /// A part of a tensor that has those of all experts, with a bias.
    Fused(Box<TransposedLinear>),
}

/// What is between an expert's layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gating {
    /// All gates stand before all ups.
    Halves(Activation),
    /// Gates and ups alternate.
    Alternating(ClampedSwiglu),
}

impl Gating {
    /// Computes what `down` reads, `[rows][width]`, from `gate_up`, `[rows][2 * width]`.
    pub fn forward<E: Element>(&self, gate_up: &[E], h: &mut [E], width: usize) {
        match self {
            Self::Halves(activation) => swiglu::forward(gate_up, h, width, *activation),
            Self::Alternating(clamped) => clamped.forward(gate_up, h, width),
        }
    }

    /// Writes the gradient of `gate_up`, and `h` as the forward pass had it.
    pub fn backward<E: Element>(
        &self,
        gate_up: &[E],
        dh: &[f32],
        outs: (&mut [E], &mut [E]),
        width: usize,
    ) {
        match self {
            Self::Halves(activation) => swiglu::backward(gate_up, dh, outs, width, *activation),
            Self::Alternating(clamped) => clamped.backward(gate_up, dh, outs, width),
        }
    }
}

impl Expert {
    /// Whether a gradient of the expert itself is wanted.
    pub fn learns(&self) -> bool {
        self.gate_up.learns() || self.down.learns()
    }

    /// Hands over gradients of zero, where no token went through the expert.
    pub fn hand_over_zeros(&self) {
        self.gate_up.hand_over_zeros();
        self.down.hand_over_zeros();
    }
}

impl ExpertLinear {
    pub fn out(&self) -> usize {
        match self {
            Self::Apart(projection) => projection.out(),
            Self::Fused(linear) => linear.out(),
        }
    }

    pub fn bias(&self) -> Option<&Weight> {
        match self {
            Self::Apart(_) => None,
            Self::Fused(linear) => Some(&linear.bias),
        }
    }

    fn learns(&self) -> bool {
        match self {
            Self::Apart(projection) => projection.learns(),
            Self::Fused(linear) => linear.learns(),
        }
    }

    /// Computes the output of `x`, `[rows][in]`.
    pub fn forward<E: Element>(&self, x: &[E], y: &mut [E], context: Context) {
        match self {
            Self::Apart(projection) => drop(projection.forward(x, y, context)),
            Self::Fused(linear) => linear.forward(x, y, (context.tokens, context.pool)),
        }
    }

    /// [`forward`](Self::forward) without rounding what comes out.
    pub fn forward_wide<E: Element>(&self, x: &[E], y: &mut [f32], context: Context) {
        match self {
            Self::Apart(projection) => drop(projection.forward_wide(x, y, context)),
            Self::Fused(linear) => linear.forward(x, y, (context.tokens, context.pool)),
        }
    }

    /// Writes the gradient of the input, and returns that of the low-rank part for [`Self::backward_weights`].
    pub fn backward_input<E: Element>(
        &self,
        dy: &[E],
        dx: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        match self {
            Self::Apart(projection) => projection.backward_input(dy, dx, context),
            Self::Fused(linear) => linear.backward_input(dy, dx, (context.tokens, context.pool)),
        }
    }

    /// Hands over the gradients of what is trainable. `x` or `dy` is multiplied by each row's weight, and `d_low_rank` is as `dy`.
    pub fn backward_weights<E: Element>(
        &self,
        x: &[E],
        dy: &[E],
        d_low_rank: &LowRank<E>,
        context: Context,
    ) {
        match self {
            Self::Apart(projection) => {
                let u = projection.low_rank(x, context);
                projection.backward_weights(x, &u, dy, d_low_rank, context);
            }
            Self::Fused(linear) => {
                linear.backward_weights(x, dy, d_low_rank, (context.tokens, context.pool));
            }
        }
    }

    fn hand_over_zeros(&self) {
        match self {
            Self::Apart(projection) => {
                for linear in &projection.0 {
                    linear.weight.add_gradient_rows(&[], &[]);
                    if let Some(lora) = &linear.lora {
                        lora.hand_over_zeros();
                    }
                }
            }
            Self::Fused(linear) => linear.hand_over_zeros(),
        }
    }
}
