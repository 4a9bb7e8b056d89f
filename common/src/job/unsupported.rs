//! Keys that Axolotl, TRL, PEFT or Transformers know and Muster does not: a user who brings such a file along is told
//! why, and a value that asks for nothing special is passed over.

use super::yaml::{Node, Value};

/// What a foreign key means here.
pub(super) enum Foreign {
    /// It changes nothing with this value.
    Harmless,
    /// It asks for what Muster does not do; the text says what to do about it.
    Unsupported(&'static str),
}

enum Accepts {
    /// Only what switches it off: null, false, none, no, 0, nothing.
    Off,
    /// These too.
    Also(&'static [&'static str]),
    /// Whatever it says, the result is the same.
    Anything,
}

/// A name that ends in `*` stands for all that begin so.
struct Entry(&'static str, Accepts, &'static str);

use Accepts::{Also, Anything, Off};

const ENTRIES: &[Entry] = &[
    // ---- true of every job here, or without meaning here ----
    Entry("model_type", Anything, ""),
    Entry("tokenizer_type", Anything, ""),
    Entry("strict", Anything, ""),
    Entry("flash_attention", Anything, ""),
    Entry("flash_attn*", Anything, ""),
    Entry("sdp_attention", Anything, ""),
    Entry("xformers_attention", Anything, ""),
    Entry("eager_attention", Anything, ""),
    Entry("attn_implementation", Anything, ""),
    Entry("pad_to_sequence_len", Anything, ""),
    Entry("eval_sample_packing", Anything, ""),
    Entry("tf32", Anything, ""),
    Entry("dataloader_*", Anything, ""),
    Entry("ddp_*", Anything, ""),
    Entry("dataset_prepared_path", Anything, ""),
    Entry("dataset_processes", Anything, ""),
    Entry("dataset_num_proc", Anything, ""),
    Entry("preprocessing_num_workers", Anything, ""),
    Entry(
        "save_safetensors",
        Also(&["true"]),
        "weights are always written as safetensors; remove it",
    ),
    Entry("remove_unused_columns", Anything, ""),
    Entry(
        "do_train",
        Also(&["true"]),
        "`start` always trains; remove it",
    ),
    Entry("do_eval", Anything, ""),
    Entry(
        "overwrite_output_dir",
        Off,
        "`output_dir` of another job is never overwritten: name a new folder",
    ),
    Entry("gradient_checkpointing_kwargs", Anything, ""),
    Entry(
        "task_type",
        Also(&["CAUSAL_LM"]),
        "only causal language models are trained",
    ),
    Entry("peft_type", Also(&["LORA"]), "only LoRA is supported"),
    Entry(
        "bias",
        Also(&["none"]),
        "biases are not trained with LoRA; remove it",
    ),
    Entry(
        "lora_bias",
        Also(&["none"]),
        "biases are not trained with LoRA; remove it",
    ),
    Entry(
        "init_lora_weights",
        Also(&["true"]),
        "LoRA starts as PEFT's default does; remove it",
    ),
    Entry(
        "peft_init_lora_weights",
        Also(&["true"]),
        "LoRA starts as PEFT's default does; remove it",
    ),
    Entry(
        "optimizer",
        Also(ADAMW),
        "AdamW is the only optimizer; remove it",
    ),
    Entry(
        "optim",
        Also(ADAMW),
        "AdamW is the only optimizer; remove it",
    ),
    Entry(
        "chat_template",
        Also(&["tokenizer_default"]),
        "the model's own chat template is used; remove it",
    ),
    Entry(
        "save_strategy",
        Also(&["steps"]),
        "give save_steps instead (0: only when the job ends)",
    ),
    Entry(
        "eval_strategy",
        Also(&["steps"]),
        "give eval_steps instead (0: only at the end)",
    ),
    Entry(
        "evaluation_strategy",
        Also(&["steps"]),
        "give eval_steps instead (0: only at the end)",
    ),
    Entry(
        "logging_strategy",
        Also(&["steps"]),
        "give logging_steps instead",
    ),
    Entry(
        "report_to",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    // ---- not done here ----
    Entry(
        "load_in_8bit",
        Off,
        "quantised base weights are not supported; remove it, or set base_dtype: bfloat16",
    ),
    Entry(
        "load_in_4bit",
        Off,
        "quantised base weights are not supported; remove it, or set base_dtype: bfloat16",
    ),
    Entry(
        "bnb_*",
        Off,
        "quantised base weights are not supported; remove it",
    ),
    Entry(
        "gptq*",
        Off,
        "quantised base weights are not supported; remove it",
    ),
    Entry(
        "fp16",
        Off,
        "float16 is not supported; set base_dtype: bfloat16 or float32",
    ),
    Entry(
        "float16",
        Off,
        "float16 is not supported; set base_dtype: bfloat16 or float32",
    ),
    Entry(
        "tokenizer_config",
        Off,
        "the tokenizer is read from base_model; remove it",
    ),
    Entry(
        "tokenizer_name*",
        Off,
        "the tokenizer is read from base_model; remove it",
    ),
    Entry(
        "base_model_config",
        Off,
        "config.json is read from base_model; remove it",
    ),
    Entry(
        "trust_remote_code",
        Off,
        "no code from model folders is ever run; remove it",
    ),
    Entry(
        "special_tokens",
        Off,
        "tokens cannot be added; use the tokenizer as it is",
    ),
    Entry(
        "tokens",
        Off,
        "tokens cannot be added; use the tokenizer as it is",
    ),
    Entry(
        "added_tokens*",
        Off,
        "tokens cannot be added; use the tokenizer as it is",
    ),
    Entry(
        "resize_token_embeddings*",
        Off,
        "tokens cannot be added; use the tokenizer as it is",
    ),
    Entry(
        "default_system_message",
        Off,
        "put the system message into the data",
    ),
    Entry(
        "chat_template_jinja",
        Off,
        "the model's own chat template is used; put the template into the model folder",
    ),
    Entry(
        "test_datasets",
        Off,
        "evaluation data is held out of `datasets` by val_set_size",
    ),
    Entry(
        "validation_file",
        Off,
        "evaluation data is held out of `datasets` by val_set_size",
    ),
    Entry(
        "eval_file",
        Off,
        "evaluation data is held out of `datasets` by val_set_size",
    ),
    Entry(
        "pretraining_dataset",
        Off,
        "list the files under `datasets` with type: text",
    ),
    Entry(
        "eval_batch_size",
        Off,
        "evaluation uses micro_batch_size; remove it",
    ),
    Entry(
        "per_device_eval_batch_size",
        Off,
        "evaluation uses micro_batch_size; remove it",
    ),
    Entry("evals_per_epoch", Off, "give eval_steps instead"),
    Entry("saves_per_epoch", Off, "give save_steps instead"),
    Entry(
        "save_only_model",
        Off,
        "a checkpoint always holds what it takes to resume; remove it",
    ),
    Entry(
        "load_best_model_at_end",
        Off,
        "the last weights are the result; checkpoints keep the others",
    ),
    Entry(
        "early_stopping_patience",
        Off,
        "early stopping is not supported; remove it",
    ),
    Entry(
        "group_by_length",
        Off,
        "packing makes blocks of one length; remove it",
    ),
    Entry(
        "neftune_noise_alpha",
        Off,
        "noise on embeddings is not supported; remove it",
    ),
    Entry(
        "label_smoothing_factor",
        Off,
        "label smoothing is not supported; remove it",
    ),
    Entry(
        "lora_modules_to_save",
        Off,
        "only LoRA layers are trained with adapter: lora; remove it",
    ),
    Entry(
        "modules_to_save",
        Off,
        "only LoRA layers are trained with adapter: lora; remove it",
    ),
    Entry(
        "lora_fan_in_fan_out",
        Off,
        "the supported models have no such layers; remove it",
    ),
    Entry(
        "lora_on_cpu",
        Off,
        "the adapter lives where the model does; remove it",
    ),
    Entry("use_dora", Off, "DoRA is not supported; remove it"),
    Entry("peft_use_dora", Off, "DoRA is not supported; remove it"),
    Entry(
        "peft_layers_to_transform",
        Off,
        "name the layers under lora_target_modules (layers.0.self_attn.q_proj)",
    ),
    Entry(
        "layers_to_transform",
        Off,
        "name the layers under lora_target_modules (layers.0.self_attn.q_proj)",
    ),
    Entry("loraplus_*", Off, "LoRA+ is not supported; remove it"),
    Entry("relora*", Off, "ReLoRA is not supported; remove it"),
    Entry(
        "unfrozen_parameters",
        Off,
        "full training trains every weight; remove it",
    ),
    Entry("lr_groups", Off, "there is one learning rate; remove it"),
    Entry(
        "lr_scheduler_kwargs",
        Off,
        "the scheduler has no further settings; remove it",
    ),
    Entry(
        "cosine_*",
        Off,
        "the cosine falls to 0 at the last step; remove it",
    ),
    Entry(
        "optim_args",
        Off,
        "give adam_beta1, adam_beta2, adam_epsilon and weight_decay instead",
    ),
    Entry(
        "deepspeed",
        Off,
        "the work is shared out without it; remove it and start more workers",
    ),
    Entry(
        "fsdp*",
        Off,
        "the work is shared out without it; remove it and start more workers",
    ),
    Entry("local_rank", Off, "workers have no fixed ranks; remove it"),
    Entry("torch_compile*", Off, "there is no PyTorch here; remove it"),
    Entry(
        "use_liger_kernel",
        Off,
        "the operations are fused already; remove it",
    ),
    Entry(
        "liger_*",
        Off,
        "the operations are fused already; remove it",
    ),
    Entry("plugins", Off, "plugins are not supported; remove it"),
    Entry("rl", Off, "only supervised fine-tuning is supported"),
    Entry("dpo_*", Off, "only supervised fine-tuning is supported"),
    Entry(
        "reward_model",
        Off,
        "only supervised fine-tuning is supported",
    ),
    Entry(
        "wandb_*",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "use_wandb",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "mlflow_*",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "use_mlflow",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "comet_*",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "use_comet",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "use_tensorboard",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry(
        "logging_dir",
        Off,
        "the measurements are in metrics.jsonl in output_dir; remove it",
    ),
    Entry("push_to_hub", Off, "nothing is uploaded; remove it"),
    Entry("hub_*", Off, "nothing is uploaded; remove it"),
    Entry(
        "hf_use_auth_token",
        Off,
        "nothing is downloaded or uploaded; remove it",
    ),
];

const DATASET_ENTRIES: &[Entry] = &[
    Entry(
        "ds_type",
        Also(&["json", "jsonl"]),
        "only JSON Lines files are read",
    ),
    Entry(
        "chat_template",
        Also(&["tokenizer_default"]),
        "the model's own chat template is used; remove it",
    ),
    Entry("name", Off, "a file has no configurations; give its path"),
    Entry("revision", Off, "a file has no revisions; give its path"),
    Entry(
        "roles_to_train",
        Also(&["assistant"]),
        "the assistant's turns are trained; see train_on_inputs",
    ),
    Entry(
        "train_on_eos",
        Also(&["turn", "last", "all"]),
        "the end of every trained turn is learned",
    ),
    Entry("shards", Off, "a file is read as a whole; remove it"),
    Entry(
        "preprocess_shards",
        Off,
        "a file is read as a whole; remove it",
    ),
    Entry(
        "trust_remote_code",
        Off,
        "no code from datasets is ever run; remove it",
    ),
    Entry(
        "message_field_training*",
        Off,
        "per-message loss switches are not supported; remove it",
    ),
    Entry(
        "field_instruction",
        Off,
        "give field_prompt and field_completion instead",
    ),
    Entry("field_input", Off, "give field_prompt instead"),
    Entry("field_output", Off, "give field_completion instead"),
    Entry(
        "field_system",
        Off,
        "put the system message into the messages",
    ),
    Entry(
        "roles",
        Off,
        "the roles are system, user, assistant and tool; rewrite the data",
    ),
];

const ADAMW: &[&str] = &[
    "adamw",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
];

/// What the foreign `key` at the top of a job means; `None` if nobody knows it.
pub(super) fn find(key: &str, node: &Node) -> Option<Foreign> {
    look_up(ENTRIES, key, node)
}

/// What the foreign `key` in an entry of `datasets` means; `None` if nobody knows it.
pub(super) fn find_in_dataset(key: &str, node: &Node) -> Option<Foreign> {
    look_up(DATASET_ENTRIES, key, node)
}

fn look_up(entries: &'static [Entry], key: &str, node: &Node) -> Option<Foreign> {
    let Entry(_, accepts, advice) =
        entries
            .iter()
            .find(|Entry(name, ..)| match name.strip_suffix('*') {
                Some(prefix) => key.starts_with(prefix),
                None => *name == key,
            })?;
    let harmless = is_off(node)
        || match accepts {
            Off => false,
            Anything => true,
            Also(values) => match &node.value {
                Value::Scalar { text, .. } => values.contains(&text.as_str()),
                Value::Sequence(items) => items.iter().all(|item| {
                    matches!(&item.value, Value::Scalar { text, .. } if values.contains(&text.as_str()))
                }),
                Value::Mapping(_) => false,
            },
        };
    Some(if harmless {
        Foreign::Harmless
    } else {
        Foreign::Unsupported(advice)
    })
}

fn is_off(node: &Node) -> bool {
    node.is_null()
        || match &node.value {
            Value::Scalar { text, .. } => {
                matches!(
                    text.to_ascii_lowercase().as_str(),
                    "" | "false" | "no" | "off" | "none" | "0" | "0.0"
                )
            }
            Value::Sequence(items) => items.is_empty(),
            Value::Mapping(entries) => entries.is_empty(),
        }
}
