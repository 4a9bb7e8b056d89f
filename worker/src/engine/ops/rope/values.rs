//! The values of a row of a fused projection: their own columns or those of the keys, normed where the model does so.

use common::memory::KeyValues;

use super::{Rope, widen};
use crate::engine::ops::element::Element;
use crate::engine::ops::rms_norm::{RowGradient, inverse_rms};

/// Memory for the values of one row.
#[derive(Default)]
pub(super) struct ValueScratch {
    /// What is normed, in float32.
    wide: Vec<f32>,
    gradient: Vec<f32>,
    /// What a norm without weights multiplies by.
    ones: Vec<f32>,
}

impl Rope<'_> {
    /// Writes the values of a row, from what is projected.
    #[inline(always)]
    pub(super) fn forward_values<E: Element>(
        &self,
        x: &[E],
        y: &mut [E],
        scratch: &mut ValueScratch,
    ) {
        let (queries, rotated) = (self.layout.queries(), self.rotated());
        let from = match self.values.source {
            KeyValues::Apart => &x[rotated..],
            KeyValues::Same => &x[queries..rotated],
            KeyValues::Of(_) => return,
        };
        let to = &mut y[rotated..];
        let Some(epsilon) = self.values.norm else {
            return to.copy_from_slice(from);
        };
        widen(from, &mut scratch.wide);
        let head_dim = self.layout.head_dim;
        let heads = scratch.wide.chunks_exact(head_dim);
        for (to, head) in to.chunks_exact_mut(head_dim).zip(heads) {
            let inverse = inverse_rms(head, epsilon);
            for (to, x) in to.iter_mut().zip(head) {
                *to = E::round_from(x * inverse);
            }
        }
    }

    /// Writes the gradient of the columns that the values come from, or adds it to that of the keys where they are these.
    #[inline(always)]
    pub(super) fn backward_values<E: Element>(
        &self,
        (x, g, dx): (&[E], &[f32], &mut [E]),
        scratch: &mut ValueScratch,
    ) {
        let (queries, rotated) = (self.layout.queries(), self.rotated());
        let columns = match self.values.source {
            KeyValues::Apart => rotated..self.projected(),
            KeyValues::Same => queries..rotated,
            KeyValues::Of(_) => return,
        };
        let g = &g[rotated..];
        let gradient = match self.values.norm {
            None => g,
            Some(epsilon) => self.through_norm(&x[columns.clone()], g, epsilon, scratch),
        };
        let dx = dx[columns].iter_mut().zip(gradient);
        match self.values.source {
            KeyValues::Same => dx.for_each(|(dx, g)| *dx = E::round_from(dx.wide() + g)),
            _ => dx.for_each(|(dx, g)| *dx = E::round_from(*g)),
        }
    }

    /// The gradient of values before their norm.
    #[inline(always)]
    fn through_norm<'s, E: Element>(
        &self,
        x: &[E],
        g: &[f32],
        epsilon: f32,
        scratch: &'s mut ValueScratch,
    ) -> &'s [f32] {
        let head_dim = self.layout.head_dim;
        let ValueScratch {
            wide,
            gradient,
            ones,
        } = scratch;
        widen(x, wide);
        gradient.resize(x.len(), 0.0);
        ones.resize(head_dim, 1.0);
        let heads = wide.chunks_exact(head_dim).zip(g.chunks_exact(head_dim));
        for (to, (x, g)) in gradient.chunks_exact_mut(head_dim).zip(heads) {
            let row = RowGradient::new(x, ones, epsilon, g, None);
            for ((to, x), g) in to.iter_mut().zip(x).zip(g) {
                *to = row.of(*x, *g, 1.0);
            }
        }
        gradient
    }
}
