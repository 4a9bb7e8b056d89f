//! A gate of what attention gives: `y = context · sigmoid(gate)`. It is projected with the queries, behind the query of each head.

use rayon::prelude::*;

use super::ROW_TILE;
use super::element::Element;
use super::rope::HeadLayout;
use super::vector::{dispatch, sigmoid};

/// Scalars that a thread takes at a time.
const TILE: usize = 1 << 14;

/// Columns of a projection in which each query is followed by its gate, and keys and values come last.
pub fn projected_width(layout: HeadLayout) -> usize {
    layout.width() + gates_width(layout)
}

/// Columns of the gates.
pub fn gates_width(layout: HeadLayout) -> usize {
    layout.heads * layout.head_dim
}

/// Takes what was projected apart: into queries, keys and values, `[tokens][layout.width()]`, and the gates, `[tokens][heads * head_dim]`.
pub fn split<E: Element>(projected: &[E], layout: HeadLayout, (qkv, gates): (&mut [E], &mut [E])) {
    let (width, gated) = (layout.width(), gates_width(layout));
    qkv.par_chunks_mut(width)
        .zip(gates.par_chunks_mut(gated))
        .zip(projected.par_chunks(width + gated))
        .with_min_len(ROW_TILE)
        .for_each(|((qkv, gates), projected)| {
            let (heads, keys) = projected.split_at(2 * gated);
            let (queries, to_keys) = qkv.split_at_mut(gated);
            to_keys.copy_from_slice(keys);
            let size = layout.head_dim;
            let to = queries
                .chunks_exact_mut(size)
                .zip(gates.chunks_exact_mut(size));
            for ((query, gate), head) in to.zip(heads.chunks_exact(2 * size)) {
                query.copy_from_slice(&head[..size]);
                gate.copy_from_slice(&head[size..]);
            }
        });
}

/// Puts together what [`split`] took apart.
pub fn join<E: Element>((qkv, gates): (&[E], &[E]), layout: HeadLayout, projected: &mut [E]) {
    let (width, gated) = (layout.width(), gates_width(layout));
    projected
        .par_chunks_mut(width + gated)
        .zip(qkv.par_chunks(width))
        .zip(gates.par_chunks(gated))
        .with_min_len(ROW_TILE)
        .for_each(|((projected, qkv), gates)| {
            let (heads, to_keys) = projected.split_at_mut(2 * gated);
            let (queries, keys) = qkv.split_at(gated);
            to_keys.copy_from_slice(keys);
            let size = layout.head_dim;
            let from = queries.chunks_exact(size).zip(gates.chunks_exact(size));
            for ((query, gate), head) in from.zip(heads.chunks_exact_mut(2 * size)) {
                head[..size].copy_from_slice(query);
                head[size..].copy_from_slice(gate);
            }
        });
}

/// Computes `y` of the context; all have the same shape.
pub fn forward<E: Element>(context: &[E], gates: &[E], y: &mut [E]) {
    y.par_chunks_mut(TILE)
        .zip(context.par_chunks(TILE))
        .zip(gates.par_chunks(TILE))
        .for_each(|((y, context), gates)| {
            dispatch(
                #[inline(always)]
                || {
                    for ((y, x), gate) in y.iter_mut().zip(context).zip(gates) {
                        *y = E::round_from(x.wide() * sigmoid(gate.wide()));
                    }
                },
            );
        });
}

/// Turns `dy`, the gradient of the result, into that of the context, and writes that of the gates.
pub fn backward<E: Element>(context: &[E], gates: &[E], dy: &mut [f32], d_gates: &mut [E]) {
    dy.par_chunks_mut(TILE)
        .zip(d_gates.par_chunks_mut(TILE))
        .zip(context.par_chunks(TILE))
        .zip(gates.par_chunks(TILE))
        .for_each(|(((dy, d_gates), context), gates)| {
            dispatch(
                #[inline(always)]
                || {
                    let outs = dy.iter_mut().zip(d_gates);
                    for ((dy, d_gate), (x, gate)) in outs.zip(context.iter().zip(gates)) {
                        let open = sigmoid(gate.wide());
                        *d_gate = E::round_from(*dy * x.wide() * open * (1.0 - open));
                        *dy *= open;
                    }
                },
            );
        });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    const LAYOUT: HeadLayout = HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 6,
    };

    /// As if attention gave its queries.
    #[test]
    fn gates_are_taken_from_behind_the_queries_and_put_back_there() {
        let (rows, gated, width) = (70, gates_width(LAYOUT), projected_width(LAYOUT));
        let x = random_tensor(rows, width, 1);
        let weights = TestWeights::new(&[]);
        let run = |projected: &[f32], dy: &[f32]| {
            let mut qkv = vec![0.0; rows * LAYOUT.width()];
            let mut gates = vec![0.0; rows * gated];
            split(projected, LAYOUT, (&mut qkv, &mut gates));
            let queries = |qkv: &[f32]| -> Vec<f32> {
                let rows = qkv.chunks(LAYOUT.width());
                rows.flat_map(|row| row[..gated].to_vec()).collect()
            };
            let context = queries(&qkv);
            let mut y = vec![0.0; context.len()];
            forward(&context, &gates, &mut y);
            let (mut d_context, mut d_gates) = (dy.to_vec(), vec![0.0; gates.len()]);
            backward(&context, &gates, &mut d_context, &mut d_gates);
            let mut d_qkv = vec![0.0; qkv.len()];
            for (to, from) in d_qkv
                .chunks_mut(LAYOUT.width())
                .zip(d_context.chunks(gated))
            {
                to[..gated].copy_from_slice(from);
            }
            let mut d_projected = vec![1.0; projected.len()];
            join((&d_qkv, &d_gates), LAYOUT, &mut d_projected);
            (y, d_projected)
        };
        check_op(&x, &weights, &[], &run, &|x| {
            let heads: Vec<Tensor> = (0..LAYOUT.heads)
                .map(|head| {
                    let size = LAYOUT.head_dim;
                    let query = x.narrow(1, 2 * head * size, size)?;
                    let gate = x.narrow(1, (2 * head + 1) * size, size)?;
                    query / (gate.neg()?.exp()? + 1.0)?
                })
                .collect::<Result<_, _>>()?;
            Tensor::cat(&heads, 1)
        });
    }
}
