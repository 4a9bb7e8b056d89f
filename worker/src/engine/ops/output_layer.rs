//! The output layer: a matrix with a row for each token, or one with an adapter beside it (LoRA, DoRA), computed as a linear layer.

use super::element::Element;
use super::matrix::View;
use super::projection::{Context, LowRank, Projection};
use super::token_matrix::{Factors, TokenMatrix};
use crate::engine::buffer::Pool;

/// What makes logits of normed rows.
#[derive(Clone, Debug)]
pub enum OutputLayer {
    /// A matrix that is frozen, trained, or has rows that are.
    Matrix(TokenMatrix),
    /// A frozen matrix with an adapter: one linear layer without bias.
    Adapted(Projection),
}

impl From<TokenMatrix> for OutputLayer {
    fn from(matrix: TokenMatrix) -> Self {
        Self::Matrix(matrix)
    }
}

impl OutputLayer {
    /// Number of tokens, and width of a row.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Matrix(matrix) => matrix.weight.matrix_dims(),
            Self::Adapted(projection) => {
                let linear = projection.0.first();
                linear.map_or((0, 0), |linear| linear.weight.matrix_dims())
            }
        }
    }

    /// What products with a matrix take, in the elements that the model is computed in. None with an adapter.
    pub fn factors<E: Element>(&self, pool: &Pool) -> Option<Factors<E>> {
        match self {
            Self::Matrix(matrix) => Some(matrix.factors(pool)),
            Self::Adapted(_) => None,
        }
    }

    /// Fills `logits` `[tokens][vocabulary]` with what comes out for `x` `[tokens][width]`. Returns what the backward pass needs of
    /// an adapter.
    pub fn multiply<E: Element>(
        &self,
        factors: Option<&Factors<E>>,
        x: View<E>,
        logits: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        match self {
            Self::Matrix(matrix) => {
                let mut made = None;
                let factors =
                    factors.unwrap_or_else(|| &*made.insert(matrix.factors(context.pool)));
                matrix.multiply(factors, x, logits, context.pool);
                None
            }
            Self::Adapted(projection) => projection.forward_wide(x.data, logits, context),
        }
    }

    /// Writes the gradient of `x` to `dx` `[tokens][width]`, and hands over those of what is trained.
    ///
    /// `d_logits` are elements at the beginning of rows of `vocabulary` float32 each.
    pub fn backward<E: Element>(
        &self,
        (factors, low_rank): (Option<&Factors<E>>, &LowRank<E>),
        x: View<E>,
        d_logits: &mut [f32],
        dx: &mut [f32],
        context: Context,
    ) {
        match self {
            Self::Matrix(matrix) => {
                let mut made = None;
                let factors =
                    factors.unwrap_or_else(|| &*made.insert(matrix.factors(context.pool)));
                matrix.backward(factors, x, d_logits, dx, context.pool);
            }
            Self::Adapted(projection) => {
                let vocabulary = projection.out();
                let stride = vocabulary * size_of::<f32>() / size_of::<E>();
                let dy: &[E] = bytemuck::cast_slice(d_logits);
                let dy = View::strided(dy, x.rows, vocabulary, stride);
                let du = projection.backward_input_of(dy, dx, context);
                projection.backward_weights_of(x.data, low_rank, dy, &du, context);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::ops::cross_entropy::{LogitRule, LossHead, Target};
    use crate::engine::ops::dora::Magnitudes;
    use crate::engine::ops::lora_linear::{Lora, MaskKey};
    use crate::engine::ops::projection::Linear;
    use crate::engine::ops::rms_norm::RmsNorm;
    use crate::engine::params::Weight;
    use crate::engine::testing::{TestWeights, check_op, in_pool, random_tensor, random_values};
    use candle_core::{D, Device, Result, Tensor};
    use half::bf16;

    const WIDTH: usize = 12;
    const RANK: usize = 3;
    const SCALE: f64 = 0.5;
    const EPSILON: f32 = 1e-5;

    fn weights(vocabulary: usize) -> TestWeights {
        TestWeights::new(&[
            ("a", &[RANK, WIDTH]),
            ("b", &[vocabulary, RANK]),
            ("magnitudes", &[vocabulary]),
            ("norm", &[WIDTH]),
            ("w", &[vocabulary, WIDTH]),
        ])
    }

    fn targets(tokens: usize, vocabulary: usize) -> Vec<Target> {
        let target = |row| Target {
            row,
            id: (row * 7 % vocabulary) as u32,
        };
        (0..tokens).filter(|row| row % 3 != 1).map(target).collect()
    }

    fn layer(weights: &TestWeights, weight: Weight, magnitudes: bool, dropout: f64) -> OutputLayer {
        let magnitudes = magnitudes.then(|| Magnitudes::new(weights.trainable("magnitudes")));
        OutputLayer::Adapted(Projection(vec![Linear {
            weight,
            bias: None,
            lora: Some(Lora {
                a: weights.trainable("a"),
                b: weights.trainable("b"),
                scale: SCALE as f32,
                trained: RANK,
                dropout,
                module: 5,
                bias: None,
                magnitudes,
            }),
        }]))
    }

    /// The loss, and the gradient of what comes in.
    fn run<E: Element>(
        weights: &TestWeights,
        layer: &OutputLayer,
        mask: Option<MaskKey>,
        x: &[f32],
        targets: &[Target],
    ) -> (Vec<f32>, Vec<f32>) {
        let norm = RmsNorm {
            weight: weights.frozen("norm"),
            epsilon: EPSILON,
            offset: false,
        };
        let head = LossHead {
            norm: &norm,
            head: layer,
            mask,
            pool: &Pool::default(),
            loss: Default::default(),
            logits: LogitRule::NONE,
        };
        let mut dx = vec![f32::NAN; x.len()];
        let sum = head.loss::<E>(x, targets, Some(&mut dx));
        (vec![sum.loss as f32], dx)
    }

    /// With magnitudes the norms are constants to the backward pass.
    fn reference(
        x: &Tensor,
        weights: &TestWeights,
        magnitudes: bool,
        targets: &[Target],
    ) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(1)?;
        let normed = x
            .broadcast_div(&(mean + f64::from(EPSILON))?.sqrt()?)?
            .broadcast_mul(&weights.variable("norm"))?;
        let of = |name: &str| weights.variable(name);
        let changed = (of("w") + (of("b").matmul(&of("a"))? * SCALE)?)?;
        let mut logits = normed.matmul(&changed.t()?)?;
        if magnitudes {
            let norms = changed.sqr()?.sum(1)?.sqrt()?.detach();
            logits = logits.broadcast_mul(&(of("magnitudes") / norms)?)?;
        }
        let log_sum = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_p = logits.broadcast_sub(&log_sum)?.flatten_all()?;
        let vocabulary = logits.dim(1)?;
        let place = |target: &Target| (target.row * vocabulary) as u32 + target.id;
        let index: Vec<u32> = targets.iter().map(place).collect();
        let index = Tensor::new(index, &Device::Cpu)?;
        log_p.index_select(&index, 0)?.sum_all()?.neg()
    }

    /// The second has more targets than a chunk has rows.
    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (tokens, vocabulary) in [(10, 31), (900, 17)] {
            let (weights, targets) = (weights(vocabulary), targets(tokens, vocabulary));
            let x = random_tensor(tokens, WIDTH, 1);
            for magnitudes in [false, true] {
                let op = |x: &[f32], _: &[f32]| {
                    let layer = layer(&weights, weights.frozen("w"), magnitudes, 0.0);
                    run::<f32>(&weights, &layer, None, x, &targets)
                };
                let untouched: &[&str] = match magnitudes {
                    true => &["norm", "w"],
                    false => &["magnitudes", "norm", "w"],
                };
                let plain = |x: &Tensor| reference(x, &weights, magnitudes, &targets);
                check_op(&x, &weights, untouched, &op, &plain);
            }
        }
    }

    #[test]
    fn beside_bfloat16_it_is_close_to_what_it_is_beside_float32() {
        let (tokens, vocabulary) = (700, 23);
        let (weights, targets) = (weights(vocabulary), targets(tokens, vocabulary));
        let x = random_values(tokens * WIDTH, 1);
        for magnitudes in [false, true] {
            weights.reset_gradients();
            let wide = layer(&weights, weights.frozen("w"), magnitudes, 0.0);
            let (wide, wide_dx) = run::<f32>(&weights, &wide, None, &x, &targets);
            let narrow = layer(&weights, weights.frozen_bf16("w"), magnitudes, 0.0);
            let (narrow, narrow_dx) = run::<bf16>(&weights, &narrow, None, &x, &targets);
            assert!((wide[0] - narrow[0]).abs() < 0.01 * wide[0]);
            let largest = wide_dx.iter().fold(0.0f32, |m, d| m.max(d.abs()));
            for (wide, narrow) in wide_dx.iter().zip(&narrow_dx) {
                assert!((wide - narrow).abs() < 0.03 * largest, "{wide} {narrow}");
            }
        }
    }

    #[test]
    fn each_chunk_drops_inputs_of_its_own_whatever_the_number_of_threads() {
        let (tokens, vocabulary) = (900, 17);
        let (weights, targets) = (weights(vocabulary), targets(tokens, vocabulary));
        let x = random_values(tokens * WIDTH, 1);
        let key = MaskKey {
            seed: 3,
            step: 1,
            slot: 0,
            part: 0,
        };
        assert_ne!(key.words(5, 0), key.of_part(1).words(5, 0));
        let with = |mask, threads| {
            in_pool(threads, || {
                weights.reset_gradients();
                let layer = layer(&weights, weights.frozen("w"), true, 0.3);
                let ran = run::<f32>(&weights, &layer, mask, &x, &targets);
                (ran, weights.gradients(&["norm", "w"]))
            })
        };
        let dropped = with(Some(key), 1);
        assert_eq!(with(Some(key), 3), dropped);
        assert_ne!(with(None, 1).0, dropped.0);
    }
}
