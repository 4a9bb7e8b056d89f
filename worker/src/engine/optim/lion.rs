//! Lion (Chen et al., 2023): the sign of an interpolation between gradient and moment, and decoupled weight decay, with the
//! semantics of `lion_pytorch` and of bitsandbytes' `Lion32bit`.

use common::files::moments::BlocksMut;
use rayon::prelude::*;

use super::eight_bits::{Codebook, update_blocks};
use super::{UPDATE_CHUNK, Update};
use crate::engine::mean_gradient::MeanSource;
use crate::engine::ops::vector::dispatch;

/// Weights move by the learning rate, up or down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Share of the moment in the interpolation whose sign is taken.
    pub beta1: f64,
    /// Decay of the moment.
    pub beta2: f64,
    pub weight_decay: f64,
}

/// The scalars of one update: computed in float64, applied in float32, as PyTorch does.
pub(in crate::engine) struct Factors {
    pub gradient_scale: f32,
    pub keep: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub learning_rate: f32,
}

impl Lion {
    /// Updates a tensor's weights and moment in place, in one pass.
    pub fn update(
        &self,
        update: &Update,
        weights: &mut [f32],
        moment: &mut [f32],
        (mean, first): (MeanSource, usize),
    ) {
        let factors = self.factors(update);
        weights
            .par_chunks_mut(UPDATE_CHUNK)
            .zip(moment.par_chunks_mut(UPDATE_CHUNK))
            .enumerate()
            .for_each_init(Vec::new, |scratch, (index, (w, m))| {
                let start = first + index * UPDATE_CHUNK;
                let gradient = mean.read(start..start + w.len(), scratch);
                dispatch(
                    #[inline(always)]
                    || factors.apply(w, m, gradient),
                );
            });
    }

    /// Updates as [`update`](Self::update) does, with a moment of 8 bits.
    pub fn update_8bit(
        &self,
        update: &Update,
        weights: &mut [f32],
        moment: &mut BlocksMut,
        mean: (MeanSource, usize),
    ) {
        let factors = self.factors(update);
        update_blocks(
            [Codebook::signed()],
            weights,
            [moment],
            mean,
            #[inline(always)]
            |weights, [moment], g| factors.apply(weights, moment, g),
        );
    }

    pub(in crate::engine) fn factors(&self, update: &Update) -> Factors {
        Factors {
            gradient_scale: update.gradient_scale,
            keep: (1.0 - update.learning_rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            learning_rate: update.learning_rate as f32,
        }
    }
}

impl Factors {
    #[inline(always)]
    fn apply(&self, weights: &mut [f32], moment: &mut [f32], gradient: &[f32]) {
        for ((w, m), g) in weights.iter_mut().zip(moment).zip(gradient) {
            let g = g * self.gradient_scale;
            let direction = *m * self.beta1 + g * self.one_minus_beta1;
            // What is exactly 0 has no sign, unlike in `f32::signum`.
            let sign = f32::from(i8::from(direction > 0.0) - i8::from(direction < 0.0));
            *w = *w * self.keep - self.learning_rate * sign;
            *m = *m * self.beta2 + g * self.one_minus_beta2;
        }
    }
}
