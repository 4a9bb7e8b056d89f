//! Keys and values that layers have of an earlier one (Gemma 4): each as its attention reads it, normed and rotated. They stay from the
//! layer that makes them to the end of a pass, and what comes back of them goes to it.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::engine::buffer::{Buffer, Pool};
use crate::engine::ops::ROW_TILE;
use crate::engine::ops::element::Element;
use crate::engine::ops::rope::HeadLayout;

/// Whose keys and values a layer's attention reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// Its own, which no other layer has.
    Own,
    /// Its own, which later layers have, too.
    Lent,
    /// Those of the layer with this number.
    Borrowed(usize),
}

/// The keys and values of a pass that several layers have, by the layer that makes them.
pub struct SharedKeys<E> {
    /// `[tokens][2 * key_value_heads * head_dim]`
    lent: BTreeMap<usize, Buffer<E>>,
    /// Their gradients so far, where they are wanted.
    gradients: BTreeMap<usize, Buffer<f32>>,
    /// To the layers before this one nothing goes back.
    first: usize,
}

impl<E> Default for SharedKeys<E> {
    fn default() -> Self {
        Self {
            lent: BTreeMap::new(),
            gradients: BTreeMap::new(),
            first: 0,
        }
    }
}

impl<E: Element> SharedKeys<E> {
    /// Says before which layer nothing learns.
    pub fn learning_from(&mut self, first: usize) {
        self.first = first;
    }

    /// Keeps the keys and values of a layer, out of `rotated`, `[tokens][layout.width()]`. One that runs once more has them already.
    pub fn lend(&mut self, layer: usize, rotated: &[E], layout: HeadLayout, pool: &Pool) {
        self.lent.entry(layer).or_insert_with(|| {
            let (width, columns) = (layout.width(), 2 * layout.keys());
            let mut kept = pool.take(rotated.len() / width * columns);
            kept.par_chunks_mut(ROW_TILE * columns)
                .zip(rotated.par_chunks(ROW_TILE * width))
                .for_each(|(kept, rotated)| {
                    let rows = kept.chunks_exact_mut(columns);
                    for (kept, row) in rows.zip(rotated.chunks_exact(width)) {
                        kept.copy_from_slice(&row[layout.queries()..]);
                    }
                });
            kept
        });
    }

    /// Puts the keys and values of the layer `lender` into `rotated`, behind the queries of each token.
    pub fn borrow(&self, lender: usize, rotated: &mut [E], layout: HeadLayout) {
        let kept = &self.lent.get(&lender).expect("layers run in their order")[..];
        let (width, columns) = (layout.width(), 2 * layout.keys());
        rotated
            .par_chunks_mut(ROW_TILE * width)
            .zip(kept.par_chunks(ROW_TILE * columns))
            .for_each(|(rotated, kept)| {
                let rows = rotated.chunks_exact_mut(width);
                for (row, kept) in rows.zip(kept.chunks_exact(columns)) {
                    row[layout.queries()..].copy_from_slice(kept);
                }
            });
    }

    /// Adds to the gradient of the keys and values of the layer `lender` what a borrower's `d_rotated` has behind its queries.
    pub fn give_back(&mut self, lender: usize, d_rotated: &[f32], layout: HeadLayout, pool: &Pool) {
        if lender < self.first {
            return;
        }
        let (width, columns) = (layout.width(), 2 * layout.keys());
        let sum = self
            .gradients
            .entry(lender)
            .or_insert_with(|| pool.zeroed(d_rotated.len() / width * columns));
        sum.par_chunks_mut(ROW_TILE * columns)
            .zip(d_rotated.par_chunks(ROW_TILE * width))
            .for_each(|(sum, d_rotated)| {
                let rows = sum.chunks_exact_mut(columns);
                for (sum, row) in rows.zip(d_rotated.chunks_exact(width)) {
                    add(sum, &row[layout.queries()..]);
                }
            });
    }

    /// Adds what all borrowers gave back to the gradient of the layer's own keys and values.
    pub fn take_back(&mut self, layer: usize, d_rotated: &mut [f32], layout: HeadLayout) {
        self.lent.remove(&layer);
        let Some(sum) = self.gradients.remove(&layer) else {
            return;
        };
        let (width, columns) = (layout.width(), 2 * layout.keys());
        d_rotated
            .par_chunks_mut(ROW_TILE * width)
            .zip(sum.par_chunks(ROW_TILE * columns))
            .for_each(|(d_rotated, sum)| {
                let rows = d_rotated.chunks_exact_mut(width);
                for (row, sum) in rows.zip(sum.chunks_exact(columns)) {
                    add(&mut row[layout.queries()..], sum);
                }
            });
    }
}

fn add(sum: &mut [f32], x: &[f32]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: HeadLayout = HeadLayout {
        heads: 2,
        key_value_heads: 1,
        head_dim: 2,
    };

    #[test]
    fn what_is_lent_comes_back_with_the_gradients_of_all_borrowers() {
        let pool = Pool::default();
        let mut keys = SharedKeys::<f32>::default();
        let rotated: Vec<f32> = (0..16).map(|x| x as f32).collect();
        keys.lend(3, &rotated, LAYOUT, &pool);
        // As when the layer runs once more.
        keys.lend(3, &[0.0; 16], LAYOUT, &pool);
        let mut borrowed = [-1.0; 16];
        keys.borrow(3, &mut borrowed, LAYOUT);
        assert_eq!(borrowed[..4], [-1.0; 4]);
        assert_eq!(borrowed[4..8], rotated[4..8]);
        assert_eq!(borrowed[12..], rotated[12..]);
        for _ in 0..2 {
            keys.give_back(3, &rotated, LAYOUT, &pool);
        }
        let mut gradient = [1.0; 16];
        keys.take_back(3, &mut gradient, LAYOUT);
        assert_eq!(gradient[..4], [1.0; 4]);
        assert_eq!(gradient[4..8], [9.0, 11.0, 13.0, 15.0]);
        assert_eq!(gradient[12..], [25.0, 27.0, 29.0, 31.0]);
    }

    #[test]
    fn to_layers_that_learn_nothing_nothing_goes_back() {
        let mut keys = SharedKeys::<f32>::default();
        keys.learning_from(4);
        keys.give_back(3, &[1.0; 8], LAYOUT, &Pool::default());
        let mut gradient = [0.0; 8];
        keys.take_back(3, &mut gradient, LAYOUT);
        assert_eq!(gradient, [0.0; 8]);
    }
}
