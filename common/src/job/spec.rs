//! The checked job. Every field is resolved: no alias, default or file name is left to look up.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A job that passed every check that needs no model and no data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Folder with `config.json`, safetensors and tokenizer files.
    pub base_model: PathBuf,
    pub model_revision: Option<String>,
    /// Where the starting weights come from.
    pub init_weights: InitWeights,
    /// Storage type of the base weights, and of the model that full fine-tuning writes.
    pub base_dtype: BaseDtype,
    pub datasets: Vec<DatasetSpec>,
    pub val_set_size: ValSetSize,
    /// Tokens in a block.
    pub sequence_len: usize,
    /// Several examples share a block. Off: one example a block.
    pub sample_packing: bool,
    pub train_on_inputs: bool,
    pub shuffle: bool,
    pub method: Method,
    /// Blocks in a step.
    pub global_batch_size: usize,
    /// Blocks in a slot. Divides `global_batch_size`.
    pub micro_batch_size: usize,
    pub num_epochs: f64,
    /// Overrides `num_epochs`.
    pub max_steps: Option<u64>,
    pub learning_rate: f64,
    pub lr_scheduler: LrScheduler,
    pub warmup: Warmup,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub weight_decay: f64,
    /// None: gradients are not clipped.
    pub max_grad_norm: Option<f64>,
    pub gradient_checkpointing: bool,
    pub seed: u64,
    pub logging_steps: u64,
    /// None: only the final state is saved.
    pub save_steps: Option<u64>,
    pub save_total_limit: Option<usize>,
    /// None: evaluate only at the end, where there is a validation set.
    pub eval_steps: Option<u64>,
    /// Steps in a row that may be skipped for gradients that are not finite before the job stops.
    pub max_skipped_steps: u64,
    pub output_dir: PathBuf,
    pub resume: Resume,
    pub reduction: Reduction,
    pub cluster: ClusterSpec,
    /// Asked before and after training; the answers are shown.
    pub test_prompts: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitWeights {
    /// The base model's safetensors.
    Pretrained,
    /// Drawn from the seed; only `config.json` and the tokenizer are read. Full training only.
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseDtype {
    Float32,
    Bfloat16,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// A JSON Lines file.
    pub path: PathBuf,
    pub kind: DatasetKind,
    pub split: Option<String>,
    pub fields: FieldNames,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetKind {
    /// Told by the columns of each row.
    Auto,
    Messages,
    PromptCompletion,
    Text,
}

/// Column names, where a dataset has its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldNames {
    pub messages: String,
    pub prompt: String,
    pub completion: String,
    pub text: String,
    /// Inside a message.
    pub role: String,
    /// Inside a message.
    pub content: String,
    pub tools: String,
}

impl Default for FieldNames {
    fn default() -> Self {
        let name = |s: &str| s.to_owned();
        Self {
            messages: name("messages"),
            prompt: name("prompt"),
            completion: name("completion"),
            text: name("text"),
            role: name("role"),
            content: name("content"),
            tools: name("tools"),
        }
    }
}

/// How much of the data is held out for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValSetSize {
    None,
    /// Of the examples, in (0, 1).
    Fraction(f64),
    Examples(usize),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Lora(LoraSpec),
    Full,
}

/// Low-rank adaptation (Hu et al., 2021), with PEFT's conventions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f64,
    pub target_modules: TargetModules,
    /// Scale by `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// Start from this PEFT adapter.
    pub model_dir: Option<PathBuf>,
}

impl LoraSpec {
    /// The factor on `B A x`.
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetModules {
    /// Every linear but the output layer.
    AllLinear,
    /// Module names (`q_proj`) or path endings (`layers.0.self_attn.q_proj`), as PEFT matches them.
    Named(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    Cosine,
    Linear,
    Constant,
    ConstantWithWarmup,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warmup {
    /// Of all steps, rounded up.
    Ratio(f64),
    Steps(u64),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resume {
    /// From the newest checkpoint in `output_dir` that verifies, if there is one.
    Auto,
    Never,
    /// From this checkpoint folder.
    Path(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// 64-bit fixed point: the same bits for any number of workers.
    Exact,
    /// float32, in whatever order it comes.
    Fast,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSpec {
    pub min_workers: usize,
    pub max_workers: Option<usize>,
}
