//! AdamW, with the semantics of `torch.optim.AdamW`.

use common::files::moments::BlocksMut;
use rayon::prelude::*;

use super::eight_bits::{Codebook, update_blocks};
use super::{UPDATE_CHUNK, Update};
use crate::engine::mean_gradient::MeanSource;
use crate::engine::ops::vector::dispatch;

/// Adam with decoupled weight decay (Loshchilov & Hutter, 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// Whether epsilon is added before the second moment's bias is corrected, as in the AdamW beside Muon.
    pub early_epsilon: bool,
}

impl AdamW {
    /// Updates a tensor's weights and moments in place, in one pass. All slices have one length, and the tensor's
    /// gradient is in `mean` from scalar `first`.
    pub fn update(
        &self,
        update: &Update,
        weights: &mut [f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        (mean, first): (MeanSource, usize),
    ) {
        let scalars = weights.len();
        assert!(
            exp_avg.len() == scalars
                && exp_avg_sq.len() == scalars
                && first + scalars <= mean.scalars(),
            "weights, moments and gradient differ in length"
        );
        let factors = self.factors(update);
        weights
            .par_chunks_mut(UPDATE_CHUNK)
            .zip(exp_avg.par_chunks_mut(UPDATE_CHUNK))
            .zip(exp_avg_sq.par_chunks_mut(UPDATE_CHUNK))
            .enumerate()
            .for_each_init(Vec::new, |scratch, (index, ((w, m), v))| {
                let start = first + index * UPDATE_CHUNK;
                let gradient = mean.read(start..start + w.len(), scratch);
                dispatch(
                    #[inline(always)]
                    || factors.apply(w, m, v, gradient),
                );
            });
    }

    /// Updates as [`update`](Self::update) does, with moments of 8 bits: the first may have either sign, the second has none.
    pub fn update_8bit(
        &self,
        update: &Update,
        weights: &mut [f32],
        moments: [&mut BlocksMut; 2],
        mean: (MeanSource, usize),
    ) {
        let factors = self.factors(update);
        let codebooks = [Codebook::signed(), Codebook::unsigned()];
        update_blocks(
            codebooks,
            weights,
            moments,
            mean,
            #[inline(always)]
            |weights, [exp_avg, exp_avg_sq], g| factors.apply(weights, exp_avg, exp_avg_sq, g),
        );
    }

    pub(in crate::engine) fn factors(&self, update: &Update) -> Factors {
        let number = update.number as f64;
        let correction1 = 1.0 - libm::pow(self.beta1, number);
        let correction2 = (1.0 - libm::pow(self.beta2, number)).sqrt();
        let (of_denominator, of_step) = match self.early_epsilon {
            true => (1.0, correction2),
            false => (correction2, 1.0),
        };
        Factors {
            gradient_scale: update.gradient_scale,
            keep: (1.0 - update.learning_rate * self.weight_decay) as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            correction2_sqrt: of_denominator as f32,
            epsilon: self.epsilon as f32,
            step_size: (update.learning_rate / correction1 * of_step) as f32,
        }
    }
}

/// The scalars of one update: computed in float64, applied in float32, as PyTorch does.
pub(in crate::engine) struct Factors {
    pub gradient_scale: f32,
    pub keep: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub correction2_sqrt: f32,
    pub epsilon: f32,
    pub step_size: f32,
}

impl Factors {
    #[inline(always)]
    fn apply(&self, weights: &mut [f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], g: &[f32]) {
        for (((w, m), v), g) in weights.iter_mut().zip(exp_avg).zip(exp_avg_sq).zip(g) {
            let g = g * self.gradient_scale;
            *m += (g - *m) * self.one_minus_beta1;
            *v = *v * self.beta2 + g * g * self.one_minus_beta2;
            let denominator = v.sqrt() / self.correction2_sqrt + self.epsilon;
            *w = *w * self.keep - self.step_size * (*m / denominator);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three updates of `torch.optim.AdamW(lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05)` (PyTorch 2.15).
    #[test]
    fn updates_are_pytorch_s() {
        let optimizer = AdamW {
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-6,
            weight_decay: 0.05,
            early_epsilon: false,
        };
        let mut weights = [1.0, -2.0, 0.5, 3.0];
        let (mut m, mut v) = ([0.0; 4], [0.0; 4]);
        let gradients = [
            [0.1f32, -0.2, 0.0, 5.0],
            [0.3, 0.2, 1e-4, -5.0],
            [-0.1, 0.4, 2e-4, 1.0],
        ];
        for (index, gradient) in gradients.iter().enumerate() {
            let update = Update {
                number: index as u64 + 1,
                learning_rate: 0.1,
                gradient_scale: 1.0,
            };
            let mean = (MeanSource::Values(gradient), 0);
            optimizer.update(&update, &mut weights, &mut m, &mut v, mean);
        }
        let expected: [f32; 4] = [0.746_549_8, -1.930_780_9, 0.337_763_46, 2.856_525];
        for (found, expected) in weights.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= 2e-7 * expected.abs(),
                "{weights:?}"
            );
        }
    }
}
