//! Memory of a layer of experts on a GPU, where the rows of all experts are there at once: bytes in the order in which the engine takes
//! and frees them (`worker/src/engine/cuda/layers/experts.rs`, `shared_expert.rs` beside it).

use super::{F32, Layer, Routed, expert_rows};

/// Sizes of the rows of all experts.
#[derive(Clone, Copy, Debug)]
struct Rows {
    experts: Routed,
    rows: u64,
    element: u64,
}

impl Rows {
    fn narrow(&self, columns: u64) -> u64 {
        self.rows * columns * self.element
    }

    fn wide(&self, columns: u64) -> u64 {
        self.rows * columns * F32
    }

    /// Bytes of gates and ups, or of their gradients.
    fn gate_up(&self) -> u64 {
        self.narrow(2 * self.experts.width)
    }
}

impl Layer {
    fn rows(&self, experts: Routed) -> Rows {
        let [tokens, per_token, count] =
            [self.tokens, experts.per_token, experts.count].map(|size| size as usize);
        Rows {
            experts,
            rows: expert_rows(tokens, per_token, count) as u64,
            element: self.element,
        }
    }

    /// Bytes of which rows are whose: token, expert and weight of each; rows and experts of each token.
    fn routes(&self, rows: Rows) -> u64 {
        rows.wide(3) + self.wide(2 * rows.experts.per_token)
    }

    /// Bytes of what experts keep of a pass, but for what a shared one's gates and ups take.
    pub(super) fn kept_of_experts(&self, experts: Routed) -> u64 {
        let rows = self.rows(experts);
        let is_shared = u64::from(self.intermediate > 0);
        self.routes(rows) + rows.gate_up() + self.wide(experts.count + is_shared)
    }

    /// Peak bytes of computing what experts keep, this included.
    pub(super) fn open_experts(&self, experts: Routed) -> u64 {
        let rows = self.rows(experts);
        let routed = self.routes(rows) + self.wide(experts.count);
        let gathered = rows.narrow(self.hidden) + rows.gate_up();
        let through_experts = self.narrow(self.hidden) + routed + gathered.max(experts.count * F32);
        if self.intermediate == 0 {
            return through_experts;
        }
        let kept = routed + rows.gate_up() + self.gate_up();
        let reading = |rank| self.narrow(self.hidden + rank) + self.masked(self.hidden, rank);
        let gates = kept + reading(self.gate_up_rank());
        let weights = kept + self.wide(1) + reading(self.shared_rank);
        through_experts.max(gates).max(weights)
    }

    /// Peak bytes of the rest of the forward pass, beside what is kept.
    pub(super) fn close_experts(&self, experts: Routed) -> u64 {
        let rows = self.rows(experts);
        let y = self.wide(self.hidden);
        let results = rows.wide(self.hidden);
        let through_experts = results + rows.narrow(experts.width).max(y);
        through_experts.max(y + self.shared_results())
    }

    /// Bytes of what a shared expert gives, and what its last layer reads; none where there is no such expert.
    fn shared_results(&self) -> u64 {
        let rank = self.ranks[3];
        match self.intermediate {
            0 => 0,
            inner => {
                let masked = self.masked(inner, rank);
                self.narrow(inner + rank) + masked.max(self.wide(self.hidden))
            }
        }
    }

    /// Peak bytes of the backward pass to what experts read, beside what was kept, some of which is freed on the way.
    pub(super) fn backward_experts(&self, experts: Routed) -> u64 {
        let rows = self.rows(experts);
        let (width, d_weights, d_normed) = (experts.width, rows.wide(1), self.wide(self.hidden));
        let to_gates =
            rows.narrow(self.hidden + width) + rows.wide(width) + rows.gate_up() + d_weights;
        // From here on the gradients of gates and ups have the place of these.
        let through = d_weights + d_normed;
        let to_read = through + rows.wide(self.hidden);
        let learning = match experts.learns {
            true => through + self.narrow(self.hidden) + rows.narrow(self.hidden),
            false => 0,
        };
        let routing = through + self.narrow(experts.count) + self.wide(self.hidden);
        let routing = routing.saturating_sub(rows.gate_up());
        let freed = rows.gate_up() + self.routes(rows) + self.wide(experts.count);
        let shared = (d_normed + self.backward_shared()).saturating_sub(freed);
        [to_read, learning, routing, shared]
            .into_iter()
            .fold(to_gates, u64::max)
    }

    /// Peak bytes of going backward through a shared expert, beside what it kept; none where there is no such expert.
    fn backward_shared(&self) -> u64 {
        let (inner, down_rank) = (self.intermediate, self.ranks[3]);
        if inner == 0 {
            return 0;
        }
        let rank = self.gate_up_rank();
        let d_gate = self.narrow(1 + self.shared_rank);
        let d_gate_up = self.narrow(2 * inner + rank);
        let masked = self.masked(inner, down_rank);
        let h = self.narrow(inner + down_rank);
        let dy = self.narrow(self.hidden + down_rank);
        let back = dy + masked.max(self.narrow(inner) + (2 * masked).max(d_gate_up));
        let to_gates = d_gate + (h + back).max(self.shared_results());
        let masked = self.masked(self.hidden, rank);
        let summed = match masked {
            0 => self.wide(self.hidden),
            _ => 3 * self.wide(self.hidden),
        };
        let to_read = d_gate + d_gate_up + summed.max(self.narrow(self.hidden + rank) + masked);
        let freed = self.gate_up() + self.wide(1);
        to_gates.max(to_read.saturating_sub(freed))
    }

    /// Columns of the low-rank activations that stand behind what a shared expert's gate and up read.
    fn gate_up_rank(&self) -> u64 {
        self.ranks[2] - self.shared_rank
    }
}
