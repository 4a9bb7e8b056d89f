//! The checked job. Every field is resolved: no alias, default or file name is left to look up.

mod dataset;
mod mixture;
mod push;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::adapter_init::AdapterInit;
use super::adapter_shape::AdapterShape;
use super::adapter_sizes::{AdapterSizes, scale};
use super::loss::TokenLoss;
use super::lr_scheduler::LrScheduler;
use super::optimizer::{Optimizer, RateGroups};
use super::router_loss::RouterLoss;
use super::tokens::{NewToken, TrainedTokens};
use super::trained_biases::TrainedBiases;
use super::unfrozen::Unfrozen;

pub use dataset::{
    DatasetKind, DatasetSpec, FieldNames, HubSource, REASONING, STANDARD_INPUT, STDIN,
    shown_address,
};
pub use mixture::{MixStrategy, MixtureSpec, Selection, Shard};
pub use push::{HubStrategy, PushSpec, Secret};

/// Default `sequence_len`, in tokens, where the data is large.
pub const DEFAULT_SEQUENCE_LEN: usize = 2048;
/// Default `global_batch_size`, in blocks, where the data is large and `micro_batch_size` divides it.
pub const DEFAULT_BATCH_SIZE: usize = 8;

/// A job that passed every check that needs no model and no data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Folder with `config.json`, safetensors and tokenizer files. Required.
    pub base_model: PathBuf,
    /// Id of the base model on the hub, where `base_model` is a folder of the hub's cache. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model_id: Option<String>,
    /// Revision that the job asked the hub for, where it is one. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_revision: Option<String>,
    /// Revision of the base model. It is written to `adapter_config.json` and changes nothing here. Default: none.
    pub model_revision: Option<String>,
    /// Where the starting weights come from. Default: pretrained.
    pub init_weights: InitWeights,
    /// Storage type of the base weights, and of the model that full fine-tuning writes. Default: float32.
    pub base_dtype: BaseDtype,
    /// Whether full training keeps and updates its weights in bfloat16, rounded by chance. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pure_bf16: bool,
    /// How the frozen weights are kept in 4 bits. Default: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Datasets to train on, at least one. Required.
    pub datasets: Vec<DatasetSpec>,
    /// How their rows become one set. Default: all rows of each, one dataset after the other.
    #[serde(default, skip_serializing_if = "MixtureSpec::is_default")]
    pub mixture: MixtureSpec,
    /// Chat template that conversations are written with. Default: the model's own.
    // Left out of the wire and the digest where they are at their defaults, as in jobs from before there were these fields.
    #[serde(default, skip_serializing_if = "TemplateChoice::is_default")]
    pub chat_template: TemplateChoice,
    /// Variables that the chat template sees in every conversation; those of a row come before them. Default: none.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub chat_template_kwargs: Map<String, Json>,
    /// System message of conversations that have none. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_system_message: Option<String>,
    /// The token that ends texts, in place of the tokenizer's own. Default: the tokenizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<String>,
    /// Tokens that end a turn, beside those that the tokenizer and `generation_config.json` name. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub eot_tokens: Vec<String>,
    /// Tokens that are added where the tokenizer does not have them; once it has been read, those that were. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<NewToken>,
    /// Other texts for added tokens that the tokenizer has, by their ids. Default: none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub added_tokens_overrides: BTreeMap<u32, String>,
    /// How much of the data is held out for evaluation. Default: nothing.
    pub val_set_size: ValSetSize,
    /// Datasets that are evaluated and never trained on; then nothing is held out. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub test_datasets: Vec<DatasetSpec>,
    /// Tokens in a block, 2 to 2^20. Default: 2048, fewer for small data.
    pub sequence_len: usize,
    /// What becomes of examples longer than a block. Default: split.
    #[serde(default, skip_serializing_if = "ExcessLength::is_default")]
    pub excess_length_strategy: ExcessLength,
    /// Whether several examples share a block. Off: one example a block. Default: on.
    pub sample_packing: bool,
    /// Whether prompts and user turns are learned too. Default: off.
    pub train_on_inputs: bool,
    /// Whether every epoch has its own order of blocks. Off: the order of the data. Default: on.
    pub shuffle: bool,
    /// Which weights are trained. Default: all.
    pub method: Method,
    /// The weights that full training changes. Default: all.
    #[serde(default, skip_serializing_if = "Unfrozen::is_all")]
    pub unfrozen: Unfrozen,
    /// Blocks in a step, a multiple of `micro_batch_size`. Default: 8 or the next multiple, fewer for small data.
    pub global_batch_size: usize,
    /// Blocks in a slot. Default: 1.
    pub micro_batch_size: usize,
    /// Number of passes over the data, above 0. Default: 1, or 3 for small data.
    pub num_epochs: f64,
    /// Number of steps, at least 1; overrides `num_epochs`. Default: none.
    pub max_steps: Option<u64>,
    /// Peak learning rate, above 0. Default: 2e-4 with LoRA, 2e-5 without.
    pub learning_rate: f64,
    /// Curve of the learning rate after the warm-up. Default: cosine.
    pub lr_scheduler: LrScheduler,
    /// Warm-up, in which the learning rate rises from 0. Default: 3% of the steps, or none where that is less than 2.
    pub warmup: Warmup,
    /// Optimizer. Default: AdamW.
    // Left out of the wire and the digest where they are at their defaults, as in jobs from before there were these fields.
    #[serde(default, skip_serializing_if = "Optimizer::is_default")]
    pub optimizer: Optimizer,
    /// Learning rates of some weights. Default: one for all.
    #[serde(default, skip_serializing_if = "RateGroups::is_none")]
    pub lr_groups: RateGroups,
    /// What a trained token adds to the loss. Default: its cross-entropy.
    #[serde(default, skip_serializing_if = "TokenLoss::is_default")]
    pub token_loss: TokenLoss,
    /// The loss that spreads tokens over experts. Default: as the model's `config.json` says.
    #[serde(default, skip_serializing_if = "RouterLoss::is_default")]
    pub router_loss: RouterLoss,
    /// Decay of the first moment of AdamW, and the first of Lion's betas, in [0, 1). Default: the optimizer's, 0.9.
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment, and the second of Lion's betas, in [0, 1). Default: the optimizer's, 0.999 for AdamW.
    pub adam_beta2: f64,
    /// AdamW's epsilon, above 0. Default: 1e-8.
    pub adam_epsilon: f64,
    /// Decoupled weight decay, 0 or more. Default: 0.
    pub weight_decay: f64,
    /// L2 norm that a gradient is scaled down to. None: gradients are not clipped. Default: 1.
    pub max_grad_norm: Option<f64>,
    /// Whether activations are computed again in the backward pass; the result is the same. Default: auto.
    pub gradient_checkpointing: Checkpointing,
    /// Seed of the order of blocks, dropout and new weights. Default: 42.
    pub seed: u64,
    /// Steps between two printed lines, at least 1. Default: 10.
    pub logging_steps: u64,
    /// When checkpoints are saved. Default: auto.
    pub save_steps: SaveSteps,
    /// Number of checkpoints that are kept, at least 1. None: all. Default: 3 where `save_steps` is auto, else none.
    pub save_total_limit: Option<usize>,
    /// Steps between two evaluations. None: only at the end, where there is a validation set. Default: none.
    pub eval_steps: Option<u64>,
    /// Whether the weights that the run begins with are evaluated too. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub eval_on_start: bool,
    /// Whether the first step is printed too, whatever `logging_steps` says. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub logging_first_step: bool,
    /// Whether a checkpoint is saved after the first step, too. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub save_first_step: bool,
    /// What comes of the weights with the best evaluation. Default: they are not told from others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_model: Option<BestModel>,
    /// Steps in a row that may be skipped for gradients that are not finite before the job stops. Default: 5.
    pub max_skipped_steps: u64,
    /// Where results and checkpoints go. Default: `output`.
    pub output_dir: PathBuf,
    /// What to continue from. Default: auto.
    pub resume: Resume,
    /// How gradients are summed. Default: exact.
    pub reduction: Reduction,
    pub cluster: ClusterSpec,
    /// Prompts that the model answers before and after training; the answers are shown. Default: none.
    pub test_prompts: Vec<String>,
    /// What reading the job left open, and what it has to tell: never part of the digest, of the wire or of a record.
    #[serde(skip)]
    pub reading: Reading,
}

impl JobSpec {
    /// What the weights that are trained are kept in.
    pub fn trained_dtype(&self) -> BaseDtype {
        match self.pure_bf16 {
            true => BaseDtype::Bfloat16,
            false => BaseDtype::Float32,
        }
    }

    /// All datasets: those to train on, then those to evaluate.
    pub fn all_datasets(&self) -> impl Iterator<Item = &DatasetSpec> {
        self.datasets.iter().chain(&self.test_datasets)
    }

    /// The dataset of that number, counted as [`all_datasets`](Self::all_datasets) goes.
    pub fn dataset(&self, index: usize) -> Option<&DatasetSpec> {
        self.all_datasets().nth(index)
    }

    /// One more than the largest id of a token that the job adds or trains a row for: so many rows the embedding needs at least.
    pub fn token_rows(&self) -> usize {
        let new = self.tokens.iter().filter_map(|token| token.id);
        let new = new.map(|id| id as usize + 1).max().unwrap_or(0);
        match &self.method {
            Method::Full => new,
            Method::Lora(lora) => new.max(lora.tokens.id_bound()),
        }
    }

    /// Leaves out of addresses what may be a key in them, for a record that others read. Digests do not change.
    pub fn hide_keys(&mut self) {
        for dataset in self.datasets.iter_mut().chain(&mut self.test_datasets) {
            dataset.path = shown_address(&dataset.path.to_string_lossy()).into();
            let of_splits = dataset.split_files.iter_mut().flat_map(|(_, files)| files);
            for file in dataset.data_files.iter_mut().chain(of_splits) {
                *file = shown_address(file);
            }
        }
    }

    /// The base model as people know it: its id on the hub and its commit, or its folder.
    pub fn model_name(&self) -> String {
        let commit = self.model_revision.as_deref().unwrap_or_default();
        match &self.base_model_id {
            Some(id) => at_commit(id, commit),
            None => self.base_model.display().to_string(),
        }
    }
}

/// What is known of a job only where it was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Fields that the data decides. Nothing is left once [`crate::plan::settle`] has seen the data.
    pub left_to_data: LeftToData,
    /// Special tokens that the job names (`bos_token`) and that the tokenizer must have as its own, with their texts.
    pub special_tokens: Vec<(String, String)>,
    /// What the user should know of the job, a line each.
    pub notices: Vec<String>,
    /// Where the result goes on the hub, if it goes there.
    pub push: Option<PushSpec>,
    /// Folder of prepared data that several runs share. Default: none, each run keeps its own.
    pub prepared_dir: Option<PathBuf>,
    /// Whether `base_dtype` is to be what the model's `config.json` says, once that is there.
    pub is_dtype_of_model: bool,
}

/// Fields that the user did not give and that follow the data. Until it is known they stand at what large data gets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeftToData {
    pub sequence_len: bool,
    /// Whether neither `global_batch_size` nor `gradient_accumulation_steps` was given.
    pub global_batch_size: bool,
    /// Whether neither `num_epochs` nor `max_steps` was given.
    pub num_epochs: bool,
    pub warmup: bool,
    /// How often checkpoints are saved, where that is a share of the run.
    pub save: Option<Cadence>,
    /// How often the held-out data is evaluated, where that is a share of the run.
    pub eval: Option<Cadence>,
}

/// How often something happens, where it takes the length of the run to say after how many steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cadence {
    /// So many times in an epoch, the last time at its end, or a little later where the steps do not go even.
    PerEpoch(u64),
    /// After every such share of all steps, in (0, 1).
    ShareOfRun(f64),
}

impl LeftToData {
    /// Whether any field is left to the data.
    pub fn anything(self) -> bool {
        self != Self::default()
    }
}

/// Where the starting weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitWeights {
    /// The base model's safetensors.
    Pretrained,
    /// Random weights, drawn from the seed; only `config.json` and the tokenizer are read. Full training only.
    Random,
}

/// Storage type of the base weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseDtype {
    Float32,
    Bfloat16,
}

/// How frozen weights are kept in 4 bits, as NF4 (Dettmers et al., 2023): every linear of the decoder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantization {
    /// Whether the scales of blocks are kept in 8 bits. Default: on.
    pub nested_scales: bool,
    /// Whether the embedding and the output layer are in 4 bits too. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub embeddings: bool,
    /// Whether experts of which a token goes through a few are in 4 bits too. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub experts: bool,
}

/// Chat template that conversations are written with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateChoice {
    /// The model's own.
    #[default]
    Model,
    /// One of those that Muster has, by its name.
    Named(String),
    /// The model's own; where it has none, one of Muster's by its name.
    ModelOrNamed(String),
    /// This text, in Jinja.
    Text(String),
}

impl TemplateChoice {
    /// Whether nothing but the model's own template is asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::Model
    }
}

/// What becomes of examples that are longer than a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExcessLength {
    /// They are divided into pieces of a block, and every token is learned.
    #[default]
    Split,
    /// They are left out.
    Drop,
    /// Their first tokens are kept.
    Truncate,
    /// They are an error.
    Raise,
}

impl ExcessLength {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How much of the data is held out for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValSetSize {
    None,
    /// A share of the examples, in (0, 1).
    Fraction(f64),
    Examples(usize),
}

/// Which weights are trained: those of an adapter, or all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Lora(LoraSpec),
    Full,
}

/// Low-rank adaptation (Hu et al., 2021), with PEFT's conventions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank, 1 to 4096. Default: 16, or that of the adapter in `model_dir`, as with the next four.
    pub r: usize,
    /// Numerator of the adapter's scale, above 0. Default: 32.
    pub alpha: f64,
    /// Share of the adapter's inputs that is dropped in training, in [0, 1). Default: 0.
    pub dropout: f64,
    /// Linears that have an adapter, sorted. Default: all-linear.
    pub target_modules: TargetModules,
    /// Scale by `alpha / sqrt(r)` instead of `alpha / r`. Default: off.
    pub use_rslora: bool,
    /// Give the rows of the adapted weights magnitudes of their own (DoRA). Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub use_dora: bool,
    /// Biases of the base model that are trained beside the adapter. Default: none.
    #[serde(default, skip_serializing_if = "TrainedBiases::is_none")]
    pub biases: TrainedBiases,
    /// Give the factor B of each adapter a bias. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lora_bias: bool,
    /// What a new adapter's factors start with. Default: as PEFT's default does.
    #[serde(default, skip_serializing_if = "AdapterInit::is_default")]
    pub init: AdapterInit,
    /// Linears that are left out, and those of another rank or alpha. Default: none.
    #[serde(default, skip_serializing_if = "AdapterShape::is_default")]
    pub shape: Box<AdapterShape>,
    /// What is trained of the embedding and the output layer beside the adapter. Default: the rows of tokens that the job adds.
    #[serde(default, skip_serializing_if = "TrainedTokens::is_none")]
    pub tokens: TrainedTokens,
    /// Start from this PEFT adapter. Default: none.
    pub model_dir: Option<PathBuf>,
    /// Where that adapter came from, where it is on the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_source: Option<HubCommit>,
}

/// A repository on the hub at one commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubCommit {
    /// `owner/name`, as the hub has it.
    pub id: String,
    pub commit: String,
}

impl HubCommit {
    /// The id, and as much of the commit as tells it from others.
    pub fn shown(&self) -> String {
        at_commit(&self.id, &self.commit)
    }
}

/// `owner/name at 0123abcd`
fn at_commit(id: &str, commit: &str) -> String {
    /// Characters of a commit that tell it from others.
    const SHOWN: usize = 8;
    let commit: String = commit.chars().take(SHOWN).collect();
    format!("{id} at {commit}")
}

impl LoraSpec {
    /// Rank and scale of the adapter of each linear.
    pub fn sizes(&self) -> AdapterSizes {
        let sizes = AdapterSizes::new(self.r, self.alpha, self.use_rslora, &self.shape);
        sizes.doubled(self.init.is_from_base())
    }

    /// Factor on the output `B A x` of the adapter of a linear that no pattern names.
    pub fn scale(&self) -> f64 {
        scale(self.r, self.alpha, self.use_rslora)
    }
}

/// The linears that have an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetModules {
    /// Every linear but the output layer.
    AllLinear,
    /// Module names (`q_proj`) or path endings (`layers.0.self_attn.q_proj`), as PEFT matches them.
    Named(Vec<String>),
    /// Those whose whole path this regular expression matches (`.*layers\.[0-3]\..*_proj`), as PEFT takes a text.
    Matching(String),
}

/// Length of the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warmup {
    /// A share of all steps, rounded up.
    Ratio(f64),
    Steps(u64),
}

/// When checkpoints are saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveSteps {
    /// By the clock: as often as costs 1% of the run's time, but at most once a minute, and at least every 10 minutes unless a
    /// state needs more than a minute to arrive.
    Auto,
    /// Only the final state is saved.
    Never,
    /// A checkpoint after every so many steps, at least 1.
    Every(u64),
}

/// What comes of the weights with the best evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestModel {
    /// Whether a greater loss is a better one. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub greater_is_better: bool,
    /// Whether they are the result, instead of the last ones. Default: on with `early_stopping_patience`.
    pub load_at_end: bool,
    /// Whether a checkpoint of them is saved, whatever `save_steps` says; so it is too where they are the result. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub save: bool,
    /// When the run ends before its last step. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
}

impl BestModel {
    /// Whether each state that is the best so far is made a checkpoint.
    pub fn saves(&self) -> bool {
        self.save || self.load_at_end
    }

    /// Whether evaluations decide what comes out of the run.
    pub fn decides(&self) -> bool {
        self.load_at_end || self.early_stopping.is_some()
    }
}

/// The run ends once evaluations have improved too little for too long.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// Number of evaluations in a row that may improve too little, at least 1: the run ends with the last of them.
    pub patience: u64,
    /// An improvement by no more than this is too little, 0 or more. Default: 0.
    pub threshold: f64,
}

/// Whether activations are computed again in the backward pass instead of kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checkpointing {
    /// Activations are computed again where a worker has no memory to keep them: each decides for itself, because the result is
    /// the same.
    Auto,
    Always,
    Never,
}

/// What a run continues from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resume {
    /// Continue from the newest checkpoint in `output_dir` that verifies, if there is one.
    Auto,
    Never,
    /// Continue from this checkpoint folder.
    Path(PathBuf),
}

/// How gradients are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Gradients are summed in 64-bit fixed point: the same bits for any number of workers.
    Exact,
    /// Gradients are summed in float32, in whatever order they come.
    Fast,
}

/// How many workers take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSpec {
    /// Number of workers that training waits for. Default: 1.
    pub min_workers: usize,
    /// Most workers that take part; more wait as spares. Default: none.
    pub max_workers: Option<usize>,
}
