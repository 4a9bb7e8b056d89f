//! Memory of what a layer of Gemma 4 has beside attention and feed-forward: an input of its own of each token, and keys and values that
//! are not all projected in it.

use super::{Layer, Shape};

/// What a layer has of a token beside the residual.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnInput {
    pub width: u64,
    /// Ranks of the adapters on its gate and its output.
    pub ranks: [u64; 2],
}

/// Columns of queries, keys and values as the attention of a layer reads them, where it projects so many.
pub(super) fn attended_columns(shape: &Shape, layer: usize, projected: usize) -> usize {
    let own = shape.layer_sizes.get(layer);
    own.map_or(projected, |sizes| {
        (shape.heads + 2 * sizes.key_value_heads) * sizes.head_dim
    })
}

impl Layer {
    /// Bytes that are kept for the layer's own input: the residual that it is mixed into, and its gate.
    pub(super) fn own_inner(&self) -> u64 {
        self.own.map_or(0, |own| {
            self.wide(self.hidden) + self.narrow(own.width + own.ranks[0])
        })
    }

    /// Bytes that mixing it in takes, or going backward through that.
    pub(super) fn own_mixing(&self) -> u64 {
        self.own.map_or(0, |own| {
            let [gate, output] = own.ranks;
            let gates = self.narrow(6 * own.width + gate + output) + self.wide(2 * own.width);
            gates + self.narrow(2 * self.hidden) + 3 * self.wide(self.hidden)
        })
    }
}
