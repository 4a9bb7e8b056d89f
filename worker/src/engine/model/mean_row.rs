//! What the rows of new tokens begin as: the mean of all rows that the model has.

use rayon::prelude::*;

use crate::engine::ops::element::Element;

/// Columns that are summed in one task.
const COLUMNS: usize = 16;

/// The mean of rows, summed in float64 from the first row to the last, a part after the other.
pub struct MeanRow {
    sums: Vec<f64>,
    rows: usize,
}

impl MeanRow {
    pub fn new(width: usize) -> Self {
        Self {
            sums: vec![0.0; width],
            rows: 0,
        }
    }

    /// Adds whole rows.
    pub fn add<E: Element>(&mut self, rows: &[E]) {
        let width = self.sums.len().max(1);
        let tiles = self.sums.par_chunks_mut(COLUMNS).enumerate();
        tiles.for_each(|(tile, sums)| {
            let first = tile * COLUMNS;
            for row in rows.chunks_exact(width) {
                for (sum, x) in sums.iter_mut().zip(&row[first..]) {
                    *sum += f64::from(x.wide());
                }
            }
        });
        self.rows += rows.len() / width;
    }

    /// Writes the mean to one row.
    pub fn write<E: Element>(&self, row: &mut [E]) {
        let rows = self.rows.max(1) as f64;
        for (out, sum) in row.iter_mut().zip(&self.sums) {
            *out = E::round_from((sum / rows) as f32);
        }
    }
}

/// Fills each new row with the mean of the known ones.
pub fn fill_with_mean<E: Element>(known: &[E], new: &mut [E], width: usize) {
    let mut mean = MeanRow::new(width);
    mean.add(known);
    for row in new.chunks_exact_mut(width.max(1)) {
        mean.write(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_has_the_same_bits_however_the_rows_are_parted() {
        let width = 21;
        let known: Vec<f32> = (0..width * 9)
            .map(|index| ((index * 37 % 101) as f32 / 7.0).sin() * 1e3)
            .collect();
        let mut whole = vec![0.0f32; 2 * width];
        fill_with_mean(&known, &mut whole, width);
        assert_eq!(whole[..width], whole[width..]);
        let mut parted = MeanRow::new(width);
        for rows in known.chunks(4 * width) {
            parted.add(rows);
        }
        let mut mean = vec![0.0f32; width];
        parted.write(&mut mean);
        assert_eq!(mean, whole[..width]);
        let first = (0..9).map(|row| f64::from(known[row * width])).sum::<f64>() / 9.0;
        assert_eq!(mean[0], first as f32);
    }
}
