//! The sizes of a model, and of the work on it.

use std::ops::Range;

use crate::job::{BaseDtype, Optimizer, Quantization, Reduction, TrainedBiases};

/// Bytes of a float32.
pub(crate) const F32: u64 = 4;

/// The sizes of a decoder, as its `config.json` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    /// Whether the output layer is the embedding.
    pub tied: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub fused: Fused,
    /// Number of weights of the norm of queries in a layer, and of that of keys.
    pub head_norms: [usize; 2],
    /// Number of other norms in a layer.
    pub layer_norms: usize,
    /// Whether what a layer's halves add goes through buffers of its own first: it is normed, or multiplied.
    pub adds_apart: bool,
    /// Whether what a layer's halves add is normed.
    pub norms_behind: bool,
    /// The windows that layers have, each once.
    pub windows: Vec<usize>,
    /// Number of cosines and sines of a position, in all rotary tables.
    pub rotary: usize,
    /// Number of a layer's logits that stand for no token.
    pub sinks: usize,
    /// The experts of a mixture of experts.
    pub experts: Option<Experts>,
    /// Whether queries come with a gate of what the attention gives, which makes them twice as wide.
    pub output_gate: bool,
    /// The layers that have linear attention, where some do.
    pub linear_attention: Option<LinearAttention>,
    /// What the sizes of each layer are, where they differ; empty where all layers have those above.
    pub layer_sizes: Vec<LayerSizes>,
    /// What layers have of each token beside the residual.
    pub layer_inputs: Option<LayerInputs>,
}

/// Sizes in which the layers of a model may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSizes {
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub key_values: KeyValues,
    pub intermediate_size: usize,
}

/// Where a layer has the keys and values of its attention from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyValues {
    /// Two projections.
    Apart,
    /// One projection: values are what keys are before they are normed and rotated.
    Same,
    /// The layer of that number, which comes before it: they are its keys and values.
    Of(usize),
}

/// Sizes of what each layer has of a token beside the residual (per-layer embeddings of Gemma 4): a row of an embedding of its own, and
/// what the model projects of the token's embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerInputs {
    /// Columns of one layer's.
    pub width: usize,
    /// Rows of the embedding, which has the columns of all layers.
    pub vocabulary: usize,
}

/// Sizes of layers of linear attention (gated DeltaNet), which have a state of fixed size in place of keys and values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearAttention {
    /// Heads of queries, and of keys.
    pub key_heads: usize,
    /// Heads of values, each with a state; a multiple of the key heads.
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Tokens that the convolution before them reads, the token itself among them.
    pub kernel: usize,
    /// For each layer, whether it is one of them.
    pub layers: Vec<bool>,
    /// Whether what it reads goes through two linears: queries, keys, values and the gate of the output, and both gates of the rule;
    /// each key head's columns lie together. Else through four.
    pub is_grouped: bool,
}

impl LinearAttention {
    /// Columns of each linear that reads its input, 0 where there is none.
    pub fn projected(&self) -> [usize; 4] {
        let [qkv, z, gate] = [self.convolved(), self.values(), self.value_heads];
        match self.is_grouped {
            true => [qkv + z, 2 * gate, 0, 0],
            false => [qkv, z, gate, gate],
        }
    }

    /// Columns of queries, keys and values together, which a convolution goes over.
    pub fn convolved(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }

    /// Columns of the values, of what is computed of them, and of its gate.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Sizes of what a layer has beside its linears and norms of the residual: the convolution, the norm of a head's result, and two
    /// numbers of each value head.
    pub fn vectors(&self) -> [usize; 4] {
        [
            self.convolved() * self.kernel,
            self.value_dim,
            self.value_heads,
            self.value_heads,
        ]
    }
}

/// Sizes of a mixture of experts: feed-forward networks of which every token goes through a few.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    pub count: usize,
    /// Number of experts that a token goes through.
    pub per_token: usize,
    /// Intermediate size of an expert.
    pub width: usize,
    /// Intermediate size of the expert that every token goes through besides, if there is one.
    pub shared: Option<usize>,
    /// For each layer, whether it has experts; a layer without is dense.
    pub layers: Vec<bool>,
    /// Whether a layer's experts are fused tensors; these have biases, and so has the router.
    pub biased: bool,
    /// Whether they stand beside a dense half (Gemma 4): their router is one of the layer's linears, and it and they have norms and
    /// scales of their own.
    pub beside_dense: bool,
}

impl Experts {
    /// Number of scalars that a layer has of norms and scales for experts beside a dense half: norms of both halves' results and of what
    /// experts read, and scales of what the router reads and of what each expert gives.
    pub(super) fn vectors_beside(&self, hidden: usize) -> [usize; 5] {
        match self.beside_dense {
            true => [hidden, hidden, hidden, hidden, self.count],
            false => [0; 5],
        }
    }

    /// What one expert of each of the parameters that a layer has its experts in reads and gives: gate and up together, and down.
    pub(super) fn parameters(&self, hidden: usize) -> [(usize, usize); 2] {
        [(hidden, 2 * self.width), (self.width, hidden)]
    }
}

/// Number of linears of a decoder layer: queries, keys, values, one more that reads what these do, attention output, gate, up, down,
/// what a shared expert is weighted by, and the gate and the output of what the layer has of a token beside the residual. Each has
/// its slot in this order. A layer of experts has those of its shared expert as gate, up and down; one of linear attention has as its
/// first four queries, keys and values in one, the gate of its output, and what is written of a token and what is kept of those
/// before; or as its first two the first of these in one, and the others.
pub const LINEARS: usize = 11;

/// Slots of the linears that read the same input, and whose results lie side by side: queries, keys and values; attention output;
/// gate and up; down; what a shared expert is weighted by; the gate of a layer's own input; its output.
pub const PROJECTIONS: [Range<usize>; 7] = [0..4, 4..5, 5..7, 7..8, 8..9, 9..10, 10..11];

/// Which linears that read the same input are one matrix. It has the first of their slots, and nothing is in the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fused {
    /// Queries, keys and values.
    pub qkv: bool,
    /// Gate and up.
    pub gate_up: bool,
}

impl Fused {
    pub const NONE: Self = Self {
        qkv: false,
        gate_up: false,
    };
}

/// Which weights are trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Trained {
    All,
    /// Some of the model's own tensors.
    Some(Vec<OwnTensor>),
    Adapters {
        /// Whether there is dropout on the adapters' inputs.
        dropout: bool,
        /// Whether adapted rows have magnitudes (DoRA).
        magnitudes: bool,
        /// Which biases of the model are trained.
        biases: TrainedBiases,
        /// Whether factors B have biases.
        lora_bias: bool,
        /// For each layer, the ranks of the adapters on its linears, 0 for none.
        ranks: Vec<[usize; LINEARS]>,
        /// For each layer, the ranks of the adapters on the parameters of its experts: gates and ups together, downs, and their router.
        experts: Vec<[usize; 3]>,
        /// What of the embedding and the output layer is trained beside them.
        tokens: Tokens,
    },
}

/// One of a model's own tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnTensor {
    pub name: String,
    pub shape: Vec<usize>,
}

/// Ranks of a job's adapters, 0 for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranks {
    /// For each layer, of those on its linears.
    pub layers: Vec<[usize; LINEARS]>,
    /// For each layer, of those on the parameters of its experts and of their router.
    pub experts: Vec<[usize; 3]>,
    /// Of those on the embedding and the output layer.
    pub tokens: [usize; 2],
    /// Of that on the linear that projects the own inputs of all layers.
    pub inputs: usize,
}

/// What is trained of the embedding, of the output layer, and of what all layers have their own inputs from, beside adapters on linears
/// of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Rank of the adapter on the linear that projects the own inputs of all layers, 0 for none.
    pub inputs: usize,
    /// Ranks of the adapters on each, 0 for none.
    pub ranks: [usize; 2],
    /// Rows of each that are trained by themselves.
    pub rows: [usize; 2],
    /// Whether the matrix is trained as a whole.
    pub whole: [bool; 2],
}

impl Tokens {
    /// How many of the two matrices are trained as a whole.
    pub(super) fn whole_matrices(&self) -> usize {
        self.whole.iter().filter(|is_whole| **is_whole).count()
    }
}

/// The work of one slot: what is trained, in which types, on how many tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    pub trained: Trained,
    pub dtype: BaseDtype,
    /// What trained weights are kept in.
    pub trained_dtype: BaseDtype,
    /// How frozen matrices are kept in 4 bits, if they are.
    pub quantization: Option<Quantization>,
    pub reduction: Reduction,
    pub optimizer: Optimizer,
    /// Number of blocks in a slot.
    pub batch: usize,
    /// Number of tokens in a block.
    pub sequence_len: usize,
    /// Whether layers keep their inputs alone and run again in the backward pass.
    pub checkpointing: bool,
    /// Whether no other worker can take part, so that the whole mean gradient is never in memory.
    pub alone: bool,
}
