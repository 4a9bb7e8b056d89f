//! Names what a job says although something else in it leaves it no effect.
//!
//! Enters: the values as they were given, and the job that they came to. Leaves: a line for people on each reason. Refuses
//! nothing, because the programs that these fields come from take them too.

use super::dialect::Dialect;
use super::fields::{DATASETS, TEST_DATASETS};
use super::merge::Given;
use super::number::parse_number;
use super::optimizer::{Optimizer, is_embedding};
use super::read::Reader;
use super::spec::{
    DatasetKind, HubStrategy, InitWeights, JobSpec, Method, MixStrategy, SaveSteps, TargetModules,
    ValSetSize,
};
use super::yaml::Value;

/// Fields, and why they change nothing.
type Idle = (Vec<String>, String);

/// Adds a line for each reason for which something that was given changes nothing.
pub(super) fn tell(reader: &mut Reader<'_>, job: &JobSpec) {
    let groups = [
        of_optimizer(job).into_iter().collect(),
        of_training(reader, job),
        of_evaluation(reader, job),
        of_data(reader, job),
        of_columns(reader, job),
        of_hub(job),
    ];
    let mut told: Vec<(String, Vec<&str>)> = Vec::new();
    for (fields, why) in groups.into_iter().flatten() {
        for field in &fields {
            let Some(given) = reader.given(field).filter(|given| asks(given)) else {
                continue;
            };
            let written = given.written.as_str();
            match told.iter_mut().find(|(known, _)| *known == why) {
                Some((_, names)) if names.contains(&written) => {}
                Some((_, names)) => names.push(written),
                None => told.push((why.clone(), vec![written])),
            }
        }
    }
    for (why, names) in told {
        let notice = format!("{}: changes nothing {why}", names.join(", "));
        reader.notices.push(notice);
    }
}

/// Whether a value asks for something: neither off, nor 0, nor empty.
fn asks(given: &Given) -> bool {
    let is_empty = match &given.node.value {
        Value::Scalar { text, .. } => text.trim().is_empty() || parse_number(text) == Some(0.0),
        Value::Sequence(items) => items.is_empty(),
        Value::Mapping(entries) => entries.is_empty(),
    };
    !is_empty && !given.is_switched_off()
}

fn idle(fields: &[&str], why: impl Into<String>) -> Idle {
    let fields = fields.iter().map(|field| (*field).to_owned()).collect();
    (fields, why.into())
}

// ---- training ----

/// AdamW's numbers beside an optimizer that has none of them.
fn of_optimizer(job: &JobSpec) -> Option<Idle> {
    const OF_ADAMW: [&str; 3] = ["adam_beta1", "adam_beta2", "adam_epsilon"];
    match job.optimizer {
        Optimizer::Adamw | Optimizer::Adamw8bit => None,
        Optimizer::Sgd { .. } => Some(idle(
            &OF_ADAMW,
            "with SGD, which has neither betas nor an epsilon (optim_args: {momentum: 0.9} gives it a momentum)",
        )),
        Optimizer::Lion | Optimizer::Lion8bit => Some(idle(
            &["adam_epsilon"],
            "with Lion, which has no epsilon",
        )),
        Optimizer::Muon { .. } => has_matrices_alone(&job.method).then(|| {
            let why = "with Muon on adapters, all of which are matrices: AdamW is for embeddings, norms and biases";
            idle(&OF_ADAMW, why)
        }),
    }
}

/// Whether nothing is trained but matrices of linear layers between embedding and output.
fn has_matrices_alone(method: &Method) -> bool {
    match method {
        Method::Full => false,
        Method::Lora(lora) => match &lora.target_modules {
            _ if lora.use_dora || lora.lora_bias || !lora.biases.is_none() => false,
            TargetModules::AllLinear => true,
            TargetModules::Named(names) => !names.iter().any(|name| is_embedding(name)),
            TargetModules::Matching(_) => false,
        },
    }
}

fn of_training(reader: &Reader<'_>, job: &JobSpec) -> Vec<Idle> {
    let mut found = Vec::new();
    let says_pretrained = reader
        .given("init_weights")
        .is_some_and(|given| given.node.is_text("pretrained"));
    if says_pretrained && job.init_weights == InitWeights::Random {
        found.push(idle(&["init_weights"], "with reinit_weights"));
    }
    // A later source that gives the steps replaces the epochs, as whoever gave it knows.
    if job.max_steps.is_some() && reader.layer("num_epochs") >= reader.layer("max_steps") {
        found.push(idle(&["num_epochs"], "with max_steps"));
    }
    let of_four_bits = [
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
        "bnb_config_kwargs",
        "quantize_embeddings",
        "quantize_moe_experts",
    ];
    if job.quantization.is_none() {
        found.push(idle(&of_four_bits, "without load_in_4bit"));
    } else if reader.given("base_dtype").is_some() {
        found.push(idle(&["bnb_4bit_compute_dtype"], "with base_dtype"));
    } else if reader
        .given("pure_bf16")
        .is_some_and(|given| !given.is_switched_off())
    {
        found.push(idle(&["bnb_4bit_compute_dtype"], "with pure_bf16"));
    }
    if let Method::Lora(lora) = &job.method
        && lora.model_dir.is_some()
    {
        let why = "with lora_model_dir, whose adapter has its factors";
        found.push(idle(&["init_lora_weights", "pissa_init"], why));
    }
    if reader
        .given("pissa_init")
        .is_none_or(Given::is_switched_off)
    {
        found.push(idle(&["pissa_iter"], "without pissa_init"));
    }
    if !job.sample_packing {
        found.push(idle(
            &["sample_packing_sequentially"],
            "without sample_packing",
        ));
    }
    found
}

// ---- evaluation ----

fn of_evaluation(reader: &Reader<'_>, job: &JobSpec) -> Vec<Idle> {
    const MAKES_BEST: &str =
        "load_best_model_at_end, early_stopping_patience or save_strategy: best";
    let mut found = Vec::new();
    let has_own = |index: usize| {
        let own = format!("{TEST_DATASETS}.{index}.max_samples");
        reader.given(&own).is_some()
    };
    let named = reader.merged.datasets(TEST_DATASETS);
    if job.test_datasets.is_empty() {
        let why = "without test_datasets: of data that val_set_size holds out, all is evaluated";
        found.push(idle(&["max_eval_samples"], why));
    } else if named > 0 && (0..named).all(has_own) {
        let why = "because every dataset to evaluate says its own";
        found.push(idle(&["max_eval_samples"], why));
    }
    let best = job.best_model;
    if best.is_none_or(|best| best.early_stopping.is_none()) {
        found.push(idle(
            &["early_stopping_threshold"],
            "without early_stopping_patience",
        ));
    }
    let has_validation = job.val_set_size != ValSetSize::None || !job.test_datasets.is_empty();
    let fields = ["metric_for_best_model", "greater_is_better"];
    match best {
        Some(best) if best.saves() || best.decides() => {}
        Some(_) if has_validation => found.push(idle(
            &fields,
            format!("but what run.json tells of the best weights: the last ones are the result without {MAKES_BEST}"),
        )),
        _ => found.push(idle(&fields, format!("without {MAKES_BEST}"))),
    }
    found
}

// ---- data ----

fn of_data(reader: &Reader<'_>, job: &JobSpec) -> Vec<Idle> {
    let mut found = Vec::new();
    if job.datasets.len() == 1 {
        let why = "because there is one dataset to train on";
        let mut fields = vec![
            "shuffle_before_merging_datasets",
            "interleave_probs",
            "datasets.0.weight",
        ];
        if job.mixture.strategy != MixStrategy::Concat {
            fields.push("mix_strategy");
        }
        found.push(idle(&fields, why));
    }
    let all_say = |list: &str, field: &str| {
        let mut entries = 0..reader.merged.datasets(list);
        entries.all(|index| reader.given(&format!("{list}.{index}.{field}")).is_some())
    };
    let of_evaluated =
        reader.given("max_eval_samples").is_some() || all_say(TEST_DATASETS, "max_samples");
    if all_say(DATASETS, "max_samples") && of_evaluated {
        found.push(idle(&["max_samples"], "because every dataset says its own"));
    }
    if all_say(DATASETS, "split") {
        found.push(idle(
            &["dataset_train_split"],
            "because every dataset says its own split",
        ));
    }
    let mut kinds = job.all_datasets().map(|dataset| dataset.kind);
    if !kinds.any(|kind| matches!(kind, DatasetKind::Auto | DatasetKind::Text)) {
        let why = "because no dataset is of plain text";
        found.push(idle(&["dataset_text_field"], why));
    }
    let mut kinds = job.all_datasets().map(|dataset| dataset.kind);
    if !kinds.any(has_conversations) && job.test_prompts.is_empty() {
        let fields = [
            "default_system_message",
            "chat_template_kwargs",
            "enable_thinking",
            "mask_history",
        ];
        found.push(idle(&fields, "because no dataset has conversations"));
    }
    if reader.dialect == Dialect::Usual {
        let why = "but with dialect: llama_factory";
        found.push(idle(&["dataset_dir"], why));
    }
    found
}

/// Whether rows of this kind may be conversations.
fn has_conversations(kind: DatasetKind) -> bool {
    matches!(
        kind,
        DatasetKind::Auto
            | DatasetKind::Messages
            | DatasetKind::PromptCompletion
            | DatasetKind::Instructions
    )
}

/// Fields of datasets that rows of their shape do not have.
fn of_columns(reader: &Reader<'_>, job: &JobSpec) -> Vec<Idle> {
    const OF_CONVERSATIONS: [&str; 4] = [
        "drop_system_message",
        "roles",
        "field_thinking",
        "template_thinking_key",
    ];
    const OF_OTHERS: [&str; 6] = [
        "field_messages",
        "field_prompt",
        "field_completion",
        "field_role",
        "field_content",
        "field_tools",
    ];
    let named = |list: &'static str| {
        let entries = 0..reader.merged.datasets(list);
        entries.map(move |index| format!("{list}.{index}"))
    };
    let entries = named(DATASETS).chain(named(TEST_DATASETS));
    // What `dataset_test_split` adds has no entries of its own.
    let kinds = job.all_datasets().map(|dataset| dataset.kind);
    let mut found = Vec::new();
    for (entry, kind) in entries.zip(kinds) {
        let written = reader.given(&format!("{entry}.type"));
        let Some(Value::Scalar { text, .. }) = written.map(|given| &given.node.value) else {
            continue;
        };
        let fields = match kind {
            DatasetKind::Auto => Vec::new(),
            DatasetKind::Messages => vec!["field_prompt", "field_completion", "field_text"],
            DatasetKind::PromptCompletion => vec!["field_messages", "field_text"],
            DatasetKind::Instructions => vec!["field_thinking", "template_thinking_key"],
            DatasetKind::Alpaca => OF_CONVERSATIONS.to_vec(),
            DatasetKind::Segments | DatasetKind::Tokenized => {
                [&OF_CONVERSATIONS[..], &["field_tools"]].concat()
            }
            DatasetKind::Text => [&OF_CONVERSATIONS[..], &OF_OTHERS].concat(),
        };
        let fields: Vec<String> = fields
            .into_iter()
            .map(|field| format!("{entry}.{field}"))
            .collect();
        found.push((fields, format!("with type: {}", text.trim())));
    }
    found
}

// ---- hub ----

fn of_hub(job: &JobSpec) -> Vec<Idle> {
    let Some(push) = &job.reading.push else {
        let fields = ["hub_model_id", "hub_private_repo", "hub_strategy"];
        return vec![idle(&fields, "because nothing is pushed (push_to_hub)")];
    };
    let is_nothing_saved = job.save_steps == SaveSteps::Never
        && !job.save_first_step
        && !job.best_model.is_some_and(|best| best.saves());
    if push.strategy == HubStrategy::End || !is_nothing_saved {
        return Vec::new();
    }
    let why = "because no checkpoint is saved (save_steps)";
    vec![idle(&["hub_strategy"], why)]
}
