//! The checked job. Every field is resolved: no alias, default or file name is left to look up.

mod mixture;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::loss::TokenLoss;
use super::lr_scheduler::LrScheduler;
use super::mask::MaskSpec;
use super::optimizer::{Optimizer, RateGroups};
use super::prompt_format::PromptFormat;
use super::split::{Split, TRAIN};

pub use mixture::{MixStrategy, MixtureSpec, Selection, Shard};

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
    /// Decay of AdamW's first moment, in [0, 1). Default: 0.9.
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment, in [0, 1). Default: 0.999.
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
    /// All datasets: those to train on, then those to evaluate.
    pub fn all_datasets(&self) -> impl Iterator<Item = &DatasetSpec> {
        self.datasets.iter().chain(&self.test_datasets)
    }

    /// The dataset of that number, counted as [`all_datasets`](Self::all_datasets) goes.
    pub fn dataset(&self, index: usize) -> Option<&DatasetSpec> {
        self.all_datasets().nth(index)
    }

    /// Leaves out of addresses what may be a key in them, for a record that others read. Digests do not change.
    pub fn hide_keys(&mut self) {
        for dataset in self.datasets.iter_mut().chain(&mut self.test_datasets) {
            dataset.path = dataset.shown().into();
            let of_splits = dataset.split_files.iter_mut().flat_map(|(_, files)| files);
            for file in dataset.data_files.iter_mut().chain(of_splits) {
                *file = shown_address(file);
            }
        }
    }

    /// The base model as people know it: its id on the hub and its commit, or its folder.
    pub fn model_name(&self) -> String {
        /// Characters of a commit that tell it from others.
        const SHOWN: usize = 8;
        let commit = self.model_revision.as_deref().unwrap_or_default();
        let commit: String = commit.chars().take(SHOWN).collect();
        match &self.base_model_id {
            Some(id) => format!("{id} at {commit}"),
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
}

/// Where a result goes on the hub.
#[derive(Clone, Debug, PartialEq)]
pub struct PushSpec {
    /// `owner/name`, or a name of the token's own account.
    pub repo: String,
    /// Whether a repository that is made for it is private.
    pub is_private: bool,
    /// Token for it. None: the environment has one.
    pub token: Option<Secret>,
}

/// A text that is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(...)")
    }
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

/// A dataset of the job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// What the job names: a file of rows, a folder, a pattern of files, or a dataset on the hub.
    pub path: PathBuf,
    /// The files that it stands for, by split and in order; see [`files`](Self::files). Only where the data is prepared.
    #[serde(skip)]
    pub files: Vec<(String, Vec<PathBuf>)>,
    /// Files of it that are read alone. Default: all of a split.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_files: Vec<String>,
    /// The same by split, where the job says which files are which. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split_files: Vec<(String, Vec<String>)>,
    /// Folder in it that is read alone. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<String>,
    /// Configuration of a dataset on the hub. Default: its default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Branch, tag or commit of a dataset on the hub. Default: main.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Where the files came from, where that is the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubSource>,
    /// Which content a run began with, by the name that the job has for it: of standard input the digest, of a file on the web the
    /// version.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<(String, String)>,
    /// Format of the files. Default: they tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Shape of the rows. Default: the columns of each row tell.
    pub kind: DatasetKind,
    /// `train`, or slices of it as in `train[100:200]` or `train[:20%]`; see [`Split`]. Default: every row.
    pub split: Option<String>,
    /// Number of rows of the split that are read at most, at least 1. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u64>,
    /// Which rows of the split those are, and how they count. Default: the first ones, each once.
    #[serde(default, skip_serializing_if = "Selection::is_default")]
    pub selection: Selection,
    pub fields: FieldNames,
    /// The fixed text that rows of instructions are put into. Default: Alpaca's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<PromptFormat>,
    /// Roles of messages by the names that the data has for them, each with the role that the template knows. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<(String, String)>,
    /// Whether the column of system messages is read beside a conversation. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_system_column: bool,
    /// Whether system messages are left out of conversations. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drop_system_message: bool,
    /// Which messages of conversations are learned, and which of their ends. Default: the assistant's, with theirs.
    #[serde(default, skip_serializing_if = "MaskSpec::is_default")]
    pub mask: MaskSpec,
}

impl DatasetSpec {
    /// A dataset of all rows of a path.
    pub fn new(path: PathBuf, kind: DatasetKind, fields: FieldNames) -> Self {
        Self {
            path,
            files: Vec::new(),
            data_files: Vec::new(),
            split_files: Vec::new(),
            data_dir: None,
            name: None,
            revision: None,
            hub: None,
            pinned: Vec::new(),
            format: None,
            kind,
            split: None,
            max_samples: None,
            selection: Selection::default(),
            fields,
            prompt: None,
            roles: Vec::new(),
            has_system_column: false,
            drop_system_message: false,
            mask: MaskSpec::default(),
        }
    }

    /// The files by split; the path itself where nobody has looked what it stands for.
    pub fn files(&self) -> Vec<(String, Vec<PathBuf>)> {
        match self.files.is_empty() {
            true => vec![(TRAIN.to_owned(), vec![self.path.clone()])],
            false => self.files.clone(),
        }
    }

    /// One of the files, split after split; the path where there are fewer.
    pub fn file(&self, index: usize) -> &Path {
        let mut files = self.files.iter().flat_map(|(_, paths)| paths);
        files.nth(index).unwrap_or(&self.path)
    }

    /// The dataset as people know it: its path, or an address without what may be a key in it.
    pub fn shown(&self) -> String {
        let path = self.path.display().to_string();
        shown_address(&path)
    }

    /// The files of the splits that are read, each once.
    pub fn read_files(&self) -> Vec<PathBuf> {
        let splits = self.read_splits().into_iter();
        splits.flat_map(|(_, paths)| paths).collect()
    }

    /// The splits that are read, and their files.
    pub fn read_splits(&self) -> Vec<(String, Vec<PathBuf>)> {
        let split = self.rows().unwrap_or_default();
        let files = self.files().into_iter();
        files.filter(|(name, _)| split.reads(name)).collect()
    }

    /// The files that the job names in it, by split; none where it leaves that open.
    pub fn named_files(&self) -> Vec<(String, Vec<String>)> {
        let mut named = self.split_files.clone();
        if !self.data_files.is_empty() {
            named.push((TRAIN.to_owned(), self.data_files.clone()));
        }
        named
    }

    /// Which rows are read; the error goes after the field's name.
    pub fn rows(&self) -> Result<Split, String> {
        let split = self
            .split
            .as_deref()
            .map_or(Ok(Split::default()), Split::parse)?;
        let names: Vec<&str> = self.files.iter().map(|(name, _)| name.as_str()).collect();
        Ok(split.among(&names))
    }
}

/// An address without its query and without what stands before an `@`, in which keys may be; any other text as it is.
pub fn shown_address(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let rest = rest.split('?').next().unwrap_or_default();
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

/// A dataset on the hub, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubSource {
    /// `owner/name`, as the hub has it.
    pub id: String,
    pub commit: String,
    /// Whether it is the hub's own conversion to Parquet.
    #[serde(default)]
    pub is_converted: bool,
}

/// Shape of the rows of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetKind {
    /// The columns of each row tell.
    Auto,
    Messages,
    PromptCompletion,
    /// Axolotl's Alpaca: an instruction, perhaps an input, and an output, in a fixed text; see [`DatasetSpec::prompt`].
    Alpaca,
    /// Axolotl's `input_output`: texts one after the other, each of which says whether it is learned.
    Segments,
    /// Tokens and which of them are learned.
    Tokenized,
    /// LLaMA-Factory's Alpaca: the same columns, perhaps a system message and earlier turns, as a conversation.
    Instructions,
    Text,
}

/// Names under which a message has its thinking.
pub const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Column names, where a dataset has its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldNames {
    pub messages: String,
    pub prompt: String,
    pub completion: String,
    pub text: String,
    /// Key of the role in a message.
    pub role: String,
    /// Key of the text in a message.
    pub content: String,
    pub tools: String,
    // Left out of the wire and the digest where they have their usual names, as in jobs from before there were these fields.
    #[serde(
        default = "usual::instruction",
        skip_serializing_if = "usual::is_instruction"
    )]
    pub instruction: String,
    #[serde(default = "usual::input", skip_serializing_if = "usual::is_input")]
    pub input: String,
    #[serde(default = "usual::output", skip_serializing_if = "usual::is_output")]
    pub output: String,
    #[serde(default = "usual::system", skip_serializing_if = "usual::is_system")]
    pub system: String,
    #[serde(default = "usual::history", skip_serializing_if = "usual::is_history")]
    pub history: String,
    /// Key of the thinking in a message, where the data has its own, and the key that the template reads it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thinking: Option<[String; 2]>,
}

/// Usual names of columns, and whether a name is one.
mod usual {
    macro_rules! names {
        ($($name:ident $is_usual:ident),*) => {
            $(pub fn $name() -> String {
                stringify!($name).to_owned()
            }

            pub fn $is_usual(name: &str) -> bool {
                name == stringify!($name)
            })*
        };
    }

    names!(instruction is_instruction, input is_input, output is_output, system is_system, history is_history);
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
            instruction: usual::instruction(),
            input: usual::input(),
            output: usual::output(),
            system: usual::system(),
            history: usual::history(),
            thinking: None,
        }
    }
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

impl FieldNames {
    /// Names of rows of ShareGPT's shape: a column `conversations`, messages with `from` and `value`.
    pub fn sharegpt() -> Self {
        Self {
            messages: "conversations".to_owned(),
            role: "from".to_owned(),
            content: "value".to_owned(),
            ..Self::default()
        }
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
    /// Start from this PEFT adapter. Default: none.
    pub model_dir: Option<PathBuf>,
}

impl LoraSpec {
    /// Factor on the adapter's output `B A x`.
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
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

#[cfg(test)]
mod tests {
    use super::shown_address;

    #[test]
    fn addresses_are_shown_without_what_may_be_a_key() {
        for (address, shown) in [
            ("https://h/a.jsonl?sig=SECRET", "https://h/a.jsonl"),
            (
                "https://user:SECRET@h:80/a@b.jsonl",
                "https://h:80/a@b.jsonl",
            ),
            ("http://h?x=1", "http://h"),
            ("what?.jsonl", "what?.jsonl"),
            ("data/a@b.jsonl", "data/a@b.jsonl"),
        ] {
            assert_eq!(shown_address(address), shown);
        }
    }
}
