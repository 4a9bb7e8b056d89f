//! Memory of one decoder layer. In: its widths. Out: bytes of what it keeps and of its operations, in the order in which
//! the engine takes and frees them (`worker/src/engine/cuda/layers/`, `worker/src/engine/model/layers`).

mod experts_on_gpu;
mod gated_on_gpu;
mod own_input;

use std::ops::Range;

use super::{F32, LINEARS, LinearAttention, PROJECTIONS, Shape, Trained, Work};
use own_input::{OwnInput, attended_columns};

/// Rows of an output that a backward pass computes again at a time, for what the magnitudes (DoRA) of its columns need.
pub const AGAIN_ROWS: usize = 1024;
/// Tokens of a chunk of linear attention, at whose borders its state is known.
pub const STATE_TOKENS: usize = 64;

/// On GPUs the rows of each expert are filled up to a multiple of this, so that products of few different shapes are asked for.
pub const EXPERT_ROWS_MULTIPLE: usize = 16;

/// Most rows of all experts on a GPU.
pub fn expert_rows(tokens: usize, per_token: usize, experts: usize) -> usize {
    tokens * per_token + experts * (EXPERT_ROWS_MULTIPLE - 1)
}

/// Widths of one layer and the tokens of one slot; what its functions return are bytes for all these tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer {
    tokens: u64,
    element: u64,
    hidden: u64,
    /// Columns of queries, keys and values together, and of what else is projected beside them.
    qkv: u64,
    /// Columns of queries, keys and values as the attention reads them, of which some may be the same, or another layer's.
    attended: u64,
    /// Columns of what the attention gives.
    queries: u64,
    heads: u64,
    /// Whether what the attention gives goes through a gate.
    output_gate: bool,
    linear: Option<Linear>,
    /// Intermediate size of what every token goes through.
    intermediate: u64,
    experts: Option<Routed>,
    /// Columns of the adapters' low-rank activations, which stand behind the inputs of qkv, output, gate and up, down.
    ranks: [u64; 4],
    /// Those of them that stand behind what a shared expert is weighted by.
    shared_rank: u64,
    own: Option<OwnInput>,
    /// Whether adapters drop inputs, so that masked copies of these are made.
    dropout: bool,
    /// Whether adapted rows have magnitudes.
    magnitudes: bool,
    /// Most columns of one linear among those that read the same input: of queries, keys and values; of gate and up.
    largest: [u64; 2],
    /// Whether what a half of the layer adds goes through buffers of its own first.
    adds_apart: bool,
    /// Whether it is normed.
    norms_behind: bool,
    place: Place,
}

/// The experts of a layer, of which a token goes through a few.
#[derive(Clone, Copy, Debug)]
struct Routed {
    count: u64,
    per_token: u64,
    width: u64,
    /// Ranks of the adapters on gate and up together, on down, and on the router.
    ranks: [u64; 3],
    /// Whether they are trained.
    learns: bool,
}

/// What a layer of linear attention computes between its projections, in float32.
#[derive(Clone, Copy, Debug)]
struct Linear {
    /// Columns of queries, keys and values behind the convolution.
    convolved: u64,
    heads: u64,
    key_heads: u64,
    /// Scalars of the states of all heads.
    state: u64,
    /// Borders between the chunks of a slot's blocks, as if each block were one text.
    borders: u64,
}

impl Linear {
    fn new(sizes: &LinearAttention, work: &Work) -> Self {
        let chunks = work.sequence_len.div_ceil(STATE_TOKENS);
        Self {
            convolved: sizes.convolved() as u64,
            heads: sizes.value_heads as u64,
            key_heads: sizes.key_heads as u64,
            state: (sizes.values() * sizes.key_dim) as u64,
            borders: (work.batch * chunks.saturating_sub(1)) as u64,
        }
    }
}

/// Whether the engine computes on a GPU or on the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Gpu,
    Processor,
}

impl Layer {
    /// All layers of a model. LoRA ranks are padded to `multiple`; `element` is the bytes of the engine's element type.
    pub fn all(
        shape: &Shape,
        work: &Work,
        element: u64,
        multiple: usize,
        place: Place,
    ) -> Vec<Self> {
        let none = [0; LINEARS];
        let (dropout, magnitudes, ranks, of_experts) = match &work.trained {
            Trained::All | Trained::Some(_) => (false, false, None, &[][..]),
            Trained::Adapters {
                dropout,
                magnitudes,
                ranks,
                experts,
                ..
            } => (*dropout, *magnitudes, Some(ranks), &experts[..]),
        };
        (0..shape.layers)
            .map(|layer| {
                let [
                    q,
                    k,
                    v,
                    fourth,
                    o,
                    gate,
                    up,
                    down,
                    shared,
                    own_gate,
                    own_output,
                ] = ranks
                    .and_then(|all| all.get(layer))
                    .unwrap_or(&none)
                    .map(|rank| rank.next_multiple_of(multiple) as u64);
                let linear = shape.linear_attention_of(layer);
                let linears = shape.linears(layer);
                let outs = linears[PROJECTIONS[0].clone()].iter();
                let qkv: usize = outs.map(|(_, out, _)| *out).sum();
                Self {
                    tokens: work.tokens(),
                    element,
                    hidden: shape.hidden_size as u64,
                    qkv: qkv as u64,
                    attended: attended_columns(shape, layer, qkv) as u64,
                    queries: linear.map_or(shape.queries(layer), LinearAttention::values) as u64,
                    heads: match linear {
                        None => shape.heads as u64,
                        Some(_) => 0,
                    },
                    output_gate: shape.output_gate && linear.is_none(),
                    linear: linear.map(|sizes| Linear::new(sizes, work)),
                    intermediate: shape.inner_size(layer) as u64,
                    experts: shape.experts_of(layer).map(|experts| Routed {
                        count: experts.count as u64,
                        per_token: experts.per_token as u64,
                        width: experts.width as u64,
                        ranks: of_experts.get(layer).map_or([0; 3], |ranks| {
                            ranks.map(|rank| rank.next_multiple_of(2) as u64)
                        }),
                        learns: !matches!(work.trained, Trained::Adapters { .. }),
                    }),
                    ranks: [q + k + v + fourth, o, gate + up + shared, down],
                    shared_rank: shared,
                    own: shape.layer_inputs.map(|inputs| OwnInput {
                        width: inputs.width as u64,
                        ranks: [own_gate, own_output],
                    }),
                    dropout,
                    magnitudes,
                    largest: {
                        let of = |slots: &Range<usize>| {
                            linears[slots.clone()]
                                .iter()
                                .map(|(_, out, _)| *out as u64)
                                .max()
                        };
                        [&PROJECTIONS[0], &PROJECTIONS[2]].map(|slots| of(slots).unwrap_or(0))
                    },
                    adds_apart: shape.adds_apart,
                    norms_behind: shape.norms_behind,
                    place,
                }
            })
            .collect()
    }

    /// Bytes of free buffers that stay in the processor's pool where layers of two kinds follow each other, because those of one kind
    /// fit the other badly: about half of what the smaller kind takes between its projections.
    pub fn left_over(layers: &[Self]) -> u64 {
        let largest = |is_linear: bool| {
            let kind = layers.iter();
            let kind = kind.filter(|layer| layer.linear.is_some() == is_linear);
            kind.map(Self::backward_to_qkv).max().unwrap_or(0)
        };
        largest(true).min(largest(false)) / 2
    }

    /// Bytes of so many columns in the engine's element type.
    fn narrow(&self, columns: u64) -> u64 {
        self.tokens * columns * self.element
    }

    /// Bytes of so many columns in float32.
    fn wide(&self, columns: u64) -> u64 {
        self.tokens * columns * F32
    }

    /// Bytes of an input gradient of a projection, which processors sum in float32.
    fn summed(&self, columns: u64) -> u64 {
        match self.place {
            Place::Gpu => self.narrow(columns),
            Place::Processor => self.wide(columns),
        }
    }

    /// Bytes of a masked copy of a projection's inputs, made on GPUs only.
    fn masked(&self, columns: u64, rank: u64) -> u64 {
        match (self.dropout && rank > 0, self.place) {
            (true, Place::Gpu) => self.narrow(columns),
            _ => 0,
        }
    }

    /// Bytes of outputs that magnitudes need once more, of a linear with so many columns.
    fn again(&self, largest: u64, rank: u64) -> u64 {
        match self.magnitudes && rank > 0 {
            true => self.tokens.min(AGAIN_ROWS as u64) * largest * F32,
            false => 0,
        }
    }

    /// Bytes of a copy of an output's gradient that magnitudes scale.
    fn gained(&self, columns: u64, rank: u64) -> u64 {
        match self.magnitudes && rank > 0 {
            true => self.narrow(columns),
            false => 0,
        }
    }

    /// Bytes that a forward pass takes for magnitudes: where inputs are dropped, one that they are left out of and what the gains add.
    fn gaining(&self, width: u64, largest: u64, rank: u64) -> u64 {
        match self.magnitudes && self.dropout && rank > 0 {
            true => self.narrow(width) + self.again(largest, rank),
            false => 0,
        }
    }

    /// Bytes that a half's result takes on processors before it is added, and its gradient: as it is and normed.
    fn apart(&self) -> u64 {
        match (self.adds_apart, self.place) {
            (true, Place::Processor) => 3 * self.wide(self.hidden),
            _ => 0,
        }
    }

    /// Bytes that a half's result takes on GPUs where it is normed before it is added.
    fn result(&self) -> u64 {
        match (self.norms_behind, self.place) {
            (true, Place::Gpu) => self.wide(self.hidden),
            _ => 0,
        }
    }

    /// Bytes of the residual that the layer reads.
    pub fn input(&self) -> u64 {
        self.wide(self.hidden)
    }

    fn context(&self) -> u64 {
        match self.is_gated_on_gpu() {
            true => self.narrow(self.queries),
            false => self.narrow(self.queries + self.ranks[1]),
        }
    }

    fn gate_up(&self) -> u64 {
        self.narrow(2 * self.intermediate)
    }

    /// Bytes of the activations that the backward pass needs beside the layer's input.
    pub fn inner(&self) -> u64 {
        let low_rank = match self.place {
            Place::Gpu => 0,
            // Beside their projections' inputs, not behind them.
            Place::Processor => self.narrow(self.ranks[0] + self.ranks[2]),
        };
        let own = self.own_inner();
        self.attended() + self.wide(self.hidden) + self.gate_up() + self.routed() + low_rank + own
    }

    /// Bytes of what experts keep: gate and up of each of a token's experts, and the probabilities of all; and with a shared expert
    /// what it is weighted by.
    fn routed(&self) -> u64 {
        let Some(experts) = self.experts else {
            return 0;
        };
        if self.place == Place::Gpu {
            return self.kept_of_experts(experts);
        }
        let is_shared = u64::from(self.intermediate > 0);
        self.narrow(2 * experts.per_token * experts.width) + self.wide(experts.count + is_shared)
    }

    /// Bytes that experts take on processors beside the rest of a layer's pass, as if one of them had all tokens: what it reads, and
    /// what goes into and comes out of its last layer, or the gradients of all of these; and which tokens are whose.
    fn routing(&self) -> u64 {
        let Some(experts) = self.experts else {
            return 0;
        };
        let group = self.narrow(2 * self.hidden + 3 * experts.width)
            + self.wide(2 * self.hidden + experts.width);
        let routes = 5 * F32 * experts.per_token * self.tokens;
        group + routes + 2 * self.wide(experts.count) + self.routed_adapters(experts)
    }

    /// Bytes that the adapters of one expert and of the router take, as if it had all tokens: low-rank activations and their gradient, each as they are
    /// and turned, and the factors as they are multiplied, beside the gradients of both; and the gradients of B of all experts, which
    /// wait for each other.
    fn routed_adapters(&self, experts: Routed) -> u64 {
        let [gate_up, down, router] = experts.ranks;
        let (inner, hidden) = (experts.width, self.hidden);
        let factors = gate_up * (hidden + 2 * inner) + down * (inner + hidden);
        let waiting = experts.count * (gate_up * 2 * inner + down * hidden) * F32;
        4 * self.narrow(gate_up + down + router) + factors * (self.element + 2 * F32) + waiting
    }

    fn experts_on_gpu(&self) -> Option<Routed> {
        self.experts.filter(|_| self.place == Place::Gpu)
    }

    /// Bytes of the attention activations saved for backward: qkv, context, log-sum-exp.
    fn attended(&self) -> u64 {
        self.narrow(self.qkv) + self.context() + self.wide(self.heads)
    }

    /// Bytes that a forward pass takes between the projections: queries and keys once they are rotated, and the values beside them; or
    /// what linear attention reads and what it gives.
    fn mixing(&self) -> u64 {
        if self.is_gated_on_gpu() {
            return self.mixing_on_gpu();
        }
        match self.linear {
            None => self.narrow(self.attended),
            Some(linear) => {
                self.wide(linear.convolved + 2 * linear.heads) + self.narrow(self.queries)
            }
        }
    }

    /// Bytes that a backward pass takes between the projections of linear attention: what the forward pass read, once more, the
    /// gradients, and the states at the borders of chunks, as if those of all heads were there at once.
    fn mixing_back(&self, linear: Linear) -> u64 {
        let chunks = self.tokens.div_ceil(STATE_TOKENS as u64);
        let d_qkv = self.narrow(self.qkv + self.ranks[0]);
        d_qkv + 2 * self.wide(linear.convolved + 2 * linear.heads) + chunks * linear.state * F32
    }

    /// Peak bytes of computing the activations of [`Self::inner`], these included.
    pub fn open(&self) -> u64 {
        let [qkv_rank, _, gate_rank, _] = self.ranks;
        let [qkv_largest, gate_largest] = self.largest;
        let masked =
            self.masked(self.hidden, qkv_rank) + self.gaining(self.hidden, qkv_largest, qkv_rank);
        let reading = self.narrow(self.hidden + qkv_rank) + masked;
        let projecting = self.narrow(self.qkv) + reading.max(self.apart_on_gpu());
        let adding = self.wide(self.hidden) + self.result();
        let adding = match self.is_gated_on_gpu() {
            true => self.opening(adding),
            false => adding,
        };
        let attending = self.attended() + self.mixing().max(adding);
        let masked = self.masked(self.hidden, gate_rank)
            + self.gaining(self.hidden, gate_largest, gate_rank);
        let gating = match self.experts_on_gpu() {
            Some(experts) => self.attended() + self.wide(self.hidden) + self.open_experts(experts),
            None => {
                let reading = self.narrow(self.hidden + gate_rank) + masked;
                self.inner() + reading + self.routing()
            }
        };
        projecting.max(attending).max(gating)
    }

    /// Peak bytes of the layer's forward pass, its input not counted.
    pub fn forward(&self) -> u64 {
        let rank = self.ranks[3];
        let masked = self.masked(self.intermediate, rank)
            + self.gaining(self.intermediate, self.hidden, rank);
        let adding = self.wide(self.hidden) + self.result();
        let closing = match self.experts_on_gpu() {
            Some(experts) => self.close_experts(experts),
            None => self.narrow(self.intermediate + rank) + masked.max(adding) + self.routing(),
        };
        let mixing = self.inner() + self.own_mixing();
        (self.open().max(self.inner() + closing) + self.apart()).max(mixing)
    }

    /// Peak bytes of the layer's backward pass beside its input, [`Self::inner`] and the residual's gradient. The inner
    /// activations are freed on the way.
    pub fn backward(&self) -> u64 {
        let [qkv_rank, _, gate_rank, _] = self.ranks;
        let [qkv_largest, gate_largest] = self.largest;
        let (to_gate_up, to_middle) = match self.experts_on_gpu() {
            Some(experts) => (self.backward_experts(experts), 0),
            None => {
                let gates = self.narrow(2 * self.intermediate + gate_rank);
                let columns = 2 * self.intermediate;
                let to_middle = gates + self.backward_to_norm(gate_rank, columns, gate_largest);
                (self.backward_to_gate_up() + self.routing(), to_middle)
            }
        };
        let to_qkv = self.backward_to_qkv();
        let qkv = self.narrow(self.qkv + qkv_rank);
        let to_input = qkv + self.backward_to_norm(qkv_rank, self.qkv, qkv_largest);
        let freed = match self.place {
            Place::Gpu => [
                self.gate_up(),
                self.gate_up() + self.routed() + self.wide(self.hidden),
                self.inner(),
            ],
            Place::Processor => [0, self.gate_up(), self.gate_up()],
        };
        let later = [to_middle, to_qkv, to_input].into_iter().zip(freed);
        let later = later.map(|(bytes, freed)| bytes.saturating_sub(freed));
        (later.fold(to_gate_up, u64::max) + self.apart()).max(self.own_mixing())
    }

    fn backward_to_gate_up(&self) -> u64 {
        let [_, _, gate_rank, rank] = self.ranks;
        let dy = self.narrow(self.hidden + rank);
        let dh = self.summed(self.intermediate);
        let masked = self.masked(self.intermediate, rank);
        let h = self.narrow(self.intermediate + rank);
        let d_gate_up = self.narrow(2 * self.intermediate + gate_rank);
        match self.place {
            Place::Gpu => {
                let back = dy + (dh + (2 * masked).max(d_gate_up + h)).max(d_gate_up + h + masked);
                // What a norm reads is computed again before.
                match self.result() {
                    0 => back,
                    result => back.max(h + masked.max(result)).max(result + dy),
                }
            }
            Place::Processor => dy + dh + d_gate_up + h + self.again(self.hidden, rank),
        }
    }

    /// Bytes of going backward through a projection whose inputs have adapters of `rank`, to the norm before it. It has so many
    /// columns, and its largest linear as many as `largest`.
    fn backward_to_norm(&self, rank: u64, columns: u64, largest: u64) -> u64 {
        let masked = self.masked(self.hidden, rank);
        let through = match masked {
            0 => 0,
            _ => 2 * self.wide(self.hidden),
        };
        let normed = self.narrow(self.hidden + rank) + masked + self.again(largest, rank);
        self.wide(self.hidden) + through.max(normed).max(self.gained(columns, rank))
    }

    fn backward_to_qkv(&self) -> u64 {
        if self.is_gated_on_gpu() {
            return self.backward_gated_on_gpu();
        }
        let rank = self.ranks[1];
        let (d_context, d_rotated) = (self.summed(self.queries), self.summed(self.attended));
        let masked = 2 * self.masked(self.queries, rank);
        let scaling = self
            .gained(self.hidden, rank)
            .max(self.again(self.hidden, rank));
        let projecting = self.narrow(self.hidden + rank) + (masked + scaling).max(self.result());
        if let Some(linear) = self.linear {
            let context = self.narrow(self.queries);
            return d_context + (projecting + context).max(self.mixing_back(linear));
        }
        // What was projected, taken apart, and its gradient.
        let gate = match self.output_gate {
            true => self.narrow(self.queries + self.qkv),
            false => 0,
        };
        let rotated = self.narrow(self.attended) + self.wide(self.heads);
        let d_qkv = self.narrow(self.qkv + self.ranks[0]);
        let back = match self.place {
            // The context and its gradient are gone by then.
            Place::Gpu => (d_rotated + d_qkv).saturating_sub(self.context()),
            Place::Processor => d_context + d_rotated + d_qkv,
        };
        (d_context + projecting.max(d_rotated + rotated)).max(back) + gate
    }
}
