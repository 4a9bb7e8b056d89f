//! What a worker needs in memory, before anything is loaded. In: the shapes of a model and of the work on it. Out: bytes at
//! the peak of a step, part by part.
//!
//! Formulas, not measurements: they follow the engine's buffers through a step (`worker/src/engine`), and tests hold them
//! against what it takes. Reads nothing and allocates nothing of what it counts.

pub mod gpu;
mod layer;
pub mod processor;
mod shape;
mod tensors;
mod told;

pub use gpu::on_gpu;
pub use processor::on_processor;
pub(crate) use shape::F32;
pub use shape::{
    Experts, Fused, KeyValues, LINEARS, LayerInputs, LayerSizes, LinearAttention, OwnTensor,
    PROJECTIONS, Ranks, Shape, Tokens, Trained, Work,
};
pub use told::bytes;

use crate::job::{BaseDtype, JobSpec, LoraSpec, Method, MomentDtype, TrainedRows};
use layer::Layer;
pub use layer::{AGAIN_ROWS, EXPERT_ROWS_MULTIPLE, STATE_TOKENS, expert_rows};
use serde::Serialize;

/// Memory of a worker at the peak of a step, in bytes, by what takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Frozen weights of the base model (on a GPU, all weights as they are multiplied, the adapters' among them; those of 4 bits
    /// as they are, beside the memory that one at a time is widened to), and the rotary tables.
    pub weights: u64,
    /// Trainable weights, moments, sums and gradients.
    pub training: u64,
    /// Activations of a slot that are kept for its backward pass.
    pub activations: u64,
    /// Largest operation at that moment: a layer's backward pass, a chunk of the loss, the exchange or the update.
    pub operation: u64,
    /// Memory of libraries, and of the program itself.
    pub libraries: u64,
    /// When the peak is.
    pub moment: Moment,
}

/// A moment of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// While a slot is computed.
    #[default]
    Slot,
    /// While workers sum their gradients. No activations are kept.
    Exchange,
    /// While weights and moments are updated. No activations are kept.
    Update,
}

impl Bytes {
    /// All of it together.
    pub fn total(&self) -> u64 {
        self.weights + self.training + self.activations + self.operation + self.libraries
    }
}

impl Shape {
    /// Input width, output width and whether there is a bias, of the linear in each slot of a layer. Nothing comes out of an
    /// empty slot.
    pub fn linears(&self, layer: usize) -> [(usize, usize, bool); LINEARS] {
        let sizes = self.sizes_of(layer);
        let (queries, keys) = (self.queries(layer), sizes.key_value_heads * sizes.head_dim);
        let (hidden, inner) = (self.hidden_size, self.inner_size(layer));
        let experts = self.experts_of(layer);
        let weighted_by = experts.map_or(0, |experts| match experts.beside_dense {
            true => experts.count,
            false => usize::from(experts.shared.is_some()),
        });
        let down = match inner {
            0 => 0,
            _ => hidden,
        };
        let gate = match self.output_gate {
            true => queries,
            false => 0,
        };
        let reading = match (self.linear_attention_of(layer), self.fused.qkv) {
            (Some(sizes), _) => sizes.projected(),
            (None, true) => [queries + 2 * keys, 0, 0, 0],
            (None, false) => match sizes.key_values {
                KeyValues::Apart => [queries + gate, keys, keys, 0],
                KeyValues::Same => [queries + gate, keys, 0, 0],
                KeyValues::Of(_) => [queries + gate, 0, 0, 0],
            },
        };
        let [query, key, value, fourth] = reading;
        let (biased, context) = match self.linear_attention_of(layer) {
            Some(sizes) => (false, sizes.values()),
            None => (true, queries),
        };
        let (qkv_bias, output_bias) = (biased && self.qkv_bias, biased && self.output_bias);
        let [gate, up] = match self.fused.gate_up {
            true => [2 * inner, 0],
            false => [inner, inner],
        };
        let [own, mixed] = match self.layer_inputs {
            None => [0, 0],
            Some(inputs) => [inputs.width, hidden],
        };
        [
            (hidden, query, qkv_bias),
            (hidden, key, qkv_bias),
            (hidden, value, qkv_bias),
            (hidden, fourth, false),
            (context, hidden, output_bias),
            (hidden, gate, self.mlp_bias),
            (hidden, up, self.mlp_bias),
            (inner, down, self.mlp_bias),
            (hidden, weighted_by, false),
            (hidden, own, false),
            (own, mixed, false),
        ]
    }

    /// The sizes of a layer in which it may differ from others.
    pub fn sizes_of(&self, layer: usize) -> LayerSizes {
        let own = self.layer_sizes.get(layer).copied();
        own.unwrap_or(LayerSizes {
            key_value_heads: self.key_value_heads,
            head_dim: self.head_dim,
            key_values: KeyValues::Apart,
            intermediate_size: self.intermediate_size,
        })
    }

    /// Columns of the queries of a layer with attention.
    pub(crate) fn queries(&self, layer: usize) -> usize {
        self.heads * self.sizes_of(layer).head_dim
    }

    /// Number of weights of the norm of queries in a layer with attention, and of that of keys.
    fn head_norms_of(&self, layer: usize) -> [usize; 2] {
        match (self.layer_sizes.get(layer), self.head_norms) {
            (None, _) | (_, [0, 0]) => self.head_norms,
            (Some(own), _) => match own.key_values {
                KeyValues::Of(_) => [own.head_dim, 0],
                KeyValues::Apart | KeyValues::Same => [own.head_dim; 2],
            },
        }
    }

    /// The layers with attention.
    pub(crate) fn layers_with_attention(&self) -> impl Iterator<Item = usize> {
        (0..self.layers).filter(|layer| self.linear_attention_of(*layer).is_none())
    }

    /// Number of scalars of the embedding of all layers' own inputs, and of the linear that projects them.
    fn input_matrices(&self) -> [u64; 2] {
        self.layer_inputs.map_or([0; 2], |inputs| {
            let columns = self.layers * inputs.width;
            [inputs.vocabulary, self.hidden_size].map(|side| (side * columns) as u64)
        })
    }

    /// The experts of a layer, if it has some.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        let experts = self.experts.as_ref()?;
        experts.layers.get(layer)?.then_some(experts)
    }

    /// The sizes of a layer's linear attention, if it has that in place of attention.
    pub fn linear_attention_of(&self, layer: usize) -> Option<&LinearAttention> {
        let sizes = self.linear_attention.as_ref()?;
        sizes.layers.get(layer)?.then_some(sizes)
    }

    /// The intermediate size of what every token goes through in a layer.
    fn inner_size(&self, layer: usize) -> usize {
        match self.experts_of(layer) {
            Some(experts) if !experts.beside_dense => experts.shared.unwrap_or(0),
            _ => self.sizes_of(layer).intermediate_size,
        }
    }

    /// Number of scalars of a layer's router, where that is none of its linears.
    fn router(&self, layer: usize) -> u64 {
        let experts = self.experts_of(layer).filter(|it| !it.beside_dense);
        experts.map_or(0, |experts| (experts.count * self.hidden_size) as u64)
    }

    /// Number of scalars of each of the three matrices of an expert.
    fn expert_matrix(&self) -> u64 {
        let experts = self.experts.as_ref();
        experts.map_or(0, |experts| (experts.width * self.hidden_size) as u64)
    }

    /// Number of matrices of a layer's experts, and of those among them that a token goes through.
    fn expert_matrices(&self, layer: usize) -> [u64; 2] {
        let experts = self.experts_of(layer);
        experts.map_or([0; 2], |experts| {
            [experts.count, experts.per_token].map(|count| 3 * count as u64)
        })
    }

    /// Number of scalars of the biases of a layer's experts, and of those among them that a token goes through.
    fn expert_biases(&self, layer: usize) -> [u64; 2] {
        let experts = self.experts_of(layer).filter(|experts| experts.biased);
        experts.map_or([0; 2], |experts| {
            let of_one = (2 * experts.width + self.hidden_size) as u64;
            [experts.count, experts.per_token].map(|count| count as u64 * of_one)
        })
    }

    /// The sizes of the adapters on the parameters of a layer's experts, of these ranks: scalars of `A` and of `B`, of one expert each.
    fn expert_factors(&self, layer: usize, ranks: [usize; 3]) -> [[usize; 2]; 2] {
        let parameters = self
            .experts_of(layer)
            .map_or([(0, 0); 2], |experts| experts.parameters(self.hidden_size));
        let [gate_up, down] = parameters.map(|(width, out)| [width, out]);
        [(gate_up, ranks[0]), (down, ranks[1])].map(|(sides, rank)| sides.map(|side| side * rank))
    }

    /// Number of scalars of the adapters on parameters of experts, of experts that a token does not go through.
    pub(crate) fn idle_factors(&self, ranks: &[[usize; 3]]) -> u64 {
        let of_layer = |(layer, ranks): (usize, &[usize; 3])| {
            let experts = self.experts_of(layer);
            let idle = experts.map_or(0, |experts| experts.count - experts.per_token);
            let factors = self.expert_factors(layer, *ranks);
            (idle * factors.as_flattened().iter().sum::<usize>()) as u64
        };
        ranks.iter().enumerate().map(of_layer).sum()
    }

    /// Number of scalars of a layer's norms and biases, and of what else is float32 always.
    fn layer_vectors(&self, layer: usize) -> u64 {
        let biases = self.linears(layer).map(|(_, out, bias)| match bias {
            true => out,
            false => 0,
        });
        let router = self.experts_of(layer).filter(|experts| experts.biased);
        let router = router.map_or(0, |experts| experts.count);
        let norms = self.layer_norms * self.hidden_size;
        let of_heads = match self.linear_attention_of(layer) {
            Some(sizes) => sizes.vectors().iter().sum(),
            None => self.head_norms_of(layer).iter().sum::<usize>() + self.sinks,
        };
        let beside = self.experts_of(layer);
        let beside = beside.map_or([0; 5], |experts| experts.vectors_beside(self.hidden_size));
        let norms = norms + beside.iter().sum::<usize>();
        let [of_experts, _] = self.expert_biases(layer);
        (norms + of_heads + router + biases.iter().sum::<usize>()) as u64 + of_experts
    }

    /// Number of scalars of the linears of a layer.
    fn layer_linears(&self, layer: usize) -> u64 {
        let scalars = self.linears(layer).map(|(width, out, _)| width * out);
        scalars.iter().sum::<usize>() as u64
    }

    /// Number of scalars of all matrices of the layers and of what projects their own inputs, and of those among them that a token goes
    /// through.
    pub(crate) fn layer_matrices(&self) -> [u64; 2] {
        let [_, projection] = self.input_matrices();
        let mut sums = [projection; 2];
        for layer in 0..self.layers {
            let dense = self.layer_linears(layer) + self.router(layer);
            let experts = self.expert_matrices(layer);
            for (sum, count) in sums.iter_mut().zip(experts) {
                *sum += dense + count * self.expert_matrix();
            }
        }
        sums
    }

    /// Number of scalars of the embedding, and of the output layer where it is not tied.
    fn token_matrices(&self) -> u64 {
        let matrices = 2 - u64::from(self.tied);
        matrices * self.token_matrix()
    }

    /// Number of scalars of the embedding.
    fn token_matrix(&self) -> u64 {
        (self.vocab_size * self.hidden_size) as u64
    }

    /// Number of scalars of all norms and biases.
    fn vectors(&self) -> u64 {
        let layers = (0..self.layers).map(|layer| self.layer_vectors(layer));
        let of_inputs = self.layer_inputs.map_or(0, |inputs| inputs.width);
        layers.sum::<u64>() + (self.hidden_size + of_inputs) as u64
    }

    /// Number of scalars of embedding, output layer and the layers' matrices.
    fn matrices(&self) -> u64 {
        let [all, _] = self.layer_matrices();
        let [of_inputs, _] = self.input_matrices();
        all + self.token_matrices() + of_inputs
    }

    /// Number of parameters of the base model.
    pub fn parameters(&self) -> u64 {
        self.matrices() + self.vectors()
    }

    /// Number of parameters of the base model that take part in a token: all but those of experts that it does not go through.
    pub fn active_parameters(&self) -> u64 {
        let [all, active] = self.layer_matrices();
        let biases = (0..self.layers).map(|layer| self.expert_biases(layer));
        let idle = biases.map(|[all, active]| all - active).sum::<u64>();
        self.parameters() - all + active - idle
    }

    /// Bytes of the rotary tables: cosines and sines.
    fn tables(&self, work: &Work) -> u64 {
        (work.sequence_len * self.rotary) as u64 * F32
    }
}

impl Work {
    /// The work of a slot of a job, with adapters of these ranks.
    pub fn of(job: &JobSpec, ranks: Ranks, checkpointing: bool) -> Self {
        Self {
            trained: match &job.method {
                Method::Full => Trained::All,
                Method::Lora(lora) => Trained::Adapters {
                    dropout: lora.dropout > 0.0,
                    magnitudes: lora.use_dora,
                    biases: lora.biases,
                    lora_bias: lora.lora_bias,
                    tokens: tokens_of(lora, &ranks),
                    ranks: ranks.layers,
                    experts: ranks.experts,
                },
            },
            dtype: job.base_dtype,
            trained_dtype: job.trained_dtype(),
            quantization: job.quantization,
            reduction: job.reduction,
            optimizer: job.optimizer,
            batch: job.micro_batch_size,
            sequence_len: job.sequence_len,
            checkpointing,
            alone: job.cluster.max_workers == Some(1),
        }
    }

    /// The same work, on these of the model's own tensors where that is not all it trains.
    pub fn on(self, own: Option<Vec<OwnTensor>>) -> Self {
        match own {
            Some(own) => Self {
                trained: Trained::Some(own),
                ..self
            },
            None => self,
        }
    }

    /// Number of trainable scalars.
    pub fn scalars(&self, shape: &Shape) -> u64 {
        match &self.trained {
            Trained::All => shape.parameters(),
            Trained::Some(_) | Trained::Adapters { .. } => {
                let tensors = tensors::trained(shape, self).into_iter();
                tensors.map(|tensors| tensors.scalars()).sum()
            }
        }
    }

    /// Bytes of a trained weight.
    fn weight_bytes(&self) -> u64 {
        match self.trained_dtype {
            BaseDtype::Float32 => F32,
            BaseDtype::Bfloat16 => 2,
        }
    }

    /// Bytes of the weights and the moments of all trainable scalars.
    pub fn state_bytes(&self, shape: &Shape) -> u64 {
        let scalars = self.scalars(shape);
        let moments = self.optimizer.moments();
        let moment = match moments.dtype {
            MomentDtype::Float32 => scalars * F32,
            MomentDtype::EightBits => {
                let tensors = tensors::trained(shape, self).into_iter();
                tensors.map(|tensors| tensors.bytes_of_8bit()).sum()
            }
        };
        scalars * self.weight_bytes() + moments.count as u64 * moment
    }

    fn tokens(&self) -> u64 {
        (self.batch * self.sequence_len) as u64
    }
}

fn tokens_of(lora: &LoraSpec, ranks: &Ranks) -> Tokens {
    let both = [&lora.tokens.embedding, &lora.tokens.head];
    Tokens {
        inputs: ranks.inputs,
        ranks: ranks.tokens,
        rows: both.map(|rows| rows.listed().len()),
        whole: both.map(|rows| *rows == TrainedRows::All),
    }
}

/// The peak so far of activations that are kept and an operation beside them.
#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    activations: u64,
    operation: u64,
    moment: Moment,
}

impl Peak {
    fn or(self, activations: u64, operation: u64) -> Self {
        self.or_of(Self {
            activations,
            operation,
            moment: Moment::Slot,
        })
    }

    /// The larger of this peak and one outside of slots, when no activations are kept.
    fn or_at(self, moment: Moment, operation: u64) -> Self {
        self.or_of(Self {
            activations: 0,
            operation,
            moment,
        })
    }

    fn or_of(self, other: Self) -> Self {
        match other.activations + other.operation > self.activations + self.operation {
            true => other,
            false => self,
        }
    }
}

/// Peak of a slot's forward and backward pass, in bytes; `loss` is what a chunk of the loss takes, `extra` what is there all
/// through it.
fn pass(layers: &[Layer], checkpointing: bool, loss: u64, extra: u64) -> Peak {
    let kept = |layer: &Layer| match checkpointing {
        true => layer.input(),
        false => layer.input() + layer.inner(),
    };
    let (mut before, mut peak) = (0, Peak::default());
    for layer in layers {
        peak = peak.or(before, extra + layer.input() + layer.forward());
        before += kept(layer);
    }
    let Some(residual) = layers.first().map(Layer::input) else {
        return peak;
    };
    // The last layer's result, and the gradient.
    peak = peak.or(before, extra + 2 * residual + loss);
    for layer in layers.iter().rev() {
        if checkpointing {
            peak = peak.or(before, extra + residual + layer.open());
            peak = peak.or(before, extra + residual + layer.inner() + layer.backward());
        } else {
            peak = peak.or(before, extra + residual + layer.backward());
        }
        before -= kept(layer);
    }
    peak
}

#[cfg(test)]
mod tests;
