//! The optimizer. In: the mean gradient, the same on every worker. Out: updated weights and moments, the same to the bit for any
//! number of threads.

mod adamw;
mod bfloat16;
mod eight_bits;
mod lion;
mod muon;
mod norm;
mod sgd;

use common::files::WeightsPartMut;
use common::files::layout::TensorLayout;
use common::files::moments::MomentPartMut;
use common::job::{JobSpec, Optimizer as Kind, RateGroups, is_embedding, is_magnitude};
use common::model::is_norm_or_bias;

pub use adamw::AdamW;
#[cfg(feature = "cuda")]
pub(in crate::engine) use adamw::Factors;
#[cfg(feature = "cuda")]
pub(in crate::engine) use eight_bits::Codebook;
#[cfg(feature = "cuda")]
pub(in crate::engine) use lion::Factors as LionFactors;
pub use lion::Lion;
pub use muon::Muon;
pub use norm::{NORM_CHUNK, clip_coefficient, gradient_norm};
#[cfg(feature = "cuda")]
pub(in crate::engine) use sgd::Factors as SgdFactors;
pub use sgd::Sgd;

use super::mean_gradient::MeanSource;

/// Scalars a thread updates at a time.
const UPDATE_CHUNK: usize = 16_384;

/// The numbers that one update takes beside the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Number of this update, 1 for the first.
    pub number: u64,
    pub learning_rate: f64,
    /// Factor for the gradient: the clip coefficient.
    pub gradient_scale: f32,
}

/// The optimizer of a job: says how each tensor is updated.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    kind: Kind,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    rates: RateGroups,
    /// The job's learning rate, which a step's is a share of.
    peak: f64,
    seed: u64,
}

/// How one tensor is updated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorUpdate {
    pub rule: Rule,
    /// Factor on the learning rate of a step.
    pub rate: f64,
    /// What weights of bfloat16 are rounded by.
    pub seed: u64,
}

/// What becomes of a tensor's weights and moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    AdamW(AdamW),
    Sgd(Sgd),
    Lion(Lion),
    Muon(Muon),
    /// They stay as they are.
    Fixed,
}

impl Optimizer {
    pub fn from_job(job: &JobSpec) -> Self {
        Self {
            kind: job.optimizer,
            beta1: job.adam_beta1,
            beta2: job.adam_beta2,
            epsilon: job.adam_epsilon,
            weight_decay: job.weight_decay,
            rates: job.lr_groups.clone(),
            peak: job.learning_rate,
            seed: job.seed,
        }
    }

    /// The update of one tensor. As in Transformers' trainer, norms and biases do not decay, but magnitudes do; Muon makes no such
    /// difference.
    pub fn of_tensor(&self, tensor: &TensorLayout) -> TensorUpdate {
        let is_vector = is_norm_or_bias(&tensor.name, tensor.shape.len());
        let rate = self.rates.of(&tensor.name, is_vector, self.peak);
        let weight_decay = match rate.decays && (!is_vector || is_magnitude(&tensor.name)) {
            true => self.weight_decay,
            false => 0.0,
        };
        let rule = match self.kind {
            Kind::Adamw | Kind::Adamw8bit => Rule::AdamW(self.adamw(weight_decay, false)),
            Kind::Sgd {
                momentum,
                dampening,
                nesterov,
            } => Rule::Sgd(Sgd {
                momentum,
                dampening,
                nesterov,
                weight_decay,
            }),
            Kind::Lion | Kind::Lion8bit => Rule::Lion(Lion {
                beta1: self.beta1,
                beta2: self.beta2,
                weight_decay,
            }),
            Kind::Muon { trains_vectors } => self.muon(tensor, trains_vectors),
        };
        TensorUpdate {
            rule,
            rate: rate.factor,
            seed: self.seed,
        }
    }

    fn muon(&self, tensor: &TensorLayout, trains_vectors: bool) -> Rule {
        let dimensions = tensor.shape.len();
        let is_vector = dimensions == 1 || is_norm_or_bias(&tensor.name, dimensions);
        match tensor.shape[..] {
            // The biases of all experts are of two dimensions.
            _ if is_vector && !trains_vectors => Rule::Fixed,
            [rows, columns] if !is_vector && !is_embedding(&tensor.name) => Rule::Muon(Muon {
                rows,
                columns,
                weight_decay: self.weight_decay,
            }),
            _ => Rule::AdamW(self.adamw(self.weight_decay, true)),
        }
    }

    fn adamw(&self, weight_decay: f64, early_epsilon: bool) -> AdamW {
        AdamW {
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay,
            early_epsilon,
        }
    }
}

impl Update {
    /// The update of a tensor whose learning rate is `factor` times the step's.
    pub fn at_rate(&self, factor: f64) -> Self {
        Self {
            learning_rate: self.learning_rate * factor,
            ..*self
        }
    }
}

impl TensorUpdate {
    /// Whether it takes all threads by itself.
    pub fn is_wide(&self) -> bool {
        matches!(self.rule, Rule::Muon(_))
    }

    /// Updates a tensor's weights and moments in place. All slices have one length, and the tensor's gradient is in `mean` from
    /// scalar `first`.
    pub fn apply(
        &self,
        update: &Update,
        weights: WeightsPartMut,
        moments: Vec<MomentPartMut>,
        gradient: (MeanSource, usize),
    ) {
        match weights {
            WeightsPartMut::Float32(weights) => {
                self.apply_f32(update, weights, moments, gradient);
            }
            WeightsPartMut::Bfloat16(weights) => {
                bfloat16::apply(self, update, weights, moments, gradient);
            }
        }
    }

    fn apply_f32(
        &self,
        update: &Update,
        weights: &mut [f32],
        mut moments: Vec<MomentPartMut>,
        (mean, first): (MeanSource, usize),
    ) {
        let scalars = weights.len();
        assert!(
            moments.iter().all(|moment| moment.len() == scalars)
                && first + scalars <= mean.scalars(),
            "weights, moments and gradient differ in length"
        );
        let (update, mean) = (&update.at_rate(self.rate), (mean, first));
        use MomentPartMut::{EightBits, Float32};
        match (&self.rule, &mut moments[..]) {
            (Rule::AdamW(rule), [Float32(exp_avg), Float32(exp_avg_sq)]) => {
                rule.update(update, weights, exp_avg, exp_avg_sq, mean);
            }
            (Rule::AdamW(rule), [EightBits(exp_avg), EightBits(exp_avg_sq)]) => {
                rule.update_8bit(update, weights, [exp_avg, exp_avg_sq], mean);
            }
            (Rule::Sgd(rule), []) => rule.update(update, weights, None, mean),
            (Rule::Sgd(rule), [Float32(momentum)]) => {
                rule.update(update, weights, Some(momentum), mean);
            }
            (Rule::Lion(rule), [Float32(moment)]) => rule.update(update, weights, moment, mean),
            (Rule::Lion(rule), [EightBits(moment)]) => {
                rule.update_8bit(update, weights, moment, mean);
            }
            (Rule::Muon(rule), [Float32(momentum), _]) => {
                rule.update(update, weights, momentum, mean);
            }
            (Rule::Fixed, _) => {}
            (rule, moments) => unreachable!("{rule:?} with {} moments", moments.len()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
