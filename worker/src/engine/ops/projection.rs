//! Linear layers that read the same input, side by side in one output: queries, keys and values; gate and up. Or one
//! layer on top of a residual: `y = residual + x Wᵀ`.
//!
//! A layer is frozen, frozen with a LoRA update, or trainable as a whole; what is frozen gets no gradient.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut};
use super::lora_linear::{Lora, MaskKey};
use super::{ROW_TILE, f32_slice, linear, output, to_tensor, vector, with_f32};
use crate::engine::params::Weight;

/// `y = x Wᵀ + bias (+ scale · x Aᵀ Bᵀ)`, the weight `[out, in]`.
///
/// `B` starts at zero, so an untrained adapter leaves the base model unchanged.
#[derive(Clone, Debug)]
pub struct Linear {
    pub weight: Weight,
    pub bias: Option<Weight>,
    pub lora: Option<Lora>,
}

/// `x` is `[tokens, in]`; the outputs lie side by side in `[tokens, sum of outs]`.
pub fn project(x: &Tensor, linears: &Arc<Vec<Linear>>, mask: Option<MaskKey>) -> Result<Tensor> {
    x.apply_op1(Projection::new(linears, mask))
}

/// `residual + linear(x)` with a single layer.
pub fn project_onto(
    residual: &Tensor,
    x: &Tensor,
    linear: &Arc<Vec<Linear>>,
    mask: Option<MaskKey>,
) -> Result<Tensor> {
    x.apply_op2(residual, Projection::new(linear, mask))
}

/// The operation, for one run.
pub struct Projection {
    linears: Arc<Vec<Linear>>,
    mask: Option<MaskKey>,
    /// `drop(x) Aᵀ` of each layer that has an adapter, for the backward pass.
    low_rank: OnceLock<LowRank>,
}

type LowRank = Vec<Option<Vec<f32>>>;

impl Projection {
    pub fn new(linears: &Arc<Vec<Linear>>, mask: Option<MaskKey>) -> Self {
        Self {
            linears: linears.clone(),
            mask,
            low_rank: OnceLock::new(),
        }
    }

    fn widths(&self) -> Result<Vec<usize>> {
        self.linears
            .iter()
            .map(|linear| Ok(linear.weight.matrix_dims()?.0))
            .collect()
    }

    fn forward(&self, x: &[f32], tokens: usize, residual: Option<&[f32]>) -> Result<Vec<f32>> {
        let widths = self.widths()?;
        let total: usize = widths.iter().sum();
        let depth = x.len() / tokens.max(1);
        let mut y = match residual {
            Some(residual) if residual.len() == tokens * total => residual.to_vec(),
            Some(_) => candle_core::bail!("a residual of another shape"),
            None => vec![0.0; tokens * total],
        };
        let low_rank = self.low_rank(x, tokens)?;
        let mut first = 0;
        for ((linear, width), u) in self.linears.iter().zip(widths).zip(low_rank) {
            if linear.weight.matrix_dims()?.1 != depth {
                candle_core::bail!("an input {depth} wide for a layer of another width");
            }
            if let Some(bias) = &linear.bias {
                bias.with_f32(|bias| {
                    add_to_rows(&mut y, total, first, bias);
                    Ok(())
                })?;
            }
            let accumulate = residual.is_some() || linear.bias.is_some();
            let mut whole = MatrixMut::new(&mut y, tokens, total);
            let mut part = whole.columns(first, width);
            linear::forward(
                &mut part,
                accumulate,
                Matrix::new(x, tokens, depth),
                &linear.weight,
            )?;
            if let (Some(lora), Some(u)) = (&linear.lora, u) {
                lora.expand(&mut part, u, tokens)?;
            }
            first += width;
        }
        Ok(y)
    }

    /// Computed by whichever pass needs it first: a checkpointed layer's last projection only runs backward.
    fn low_rank(&self, x: &[f32], tokens: usize) -> Result<&LowRank> {
        if let Some(low_rank) = self.low_rank.get() {
            return Ok(low_rank);
        }
        let low_rank = self
            .linears
            .iter()
            .map(|linear| match &linear.lora {
                Some(lora) => Ok(Some(lora.reduce(x, tokens, self.mask)?)),
                None => Ok(None),
            })
            .collect::<Result<_>>()?;
        Ok(self.low_rank.get_or_init(|| low_rank))
    }

    fn backward(&self, x: &[f32], dy: &[f32], tokens: usize) -> Result<Vec<f32>> {
        let low_rank = self.low_rank(x, tokens)?;
        let widths = self.widths()?;
        let total: usize = widths.iter().sum();
        let depth = x.len() / tokens.max(1);
        let mut dx = vec![0.0; x.len()];
        let input = Matrix::new(x, tokens, depth);
        let mut first = 0;
        for (index, (linear, width)) in self.linears.iter().zip(widths).enumerate() {
            let part = &dy[first.min(dy.len())..];
            let d_part = Matrix::strided(part, tokens, width, total);
            linear::backward_input(
                &mut MatrixMut::new(&mut dx, tokens, depth),
                index > 0,
                d_part,
                &linear.weight,
            )?;
            linear::backward_weight(input, d_part, &linear.weight)?;
            if let Some(bias) = &linear.bias {
                linear::backward_bias(part, total, tokens, bias)?;
            }
            if let (Some(lora), Some(u)) = (&linear.lora, &low_rank[index]) {
                lora.backward(&mut dx, x, u, d_part, tokens, self.mask)?;
            }
            first += width;
        }
        Ok(dx)
    }
}

/// Adds `row` to columns `first..` of every row of `y`.
fn add_to_rows(y: &mut [f32], width: usize, first: usize, row: &[f32]) {
    y.par_chunks_mut(ROW_TILE * width).for_each(|tile| {
        for y in tile.chunks_exact_mut(width) {
            vector::dispatch(
                #[inline(always)]
                || vector::add_scaled(&mut y[first..first + row.len()], row, 1.0),
            );
        }
    });
}

impl CustomOp1 for Projection {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let tokens = layout.shape().dims2()?.0;
        let y = self.forward(f32_slice(storage, layout)?, tokens, None)?;
        let width = y.len() / tokens.max(1);
        Ok(output(y, tokens, width))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (tokens, depth) = arg.dims2()?;
        let dx = with_f32(arg, |x| with_f32(grad, |dy| self.backward(x, dy, tokens)))?;
        Ok(Some(to_tensor(dx, tokens, depth)?))
    }
}

impl CustomOp2 for Projection {
    fn name(&self) -> &'static str {
        "projection_onto_residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = residual_layout.shape().dims2()?;
        let residual = f32_slice(residual, residual_layout)?;
        let y = self.forward(f32_slice(x, x_layout)?, tokens, Some(residual))?;
        Ok(output(y, tokens, width))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = CustomOp1::bwd(self, x, x, grad)?;
        Ok((dx, Some(grad.clone())))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, flat, random_tensor};

    fn reference(x: &Tensor, weights: &TestWeights, layer: &str, lora: bool) -> Result<Tensor> {
        let variable = |name: &str| weights.variable(&format!("{layer}.{name}"));
        let y = x
            .matmul(&variable("w").t()?)?
            .broadcast_add(&variable("bias"))?;
        match lora {
            false => Ok(y),
            true => y + (x.matmul(&variable("a").t()?)?.matmul(&variable("b").t()?)? * 0.5)?,
        }
    }

    fn weights(depth: usize) -> TestWeights {
        TestWeights::new(&[
            ("p.w", &[70, depth]),
            ("p.bias", &[70]),
            ("p.a", &[3, depth]),
            ("p.b", &[70, 3]),
            ("q.w", &[20, depth]),
            ("q.bias", &[20]),
            ("q.a", &[3, depth]),
            ("q.b", &[20, 3]),
        ])
    }

    fn lora(weights: &TestWeights, layer: &str, dropout: f64) -> Lora {
        Lora {
            a: weights.trainable(&format!("{layer}.a")),
            b: weights.trainable(&format!("{layer}.b")),
            scale: 0.5,
            dropout,
            module: 1,
        }
    }

    #[test]
    fn trainable_layers_side_by_side_equal_the_reference() {
        let weights = weights(50);
        let linear = |layer: &str| Linear {
            weight: weights.trainable(&format!("{layer}.w")),
            bias: Some(weights.trainable(&format!("{layer}.bias"))),
            lora: None,
        };
        let linears = Arc::new(vec![linear("p"), linear("q")]);
        check_op(
            &random_tensor(90, 50, 1),
            &weights,
            &["p.a", "p.b", "q.a", "q.b"],
            &|x| project(x, &linears, None),
            &|x| {
                let parts = ["p", "q"].map(|layer| reference(x, &weights, layer, false).unwrap());
                Tensor::cat(&parts, 1)
            },
        );
    }

    #[test]
    fn adapted_layers_equal_the_reference_and_their_base_gets_no_gradient() {
        let weights = weights(50);
        let linear = |layer: &str| Linear {
            weight: weights.frozen(&format!("{layer}.w")),
            bias: Some(weights.frozen(&format!("{layer}.bias"))),
            lora: Some(lora(&weights, layer, 0.0)),
        };
        let linears = Arc::new(vec![linear("p"), linear("q")]);
        check_op(
            &random_tensor(90, 50, 1),
            &weights,
            &["p.w", "p.bias", "q.w", "q.bias"],
            &|x| project(x, &linears, None),
            &|x| {
                let parts = ["p", "q"].map(|layer| reference(x, &weights, layer, true).unwrap());
                Tensor::cat(&parts, 1)
            },
        );
    }

    #[test]
    fn a_residual_passes_value_and_gradient() {
        let weights = weights(70);
        let linear = Linear {
            weight: weights.frozen("p.w"),
            bias: Some(weights.frozen("p.bias")),
            lora: Some(lora(&weights, "p", 0.0)),
        };
        let linear = Arc::new(vec![linear]);
        check_op(
            &random_tensor(33, 70, 1),
            &weights,
            &["p.w", "p.bias", "q.w", "q.bias", "q.a", "q.b"],
            &|x| project_onto(x, x, &linear, None),
            &|x| x + reference(x, &weights, "p", true)?,
        );
    }

    #[test]
    fn dropout_is_drawn_from_its_key_and_keeps_the_mean() {
        let weights = weights(50);
        let layer = |dropout| {
            Arc::new(vec![Linear {
                weight: weights.frozen("p.w"),
                bias: None,
                lora: Some(lora(&weights, "p", dropout)),
            }])
        };
        let key = |slot| MaskKey {
            seed: 1,
            step: 2,
            slot,
        };
        let x = random_tensor(90, 50, 1);
        let run = |dropout, mask| flat(&project(&x, &layer(dropout), mask).unwrap());
        let dropped = run(0.5, Some(key(0)));
        assert_eq!(run(0.5, Some(key(0))), dropped);
        assert_ne!(run(0.5, Some(key(1))), dropped);
        assert_eq!(run(0.5, None), run(0.0, Some(key(0))));
        let mean_over_masks: Vec<f32> = (0..400).map(|slot| run(0.5, Some(key(slot)))[7]).collect();
        let mean = mean_over_masks.iter().sum::<f32>() / 400.0;
        assert!((mean - run(0.0, None)[7]).abs() < 1.5, "{mean}");
    }

    #[test]
    fn dropout_s_gradient_goes_through_its_mask() {
        // With B and the output gradient fixed, x -> y is linear for one mask, so dx is exact by differences.
        let weights = weights(50);
        let linears = Arc::new(vec![Linear {
            weight: weights.frozen("q.w"),
            bias: None,
            lora: Some(lora(&weights, "q", 0.4)),
        }]);
        let mask = Some(MaskKey {
            seed: 3,
            step: 1,
            slot: 0,
        });
        let x = candle_core::Var::from_tensor(&random_tensor(70, 50, 1)).unwrap();
        let total = |x: &Tensor| project(x, &linears, mask).unwrap().sum_all().unwrap();
        let gradients = total(x.as_tensor()).backward().unwrap();
        let dx = gradients.get(&x).unwrap();
        let direction = random_tensor(70, 50, 2);
        let expected = total(&(x.as_tensor() + &direction).unwrap());
        let expected = flat(&(expected - total(x.as_tensor())).unwrap());
        let found = flat(&(dx * &direction).unwrap().sum_all().unwrap());
        assert!(
            (expected[0] - found[0]).abs() < 1e-2,
            "{expected:?} {found:?}"
        );
    }
}
