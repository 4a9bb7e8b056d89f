//! The loss that spreads tokens over experts: `coefficient · E · Σ_e f_e · P_e`, where `f_e` is how often a token goes through expert e
//! and `P_e` the mean probability that the router gives it, over the tokens of all layers with experts.
//!
//! Source: Fedus et al., "Switch Transformers", 2021, equations 4 to 6, as Transformers' `load_balancing_loss_func` has it for several
//! experts a token. It is one of the slot, which counts by the tokens that it trains: whatever else is in the step changes nothing of it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::routing::Routes;

/// The router's loss of a slot, while a pass runs through the layers.
pub struct RouterLoss {
    coefficient: f64,
    /// Trained tokens of the slot.
    trained: f64,
    used: Mutex<Used>,
}

/// How experts were used by the layers so far.
#[derive(Default)]
struct Used {
    /// Tokens, each as often as there were layers.
    tokens: u64,
    /// Tokens that went through each expert.
    counts: Vec<u64>,
    /// Sum of the probabilities of each expert.
    probabilities: Vec<f64>,
}

impl RouterLoss {
    /// The loss of a slot with so many trained tokens, of which no layer was seen yet.
    pub fn new(coefficient: f64, trained: usize) -> Self {
        Self {
            coefficient,
            trained: trained as f64,
            used: Mutex::default(),
        }
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        // A panic in a pass ends the trainer.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a layer: of the probabilities `[tokens][experts]`, and of the experts that were chosen by them. Layers come one
    /// after the other.
    pub fn add(&self, probabilities: &[f32], routes: &Routes) {
        let counts = routes.counts();
        let mut sums = vec![0.0; counts.len()];
        for row in probabilities.chunks_exact(counts.len()) {
            for (sum, p) in sums.iter_mut().zip(row) {
                *sum += f64::from(*p);
            }
        }
        self.add_sums(probabilities.len() / counts.len(), &counts, &sums);
    }

    /// [`add`](Self::add) of a layer of so many tokens, by how many went through each expert and the sum of its probabilities.
    pub fn add_sums(&self, tokens: usize, counts: &[usize], probabilities: &[f64]) {
        let mut used = self.used();
        used.tokens += tokens as u64;
        used.counts.resize(counts.len(), 0);
        used.probabilities.resize(counts.len(), 0.0);
        for (sum, count) in used.counts.iter_mut().zip(counts) {
            *sum += *count as u64;
        }
        for (sum, p) in used.probabilities.iter_mut().zip(probabilities) {
            *sum += p;
        }
    }

    /// The loss of the slot, once all layers were seen; as the loss of tokens it is a sum over those that are trained.
    pub fn loss(&self) -> f64 {
        let used = self.used();
        let pairs = used.counts.iter().zip(&used.probabilities);
        let sum: f64 = pairs.map(|(count, p)| *count as f64 * p).sum();
        match used.tokens {
            0 => 0.0,
            tokens => self.scale(&used) * sum / tokens as f64,
        }
    }

    /// The gradient of the loss by each expert's probability, the same for every token of every layer.
    pub fn gradient(&self) -> Vec<f32> {
        let used = self.used();
        let scale = self.scale(&used) / used.tokens.max(1) as f64;
        let counts = used.counts.iter();
        counts.map(|count| (scale * *count as f64) as f32).collect()
    }

    fn scale(&self, used: &Used) -> f64 {
        self.coefficient * self.trained * used.counts.len() as f64 / used.tokens.max(1) as f64
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::ops::routing::Routing;

    #[test]
    fn even_use_costs_the_least() {
        let routing = Routing {
            experts: 4,
            per_token: 2,
            normalises: true,
        };
        let of = |rows: [[f32; 4]; 2]| {
            let loss = RouterLoss::new(0.5, 10);
            for row in rows {
                loss.add(&row, &routing.routes(&row));
            }
            (loss.loss(), loss.gradient())
        };
        // Each expert is chosen once in two rows: f is a half, P a quarter, and the loss 4 · 4 · 1/2 · 1/4.
        let (even, gradient) = of([[0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]]);
        assert!((even - 0.5 * 10.0 * 2.0).abs() < 1e-6, "{even}");
        assert_eq!(gradient, [0.5 * 10.0 * 4.0 / 4.0; 4]);
        let (uneven, gradient) = of([[0.4, 0.4, 0.1, 0.1]; 2]);
        assert!(uneven > 1.5 * even, "{uneven}");
        assert_eq!(gradient, [10.0, 10.0, 0.0, 0.0]);
    }

    #[test]
    fn without_a_layer_of_experts_there_is_none() {
        assert_eq!(RouterLoss::new(1.0, 3).loss(), 0.0);
    }
}
