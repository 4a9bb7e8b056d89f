//! A trainable matrix whose columns are dealt in turn to several matrices: what each expert has of a tensor with the factors of all.
//!
//! Columns that stand apart are slow to read, so that a copy with those of each matrix together is made after every update, and
//! gradients are put back among each other once all of them are there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

/// Matrices whose values of one row lie in one cache line.
const TOGETHER: usize = 16;
/// Scalars of rows that a thread puts back at a time.
const ROWS_TILE: usize = 1 << 16;

/// The sizes of a matrix that is dealt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deal {
    pub rows: usize,
    /// Columns of each of the matrices.
    pub columns: usize,
    /// Number of matrices.
    pub parts: usize,
}

impl Deal {
    /// Scalars of one of the matrices.
    pub fn scalars(self) -> usize {
        self.rows * self.columns
    }

    /// The matrices one behind the other.
    pub fn apart(self, whole: &[f32]) -> Vec<f32> {
        let (parts, columns) = (self.parts, self.columns);
        let mut apart = vec![0.0; whole.len()];
        let groups = apart.par_chunks_mut((TOGETHER * self.scalars()).max(1));
        groups.enumerate().for_each(|(group, apart)| {
            let (first, count) = (group * TOGETHER, apart.len() / self.scalars());
            for row in 0..self.rows {
                for column in 0..columns {
                    let from = (row * columns + column) * parts + first;
                    for (part, value) in whole[from..from + count].iter().enumerate() {
                        apart[part * self.scalars() + row * columns + column] = *value;
                    }
                }
            }
        });
        apart
    }

    /// Puts matrices that lie one behind the other, from row `first` on, in place of what is in `rows`, or adds them.
    pub fn put_back(self, apart: &[f32], first: usize, rows: &mut [f32], adds: bool) {
        let (parts, columns) = (self.parts, self.columns);
        let width = (columns * parts).max(1);
        let tile = (ROWS_TILE / width).max(1);
        rows.par_chunks_mut(tile * width)
            .enumerate()
            .for_each(|(index, rows)| {
                for (row, values) in rows.chunks_exact_mut(width).enumerate() {
                    let from = (first + index * tile + row) * columns;
                    for part in 0..parts {
                        let own = &apart[part * self.scalars() + from..][..columns];
                        for (column, value) in own.iter().enumerate() {
                            let place = &mut values[column * parts + part];
                            *place = if adds { *place + value } else { *value };
                        }
                    }
                }
            });
    }
}

/// One of the matrices that a trainable one is dealt to.
#[derive(Clone)]
pub(super) struct Columns {
    pub part: usize,
    pub dealt: Arc<Dealt>,
}

/// A matrix that is dealt, and a copy with its parts apart.
pub(super) struct Dealt {
    pub deal: Deal,
    /// The copy, and the version of the weights that it is of.
    copy: Mutex<Option<(u64, Arc<Vec<f32>>)>>,
}

impl Dealt {
    pub fn new(deal: Deal) -> Self {
        let copy = Mutex::default();
        Self { deal, copy }
    }

    /// The copy, which is made of these weights where it is of another version.
    pub fn apart(&self, version: u64, whole: &[f32]) -> Arc<Vec<f32>> {
        let mut copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, apart)) = &*copy
            && *of == version
        {
            return apart.clone();
        }
        // Gone before the next is made.
        *copy = None;
        let apart = Arc::new(self.deal.apart(whole));
        *copy = Some((version, apart.clone()));
        apart
    }
}

/// Gradients of matrices that are dealt, until those of all parts are there.
#[derive(Default)]
pub(super) struct Unfinished(HashMap<usize, Gathered>);

struct Gathered {
    apart: Vec<f32>,
    missing: usize,
}

impl Unfinished {
    /// Forgets what an abandoned slot has left.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes the gradient of a part of the tensor of this index, and returns those of all, one behind the other, with the last of them.
    pub fn take(&mut self, index: usize, columns: &Columns, gradient: &[f32]) -> Option<Vec<f32>> {
        let deal = columns.dealt.deal;
        let gathered = self.0.entry(index).or_insert_with(|| Gathered {
            apart: vec![0.0; deal.parts * deal.scalars()],
            missing: deal.parts,
        });
        let first = columns.part * deal.scalars();
        gathered.apart[first..first + gradient.len()].copy_from_slice(gradient);
        gathered.missing -= 1;
        match gathered.missing {
            0 => Some(self.0.remove(&index)?.apart),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_put_back_are_the_whole() {
        for (rows, columns, parts) in [(3, 2, 40), (1, 1, 1), (70, 3, 16)] {
            let deal = Deal {
                rows,
                columns,
                parts,
            };
            let whole: Vec<f32> = (0..rows * columns * parts).map(|x| x as f32).collect();
            let apart = deal.apart(&whole);
            // The first row of the last part.
            let last = &apart[(parts - 1) * deal.scalars()..][..columns];
            let expected: Vec<f32> = (1..=columns).map(|n| (n * parts - 1) as f32).collect();
            assert_eq!(last, expected);
            let mut found = vec![1.0; whole.len()];
            let (head, rest) = found.split_at_mut(columns * parts);
            deal.put_back(&apart, 0, head, false);
            deal.put_back(&apart, 1, rest, true);
            let is_right = |(index, (found, whole)): (usize, (&f32, &f32))| {
                let added = if index < columns * parts { 0.0 } else { 1.0 };
                *found == whole + added
            };
            let mut pairs = found.iter().zip(&whole).enumerate();
            assert!(pairs.all(is_right), "{deal:?}");
        }
    }
}
