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

struct Projection {
    linears: Arc<Vec<Linear>>,
    mask: Option<MaskKey>,
    /// `drop(x) Aᵀ` of each layer that has an adapter, for the backward pass.
    low_rank: OnceLock<Vec<Option<Vec<f32>>>>,
}

impl Projection {
    fn new(linears: &Arc<Vec<Linear>>, mask: Option<MaskKey>) -> Self {
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
        let mut low_rank = Vec::with_capacity(widths.len());
        let mut first = 0;
        for (linear, width) in self.linears.iter().zip(widths) {
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
            low_rank.push(match &linear.lora {
                Some(lora) => Some(lora.forward(&mut part, x, tokens, self.mask)?),
                None => None,
            });
            first += width;
        }
        if self.low_rank.set(low_rank).is_err() {
            candle_core::bail!("a projection was run twice");
        }
        Ok(y)
    }

    fn backward(&self, x: &[f32], dy: &[f32], tokens: usize) -> Result<Vec<f32>> {
        let Some(low_rank) = self.low_rank.get() else {
            candle_core::bail!("projection backward before forward");
        };
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
