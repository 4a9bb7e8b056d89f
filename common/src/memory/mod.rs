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
    Experts, Fused, LINEARS, LinearAttention, OwnTensor, PROJECTIONS, Ranks, Shape, Tokens,
    Trained, Work,
};
pub use told::bytes;

use crate::job::{BaseDtype, JobSpec, LoraSpec, Method, MomentDtype, TrainedRows};
use layer::Layer;
pub use layer::{AGAIN_ROWS, EXPERT_ROWS_MULTIPLE, STATE_TOKENS, expert_rows};
use serde::Serialize;

/// Memory of a worker at the peak of a step, in bytes, by what takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Frozen weights of the base model (on a GPU, all weights as they are multiplied, the adapters' among them), and the rotary
    /// tables.
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
        let (queries, keys) = (
            self.heads * self.head_dim,
            self.key_value_heads * self.head_dim,
        );
        let (hidden, inner) = (self.hidden_size, self.inner_size(layer));
        let experts = self.experts_of(layer);
        let is_shared = experts.is_some_and(|experts| experts.shared.is_some());
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
            (None, false) => [queries + gate, keys, keys, 0],
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
        [
            (hidden, query, qkv_bias),
            (hidden, key, qkv_bias),
            (hidden, value, qkv_bias),
            (hidden, fourth, false),
            (context, hidden, output_bias),
            (hidden, gate, self.mlp_bias),
            (hidden, up, self.mlp_bias),
            (inner, down, self.mlp_bias),
            (hidden, usize::from(is_shared), false),
        ]
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

    /// Number of layers with attention.
    pub(crate) fn attention_layers(&self) -> usize {
        let linear = |layer: &usize| self.linear_attention_of(*layer).is_some();
        self.layers - (0..self.layers).filter(linear).count()
    }

    /// The intermediate size of what every token goes through in a layer.
    fn inner_size(&self, layer: usize) -> usize {
        match self.experts_of(layer) {
            None => self.intermediate_size,
            Some(experts) => experts.shared.unwrap_or(0),
        }
    }

    /// Number of scalars of a layer's router.
    fn router(&self, layer: usize) -> u64 {
        let experts = self.experts_of(layer);
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
            None => self.head_norms.iter().sum::<usize>() + self.sinks,
        };
        let [of_experts, _] = self.expert_biases(layer);
        (norms + of_heads + router + biases.iter().sum::<usize>()) as u64 + of_experts
    }

    /// Number of scalars of the linears of a layer.
    fn layer_linears(&self, layer: usize) -> u64 {
        let scalars = self.linears(layer).map(|(width, out, _)| width * out);
        scalars.iter().sum::<usize>() as u64
    }

    /// Number of scalars of all matrices of the layers, and of those among them that a token goes through.
    pub(crate) fn layer_matrices(&self) -> [u64; 2] {
        let mut sums = [0; 2];
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
        layers.sum::<u64>() + self.hidden_size as u64
    }

    /// Number of scalars of embedding, output layer and the layers' matrices.
    fn matrices(&self) -> u64 {
        let [all, _] = self.layer_matrices();
        all + self.token_matrices()
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
                    ranks: ranks.layers,
                    experts: ranks.experts,
                    tokens: tokens_of(lora, ranks.tokens),
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

fn tokens_of(lora: &LoraSpec, ranks: [usize; 2]) -> Tokens {
    let both = [&lora.tokens.embedding, &lora.tokens.head];
    Tokens {
        ranks,
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
mod tests {
    use super::*;
    use crate::job::{Optimizer, Reduction, TrainedBiases};

    /// Qwen3-0.6B.
    const SMALL: Shape = Shape {
        vocab_size: 151_936,
        hidden_size: 1024,
        intermediate_size: 3072,
        layers: 28,
        heads: 16,
        key_value_heads: 8,
        head_dim: 128,
        tied: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        fused: Fused::NONE,
        head_norms: [128; 2],
        layer_norms: 2,
        adds_apart: false,
        norms_behind: false,
        windows: Vec::new(),
        rotary: 128,
        sinks: 0,
        experts: None,
        output_gate: false,
        linear_attention: None,
    };

    fn work(trained: Trained, checkpointing: bool) -> Work {
        Work {
            trained,
            dtype: BaseDtype::Bfloat16,
            trained_dtype: BaseDtype::Float32,
            quantization: None,
            reduction: Reduction::Exact,
            optimizer: Optimizer::Adamw,
            batch: 8,
            sequence_len: 2048,
            checkpointing,
            alone: true,
        }
    }

    fn adapters() -> Trained {
        Trained::Adapters {
            dropout: false,
            magnitudes: false,
            biases: TrainedBiases::None,
            lora_bias: false,
            ranks: vec![[16; LINEARS]; SMALL.layers],
            experts: Vec::new(),
            tokens: Tokens::default(),
        }
    }

    #[test]
    fn scalars_are_those_that_transformers_and_peft_count() {
        assert_eq!(SMALL.parameters(), 596_049_920);
        assert_eq!(work(adapters(), false).scalars(&SMALL), 10_092_544);
        let dora = Trained::Adapters {
            dropout: false,
            magnitudes: true,
            biases: TrainedBiases::None,
            lora_bias: false,
            ranks: vec![[16; LINEARS]; SMALL.layers],
            experts: Vec::new(),
            tokens: Tokens::default(),
        };
        // One for each row: queries, keys and values, output, gate and up, down.
        let rows = 28 * (2048 + 2 * 1024 + 1024 + 2 * 3072 + 1024);
        assert_eq!(work(dora, false).scalars(&SMALL), 10_092_544 + rows);
        assert_eq!(work(Trained::All, false).scalars(&SMALL), 596_049_920);
    }

    #[test]
    fn a_layer_keeps_its_residuals_and_what_it_projects() {
        let activations = |layers, checkpointing| {
            let shape = Shape { layers, ..SMALL };
            let work = work(Trained::All, checkpointing);
            on_gpu(&shape, &work).activations
        };
        let tokens = 8 * 2048;
        let residual = tokens * 1024 * 4;
        // Queries, keys, values, the context, gate and up in two bytes; the log sums of 16 heads in four.
        let inner = tokens * (2 * (4096 + 2048 + 6144) + 4 * 16) + residual;
        let more = activations(28, false) - activations(27, false);
        assert_eq!(more, residual + inner);
        assert_eq!(activations(28, true) - activations(27, true), residual);
    }

    #[test]
    fn all_weights_take_what_their_training_keeps_of_each() {
        let full = on_gpu(&SMALL, &work(Trained::All, true));
        // Beside two bytes for products: weights and two moments of four, a sum of eight.
        assert_eq!(full.training, 596_049_920 * 20);
        let here = on_processor(&SMALL, &work(Trained::All, true));
        let tile = 4 * processor::SUMS_TILE as u64;
        assert_eq!(here.training, 596_049_920 * 18 + tile);
        let with_others = Work {
            alone: false,
            ..work(Trained::All, true)
        };
        let mean = on_processor(&SMALL, &with_others).training - here.training;
        assert_eq!(mean, 596_049_920 * 4);
        // Lion keeps a moment less.
        let lion = Work {
            optimizer: Optimizer::Lion,
            ..work(Trained::All, true)
        };
        let less = |of: fn(&Shape, &Work) -> Bytes| {
            of(&SMALL, &work(Trained::All, true)).training - of(&SMALL, &lion).training
        };
        assert_eq!([less(on_gpu), less(on_processor)], [596_049_920 * 4; 2]);
        // In 8 bits each of two moments keeps a byte and a 64th of a float32, but four bytes of the embedding and the vectors.
        let eight_bits = Work {
            optimizer: Optimizer::Adamw8bit,
            ..work(Trained::All, true)
        };
        let matrices = 596_049_920 - 151_936 * 1024 - SMALL.vectors();
        let saved = 2 * matrices * 3 - 2 * matrices / 256 * 4;
        let less = |of: fn(&Shape, &Work) -> Bytes| {
            of(&SMALL, &work(Trained::All, true)).training - of(&SMALL, &eight_bits).training
        };
        assert_eq!([less(on_gpu), less(on_processor)], [saved; 2]);
    }

    #[test]
    fn muon_takes_four_buffers_beside_its_largest_matrix() {
        let short = Work {
            batch: 1,
            sequence_len: 8,
            optimizer: Optimizer::Muon {
                trains_vectors: true,
            },
            ..work(Trained::All, true)
        };
        let peak = on_processor(&SMALL, &short);
        assert_eq!(peak.moment, Moment::Update);
        // Gate and up, 1024 x 3072: direction and product, and two squares.
        assert_eq!(peak.operation, 4 * (2 * 1024 * 3072 + 2 * 1024 * 1024));
    }
}
