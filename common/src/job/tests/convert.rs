//! Jobs in Muster's own spelling.

use super::*;

fn converted(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    fs::write(&path, text).unwrap();
    convert(&path, &find_no_adapter).unwrap_or_else(|errors| panic!("{errors}"))
}

const AXOLOTL: &str = "base_model: m\noptimizer: adamw_torch_8bit\ntf32: true\ndatasets:\n  - path: a.jsonl\n    type: chat_template\n    \
    field_messages: conversations\n    message_property_mappings: {role: from, content: value}\n    roles: {user: [human], assistant: ['on']}\n  \
    - path: b c.jsonl\n    type: alpaca\nadapter: lora\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\n\
    num_epochs: 1\nlearning_rate: 2e-4\nmicro_batch_size: 2\nchat_template_kwargs: {enable_thinking: false}\ncluster: {min_workers: 2}\n";

/// Jobs of every dialect that give every field of the table a value of its own, most of them under other names than Muster's.
const JOBS: [&str; 22] = [
    AXOLOTL,
    // Axolotl, with datasets of every kind.
    "base_model: m\nrevision_of_model: v1\nreinit_weights: true\ninit_weights: random\nbf16: full\nspecial_tokens: {bos_token: '<s>', pad_token: '<|x|>'}\n\
     datasets:\n- path: a\n  type: chat_template\n  name: main\n  data_dir: sub\n  data_files: [x.jsonl, 'y z.jsonl']\n  split: 'train[:50%]'\n  \
     revision: v2\n  ds_type: json\n  field_messages: talk\n  message_field_role: who\n  message_field_content: says\n  field_tools: functions\n  \
     field_system: sys\n  roles_to_train: assistant, user\n  train_on_eos: all\n  train_on_eot: last\n  eot_tokens: ['<|eot|>']\n  \
     message_field_training: learn\n  message_field_training_detail: parts\n  drop_system_message: true\n  field_thinking: thoughts\n  \
     template_thinking_key: thinking\n  chat_template: chatml\n  skip: 2\n  shards: 3\n  shards_idx: 1\n  repeat: 2\n  weight: 0.25\n\
     - path: b\n  type: {format: 'Q: {instruction} # {input}', no_input_format: \"{instruction}\\n\", system_format: '[{system}]', system_prompt: 'yes', \
     field_instruction: q, field_input: i, field_output: o}\n  weight: 0.75\nmix_strategy: interleave_over\nchat_template: chatml\n\
     default_system_message: |\n  Be brief,\n    - and kind.\n\neot_tokens: ['<|end|>', '1']\nmin_sample_len: 4\n\
     dataset_exact_deduplication: true\nshuffle_before_merging_datasets: true\ndataset_prepared_path: kept\nsample_packing_sequentially: true\n\
     curriculum_sampling: true\nexcess_length_strategy: drop\nlr_quadratic_warmup: true\nembedding_lr_scale: 0.5\n\
     lr_groups:\n- name: out\n  modules: [o_proj, 'down_proj']\n  lr: 1e-5\n",
    // Axolotl, with the rest of its training.
    "base_model: m\ndatasets:\n- path: a\n  type: completion\n  field: body\n  fraction: 0.5\n- path: b\n  field_prompt: ask\n  \
     field_completion: tell\n  type: prompt_completion\n  fraction: 0.5\ntest_datasets:\n- path: c\n  type: input_output\n  split: dev\n\
     max_eval_samples: 9\nmax_samples: 1_000\nadapter: lora\nlora_target_linear: true\nlora_alpha: 8\nlora_dropout: .05\n\
     peft_use_rslora: true\nloraplus_lr_ratio: 16\nloraplus_lr_embedding: 1e-6\ncosine_min_lr_ratio: 0.1\ncosine_constant_lr_ratio: 0.8\n\
     warmup_ratio: 0.1\nearly_stopping_patience: 3\nearly_stopping_threshold: 0.01\nmetric_for_best_model: loss\ngreater_is_better: true\n\
     evals_per_epoch: 4\nsaves_per_epoch: 2\nuse_eaft: true\neaft_alpha: 0.5\neaft_k: 7\nhub_model_id: me/it\nhub_private_repo: false\n\
     val_set_size: 0\n",
    // An empty adapter, beside what an adapter would have.
    "base_model: m\ndatasets: a\nadapter:\nlora_r: 8\nlora_target_modules:\n- q_proj\nembedding_lr: 1e-5\noptimizer: lion_8bit\n",
    // LLaMA-Factory, told by one key alone.
    "model_name_or_path: m\nstage: sft\ndataset: a.jsonl, b.jsonl\nlora_rank: 4\nlora_target: q_proj,v_proj\ncutoff_len: 64\n\
     num_train_epochs: 2.0\neval_dataset: c.jsonl\nuse_muon: true\nuse_eaft_loss: true\n",
    "model_name_or_path: m\nstage: sft\ndataset: a.jsonl\npissa_init: true\npissa_iter: 4\npissa_convert: true\n",
    // LLaMA-Factory's patience keeps the last weights.
    "model_name_or_path: m\ntemplate: qwen3\ndataset: a.jsonl\nfinetuning_type: full\npure_bf16: true\nval_size: 0.1\neval_strategy: steps\neval_steps: 0.25\n\
     early_stopping_steps: 2\nmask_history: true\nenable_thinking: false\ndefault_system: 'no'\nuse_dft_loss: true\n",
    // The same name in a job of others.
    "base_model: m\ndatasets: a.jsonl\nval_set_size: 4\neval_steps: 5\nsave_steps: 0\nearly_stopping_steps: 2\neval_on_start: true\n",
    // TRL, whose name of the data brings the split `test` along.
    "model_name_or_path: m\ndataset_name: owner/set\neval_strategy: epoch\nsave_strategy: epoch\nuse_peft: true\nlora_target_modules: q_proj, v_proj\n\
     dataset_text_field: body\nassistant_only_loss: false\nload_best_model_at_end: true\noptim: sgd\noptim_args: momentum=0.9,nesterov=true\n\
     lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: '{\"num_cycles\": 2}'\nloss_type: dft\nbf16: true\npush_to_hub: true\nhub_strategy: checkpoint\noutput_dir: its-name\n",
    // Transformers' numbers.
    "model: m\ndatasets: [a, b]\ndataset_train_split: train\ndataset_test_split: held\ninterleave_probs: 0.5, 0.5\nmix_strategy: first_exhausted\n\
     torch_dtype: bfloat16\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 3\nmax_steps: 70\nlr: 1e-3\nwarmup_steps: 7\n\
     adam_beta1: 0.8\nadam_beta2: 0.95\nadam_epsilon: 1.0E-6\nweight_decay: 0.1\ngradient_clipping: 0.5\nlabel_smoothing_factor: 0.1\n\
     gradient_checkpointing: true\nseed: 18446744073709551615\nlogging_steps: 3\nlogging_first_step: true\nsave_first_step: true\n\
     save_total_limit: 2\nresume: never\nshuffle: false\n",
    // Muster's own.
    "dialect: muster\nbase_model: m\ndatasets:\n- path: a\n  type: instructions\n  field_history: before\n  max_samples: 3\n  \
     roles: {user: [customer], assistant: ['on', '7']}\n  chat_template: jinja\n  chat_template_jinja: \"{{ messages }}\\n\"\nglobal_batch_size: 6\nmax_skipped_steps: 1\n\
     save_steps: 30\nreduction: fast\ncluster: {min_workers: 2, max_workers: 3}\ntest_prompts:\n- 'What: is, it?'\n- 'two\n\n  lines'\n- 007\n- '~'\n\
     eos_token: '</s>'\ntrain_on_inputs: true\nsample_packing: false\n",
    "base_model: m\ndatasets:\n- path: a\n  split: 'train+test'\nchat_template: jinja\nchat_template_jinja: '{{ messages }}'\n\
     chat_template_kwargs: {thinking: true, level: '3', depth: 3, share: 1e-3, none: null, off: no, list: [a, 'b, c', {}], 'a b': ''}\ndataset_dir: sets\ndialect: axolotl\n",
    "base_model: m\ndatasets: a\nadapter: lora\nlora_model_dir: ADAPTER\nlr_scheduler: warmup_stable_decay\n\
     lr_scheduler_kwargs:\n  num_decay_steps: 10\n  decay_type: 1-sqrt\n",
    "base_model: m\ndatasets: a\nadapter: lora\nlora_target_modules: '.*layers\\.[0-3]\\..*_proj'\n",
    // Adapters that are not alike.
    "base_model: m\ndatasets: a\nadapter: lora\nrank_pattern: {'layers\\.0\\..*v_proj': 4, q_proj: 2}\nalpha_pattern: {q_proj: 8.5}\n\
     exclude_modules: [down_proj]\nlayers_to_transform: [0, 2]\npeft_use_dora: true\npeft_init_lora_weights: gaussian\nbias: lora_only\nlora_bias: none\n",
    "base_model: m\ndatasets: a\nadapter: lora\nlora_target_parameters: [experts.gate_up_proj, experts.down_proj]\n",
    // Some of the weights.
    "base_model: m\ndatasets: a\nunfrozen_parameters:\n- ^lm_head.weight$\n- 'model.layers.2[0-9]+.mlp'\n",
    // A loss of the router.
    "base_model: m\ndatasets: a\nmodel_config: {output_router_logits: true, router_aux_loss_coef: 0.02}\noutput_router_logits: false\nmoe_aux_loss_coef: 0.5\n",
    // Tokens that are added, and what is trained of them.
    "base_model: m\ndatasets: a\nadapter: lora\ntokens: ['<a>', '7']\nadd_special_tokens: ['<b>']\n\
     special_tokens: {eos_token: '<c>', additional_special_tokens: ['<d>']}\nlora_modules_to_save: [embed_tokens]\ntrainable_token_indices: {lm_head: [3, 1]}\nadded_tokens_overrides: {7: '<e>', 9: '8'}\n",
    "model_name_or_path: m\nstage: sft\ndataset: a.jsonl\nadd_tokens: <a>,<b>\nadditional_target: embed_tokens,lm_head\n",
    // Bases of 4 bits.
    "base_model: m\ndatasets: a\nadapter: qlora\nload_in_4bit: true\nbnb_config_kwargs: {bnb_4bit_use_double_quant: false}\nquantize_embeddings: true\nquantize_moe_experts: true\n",
    "model_name_or_path: m\nstage: sft\ndataset: a.jsonl\nquantization_bit: 4\nquantization_type: nf4\ndouble_quantization: false\nbnb_4bit_compute_dtype: float32\n",
];

#[test]
fn a_converted_job_is_the_same_job_for_every_field_of_every_dialect() {
    let adapter = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"]}"#;
    fs::write(adapter.path().join("adapter_config.json"), config).unwrap();
    let alike = |mut job: JobSpec| {
        job.reading.notices.clear();
        job
    };
    let mut all = String::new();
    for text in JOBS {
        let text = &text.replace("ADAPTER", &adapter.path().display().to_string());
        let own = converted(text);
        let before = load_text(text).unwrap_or_else(|errors| panic!("{errors}"));
        let after = load_text(&own).unwrap_or_else(|errors| panic!("{errors}\n{own}"));
        assert_eq!(alike(before), alike(after), "{own}");
        assert_eq!(
            converted(&own),
            converted(&converted(&own)),
            "it is its own form"
        );
        all += &own;
    }
    let lines: Vec<&str> = all.lines().collect();
    let is_given = |name: &str| match name.split_once('.') {
        None => lines.iter().any(|line| starts_with_key(line, name)),
        Some((_, name)) => lines.iter().any(|line| {
            let inner = line.trim_start_matches([' ', '-']);
            inner.len() < line.len() && starts_with_key(inner, name)
        }),
    };
    let names = fields().iter().map(|field| field.name);
    // The token is printed nowhere.
    let missing: Vec<&str> = names
        .filter(|name| *name != "hub_token" && !is_given(name))
        .collect();
    assert!(missing.is_empty(), "no job here gives {missing:?}");
}

fn starts_with_key(line: &str, name: &str) -> bool {
    line.strip_prefix(name)
        .is_some_and(|rest| rest.starts_with(':'))
}

#[test]
fn what_names_and_keys_say_beside_their_values_is_written_out() {
    let patience = converted(
        "base_model: m\ndatasets: a\nval_set_size: 4\neval_steps: 5\nearly_stopping_steps: 2\n",
    );
    assert!(
        patience.contains("early_stopping_patience: 2  # early_stopping_steps\n")
            && patience.contains("load_best_model_at_end: false"),
        "{patience}"
    );
    let trl = converted("model: m\ndataset_name: a.jsonl\neval_strategy: epoch\n");
    assert!(trl.contains("dataset_test_split: test"), "{trl}");
    let staged = converted("model_name_or_path: m\nstage: sft\ndataset: a.jsonl\n");
    assert!(staged.contains("dialect: llama_factory"), "{staged}");
}

#[test]
fn what_is_not_done_stands_at_the_top_and_other_names_beside_ours() {
    let own = converted(AXOLOTL);
    let comments: Vec<&str> = own
        .lines()
        .take_while(|line| line.starts_with('#'))
        .collect();
    assert!(comments.iter().any(|line| line.contains("tf32")), "{own}");
    assert!(
        comments.iter().any(|line| line.contains("optimizer")),
        "{own}"
    );
    assert!(!own.contains("\ntf32"), "{own}");
    let own = converted("model_name_or_path: m\ntrain_file: a.jsonl\nmax_seq_length: 64\n");
    assert!(
        own.contains("base_model: m  # model_name_or_path\n"),
        "{own}"
    );
    assert!(
        own.contains("sequence_len: 64  # max_seq_length\n"),
        "{own}"
    );
}

#[test]
fn the_schema_has_every_name_of_the_table() {
    let schema = schema();
    for field in fields() {
        let place = match field.name.split_once('.') {
            Some(("cluster", name)) => format!("/properties/cluster/properties/{name}"),
            Some((_, name)) => {
                format!("/properties/datasets/anyOf/1/items/anyOf/1/properties/{name}")
            }
            None => format!("/properties/{}", field.name),
        };
        assert!(schema.pointer(&place).is_some(), "{place}");
    }
}

#[test]
fn a_token_is_printed_nowhere() {
    let own =
        converted("base_model: m\ndatasets: a\nhub_model_id: b/c\nhub_token: hf_verySecret\n");
    assert!(
        !own.contains("hf_verySecret") && own.contains("hub_token is left out"),
        "{own}"
    );
}
