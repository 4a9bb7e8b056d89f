//! The rank of each linear's adapter, and the factor on what it computes.

use super::adapter_shape::{AdapterShape, Compiled};

/// Ranks and scales of an adapter by the path of the linear that it is on; its patterns are compiled once for all of them.
pub struct AdapterSizes {
    r: usize,
    alpha: f64,
    use_rslora: bool,
    /// Whether each adapter has a second half that is not trained.
    is_doubled: bool,
    ranks: Compiled<usize>,
    alphas: Compiled<f64>,
}

impl AdapterSizes {
    pub fn new(r: usize, alpha: f64, use_rslora: bool, shape: &AdapterShape) -> Self {
        Self {
            r,
            alpha,
            use_rslora,
            is_doubled: false,
            ranks: Compiled::new(&shape.ranks),
            alphas: Compiled::new(&shape.alphas),
        }
    }

    /// Those of adapters with a second half that is not trained, where this says what the first is.
    pub fn doubled(self, is_doubled: bool) -> Self {
        Self { is_doubled, ..self }
    }

    /// Rank of the adapter of the linear of this path.
    pub fn rank(&self, path: &str) -> usize {
        self.trained_rank(path) * if self.is_doubled { 2 } else { 1 }
    }

    /// Number of the first rows of A and columns of B that are trained, of the adapter of the linear of this path.
    pub fn trained_rank(&self, path: &str) -> usize {
        self.ranks.first_that_fits(path).unwrap_or(self.r)
    }

    /// Factor on the output `B A x` of the adapter of the linear of this path.
    pub fn scale(&self, path: &str) -> f64 {
        let alpha = self.alphas.first_that_fits(path).unwrap_or(self.alpha);
        scale(self.trained_rank(path), alpha, self.use_rslora)
    }
}

/// Factor on the output `B A x` of an adapter.
pub(super) fn scale(rank: usize, alpha: f64, use_rslora: bool) -> f64 {
    let rank = rank as f64;
    alpha / if use_rslora { rank.sqrt() } else { rank }
}
