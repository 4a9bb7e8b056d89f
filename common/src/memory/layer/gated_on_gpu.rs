//! Memory of the first half of a layer on a GPU where a gate stands before its output layer, in attention or in linear attention: what
//! the output layer reads is not kept, but made again. Bytes in the order in which the engine takes and frees them
//! (`worker/src/engine/cuda/layers/attention.rs`, `gated_delta_net.rs` beside it).

use super::{F32, Layer, Linear, Place, STATE_TOKENS};

impl Layer {
    /// Whether what the output layer reads is made of what is kept, in memory of its own.
    pub(super) fn is_gated_on_gpu(&self) -> bool {
        self.place == Place::Gpu && (self.output_gate || self.linear.is_some())
    }

    /// Bytes of what was projected once it is taken apart, beside it.
    pub(super) fn apart_on_gpu(&self) -> u64 {
        match (self.output_gate, self.place) {
            (true, Place::Gpu) => self.narrow(self.qkv),
            _ => 0,
        }
    }

    /// Bytes of what the output layer reads, and of a masked copy.
    fn opened(&self) -> u64 {
        let rank = self.ranks[1];
        self.narrow(self.queries + rank) + self.masked(self.queries, rank)
    }

    /// Bytes of what the output layer reads beside what it adds, of so many bytes.
    pub(super) fn opening(&self, adding: u64) -> u64 {
        let opened = self.narrow(self.queries + self.ranks[1]);
        opened + adding.max(self.masked(self.queries, self.ranks[1]))
    }

    /// Bytes that a forward pass takes between the projections.
    pub(super) fn mixing_on_gpu(&self) -> u64 {
        match self.linear {
            Some(linear) => self.prepared(linear),
            None => self.narrow(self.qkv - self.queries),
        }
    }

    /// Bytes of what the rule reads, of lengths of queries and keys, and of what the rows of a chunk have to do with each other, twice.
    fn prepared(&self, linear: Linear) -> u64 {
        let pairs = 2 * linear.heads * STATE_TOKENS as u64;
        self.wide(linear.convolved + 3 * linear.heads + 2 * linear.key_heads + pairs)
    }

    /// Peak bytes of going back from the residual's gradient to that of what was projected, beside what was kept, some of which is freed
    /// on the way.
    pub(super) fn backward_gated_on_gpu(&self) -> u64 {
        let dy = self.narrow(self.hidden + self.ranks[1]);
        let masked = self.masked(self.queries, self.ranks[1]);
        let Some(linear) = self.linear else {
            let d_context = self.narrow(self.queries);
            let opening = dy + (2 * masked).max(self.opened()).max(self.result());
            // The gates are gone by then, and have gradients in their place.
            let rotated = 2 * self.narrow(self.qkv - self.queries) + self.wide(self.heads);
            let mixing = rotated.max(self.narrow(self.queries));
            // So are the context, and queries, keys and values.
            let joined = self.narrow(self.qkv + self.ranks[0]);
            let joined = joined.saturating_sub(self.narrow(self.queries));
            return (d_context + opening.max(mixing)).max(joined);
        };
        let d_read = self.wide(self.queries);
        let through = match masked {
            0 => 0,
            _ => 2 * self.wide(self.queries),
        };
        let opening = dy + through.max(self.opened()).max(self.result());
        let d_projected = self.narrow(self.qkv + self.ranks[0]);
        let gradients = self.wide(linear.convolved + 2 * linear.heads);
        let states = 2 * linear.borders * linear.state * F32;
        let rule = self.prepared(linear) + self.wide(self.queries) + states + gradients;
        // What was read is gone by then.
        let mixing = (d_projected + rule).saturating_sub(self.narrow(self.queries));
        d_read + opening.max(mixing)
    }
}
