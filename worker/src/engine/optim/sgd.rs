//! Stochastic gradient descent, with the semantics of `torch.optim.SGD`: the weight decay is added to the gradient.

use rayon::prelude::*;

use super::{UPDATE_CHUNK, Update};
use crate::engine::mean_gradient::MeanSource;
use crate::engine::ops::vector::dispatch;

/// Gradient descent with a momentum or without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    pub momentum: f64,
    pub dampening: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
}

/// The scalars of one update: computed in float64, applied in float32, as PyTorch does.
pub(in crate::engine) struct Factors {
    pub gradient_scale: f32,
    pub weight_decay: f32,
    /// 0 in the first update, where the momentum is the gradient.
    pub momentum: f32,
    pub one_minus_dampening: f32,
    /// Share of the momentum that is added to the gradient. None: the momentum stands in the gradient's place.
    pub nesterov: Option<f32>,
    pub learning_rate: f32,
}

impl Sgd {
    /// Updates a tensor's weights, and their momentum where there is one, in place.
    pub fn update(
        &self,
        update: &Update,
        weights: &mut [f32],
        momentum: Option<&mut [f32]>,
        (mean, first): (MeanSource, usize),
    ) {
        let factors = self.factors(update);
        let range = |index: usize, scalars: usize| {
            let start = first + index * UPDATE_CHUNK;
            start..start + scalars
        };
        let weights = weights.par_chunks_mut(UPDATE_CHUNK);
        match momentum {
            None => weights
                .enumerate()
                .for_each_init(Vec::new, |scratch, (index, w)| {
                    let gradient = mean.read(range(index, w.len()), scratch);
                    dispatch(
                        #[inline(always)]
                        || factors.apply(w, gradient),
                    );
                }),
            Some(momentum) => weights
                .zip(momentum.par_chunks_mut(UPDATE_CHUNK))
                .enumerate()
                .for_each_init(Vec::new, |scratch, (index, (w, m))| {
                    let gradient = mean.read(range(index, w.len()), scratch);
                    dispatch(
                        #[inline(always)]
                        || factors.apply_with_momentum(w, m, gradient),
                    );
                }),
        }
    }

    pub(in crate::engine) fn factors(&self, update: &Update) -> Factors {
        let is_first = update.number <= 1;
        Factors {
            gradient_scale: update.gradient_scale,
            weight_decay: self.weight_decay as f32,
            momentum: if is_first { 0.0 } else { self.momentum as f32 },
            one_minus_dampening: match is_first {
                true => 1.0,
                false => (1.0 - self.dampening) as f32,
            },
            nesterov: self.nesterov.then_some(self.momentum as f32),
            learning_rate: update.learning_rate as f32,
        }
    }
}

impl Factors {
    #[inline(always)]
    fn apply(&self, weights: &mut [f32], gradient: &[f32]) {
        for (w, g) in weights.iter_mut().zip(gradient) {
            let g = g * self.gradient_scale + *w * self.weight_decay;
            *w -= self.learning_rate * g;
        }
    }

    #[inline(always)]
    fn apply_with_momentum(&self, weights: &mut [f32], momentum: &mut [f32], gradient: &[f32]) {
        for ((w, m), g) in weights.iter_mut().zip(momentum).zip(gradient) {
            let g = g * self.gradient_scale + *w * self.weight_decay;
            *m = *m * self.momentum + g * self.one_minus_dampening;
            let direction = match self.nesterov {
                Some(share) => g + *m * share,
                None => *m,
            };
            *w -= self.learning_rate * direction;
        }
    }
}
