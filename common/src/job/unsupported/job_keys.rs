//! Foreign keys at the top of a job that ask for what is not done here, or done otherwise.

use super::table::Rule::{Inert, InertIf, Instead, InsteadUnless, Only};
use super::table::{Group, NOTHING_SHARDED, OFF, ONLY_SFT};

const NO_TOKENS: &str = "use the tokenizer as it is (tokens: adds some, and added_tokens_overrides: names reserved ones)";
const NO_QUANTISATION: &str =
    "NF4 (load_in_4bit: true) is the one way in which weights are quantised; remove it";
const NOTHING_READ: &str = "nothing is sharded or offloaded, each worker holds the whole model; what else a file named there says \
     (optimizer, clipping, batch) is not read";
const DECIDES: &str = "optimizer, scheduler, clipping, batch and precision are fields of the job (learning_rate, lr_scheduler, \
     max_grad_norm, global_batch_size, base_dtype): give them there, and remove them here or write auto";
/// What decides the result in the settings of DeepSpeed and FSDP.
const DECIDING: &[&str] = &[
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "fp16",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "prescale_gradients",
    "mixed_precision_policy",
    "mixed_precision",
];
const IN_METRICS: &str = "the measurements are in metrics.jsonl in output_dir";
const ONLY_HELD_OUT: &str =
    "evaluation data is held out of `datasets` by val_set_size, or named by test_datasets";
const OWN_TOKENIZER: &str = "the tokenizer is read from base_model; remove it";
const OWN_CONFIG: &str = "config.json is read from base_model and decides it; remove it";
const NO_PER_LAYER: &str = "every layer of the model is there once; remove it";
const NAME_LAYERS: &str = "name the layers under lora_target_modules (layers.0.self_attn.q_proj)";
const PUSHED_TO_MAIN: &str = "what is pushed goes to the branch main of hub_model_id";
const IN_KWARGS: &str = "give it in lr_scheduler_kwargs, or Axolotl's cosine_min_lr_ratio";
const IN_DATASET: &str = "it belongs into an entry of `datasets`";
const SPLIT_NOT_CUT: &str =
    "examples longer than sequence_len are split, and no token is lost; remove it";

pub(super) const GROUPS: &[Group] = &[
    Group {
        keys: &[
            "fsdp*",
            "fsdp",
            "fsdp_config",
            "parallelism_config",
            "max_memory",
            "cpu_offload",
            "gpu_memory_limit",
        ],
        rule: InsteadUnless {
            off: OFF,
            told: NOTHING_SHARDED,
            deciding: DECIDING,
            advice: DECIDES,
        },
    },
    Group {
        keys: &["deepspeed"],
        rule: InsteadUnless {
            off: OFF,
            told: NOTHING_READ,
            deciding: DECIDING,
            advice: DECIDES,
        },
    },
    Group {
        keys: &["use_kt", "kt_*"],
        rule: InsteadUnless {
            off: OFF,
            told: NOTHING_SHARDED,
            deciding: DECIDING,
            advice: DECIDES,
        },
    },
    Group {
        keys: &["accelerate_config"],
        rule: Instead(OFF, NOTHING_READ),
    },
    Group {
        keys: &[
            "num_processes",
            "num_machines",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
            "rdzv_backend",
        ],
        rule: Instead(
            OFF,
            "as many processors and GPUs train as workers join; --local-workers and --device of `start` say which of this machine",
        ),
    },
    Group {
        keys: &["ignore_data_skip"],
        rule: Only(
            OFF,
            "a run that is resumed goes on with the data that it had not seen; remove it",
        ),
    },
    Group {
        keys: &["train_sampling_strategy"],
        rule: InertIf(
            &["random"],
            "give shuffle: false for the order of the data; blocks are packed to one length, and none is padded to another's",
        ),
    },
    Group {
        keys: &["activation_offloading"],
        rule: Instead(
            OFF,
            "activations stay in the memory of the device; gradient_checkpointing says whether they are computed again",
        ),
    },
    Group {
        keys: &["overwrite_output_dir"],
        rule: Instead(
            OFF,
            "nothing is overwritten: a run goes on in its own output_dir (resume: never begins anew), and another job needs another one",
        ),
    },
    Group {
        keys: &["report_to"],
        rule: Instead(OFF, IN_METRICS),
    },
    Group {
        keys: &[
            "wandb*",
            "wandb_project",
            "wandb_entity",
            "wandb_name",
            "wandb_run_id",
            "use_wandb",
            "mlflow_*",
            "use_mlflow",
            "comet_*",
            "use_comet",
            "trackio_*",
            "trackio_bucket_id",
            "trackio_space_id",
            "trackio_static_space_id",
            "use_trackio",
            "project",
            "swanlab_*",
            "use_swanlab",
            "use_tensorboard",
            "use_otel_metrics",
            "otel_*",
            "logging_dir",
            "include_for_metrics",
        ],
        rule: Instead(OFF, IN_METRICS),
    },
    Group {
        keys: &["bnb_*", "gptq*", "quantization*", "quantization_device_map"],
        rule: Only(OFF, NO_QUANTISATION),
    },
    Group {
        keys: &["load_in_8bit", "model_quantization_config*"],
        rule: Instead(
            OFF,
            "the base weights are not quantised, which is more exact; base_dtype: bfloat16 takes 2 bytes for each",
        ),
    },
    Group {
        keys: &["fp8", "fp8_*"],
        rule: Instead(
            OFF,
            "products are computed in float32 or bfloat16, which is more exact",
        ),
    },
    Group {
        keys: &["mixed_precision"],
        rule: Instead(
            OFF,
            "adapters, optimizer and sums are always float32; base_dtype: bfloat16 holds the base weights in 2 bytes each",
        ),
    },
    Group {
        keys: &["tokenizer_use_mistral_common"],
        rule: Instead(
            OFF,
            "the tokenizer is read from tokenizer.json, which Mistral's models have, too",
        ),
    },
    Group {
        keys: &["accelerator_config"],
        rule: InsteadUnless {
            off: OFF,
            told: "batches are what global_batch_size and the schedule of blocks make them",
            deciding: DECIDING,
            advice: DECIDES,
        },
    },
    Group {
        keys: &["qat", "use_onebitllms"],
        rule: Only(
            OFF,
            "training for weights of fewer bits is not supported; remove it",
        ),
    },
    Group {
        keys: &["use_asft_loss", "asft_alpha"],
        rule: Only(
            OFF,
            "it needs a second model beside the one that is trained; remove it, or use use_dft_loss, the other half of that loss",
        ),
    },
    Group {
        keys: &["ebft*", "diffusion"],
        rule: Only(
            OFF,
            "the loss is one of the next token, given those before it; remove it",
        ),
    },
    Group {
        keys: &["use_llama_pro", "mixture_of_depths", "oft_*", "lisa_*"],
        rule: Only(
            OFF,
            "LoRA (adapter: lora) and full training are the two methods; remove it",
        ),
    },
    Group {
        keys: &["infer_backend", "export_*"],
        rule: Only(
            OFF,
            "a job trains; `worker generate` answers prompts, and `worker merge` writes one model of base and adapter",
        ),
    },
    Group {
        keys: &["fp16", "float16", "fp16_opt_level"],
        rule: Instead(
            OFF,
            "the base weights are held in base_dtype (float32 or bfloat16), and nothing is computed in float16, whose range is small",
        ),
    },
    Group {
        keys: &["no_cuda", "use_cpu", "use_mps_device"],
        rule: Only(
            OFF,
            "the flag --device of `start` and `worker join` says what computes",
        ),
    },
    Group {
        keys: &["tokenizer_legacy"],
        rule: Instead(
            &[],
            "tokenizer.json has it built in; one that is made from a tokenizer.model follows `legacy` of tokenizer_config.json",
        ),
    },
    Group {
        keys: &["processor_type"],
        rule: Only(
            OFF,
            "a processor reads pictures or sound, and only text is trained; remove it",
        ),
    },
    Group {
        keys: &["tokenizer_config", "tokenizer_name*"],
        rule: Only(OFF, OWN_TOKENIZER),
    },
    Group {
        keys: &[
            "base_model_config",
            "config_name",
            "model_init_kwargs",
            "model_kwargs",
            "overrides_of_model_kwargs",
            "rope_scaling",
            "rope_theta",
        ],
        rule: Only(OFF, OWN_CONFIG),
    },
    Group {
        keys: &["fix_untrained_tokens", "bos_token"],
        rule: Only(OFF, NO_TOKENS),
    },
    Group {
        keys: &["resize_token_embeddings*", "resize_vocab"],
        rule: Instead(
            OFF,
            "the embedding has a row for each token that is added, and no further ones",
        ),
    },
    Group {
        keys: &["mean_resizing_embeddings"],
        rule: Instead(
            OFF,
            "rows of tokens that are added begin at the mean of the others",
        ),
    },
    Group {
        keys: &["validation_split_percentage"],
        rule: Only(OFF, ONLY_HELD_OUT),
    },
    Group {
        keys: &[
            "streaming",
            "dataset_streaming",
            "streaming_*",
            "pretrain_multipack_*",
            "shuffle_buffer_size",
        ],
        rule: Instead(OFF, "the data is prepared once, before training"),
    },
    Group {
        keys: &["dataset_config", "dataset_config_name"],
        rule: Only(
            OFF,
            "it is the name of one dataset's configuration: give it there, as in datasets: [{path: ID, name: CONFIG}]",
        ),
    },
    Group {
        keys: &[
            "roles_to_train",
            "train_on_eos",
            "train_on_eot",
            "field_messages",
            "message_property_mappings",
        ],
        rule: Only(&[], IN_DATASET),
    },
    Group {
        keys: &["truncation_mode", "truncation_side"],
        rule: Only(&[], SPLIT_NOT_CUT),
    },
    Group {
        keys: &["max_packed_sequence_len"],
        rule: Only(OFF, "give sequence_len and sample_packing: true instead"),
    },
    Group {
        keys: &["eval_delay"],
        rule: Only(OFF, "eval_steps counts from the first step; remove it"),
    },
    Group {
        keys: &["save_only_model"],
        rule: Instead(OFF, "a checkpoint always holds what it takes to resume"),
    },
    Group {
        keys: &["loss_watchdog_*"],
        rule: Instead(
            OFF,
            "a run is not stopped for its loss; steps with a gradient that is not finite are skipped (max_skipped_steps)",
        ),
    },
    Group {
        keys: &[
            "generate_samples",
            "num_generation_samples",
            "generation_max_new_tokens",
        ],
        rule: Instead(
            OFF,
            "nothing is generated during training; test_prompts are asked before and after it",
        ),
    },
    Group {
        keys: &[
            "do_predict",
            "predict_with_generate",
            "do_bench_eval",
            "do_causal_lm_eval",
            "eval_causal_lm_metrics",
            "eval_table_size",
            "eval_max_new_tokens",
        ],
        rule: Instead(
            OFF,
            "an evaluation measures the loss of what is held out, and generates nothing; test_prompts are asked before and after training",
        ),
    },
    Group {
        keys: &["group_by_length"],
        rule: Instead(
            OFF,
            "packing makes blocks of one length, so that none is padded to another's",
        ),
    },
    Group {
        keys: &["auto_find_batch_size"],
        rule: Only(OFF, "give micro_batch_size, which the memory depends on"),
    },
    Group {
        keys: &["data_seed"],
        rule: Only(&[], "`seed` decides the order of the data too; remove it"),
    },
    Group {
        keys: &["neftune_noise_alpha", "noisy_embedding_alpha"],
        rule: Only(OFF, "noise on embeddings is not supported; remove it"),
    },
    Group {
        keys: &["s2_attention", "shift_attn"],
        rule: Only(OFF, "every token attends to all before it; remove it"),
    },
    Group {
        keys: &["layer_replication", "peft_layer_replication"],
        rule: Only(OFF, NO_PER_LAYER),
    },
    Group {
        keys: &["ensure_weight_tying", "peft_ensure_weight_tying"],
        rule: Only(
            OFF,
            "an embedding and an output layer that are one matrix get adapters, or copies, of their own; remove it",
        ),
    },
    Group {
        keys: &["lora_fan_in_fan_out", "fan_in_fan_out"],
        rule: Instead(OFF, "no layer of the supported models is stored that way"),
    },
    Group {
        keys: &["inference_mode"],
        rule: Only(
            OFF,
            "an adapter that is trained is not in inference mode; remove it",
        ),
    },
    Group {
        keys: &["layers_pattern", "peft_layers_pattern"],
        rule: Only(&["none", "layers"], NAME_LAYERS),
    },
    Group {
        keys: &["relora*", "jagged_restart_*"],
        rule: Only(OFF, "ReLoRA is not supported; remove it"),
    },
    Group {
        keys: &["freeze_*"],
        rule: Only(
            OFF,
            "unfrozen_parameters says which weights full training changes, by patterns of their names; remove it",
        ),
    },
    Group {
        keys: &["merge_lora"],
        rule: Only(
            OFF,
            "`worker merge` writes one model of base and adapter; remove it",
        ),
    },
    Group {
        keys: &["cosine_*", "min_lr*", "lr_end"],
        rule: Only(OFF, IN_KWARGS),
    },
    Group {
        // Files of examples have them, but Axolotl reads neither.
        keys: &["eta_min", "lr_div_factor"],
        rule: Instead(
            OFF,
            "Axolotl does nothing with it, and neither is it done here; cosine_min_lr_ratio sets the lowest rate",
        ),
    },
    Group {
        keys: &["adam_beta3", "adam_epsilon2"],
        rule: Only(
            OFF,
            "no optimizer here has a third beta or a second epsilon; remove it",
        ),
    },
    Group {
        keys: &[
            "rl",
            "rl_beta",
            "dpo*",
            "ipo*",
            "orpo*",
            "kto*",
            "simpo*",
            "grpo*",
            "pref_*",
            "ref_model",
            "reward_model",
            "process_reward_model",
            "trl",
        ],
        rule: Only(OFF, ONLY_SFT),
    },
    Group {
        keys: &["hub_always_push"],
        rule: Instead(
            OFF,
            "a checkpoint that is saved while another is pushed waits for that, and of several the newest goes next",
        ),
    },
    Group {
        keys: &["hub_revision"],
        rule: Instead(&["main", "none"], PUSHED_TO_MAIN),
    },
    Group {
        keys: &["push_to_hub_*", "hub_*"],
        rule: Instead(&["false", "none"], PUSHED_TO_MAIN),
    },
    Group {
        keys: &["push_dataset_to_hub"],
        rule: Instead(OFF, "the prepared data stays on this machine"),
    },
    Group {
        keys: &["hf_use_auth_token", "use_auth_token"],
        rule: Inert,
    },
    Group {
        keys: &["use_ray", "ray_*"],
        rule: Instead(OFF, "workers join the coordinator themselves"),
    },
];
