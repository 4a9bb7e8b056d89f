//! What a half of a decoder layer adds to the residual: `y = x + scale · norm(output(h))`, where most models have neither
//! scale nor norm.

use super::Pass;
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::{add_scaled_in_place, round_into, scale_in_place};

/// How the result of a half's last layer is added.
pub struct Residual {
    pub norm: Option<RmsNorm>,
    pub scale: f32,
}

impl Residual {
    /// Writes `y`, `[tokens][hidden]` as `x` is, from what the last layer reads.
    pub fn forward<E: Element>(
        &self,
        output: &Projection,
        (x, h): (&[f32], &[E]),
        y: &mut [f32],
        pass: Pass,
    ) -> LowRank<E> {
        if self.is_plain() {
            return output.forward_onto(x, h, y, pass.context());
        }
        y.copy_from_slice(x);
        let mut result = pass.pool.take::<f32>(x.len());
        let low_rank = output.forward_wide(h, &mut result, pass.context());
        match &self.norm {
            None => add_scaled_in_place(y, &result, self.scale),
            Some(norm) => {
                let mut normed = pass.pool.take::<f32>(x.len());
                norm.forward(&result, &mut normed[..]);
                add_scaled_in_place(y, &normed, self.scale);
            }
        }
        low_rank
    }

    /// The gradient of the last layer's result from that of `y`, rounded. What a norm reads is computed again from `h`.
    pub fn backward<E: Element>(
        &self,
        output: &Projection,
        h: impl FnOnce() -> Buffer<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> Buffer<E> {
        let mut dy = pass.pool.take::<E>(gradient.len());
        if self.is_plain() {
            round_into(gradient, &mut dy);
            return dy;
        }
        let mut scaled = pass.pool.take::<f32>(gradient.len());
        scaled.copy_from_slice(gradient);
        scale_in_place(&mut scaled, self.scale);
        let Some(norm) = &self.norm else {
            round_into(&scaled, &mut dy);
            return dy;
        };
        let mut result = pass.pool.take::<f32>(gradient.len());
        output.forward_wide(&h()[..], &mut result, pass.context());
        let mut d_result = pass.pool.zeroed::<f32>(gradient.len());
        norm.backward(&result, &scaled, &mut d_result);
        round_into(&d_result, &mut dy);
        dy
    }

    fn is_plain(&self) -> bool {
        self.norm.is_none() && self.scale == 1.0
    }
}
