//! What a job needs in memory, before anything is loaded.
//!
//! Enters: the job and the sizes of the model. Leaves: bytes a worker needs, in four parts. A formula, not a
//! measurement: it counts the tensors that have to be there at the peak of a backward pass, and nothing of allocator,
//! code or page cache.

use common::job::{BaseDtype, Checkpointing, JobSpec, Method, Reduction};

use super::ModelShape;

/// The loss is computed in chunks of at most so many logits and tokens.
const LOSS_CHUNK_LOGITS: usize = 24 << 20;
const LOSS_CHUNK_TOKENS: usize = 512;
const F32: u64 = 4;

/// Bytes in one worker, and the scalars behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    pub parameters: u64,
    pub trainable_parameters: u64,
    /// Frozen ones in their storage type, trainable ones in float32.
    pub weights_bytes: u64,
    /// For each trainable scalar: two moments in float32, the sum over slots (6 bytes; 4 with `reduction: fast`) and, where
    /// there are several workers, the mean gradient in float32; with LoRA the gradient of a slot, too.
    pub trainable_bytes: u64,
    /// What the backward pass needs of one slot, at least: with `gradient_checkpointing: auto` a worker may take more.
    pub activations_bytes: u64,
    /// Logits of one chunk of tokens; their gradient takes their place.
    pub logits_bytes: u64,
}

impl Estimate {
    pub fn new(job: &JobSpec, shape: &ModelShape) -> Result<Self, String> {
        let parameters = shape.parameters();
        let trainable = match &job.method {
            Method::Full => parameters,
            Method::Lora(lora) => shape
                .targets(&lora.target_modules)?
                .iter()
                .map(|linear| (lora.r * (linear.inputs + linear.outputs)) as u64)
                .sum(),
        };
        let stored = match job.base_dtype {
            BaseDtype::Float32 => F32,
            BaseDtype::Bfloat16 => 2,
        };
        let sum = match job.reduction {
            Reduction::Exact => 6,
            Reduction::Fast => F32,
        };
        let gradients = match job.method {
            Method::Full => F32,
            Method::Lora(_) => 2 * F32,
        };
        let tokens = (job.micro_batch_size * job.sequence_len) as u64;
        let element = match job.method {
            Method::Full => F32,
            Method::Lora(_) => stored,
        };
        let (layers, layer) = (shape.layers as u64, layer_bytes_per_token(shape, element));
        let kept = match job.gradient_checkpointing {
            Checkpointing::Never => layers * layer,
            // The input of each layer, and all of the layer that is being computed again.
            Checkpointing::Always | Checkpointing::Auto => {
                layers * shape.hidden_size as u64 * F32 + layer
            }
        };
        let chunk = (LOSS_CHUNK_LOGITS / shape.vocab_size).clamp(16, LOSS_CHUNK_TOKENS);
        let weights_bytes = match job.method {
            Method::Full => parameters * F32,
            Method::Lora(_) => parameters * stored + trainable * F32,
        };
        Ok(Self {
            parameters,
            trainable_parameters: trainable,
            weights_bytes,
            trainable_bytes: trainable * (2 * F32 + sum + gradients),
            activations_bytes: tokens * kept,
            logits_bytes: tokens.min(chunk as u64) * shape.vocab_size as u64 * F32,
        })
    }

    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.trainable_bytes + self.activations_bytes + self.logits_bytes
    }
}

/// What one layer keeps of a token for its backward pass: both residual sums in float32, and queries, keys and values,
/// the attention's output, gate and up in the type that the base model is stored in.
fn layer_bytes_per_token(shape: &ModelShape, element: u64) -> u64 {
    let heads = 2 * shape.heads + 2 * shape.key_value_heads;
    let inner = heads * shape.head_dim + 2 * shape.intermediate_size;
    2 * shape.hidden_size as u64 * F32 + inner as u64 * element
}
