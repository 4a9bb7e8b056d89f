//! The plan: what will be trained on what, for how long, and where it goes.

use common::data::DataCounts;
use common::job::{
    AdapterInit, AdapterShape, BaseDtype, BestModel, InitWeights, JobSpec, LoraSpec, Method,
    Quantization, RateGroups, TargetModules, TrainedBiases, TrainedRows, TrainedTokens, Warmup,
};

use super::text::{Style, bytes, count, grouped, rate, visible, wrapped};
use crate::prepare::{Need, Prepared};

/// Least columns for values, however narrow the terminal is.
const MIN_COLUMNS: usize = 20;

/// Whether workers of this build can compute on GPUs: else what those need is of no use to anybody.
pub const GPUS: bool = cfg!(feature = "cuda");

/// Everything that the plan says.
#[derive(Clone, Debug)]
pub struct PlanView<'a> {
    pub job: &'a JobSpec,
    pub counts: &'a DataCounts,
    /// Name of the architecture, such as `Qwen3`.
    pub architecture: &'a str,
    /// How linears are kept in 4 bits, if they are.
    pub quantization: Option<Quantization>,
    pub parameters: u64,
    pub active_parameters: u64,
    pub trainable_parameters: u64,
    pub total_steps: u64,
    pub slots_per_step: usize,
    pub epochs: f64,
    /// Memory that one worker needs, computing on the processor.
    pub memory: Need,
    /// GPU memory that one worker needs, computing on a GPU.
    pub gpu_memory: Need,
    pub notices: Vec<String>,
}

/// Which weights are kept in 4 bits, behind what else is said of a model.
pub fn bits(quantization: Option<Quantization>) -> &'static str {
    match quantization {
        None => "",
        Some(how) if how.embeddings => ", all matrices in 4 bits",
        Some(how) if how.experts => ", linears and experts in 4 bits",
        Some(_) => ", linears in 4 bits",
    }
}

/// The number of parameters in words, and how many of them take part in a token where not all do.
pub fn parameter_count(all: u64, active: u64) -> String {
    match active == all {
        true => format!("{} parameters", grouped(all)),
        false => format!(
            "{} parameters, {} of them for a token",
            grouped(all),
            grouped(active)
        ),
    }
}

/// The number of all blocks in words, and how many of them are for evaluation.
pub fn block_count(counts: &DataCounts) -> String {
    let all = grouped(counts.blocks + counts.eval_blocks);
    match counts.eval_blocks {
        0 => all,
        held_out => format!("{all} ({} of them to evaluate)", grouped(held_out)),
    }
}

/// Most datasets of which the plan says what each gives.
const MAX_SETS: usize = 30;

/// What each of several datasets gives to an epoch, a line each.
pub fn set_lines(job: &JobSpec, counts: &DataCounts) -> Vec<String> {
    let all: u64 = counts.sets.iter().map(|set| set.tokens).sum();
    let told = job.datasets.iter().zip(&counts.sets).take(MAX_SETS);
    let mut lines: Vec<String> = told
        .map(|(dataset, set)| {
            let of = match set.rows == set.rows_read {
                true => String::new(),
                false => format!(" of {}", grouped(set.rows_read)),
            };
            format!(
                "{:.1}%: {}{of}, {}, {} of them trained: {}",
                100.0 * set.tokens as f64 / all.max(1) as f64,
                count(set.rows, "row"),
                count(set.tokens, "token"),
                grouped(set.trained_tokens),
                dataset.shown(),
            )
        })
        .collect();
    if counts.sets.len() > MAX_SETS {
        let more = counts.sets.len() - MAX_SETS;
        lines.push(format!("and {} more", grouped(more as u64)));
    }
    lines
}

impl<'a> PlanView<'a> {
    pub fn of(prepared: &'a Prepared) -> Self {
        Self {
            job: &prepared.job,
            counts: &prepared.data.counts,
            architecture: prepared.model_config.architecture.name(),
            quantization: prepared.model_config.quantization_of(&prepared.job),
            parameters: prepared.estimate.parameters,
            active_parameters: prepared.estimate.active_parameters,
            trainable_parameters: prepared.estimate.trainable_parameters,
            total_steps: prepared.total_steps(),
            slots_per_step: prepared.slots_per_step(),
            epochs: prepared.schedule.epoch_after(prepared.total_steps()),
            memory: prepared.estimate.processor,
            gpu_memory: prepared.estimate.gpu,
            notices: prepared.notices(),
        }
    }

    /// The rows of the plan, names and values, in the order in which they are shown.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![
            ("model", self.model()),
            ("method", method(self.job)),
            ("trainable", self.trainable()),
            ("dataset", self.dataset()),
        ];
        let sets = set_lines(self.job, self.counts);
        rows.extend(sets.into_iter().map(|set| ("share", set)));
        rows.extend([
            ("blocks", self.blocks()),
            ("steps", self.steps()),
            ("batch", self.batch()),
            ("learning rate", learning_rate(self.job)),
            ("optimizer", self.job.optimizer.to_string()),
            ("loss", self.job.token_loss.to_string()),
            ("memory", memory(&self.memory)),
        ]);
        if GPUS {
            rows.push(("GPU memory", memory(&self.gpu_memory)));
        }
        if let Some(best) = &self.job.best_model {
            rows.push(("best weights", best_weights(best)));
        }
        // What every job has unless it says otherwise is no news.
        let is_usual = |name| match name {
            "optimizer" => self.job.optimizer.is_default(),
            "loss" => self.job.token_loss.is_default(),
            _ => false,
        };
        rows.retain(|(name, _)| !is_usual(*name));
        rows.push(("output", self.job.output_dir.display().to_string()));
        rows
    }

    fn model(&self) -> String {
        let dtype = match self.job.base_dtype {
            BaseDtype::Float32 => "float32",
            BaseDtype::Bfloat16 => "bfloat16",
        };
        let bits = bits(self.quantization);
        let init = match self.job.init_weights {
            InitWeights::Pretrained => "",
            InitWeights::Random => ", random weights",
        };
        format!(
            "{} ({}, {}, {dtype}{bits}{init})",
            self.job.model_name(),
            self.architecture,
            parameter_count(self.parameters, self.active_parameters)
        )
    }

    fn trainable(&self) -> String {
        let share = 100.0 * self.trainable_parameters as f64 / self.parameters.max(1) as f64;
        format!(
            "{} parameters ({share:.2}%)",
            grouped(self.trainable_parameters)
        )
    }

    fn dataset(&self) -> String {
        let counts = self.counts;
        let held_out = match (counts.eval_examples, self.job.test_datasets.len()) {
            (0, _) => String::new(),
            (examples, 0) => format!(", {} held out", grouped(examples)),
            (examples, sets) => format!(
                ", {} to evaluate from {}",
                grouped(examples),
                count(sets as u64, "set")
            ),
        };
        let rows = match counts.divided_rows {
            0 => String::new(),
            _ => format!(" of {}", count(counts.rows, "row")),
        };
        let share = 100.0 * counts.trained_tokens as f64 / counts.tokens.max(1) as f64;
        format!(
            "{}{rows}{held_out}, {}, {share:.0}% of them trained, longest {}",
            count(counts.examples, "example"),
            count(counts.tokens, "token"),
            grouped(counts.longest)
        )
    }

    fn blocks(&self) -> String {
        let counts = self.counts;
        let all = counts.tokens + counts.padding_tokens;
        let padding = 100.0 * counts.padding_tokens as f64 / all.max(1) as f64;
        let packing = match self.job.sample_packing {
            true => "packed",
            false => "one example each",
        };
        format!(
            "{} of {} tokens, {packing}, {padding:.1}% padding",
            block_count(counts),
            grouped(self.job.sequence_len as u64)
        )
    }

    fn steps(&self) -> String {
        let epochs = format!("{:.2}", self.epochs);
        let epochs = epochs.trim_end_matches('0').trim_end_matches('.');
        let plural = if epochs == "1" { "" } else { "s" };
        format!("{} ({epochs} epoch{plural})", grouped(self.total_steps))
    }

    fn batch(&self) -> String {
        let job = self.job;
        format!(
            "{} a step, in {} of {}",
            count(job.global_batch_size as u64, "block"),
            count(self.slots_per_step as u64, "slot"),
            job.micro_batch_size
        )
    }
}

/// Memory that a worker takes, in words, by what becomes of activations. With `gradient_checkpointing: auto` it chooses by what
/// it has.
fn memory(need: &Need) -> String {
    let total = |need: common::memory::Bytes| bytes(need.total());
    match (need.keeping.map(total), need.recomputing.map(total)) {
        (Some(keeping), Some(least)) if keeping != least => {
            format!("{keeping} in each worker, or {least} with gradient checkpointing")
        }
        (Some(keeping), _) => format!("{keeping} in each worker"),
        (None, least) => format!(
            "{} in each worker, with gradient checkpointing",
            least.unwrap_or_default()
        ),
    }
}

fn method(job: &JobSpec) -> String {
    let Method::Lora(lora) = &job.method else {
        return full_fine_tuning(job).to_owned();
    };
    let modules = match &lora.target_modules {
        TargetModules::AllLinear => "all linear layers".to_owned(),
        TargetModules::Named(names) => names.join(", "),
        TargetModules::Matching(pattern) => format!("those that {pattern} matches"),
    };
    let narrowed = narrowed(&lora.shape);
    let modules = match (modules.is_empty(), &lora.shape.parameters[..]) {
        (_, []) => format!("{modules}{narrowed}"),
        (true, parameters) => {
            // Layers and modules that are left out are those of linears.
            let shape = AdapterShape {
                layers: None,
                excluded: None,
                ..(*lora.shape).clone()
            };
            format!("{}{}", parameters.join(", "), self::narrowed(&shape))
        }
        (false, parameters) => format!("{modules}{narrowed} and on {}", parameters.join(", ")),
    };
    let rank_stabilised = if lora.use_rslora {
        ", rank-stabilised"
    } else {
        ""
    };
    let biases = match lora.biases {
        TrainedBiases::None => "",
        TrainedBiases::LoraOnly => ", with their biases",
        TrainedBiases::All => ", with all biases",
    };
    let of_b = if lora.lora_bias {
        ", B with biases"
    } else {
        ""
    };
    let dropout = match lora.dropout > 0.0 {
        true => format!(", dropout {}", lora.dropout),
        false => String::new(),
    };
    let start = match (&lora.model_source, &lora.model_dir) {
        (Some(source), _) => format!(", from {}", source.shown()),
        (None, Some(dir)) => format!(", from {}", dir.display()),
        (None, None) => String::new(),
    };
    format!(
        "{}, rank {}, alpha {}{rank_stabilised}{of_b}{}{dropout} on {modules}{biases}{start}{}",
        adapter_kind(lora),
        lora.r,
        lora.alpha,
        adapter_start(lora),
        beside(&lora.tokens)
    )
}

/// Full training, of which weights.
pub fn full_fine_tuning(job: &JobSpec) -> &'static str {
    match (job.unfrozen.is_all(), job.pure_bf16) {
        (true, false) => "full fine-tuning",
        (true, true) => "full fine-tuning in bfloat16",
        (false, false) => "full fine-tuning of the weights that unfrozen_parameters names",
        (false, true) => {
            "full fine-tuning in bfloat16 of the weights that unfrozen_parameters names"
        }
    }
}

/// `LoRA`, or what else an adapter is.
pub fn adapter_kind(lora: &LoraSpec) -> &'static str {
    if lora.use_dora { "DoRA" } else { "LoRA" }
}

/// What a new adapter starts with, where it is not as usual, behind a comma.
pub fn adapter_start(lora: &LoraSpec) -> String {
    match (
        lora.init == AdapterInit::default(),
        lora.init.is_from_base(),
    ) {
        (true, _) => String::new(),
        (false, false) => format!(", {} start", lora.init),
        (false, true) => format!(", {} start (saved with rank {})", lora.init, 2 * lora.r),
    }
}

/// Which of the linears have no adapter after all, and that some have another rank or alpha.
fn narrowed(shape: &AdapterShape) -> String {
    let mut parts = Vec::new();
    if let Some(layers) = &shape.layers {
        let numbers: Vec<String> = layers.iter().map(usize::to_string).collect();
        parts.push(format!(" of layers {}", numbers.join(", ")));
    }
    match &shape.excluded {
        None | Some(TargetModules::AllLinear) => {}
        Some(TargetModules::Named(names)) => parts.push(format!(" without {}", names.join(", "))),
        Some(TargetModules::Matching(pattern)) => {
            parts.push(format!(" without those that {pattern} matches"));
        }
    }
    match (shape.ranks.len(), shape.alphas.len()) {
        (0, 0) => {}
        (_, 0) => parts.push(" (some of other ranks)".to_owned()),
        (0, _) => parts.push(" (some of other alphas)".to_owned()),
        _ => parts.push(" (some of other ranks and alphas)".to_owned()),
    }
    parts.concat()
}

/// What is trained of the embedding and the output layer.
fn beside(tokens: &TrainedTokens) -> String {
    let both = [
        ("embedding", &tokens.embedding),
        ("output layer", &tokens.head),
    ];
    let told = both.into_iter().filter_map(|(matrix, rows)| match rows {
        TrainedRows::All => Some(format!("the whole {matrix}")),
        TrainedRows::These(ids) if ids.is_empty() => None,
        TrainedRows::These(ids) => {
            let rows = common::text::count(ids.len() as u64, "row");
            Some(format!("{rows} of the {matrix}"))
        }
    });
    let told: Vec<String> = told.collect();
    match told.is_empty() {
        true => String::new(),
        false => format!("; beside it {}", told.join(" and ")),
    }
}

fn best_weights(best: &BestModel) -> String {
    let better = match best.greater_is_better {
        true => "greatest",
        false => "lowest",
    };
    let mut parts = vec![format!("those of the {better} eval_loss")];
    parts.extend(
        best.saves()
            .then(|| "saved as a checkpoint each time".to_owned()),
    );
    parts.extend(best.load_at_end.then(|| "the result of the run".to_owned()));
    parts.extend(best.early_stopping.map(|stopping| {
        let threshold = match stopping.threshold > 0.0 {
            true => format!(" by more than {}", stopping.threshold),
            false => String::new(),
        };
        let evaluations = count(stopping.patience, "evaluation");
        format!("the run ends after {evaluations} without a better one{threshold}")
    }));
    parts.join(", ")
}

fn learning_rate(job: &JobSpec) -> String {
    let scheduler = job.lr_scheduler;
    let warmup = match job.warmup {
        Warmup::Steps(0) => String::new(),
        Warmup::Steps(steps) => format!(", warm-up {}", count(steps, "step")),
        Warmup::Ratio(ratio) if ratio > 0.0 => format!(", warm-up {:.1}%", 100.0 * ratio),
        Warmup::Ratio(_) => String::new(),
    };
    let groups = groups(job);
    format!("{}, {scheduler}{warmup}{groups}", rate(job.learning_rate))
}

/// The rates of some weights beside that of all others.
fn groups(job: &JobSpec) -> String {
    match &job.lr_groups {
        RateGroups::None => String::new(),
        RateGroups::LoraPlus { ratio, embedding } => {
            let embedding = embedding.map(|lr| format!(", of the embedding's {}", rate(lr)));
            let embedding = embedding.unwrap_or_default();
            format!(", of B {ratio} times as much{embedding} (LoRA+)")
        }
        RateGroups::Named { embedding, groups } => {
            let embedding = embedding.map(|lr| ("embedding", lr));
            let groups = groups.iter().map(|group| (group.name.as_str(), group.lr));
            let all: Vec<_> = embedding.into_iter().chain(groups).collect();
            /// Groups that are told; a line has an end.
            const TOLD: usize = 4;
            let told = all.iter().take(TOLD);
            let told: String = told
                .map(|(name, lr)| format!(", {} {}", visible(name), rate(*lr)))
                .collect();
            match all.len() > TOLD {
                true => format!("{told}, and {} more", all.len() - TOLD),
                false => told,
            }
        }
    }
}

/// The plan as text: the table, then what else the user should know. `columns` is the width of the terminal, where it is one.
pub(super) fn render(plan: &PlanView, style: Style, columns: Option<usize>) -> String {
    let rows = plan.rows();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let room = columns.map_or(usize::MAX, |columns| {
        columns.saturating_sub(width + 2).max(MIN_COLUMNS)
    });
    let notices = plan.notices.iter().map(|notice| ("note", notice));
    let rows = rows.iter().map(|(name, value)| (*name, value));
    let mut text = String::new();
    for (name, value) in rows.chain(notices) {
        let name = style.bold(&format!("{name:<width$}"));
        let value = wrapped(&visible(value), room).join(&format!("\n{:width$}  ", ""));
        text += &format!("{name}  {value}\n");
    }
    text
}
