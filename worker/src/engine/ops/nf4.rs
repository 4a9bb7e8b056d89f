//! Weights of 4 bits as products read them: widened piece by piece while they are packed, never as a whole.
//!
//! In: a matrix of [`Nf4`], and which part of it. Out: the part as elements: a level times its block's scale in float32, then
//! rounded to the element. The same bits on every processor.

use common::nf4::Nf4;

use super::element::Element;

/// A row-major matrix of 4 bits a scalar, without gaps between its rows.
#[derive(Clone, Copy)]
pub struct Nf4View<'a> {
    pub matrix: &'a Nf4,
    pub rows: usize,
    pub columns: usize,
}

/// A part of one row that lies in one block.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// Number of the first scalar in the matrix.
    pub first: usize,
    /// Where the part begins, counted from what was asked for.
    pub at: usize,
    pub len: usize,
    pub block: usize,
}

impl<'a> Nf4View<'a> {
    pub fn new(matrix: &'a Nf4, rows: usize, columns: usize) -> Self {
        assert_eq!(
            matrix.scalars(),
            rows * columns,
            "a matrix of another shape"
        );
        Self {
            matrix,
            rows,
            columns,
        }
    }

    /// Writes the columns of a row from `start` on to `out`.
    pub fn widen<E: Element>(&self, row: usize, start: usize, out: &mut [E]) {
        for run in self.runs(row, start, out.len()) {
            let levels = self.levels::<E>(run.block);
            for (index, out) in out[run.at..run.at + run.len].iter_mut().enumerate() {
                *out = levels[self.matrix.code(run.first + index)];
            }
        }
    }

    /// [`widen`](Self::widen) to float32, of what it makes of the element.
    pub fn widen_to_f32<E: Element>(&self, row: usize, start: usize, out: &mut [f32]) {
        for run in self.runs(row, start, out.len()) {
            let levels = self.levels::<E>(run.block).map(E::wide);
            for (index, out) in out[run.at..run.at + run.len].iter_mut().enumerate() {
                *out = levels[self.matrix.code(run.first + index)];
            }
        }
    }

    /// What the codes of a block stand for.
    fn levels<E: Element>(&self, block: usize) -> [E; 16] {
        self.matrix.levels_of(block).map(E::round_from)
    }

    /// The columns `start..start + len` of a row, block by block.
    pub(super) fn runs(&self, row: usize, start: usize, len: usize) -> impl Iterator<Item = Run> {
        assert!(
            row < self.rows && start + len <= self.columns,
            "a part outside the matrix"
        );
        let (shift, first) = (
            self.matrix.block().trailing_zeros(),
            row * self.columns + start,
        );
        let mut at = 0;
        std::iter::from_fn(move || {
            let scalar = first + at;
            let block = scalar >> shift;
            let run = Run {
                first: scalar,
                at,
                len: (((block + 1) << shift) - scalar).min(len - at),
                block,
            };
            at += run.len;
            (run.len > 0).then_some(run)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::engine::testing::random_values;

    #[test]
    fn a_part_is_what_dequantising_the_whole_gives_rounded_to_the_element() {
        for (rows, columns) in [(5, 64), (7, 50), (3, 7), (2, 300)] {
            let scalars = random_values(rows * columns, 1);
            let matrix = Nf4::quantise(&scalars, true).unwrap();
            let mut whole = vec![0.0; scalars.len()];
            matrix.dequantise(0, &mut whole);
            let view = Nf4View::new(&matrix, rows, columns);
            for row in 0..rows {
                for (start, len) in [(0, columns), (1, columns - 1), (columns / 3, columns / 2)] {
                    let expected = &whole[row * columns + start..][..len];
                    let (mut single, mut half) = (vec![0.0f32; len], vec![bf16::ZERO; len]);
                    view.widen(row, start, &mut single);
                    view.widen(row, start, &mut half);
                    assert_eq!(single, expected);
                    let rounded: Vec<bf16> = expected.iter().map(|x| bf16::from_f32(*x)).collect();
                    assert_eq!(half, rounded);
                    view.widen_to_f32::<bf16>(row, start, &mut single);
                    assert!(single.iter().zip(&rounded).all(|(a, b)| *a == b.to_f32()));
                }
            }
        }
    }
}
