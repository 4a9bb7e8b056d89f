//! Rotary positions (Su et al., 2021) on the queries and keys of a fused projection, with Qwen3's norm of each head
//! before it where the model has one. Values pass through.
//!
//! Positions restart with each segment: they come with the batch.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::vector::dispatch;
use super::{ROW_TILE, add_partials, f32_slice, output, rms_norm, to_tensor, with_f32};
use crate::engine::params::Weight;

/// Cosines and sines of every position: `[positions, head_dim / 2]` each.
#[derive(Debug)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// `frequencies` are radians per position, `head_dim / 2` of them. Rounded as Transformers does: the angle in
    /// float32.
    pub fn new(frequencies: &[f32], positions: usize) -> Self {
        let angles = || {
            (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
        };
        Self {
            half: frequencies.len(),
            cos: angles().map(f32::cos).collect(),
            sin: angles().map(f32::sin).collect(),
        }
    }

    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    #[inline(always)]
    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// How a fused projection `[tokens, (heads + 2 * key_value_heads) * head_dim]` divides: queries, keys, values.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
}

impl HeadLayout {
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.key_value_heads) * self.head_dim
    }
}

/// The norm of each query and key head, weights `[head_dim]`.
#[derive(Clone, Debug)]
pub struct HeadNorms {
    pub query: Weight,
    pub key: Weight,
    pub epsilon: f32,
}

impl HeadNorms {
    /// Each partial sum holds the gradient of the query weight, then that of the key weight.
    fn add_gradients(&self, partials: &[Vec<f32>]) -> Result<()> {
        let (query, key): (Vec<_>, Vec<_>) = partials
            .iter()
            .map(|dw| dw.split_at(dw.len() / 2))
            .map(|(query, key)| (query.to_vec(), key.to_vec()))
            .unzip();
        for (weight, partials) in [(&self.query, query), (&self.key, key)] {
            weight.add_gradient(|gradient, accumulate| {
                add_partials(gradient, accumulate, &partials);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// `qkv` is `[tokens, layout.width()]`, and so is the result.
pub fn rope(
    qkv: &Tensor,
    layout: HeadLayout,
    norms: Option<HeadNorms>,
    positions: Arc<Vec<u32>>,
    table: Arc<RopeTable>,
) -> Result<Tensor> {
    qkv.apply_op1(Rope::new(layout, norms, positions, table)?)
}

/// The operation.
pub struct Rope {
    layout: HeadLayout,
    norms: Option<HeadNorms>,
    positions: Arc<Vec<u32>>,
    table: Arc<RopeTable>,
}

/// The norm weights of queries and keys, opened for reading.
type NormSlices<'a> = Option<(&'a [f32], &'a [f32])>;

impl Rope {
    /// The table must reach to the last position.
    pub fn new(
        layout: HeadLayout,
        norms: Option<HeadNorms>,
        positions: Arc<Vec<u32>>,
        table: Arc<RopeTable>,
    ) -> Result<Self> {
        let longest = positions.iter().max().map_or(0, |last| *last as usize + 1);
        if longest > table.positions() || table.half * 2 != layout.head_dim {
            candle_core::bail!("a rope table for other positions");
        }
        Ok(Self {
            layout,
            norms,
            positions,
            table,
        })
    }

    fn with_norms<R>(&self, read: impl FnOnce(NormSlices) -> Result<R>) -> Result<R> {
        match &self.norms {
            None => read(None),
            Some(norms) => norms
                .query
                .with_f32(|query| norms.key.with_f32(|key| read(Some((query, key))))),
        }
    }

    fn epsilon(&self) -> f32 {
        self.norms.as_ref().map_or(0.0, |norms| norms.epsilon)
    }

    #[inline(always)]
    fn forward_row(&self, x: &[f32], y: &mut [f32], position: usize, norms: NormSlices) {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        let (cos, sin) = self.table.row(position);
        let rotated = (heads + key_value_heads) * head_dim;
        for (head, (x, y)) in x[..rotated]
            .chunks_exact(head_dim)
            .zip(y[..rotated].chunks_exact_mut(head_dim))
            .enumerate()
        {
            match norms {
                None => y.copy_from_slice(x),
                Some((query, key)) => {
                    let weight = if head < heads { query } else { key };
                    rms_norm::forward_row(x, weight, self.epsilon(), y);
                }
            }
            let (first, second) = y.split_at_mut(head_dim / 2);
            for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
        y[rotated..].copy_from_slice(&x[rotated..]);
    }

    /// Rotates the gradient back, then passes it through the norm. `dw` holds the gradients of both norm weights.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn backward_row(
        &self,
        x: &[f32],
        g: &[f32],
        dx: &mut [f32],
        position: usize,
        norms: NormSlices,
        scratch: &mut [f32],
        dw: &mut [f32],
    ) {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        let (cos, sin) = self.table.row(position);
        let rotated = (heads + key_value_heads) * head_dim;
        for (head, ((x, g), dx)) in x[..rotated]
            .chunks_exact(head_dim)
            .zip(g[..rotated].chunks_exact(head_dim))
            .zip(dx[..rotated].chunks_exact_mut(head_dim))
            .enumerate()
        {
            let (g1, g2) = g.split_at(head_dim / 2);
            let (d1, d2) = scratch.split_at_mut(head_dim / 2);
            for (((((d1, d2), g1), g2), c), s) in
                d1.iter_mut().zip(d2).zip(g1).zip(g2).zip(cos).zip(sin)
            {
                (*d1, *d2) = (g1 * c + g2 * s, g2 * c - g1 * s);
            }
            match norms {
                None => dx.copy_from_slice(scratch),
                Some((query, key)) => {
                    let (weight, part) = if head < heads { (query, 0) } else { (key, 1) };
                    let dw = dw.chunks_exact_mut(head_dim).nth(part);
                    rms_norm::backward_row(x, weight, self.epsilon(), scratch, dx, dw);
                }
            }
        }
        dx[rotated..].copy_from_slice(&g[rotated..]);
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        if width != self.layout.width() || rows != self.positions.len() {
            candle_core::bail!("queries, keys and values of another shape");
        }
        let x = f32_slice(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        self.with_norms(|norms| {
            y.par_chunks_mut(ROW_TILE * width)
                .zip(x.par_chunks(ROW_TILE * width))
                .zip(self.positions.par_chunks(ROW_TILE))
                .for_each(|((y, x), positions)| {
                    dispatch(
                        #[inline(always)]
                        || {
                            for ((y, x), &position) in y
                                .chunks_exact_mut(width)
                                .zip(x.chunks_exact(width))
                                .zip(positions)
                            {
                                self.forward_row(x, y, position as usize, norms);
                            }
                        },
                    );
                });
            Ok(())
        })?;
        Ok(output(y, rows, width))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = arg.dims2()?;
        let head_dim = self.layout.head_dim;
        let trainable = self
            .norms
            .as_ref()
            .is_some_and(|norms| norms.query.is_trainable());
        let tile = ROW_TILE * width;
        let mut dx = vec![0.0; rows * width];
        let partials: Vec<Vec<f32>> = with_f32(arg, |x| {
            with_f32(grad, |g| {
                self.with_norms(|norms| {
                    Ok(dx
                        .par_chunks_mut(tile)
                        .zip(x.par_chunks(tile))
                        .zip(g.par_chunks(tile))
                        .zip(self.positions.par_chunks(ROW_TILE))
                        .map(|(((dx, x), g), positions)| {
                            let mut scratch = vec![0.0; head_dim];
                            let mut dw = vec![0.0; if trainable { 2 * head_dim } else { 0 }];
                            dispatch(
                                #[inline(always)]
                                || {
                                    for (((dx, x), g), &position) in dx
                                        .chunks_exact_mut(width)
                                        .zip(x.chunks_exact(width))
                                        .zip(g.chunks_exact(width))
                                        .zip(positions)
                                    {
                                        let position = position as usize;
                                        self.backward_row(
                                            x,
                                            g,
                                            dx,
                                            position,
                                            norms,
                                            &mut scratch,
                                            &mut dw,
                                        );
                                    }
                                },
                            );
                            dw
                        })
                        .collect())
                })
            })
        })?;
        if let Some(norms) = self.norms.as_ref().filter(|_| trainable) {
            norms.add_gradients(&partials)?;
        }
        Ok(Some(to_tensor(dx, rows, width)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};
    use candle_core::Device;

    const LAYOUT: HeadLayout = HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 8,
    };
    const FREQUENCIES: [f32; 4] = [1.0, 0.3, 0.1, 0.02];

    /// One head: `[tokens, head_dim]`.
    fn rotate(x: &Tensor, positions: &[u32]) -> Result<Tensor> {
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|p| FREQUENCIES.map(|f| *p as f32 * f))
            .collect();
        let angles = Tensor::from_vec(angles, (positions.len(), 4), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (a, b) = (x.narrow(1, 0, 4)?, x.narrow(1, 4, 4)?);
        let first = ((&a * &cos)? - (&b * &sin)?)?;
        let second = ((&b * &cos)? + (&a * &sin)?)?;
        Tensor::cat(&[first, second], 1)
    }

    fn reference(
        qkv: &Tensor,
        norms: Option<(&Tensor, &Tensor)>,
        positions: &[u32],
    ) -> Result<Tensor> {
        let mut parts = Vec::new();
        for head in 0..6 {
            let mut x = qkv.narrow(1, head * 8, 8)?;
            if let Some((query, key)) = norms {
                let mean = x.sqr()?.mean_keepdim(1)?;
                let weight = if head < 4 { query } else { key };
                x = x
                    .broadcast_div(&(mean + 1e-6)?.sqrt()?)?
                    .broadcast_mul(weight)?;
            }
            parts.push(rotate(&x, positions)?);
        }
        parts.push(qkv.narrow(1, 6 * 8, 2 * 8)?);
        Tensor::cat(&parts, 1)
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        let positions: Arc<Vec<u32>> = Arc::new((0..50).chain(0..37).collect());
        let table = Arc::new(RopeTable::new(&FREQUENCIES, 50));
        let x = random_tensor(87, LAYOUT.width(), 1);
        let weights = TestWeights::new(&[("q", &[8]), ("k", &[8])]);
        let run = |x: &Tensor, norms| rope(x, LAYOUT, norms, positions.clone(), table.clone());
        check_op(&x, &weights, &["q", "k"], &|x| run(x, None), &|x| {
            reference(x, None, &positions)
        });
        let norms = HeadNorms {
            query: weights.trainable("q"),
            key: weights.trainable("k"),
            epsilon: 1e-6,
        };
        check_op(&x, &weights, &[], &|x| run(x, Some(norms.clone())), &|x| {
            let (query, key) = (weights.variable("q"), weights.variable("k"));
            reference(x, Some((&query, &key)), &positions)
        });
    }

    #[test]
    fn positions_beyond_the_table_are_refused() {
        let table = Arc::new(RopeTable::new(&FREQUENCIES, 3));
        let x = random_tensor(4, LAYOUT.width(), 1);
        assert!(rope(&x, LAYOUT, None, Arc::new(vec![0, 1, 2, 3]), table).is_err());
    }
}
