//! Resolves merged values to a [`JobSpec`]: types, ranges, defaults and the combinations that cannot be.

mod adapter_init;
mod adapter_shape;
mod best_model;
mod cadence;
mod chat_template;
mod datasets;
mod loss;
mod lr_scheduler;
mod mask;
mod method;
mod mixture;
mod optimizer;
mod prompt_types;
mod push;
mod quantization;
mod rate_groups;
mod router_loss;
mod schedule;
mod settings;
mod special_tokens;
mod tokens;
mod unfrozen;
mod user_defined;

use std::path::PathBuf;

use super::did_you_mean::did_you_mean;
use super::limits::{MAX_EPOCHS, MAX_SEQUENCE_LEN, MAX_STEPS};
use super::lr_scheduler::LrScheduler;
use super::number::{parse_number, without_separators};
use super::optimizer::RateGroups;
use super::quote::shorten;
use super::read::Reader;
use super::spec::*;
use super::switch::parse_switch;
use best_model::best_model;
use cadence::{
    eval_on_start, eval_steps, is_evaluated_in_training, is_never_evaluated, save_steps,
};
use chat_template::{chat_template, chat_template_kwargs, eot_tokens};
use datasets::{Wishes, datasets, names, test_datasets};
use loss::token_loss;
use lr_scheduler::lr_scheduler;
use method::{check_optimizer, method};
use mixture::{mixture, shuffle};
use optimizer::optimizer;
use push::push;
use quantization::{base_dtype, is_dtype_of_model, is_pure_bf16, quantization};
use rate_groups::{decays, rate_groups};
use router_loss::router_loss;
use schedule::{batch, max_steps, warmup};
use special_tokens::{eos_token, special_tokens};
use tokens::{new_tokens, overrides};
use unfrozen::unfrozen;

/// Default `save_total_limit` where a run saves checkpoints by the clock: the newest may turn out to be damaged.
const KEPT_BY_DEFAULT: usize = 3;

/// Reads every field. What could not be read is reported and stands at its default, so that the rest is checked too.
pub(super) fn resolve(reader: &mut Reader<'_>) -> JobSpec {
    let output_dir = reader
        .text("output_dir")
        .map_or_else(|| "output".into(), PathBuf::from);
    let resume = resume(reader);
    let method = method(reader, &output_dir, resume == Resume::Never);
    let init_weights = init_weights(reader, &method);
    let quantization = quantization(reader, &method);
    let is_pure_bf16 = is_pure_bf16(reader, &method);
    let learning_rate = learning_rate(reader, &method);
    let (global_batch_size, micro_batch_size) = batch(reader);
    let lr_scheduler = lr_scheduler(reader, learning_rate);
    let (optimizer, betas) = optimizer(reader);
    check_optimizer(reader, &method, &optimizer);
    let lr_groups = rate_groups(reader, &method, &optimizer, learning_rate);
    let weight_decay = weight_decay(reader, &lr_groups);
    let max_steps = max_steps(reader);
    let base_model = base_model(reader);
    let entries = names(reader);
    let datasets = datasets(reader);
    let Evaluation {
        val_set_size,
        test_datasets,
        best_model,
        on_start: eval_on_start,
        saves: (save_steps, save_cadence),
        evals: (eval_steps, eval_cadence),
    } = evaluation(reader, &datasets);
    let output_dir = reader
        .text("output_dir")
        .map_or_else(|| "output".into(), PathBuf::from);
    JobSpec {
        base_model,
        base_model_id: None,
        asked_revision: None,
        model_revision: reader.text("model_revision"),
        init_weights,
        base_dtype: base_dtype(reader, quantization.is_some(), is_pure_bf16),
        pure_bf16: is_pure_bf16 && method == Method::Full,
        quantization,
        mixture: mixture(reader, &datasets),
        datasets,
        chat_template: chat_template(reader, &entries),
        chat_template_kwargs: chat_template_kwargs(reader),
        default_system_message: reader.text("default_system_message"),
        eos_token: eos_token(reader),
        eot_tokens: eot_tokens(reader, &entries),
        tokens: new_tokens(reader),
        added_tokens_overrides: overrides(reader),
        val_set_size,
        test_datasets,
        sequence_len: reader
            .size("sequence_len", 2..=MAX_SEQUENCE_LEN as u64)
            .unwrap_or(DEFAULT_SEQUENCE_LEN),
        excess_length_strategy: excess_length(reader),
        sample_packing: reader.switch("sample_packing").unwrap_or(true),
        train_on_inputs: train_on_inputs(reader),
        shuffle: shuffle(reader),
        method,
        unfrozen: unfrozen(reader),
        global_batch_size,
        micro_batch_size,
        num_epochs: num_epochs(reader),
        max_steps,
        learning_rate,
        lr_scheduler,
        warmup: warmup(reader, lr_scheduler, max_steps),
        optimizer,
        lr_groups,
        token_loss: token_loss(reader),
        router_loss: router_loss(reader),
        adam_beta1: reader.below_one("adam_beta1").unwrap_or(betas.0),
        adam_beta2: reader.below_one("adam_beta2").unwrap_or(betas.1),
        adam_epsilon: adam_epsilon(reader),
        weight_decay,
        max_grad_norm: max_grad_norm(reader),
        gradient_checkpointing: gradient_checkpointing(reader),
        seed: reader.whole("seed", 0..=u64::MAX).unwrap_or(42),
        logging_steps: reader.whole("logging_steps", 1..=MAX_STEPS).unwrap_or(10),
        save_steps,
        save_total_limit: reader
            .size("save_total_limit", 1..=1_000_000)
            .or((save_steps == SaveSteps::Auto && save_cadence.is_none())
                .then_some(KEPT_BY_DEFAULT)),
        eval_steps,
        eval_on_start,
        logging_first_step: reader.switch("logging_first_step").unwrap_or(false),
        save_first_step: reader.switch("save_first_step").unwrap_or(false),
        best_model,
        max_skipped_steps: reader
            .whole("max_skipped_steps", 0..=MAX_STEPS)
            .unwrap_or(5),
        output_dir: output_dir.clone(),
        resume,
        reduction: reduction(reader),
        cluster: cluster(reader),
        test_prompts: reader.texts("test_prompts", None).unwrap_or_default(),
        reading: Reading {
            left_to_data: LeftToData {
                save: save_cadence,
                eval: eval_cadence,
                ..left_to_data(reader, max_steps, lr_scheduler)
            },
            special_tokens: special_tokens(reader),
            notices: Vec::new(),
            push: push(reader, &output_dir),
            prepared_dir: reader.text("dataset_prepared_path").map(PathBuf::from),
            is_dtype_of_model: is_dtype_of_model(reader) && !is_pure_bf16,
        },
    }
}

/// What is evaluated and when, and what comes of it: that decides when there are checkpoints, too.
struct Evaluation {
    val_set_size: ValSetSize,
    test_datasets: Vec<DatasetSpec>,
    best_model: Option<BestModel>,
    on_start: bool,
    saves: (SaveSteps, Option<Cadence>),
    evals: (Option<u64>, Option<Cadence>),
}

fn evaluation(reader: &mut Reader<'_>, datasets: &[DatasetSpec]) -> Evaluation {
    let val_set_size = val_set_size(reader);
    let holds_out = val_set_size != ValSetSize::None;
    let wishes = Wishes {
        holds_out,
        is_off: is_never_evaluated(reader),
        is_asked: is_evaluated_in_training(reader),
    };
    let test_datasets = test_datasets(reader, datasets, wishes);
    let has_validation = holds_out || !test_datasets.is_empty();
    let saves = save_steps(reader);
    let evals = eval_steps(reader, has_validation);
    Evaluation {
        val_set_size,
        test_datasets,
        best_model: best_model(reader, saves, evals, has_validation),
        on_start: eval_on_start(reader, has_validation),
        saves: saves.steps(),
        evals: evals.steps(),
    }
}

fn left_to_data(
    reader: &Reader<'_>,
    max_steps: Option<u64>,
    lr_scheduler: LrScheduler,
) -> LeftToData {
    let left = |names: &[&str]| names.iter().all(|name| reader.given(name).is_none());
    LeftToData {
        sequence_len: left(&["sequence_len"]),
        global_batch_size: left(&["global_batch_size", "gradient_accumulation_steps"]),
        num_epochs: left(&["num_epochs"]) && max_steps.is_none(),
        warmup: left(&["warmup_steps", "warmup_ratio"]) && lr_scheduler.has_warmup(),
        save: None,
        eval: None,
    }
}

fn num_epochs(reader: &mut Reader<'_>) -> f64 {
    reader
        .number("num_epochs", "a number above 0, at most 100000", |n| {
            n > 0.0 && n <= MAX_EPOCHS
        })
        .unwrap_or(1.0)
}

fn learning_rate(reader: &mut Reader<'_>, method: &Method) -> f64 {
    let default = match method {
        Method::Lora(_) => 2e-4,
        Method::Full => 2e-5,
    };
    reader
        .number("learning_rate", "a number above 0, at most 1000", |n| {
            n > 0.0 && n <= 1e3
        })
        .unwrap_or(default)
}

fn adam_epsilon(reader: &mut Reader<'_>) -> f64 {
    reader
        .number("adam_epsilon", "a number above 0, at most 1", |n| {
            n > 0.0 && n <= 1.0
        })
        .unwrap_or(1e-8)
}

fn weight_decay(reader: &mut Reader<'_>, lr_groups: &RateGroups) -> f64 {
    let decay = reader
        .number("weight_decay", "a number from 0 to 1000", |n| {
            (0.0..=1e3).contains(&n)
        })
        .unwrap_or(0.0);
    match decays(reader, lr_groups, decay) {
        true => decay,
        false => 0.0,
    }
}

fn max_grad_norm(reader: &mut Reader<'_>) -> Option<f64> {
    reader
        .number("max_grad_norm", "a number, 0 or more", |n| n >= 0.0)
        .map_or(Some(1.0), |norm| (norm > 0.0).then_some(norm))
}

fn gradient_checkpointing(reader: &mut Reader<'_>) -> Checkpointing {
    reader
        .choice(
            "gradient_checkpointing",
            &[
                (&["auto"], Checkpointing::Auto),
                // What other trainers do with the activations beside that, Muster does not.
                (
                    &["true", "yes", "on", "offload", "offload_disk", "unsloth"],
                    Checkpointing::Always,
                ),
                (&["false", "no", "off"], Checkpointing::Never),
            ],
        )
        .unwrap_or(Checkpointing::Auto)
}

fn reduction(reader: &mut Reader<'_>) -> Reduction {
    reader
        .choice(
            "reduction",
            &[(&["exact"], Reduction::Exact), (&["fast"], Reduction::Fast)],
        )
        .unwrap_or(Reduction::Exact)
}

// ---- model ----

fn base_model(reader: &mut Reader<'_>) -> PathBuf {
    if reader.given("base_model").is_none() {
        reader.missing(
            "`base_model` is missing: the model to fine-tune, a folder or an id on the hub",
        );
    }
    reader.input_path("base_model").unwrap_or_default()
}

fn init_weights(reader: &mut Reader<'_>, method: &Method) -> InitWeights {
    let choices: &[(&[&str], InitWeights)] = &[
        (&["pretrained"], InitWeights::Pretrained),
        (&["random"], InitWeights::Random),
    ];
    let name = match reader.switch("reinit_weights") {
        Some(true) => "reinit_weights",
        _ => "init_weights",
    };
    let init = match name {
        "reinit_weights" => InitWeights::Random,
        _ => reader
            .choice("init_weights", choices)
            .unwrap_or(InitWeights::Pretrained),
    };
    if init == InitWeights::Random
        && matches!(method, Method::Lora(_))
        && let Some(given) = reader.given(name)
    {
        let message = "is random, but an adapter on random weights learns nothing of use; remove `adapter: lora`";
        reader.problem(given, message.to_owned());
    }
    init
}

// ---- data ----

fn val_set_size(reader: &mut Reader<'_>) -> ValSetSize {
    let wanted = "0, a fraction below 1 or a whole number of examples";
    let Some((given, text)) = reader.scalar("val_set_size", wanted) else {
        return ValSetSize::None;
    };
    if let Ok(examples) = without_separators(text).parse::<u32>() {
        return match examples {
            0 => ValSetSize::None,
            examples => ValSetSize::Examples(examples as usize),
        };
    }
    match parse_number(text) {
        Some(0.0) => ValSetSize::None,
        Some(fraction) if fraction > 0.0 && fraction < 1.0 => ValSetSize::Fraction(fraction),
        _ => {
            reader.wrong(given, wanted);
            ValSetSize::None
        }
    }
}

fn excess_length(reader: &mut Reader<'_>) -> ExcessLength {
    let choices: &[(&[&str], ExcessLength)] = &[
        (&["split"], ExcessLength::Split),
        (&["drop"], ExcessLength::Drop),
        (&["truncate"], ExcessLength::Truncate),
        (&["raise", "error"], ExcessLength::Raise),
    ];
    reader
        .choice("excess_length_strategy", choices)
        .unwrap_or_default()
}

fn train_on_inputs(reader: &mut Reader<'_>) -> bool {
    let inputs = reader.switch("train_on_inputs").unwrap_or(false);
    let assistant_only = reader.switch("assistant_only_loss").unwrap_or(true);
    match reader.one_of(
        &["train_on_inputs", "assistant_only_loss"],
        "what is trained",
    ) {
        Some("assistant_only_loss") => !assistant_only,
        _ => inputs,
    }
}

// ---- what is written, and when ----

fn resume(reader: &mut Reader<'_>) -> Resume {
    let wanted = "auto, never or a checkpoint folder";
    let Some((given, text)) = reader.scalar("resume", wanted) else {
        return Resume::Auto;
    };
    match parse_switch(text) {
        Some(true) => return Resume::Auto,
        Some(false) => return Resume::Never,
        None => {}
    }
    match text {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        _ => match reader.input_path("resume") {
            Some(path) if path.is_dir() => Resume::Path(path),
            _ => {
                let hint = did_you_mean(text, ["auto", "never"].into_iter());
                let text = shorten(text);
                let message = format!("must be {wanted}, and there is no folder `{text}`{hint}");
                reader.problem(given, message);
                Resume::Auto
            }
        },
    }
}

// ---- cluster ----

fn cluster(reader: &mut Reader<'_>) -> ClusterSpec {
    let min_workers = reader.size("cluster.min_workers", 1..=10_000).unwrap_or(1);
    let max_workers = reader.size("cluster.max_workers", 1..=10_000);
    if let Some(max) = max_workers
        && max < min_workers
        && let Some(given) = reader.given("cluster.max_workers")
    {
        reader.problem(
            given,
            format!("({max}) is less than `cluster.min_workers` ({min_workers})"),
        );
    }
    ClusterSpec {
        min_workers,
        max_workers,
    }
}
