//! Which experts each token goes through, and what their results are weighted by: the softmax of a router's logits, and of these
//! probabilities the largest few (Shazeer et al., 2017), in float32, as Transformers' `TopKRouter` of each family has it.
//!
//! In: logits, `[tokens][experts]`. Out: rows sorted by expert and within an expert by token, so that what an expert computes lies
//! together, and every sum over a token's experts runs from the first to the last. Of equal probabilities the first counts.

use std::ops::Range;

use rayon::prelude::*;

use super::ROW_TILE;
use super::vector::{self, dispatch};

/// How tokens are spread over experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    pub experts: usize,
    /// Number of experts that a token goes through.
    pub per_token: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalises: bool,
}

/// The rows of a batch: each a token in one of its experts.
#[derive(Debug)]
pub struct Routes {
    /// Token of each row.
    tokens: Vec<u32>,
    /// Weight of each row.
    weights: Vec<f32>,
    /// The same, times a number of each expert, where experts have one.
    scaled: Option<Vec<f32>>,
    /// First row of each expert, and the number of all rows.
    starts: Vec<usize>,
    /// The rows of each token, `[tokens][per_token]`.
    of_token: Vec<u32>,
    /// The experts of each token, ascending, `[tokens][per_token]`.
    chosen: Vec<u32>,
}

/// The rows of one expert.
pub struct Group<'a> {
    pub rows: Range<usize>,
    /// Token of each row, ascending.
    pub tokens: &'a [u32],
    pub weights: &'a [f32],
}

impl Routing {
    /// Turns logits into probabilities.
    pub fn softmax(&self, logits: &mut [f32]) {
        logits
            .par_chunks_mut(ROW_TILE * self.experts)
            .for_each(|tile| {
                dispatch(
                    #[inline(always)]
                    || {
                        for row in tile.chunks_exact_mut(self.experts) {
                            let sum = vector::exp_shifted_sum(row, vector::max(row));
                            vector::scale(row, 1.0 / sum);
                        }
                    },
                );
            });
    }

    /// Chooses the experts of each token.
    pub fn routes(&self, probabilities: &[f32]) -> Routes {
        let tokens = probabilities.len() / self.experts;
        let mut chosen = vec![0; tokens * self.per_token];
        chosen
            .par_chunks_mut(ROW_TILE * self.per_token)
            .zip(probabilities.par_chunks(ROW_TILE * self.experts))
            .for_each(|(chosen, probabilities)| {
                let rows = probabilities.chunks_exact(self.experts);
                for (chosen, row) in chosen.chunks_exact_mut(self.per_token).zip(rows) {
                    choose(row, chosen);
                }
            });
        let mut starts = vec![0; self.experts + 1];
        for expert in &chosen {
            starts[*expert as usize + 1] += 1;
        }
        for expert in 0..self.experts {
            starts[expert + 1] += starts[expert];
        }
        let mut routes = Routes {
            tokens: vec![0; chosen.len()],
            weights: vec![0.0; chosen.len()],
            scaled: None,
            of_token: vec![0; chosen.len()],
            starts,
            chosen,
        };
        let mut next = routes.starts.clone();
        for (index, expert) in routes.chosen.iter().enumerate() {
            let (token, expert) = (index / self.per_token, *expert as usize);
            let row = next[expert];
            next[expert] += 1;
            routes.tokens[row] = token as u32;
            routes.weights[row] = probabilities[token * self.experts + expert];
            routes.of_token[index] = row as u32;
        }
        if self.normalises {
            for rows in routes.of_token.chunks_exact(self.per_token) {
                let weights = rows.iter().map(|row| routes.weights[*row as usize]);
                let sum: f32 = weights.sum();
                for row in rows {
                    routes.weights[*row as usize] /= sum;
                }
            }
        }
        routes
    }

    /// Writes the gradient of the logits from that of each row's weight.
    ///
    /// With probabilities p, of which those of the chosen experts are summed to s: `w = p / s` has `dp = (dw - Σ dw w) / s`, and
    /// the softmax `dl = p (dp - Σ dp p)`. `of_loss` is what the router's own loss adds to each dp, if there is one.
    pub fn backward(
        &self,
        probabilities: &[f32],
        (routes, d_weights): (&Routes, &[f32]),
        of_loss: Option<&[f32]>,
        d_logits: &mut [f32],
    ) {
        let rows = probabilities.par_chunks(self.experts);
        d_logits
            .par_chunks_mut(self.experts)
            .with_min_len(ROW_TILE)
            .zip(rows)
            .enumerate()
            .for_each(|(token, (d_logits, p))| {
                let range = token * self.per_token..(token + 1) * self.per_token;
                let chosen = routes.chosen[range.clone()].iter().map(|e| *e as usize);
                let rows = routes.of_token[range].iter().map(|row| *row as usize);
                let (mut mean, mut sum) = (0.0, 1.0);
                if self.normalises {
                    sum = chosen.clone().map(|expert| p[expert]).sum();
                    mean = rows
                        .clone()
                        .map(|row| d_weights[row] * routes.weights[row])
                        .sum();
                }
                let of_chosen = chosen.zip(rows);
                let of_chosen =
                    of_chosen.map(|(expert, row)| (expert, (d_weights[row] - mean) / sum));
                let inner: f32 = of_chosen.clone().map(|(expert, dp)| dp * p[expert]).sum();
                for (d, p) in d_logits.iter_mut().zip(p) {
                    *d = -inner * p;
                }
                for (expert, dp) in of_chosen {
                    d_logits[expert] = p[expert] * (dp - inner);
                }
                if let Some(of_loss) = of_loss {
                    let inner: f32 = of_loss.iter().zip(p).map(|(dp, p)| dp * p).sum();
                    for ((d, dp), p) in d_logits.iter_mut().zip(of_loss).zip(p) {
                        *d += p * (dp - inner);
                    }
                }
            });
    }
}

/// Finds the largest few, ascending by their places.
fn choose(probabilities: &[f32], chosen: &mut [u32]) {
    for count in 0..chosen.len() {
        let (known, next) = chosen.split_at_mut(count);
        let mut best: Option<usize> = None;
        for (expert, p) in probabilities.iter().enumerate() {
            let is_larger = best.is_none_or(|best| *p > probabilities[best]);
            if is_larger && !known.contains(&(expert as u32)) {
                best = Some(expert);
            }
        }
        next[0] = best.unwrap_or(0) as u32;
    }
    chosen.sort_unstable();
}

impl Routes {
    /// The same rows, whose weights are multiplied by a number of each expert.
    pub fn scaled_by(self, scales: &[f32]) -> Self {
        let mut scaled = self.weights.clone();
        for (rows, scale) in self.starts.windows(2).zip(scales) {
            scaled[rows[0]..rows[1]]
                .iter_mut()
                .for_each(|w| *w *= scale);
        }
        Self {
            scaled: Some(scaled),
            ..self
        }
    }

    /// Turns the gradients of scaled weights into those of the weights, and returns those of the numbers that experts have.
    pub fn unscale(&self, d_weights: &mut [f32], scales: &[f32]) -> Vec<f32> {
        let experts = self.starts.windows(2).zip(scales);
        let of_expert = experts.map(|(rows, scale)| {
            let rows = rows[0]..rows[1];
            let mut sum = 0.0f32;
            for (d, w) in d_weights[rows.clone()].iter_mut().zip(&self.weights[rows]) {
                sum += *d * w;
                *d *= scale;
            }
            sum
        });
        of_expert.collect()
    }

    /// Number of rows of each expert.
    pub fn counts(&self) -> Vec<usize> {
        let pairs = self.starts.windows(2);
        pairs.map(|pair| pair[1] - pair[0]).collect()
    }

    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Most rows of an expert.
    pub fn largest(&self) -> usize {
        self.counts().into_iter().max().unwrap_or(0)
    }

    /// The rows of each expert, none where no token goes through it.
    pub fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        self.starts.windows(2).map(|pair| {
            let rows = pair[0]..pair[1];
            Group {
                tokens: &self.tokens[rows.clone()],
                weights: &self.scaled.as_ref().unwrap_or(&self.weights)[rows.clone()],
                rows,
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{D, Result, Tensor};

    use super::*;
    use crate::engine::testing::{TestWeights, check_op, largest_few, random_tensor};

    fn routing(normalises: bool) -> Routing {
        Routing {
            experts: 5,
            per_token: 2,
            normalises,
        }
    }

    /// The weights of all experts, zero for those that are not chosen.
    fn weights(routing: Routing, probabilities: &[f32], routes: &Routes) -> Vec<f32> {
        let mut all = vec![0.0; probabilities.len()];
        for (expert, group) in routes.groups().enumerate() {
            for (token, weight) in group.tokens.iter().zip(group.weights) {
                all[*token as usize * routing.experts + expert] = *weight;
            }
        }
        all
    }

    fn reference(routing: Routing, logits: &Tensor) -> Result<Tensor> {
        let exp = logits.exp()?;
        let p = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        let mask = largest_few(&p, routing.per_token)?;
        let chosen = (p * mask)?;
        match routing.normalises {
            true => chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?),
            false => Ok(chosen),
        }
    }

    #[test]
    fn weights_and_gradients_equal_the_reference() {
        for normalises in [false, true] {
            let routing = routing(normalises);
            let run = |x: &[f32], dy: &[f32]| {
                let mut probabilities = x.to_vec();
                routing.softmax(&mut probabilities);
                let routes = routing.routes(&probabilities);
                let d_weights: Vec<f32> = routes
                    .groups()
                    .enumerate()
                    .flat_map(|(expert, group)| {
                        let tokens = group.tokens.iter();
                        tokens
                            .map(|token| dy[*token as usize * routing.experts + expert])
                            .collect::<Vec<_>>()
                    })
                    .collect();
                let mut dx = vec![f32::NAN; x.len()];
                routing.backward(&probabilities, (&routes, &d_weights), None, &mut dx);
                (weights(routing, &probabilities, &routes), dx)
            };
            let x = random_tensor(130, routing.experts, 3);
            check_op(&x, &TestWeights::new(&[]), &[], &run, &|x| {
                reference(routing, x)
            });
        }
    }

    #[test]
    fn of_equal_experts_the_first_are_chosen_and_rows_are_sorted() {
        let routing = routing(true);
        let probabilities = [
            [0.2, 0.2, 0.2, 0.2, 0.2],
            [0.1, 0.4, 0.1, 0.0, 0.4],
            [f32::NAN; 5],
        ];
        let routes = routing.routes(probabilities.as_flattened());
        let tokens: Vec<&[u32]> = routes.groups().map(|group| group.tokens).collect();
        assert_eq!(tokens, [&[0, 2][..], &[0, 1, 2], &[], &[], &[1]]);
        assert_eq!((routes.rows(), routes.largest()), (6, 3));
    }
}
