//! Every field that a job may hold: its names, values, default and meaning. The documentation is made from this table,
//! and the reader accepts nothing that is not in it.

/// One field, for people.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Canonical name; `datasets[].` and `cluster.` stand before the fields inside those.
    pub name: &'static str,
    /// Other names for the same thing, from Axolotl, TRL, PEFT and Transformers.
    pub aliases: &'static [&'static str],
    /// What may stand there.
    pub values: &'static str,
    pub default: &'static str,
    pub help: &'static str,
}

/// The lists of datasets that a job has: those to train on, and those to evaluate. Entries of both have the same fields.
pub(super) const DATASETS: &str = "datasets";
pub(super) const TEST_DATASETS: &str = "test_datasets";
pub(super) const LISTS: [&str; 2] = [DATASETS, TEST_DATASETS];

/// All fields, in the order in which a job file is best written.
pub fn fields() -> &'static [Field] {
    FIELDS
}

const fn field(
    name: &'static str,
    aliases: &'static [&'static str],
    values: &'static str,
    default: &'static str,
    help: &'static str,
) -> Field {
    Field {
        name,
        aliases,
        values,
        default,
        help,
    }
}

const FIELDS: &[Field] = &[
    field(
        "dialect",
        &[],
        "auto | llama_factory",
        "auto",
        "Whose names the job uses where they mean something else elsewhere. `auto` takes a job with `stage`, `template` or `dataset_dir` for LLaMA-Factory's.",
    ),
    // ---- model ----
    field(
        "base_model",
        &["model_name_or_path", "model"],
        "folder, or id on the hub",
        "required",
        "Folder with config.json, safetensors and tokenizer files, or a model on the Hugging Face hub (`Qwen/Qwen3-0.6B`).",
    ),
    field(
        "model_revision",
        &["revision_of_model", "revision"],
        "text",
        "none",
        "Revision of the base model, written to adapter_config.json: on the hub a branch, a tag or a commit, `main` unless given.",
    ),
    field(
        "reinit_weights",
        &[],
        "true | false",
        "false",
        "Axolotl's way to write `init_weights: random` (true).",
    ),
    field(
        "init_weights",
        &[],
        "pretrained | random",
        "pretrained",
        "Where the starting weights come from. `random` draws them from the seed and reads only config.json and the tokenizer; full training only.",
    ),
    field(
        "base_dtype",
        &["torch_dtype", "dtype"],
        "float32 | bfloat16",
        "float32",
        "Storage type of the base weights and of the model that full training writes. Adapters, optimizer and sums are always float32.",
    ),
    field(
        "bf16",
        &["bfloat16"],
        "true | false | auto",
        "auto",
        "Another way to write `base_dtype: bfloat16` (true); false and auto change nothing.",
    ),
    field(
        "special_tokens",
        &[],
        "mapping of bos_token, eos_token, unk_token, pad_token",
        "those of the tokenizer",
        "Axolotl's way to name them. `eos_token` is read as the field of that name; the others must be those of the tokenizer, but `pad_token` may be any, because nothing is learned of padding and none is added.",
    ),
    // ---- data ----
    field(
        "datasets",
        &[
            "dataset",
            "dataset_path",
            "dataset_name",
            "train_file",
            "train_files",
        ],
        "list of files or of mappings",
        "required",
        "The training data. An entry is a path or a mapping with `path`.",
    ),
    field(
        "datasets[].path",
        &[],
        "file, folder, pattern, id on the hub, address, or -",
        "required",
        "Where the data is: a file, a folder or a pattern (`data/*.jsonl`) of files, a dataset on the Hugging Face hub (`tatsu-lab/alpaca`), the address of a file (`https://...`), or `-`, standard input.",
    ),
    field(
        "datasets[].data_files",
        &[],
        "file, list of files, or mapping of splits to them",
        "all",
        "Files of a folder or of a dataset on the hub that are read alone; patterns too. Without `path`, the files themselves, or their addresses.",
    ),
    field(
        "datasets[].data_dir",
        &[],
        "folder",
        "none",
        "Folder in a folder or in a dataset on the hub that is read alone.",
    ),
    field(
        "datasets[].name",
        &["subset", "config_name"],
        "name",
        "the default one",
        "Configuration of a dataset on the hub.",
    ),
    field(
        "datasets[].revision",
        &[],
        "branch, tag or commit",
        "main",
        "Revision of a dataset on the hub.",
    ),
    field(
        "datasets[].ds_type",
        &["file_format"],
        "json | csv | parquet | arrow | text",
        "by the files",
        "Format of the files, where their names and contents do not tell.",
    ),
    field(
        "datasets[].type",
        &["kind"],
        "auto | messages | sharegpt | prompt_completion | alpaca | instructions | user_defined | input_output | tokenized | text",
        "auto",
        "Shape of the rows. `auto` goes by the columns of each row. `sharegpt` is messages under that one's names (`conversations`, `from`, `value`). `alpaca` is Axolotl's: an instruction, perhaps an input, and an output, in a fixed text without the chat template; `instructions` is LLaMA-Factory's: the same columns as a conversation, the input a line below the instruction. Axolotl's other types of a fixed text are read by their names (`alpaca:chat`, `alpaca_w_system.load_open_orca`, `gpteacher`, `jeopardy`, `context_qa` and so on); `user_defined` is one that the job gives, also as a mapping (`type: {format: ...}`). `input_output` is a column `segments` of texts with `label`; `tokenized` is `input_ids` with `labels`.",
    ),
    field(
        "datasets[].format",
        &[],
        "text with {instruction} and {input}",
        "'{instruction} {input} '",
        "What a row with an input asks, with `type: user_defined`.",
    ),
    field(
        "datasets[].no_input_format",
        &[],
        "text with {instruction}",
        "'{instruction} '",
        "What a row without an input asks, with `type: user_defined`.",
    ),
    field(
        "datasets[].system_format",
        &[],
        "text with {system}",
        "'{system}'",
        "How a system message is written before that, with `type: user_defined`.",
    ),
    field(
        "datasets[].system_prompt",
        &[],
        "text",
        "none",
        "System message of rows that have no column of it, with `type: user_defined`.",
    ),
    field(
        "datasets[].split",
        &["train_on_split"],
        "name | name[from:to], joined by +",
        "train",
        "Name of a split, or some of its rows: by number (`train[100:200]`, from 0), by share (`train[:20%]`), from the end (`train[-100:]`), several joined by `+`; `all` is every split. A file, or what a pattern matches, is the split `train`.",
    ),
    field(
        "datasets[].chat_template",
        &[],
        "as chat_template of the job",
        "that of the job",
        "Template of this dataset's conversations. All datasets have the same one.",
    ),
    field(
        "datasets[].chat_template_jinja",
        &[],
        "Jinja text, or a file of it",
        "none",
        "The template itself.",
    ),
    field(
        "datasets[].eot_tokens",
        &[],
        "list of tokens",
        "none",
        "As eot_tokens of the job, which they are added to.",
    ),
    field(
        "datasets[].field_messages",
        &["messages_field"],
        "column",
        "messages",
        "Column with the list of messages.",
    ),
    field(
        "datasets[].field_prompt",
        &["prompt_field"],
        "column",
        "prompt",
        "Column with the prompt.",
    ),
    field(
        "datasets[].field_completion",
        &["completion_field"],
        "column",
        "completion",
        "Column with the completion.",
    ),
    field(
        "datasets[].max_samples",
        &["num_samples", "take"],
        "1 or more",
        "all",
        "Number of rows of the split that are read at most: the first ones.",
    ),
    field(
        "datasets[].skip",
        &[],
        "0 or more",
        "0",
        "Number of rows that are passed over first.",
    ),
    field(
        "datasets[].shards",
        &[],
        "1 or more",
        "none",
        "Draw the rows into so many parts of equal size, from the seed, and read one of them: `shards_idx`.",
    ),
    field(
        "datasets[].shards_idx",
        &[],
        "0 or more, below shards",
        "0",
        "Which of the parts is read.",
    ),
    field(
        "datasets[].fraction",
        &[],
        "above 0",
        "none",
        "Share of the rows of all datasets that are to be this one's, against the `fraction` of the others (as in TRL): of each the first rows, as many as keep the shares with no row twice. For a share of its own rows see `split`.",
    ),
    field(
        "datasets[].weight",
        &[],
        "0 or more",
        "none",
        "How likely the next row is this dataset's, against the weights of the others; see `mix_strategy`.",
    ),
    field(
        "datasets[].repeat",
        &[],
        "1 to 1000",
        "1",
        "Number of times that every row of it comes in an epoch.",
    ),
    field(
        "datasets[].roles",
        &[],
        "mapping of roles to lists of names",
        "none",
        "The data's own names of roles, as in `{user: [customer], assistant: [agent]}`. ShareGPT's `human`, `gpt` and `observation` are known without.",
    ),
    field(
        "datasets[].roles_to_train",
        &[],
        "list of roles",
        "assistant",
        "Roles whose messages are learned. `[]`: only messages that say so themselves (`train`, `weight`, message_field_training).",
    ),
    field(
        "datasets[].train_on_eos",
        &[],
        "turn | all | last | none",
        "turn",
        "Which EOS tokens behind messages are learned: of messages that are learned, of all, of the last that is learned, or none.",
    ),
    field(
        "datasets[].train_on_eot",
        &[],
        "turn | all | last | none",
        "as train_on_eos",
        "The same for other tokens that end a message (eot_tokens).",
    ),
    field(
        "datasets[].message_field_training",
        &[],
        "key",
        "none",
        "Key of a message that says whether it is learned, whatever its role. `train`, `weight` and `loss` are read without.",
    ),
    field(
        "datasets[].message_field_training_detail",
        &[],
        "key",
        "none",
        "Key of a message that says which characters of its content are learned: a list of `begin_offset`, `end_offset` (the last one) and `train`. A token is learned where one of them has it whole, or reaches more than one character into it.",
    ),
    field(
        "datasets[].drop_system_message",
        &[],
        "true | false",
        "false",
        "Leave system messages out of this dataset's conversations.",
    ),
    field(
        "datasets[].field_thinking",
        &[],
        "key",
        "reasoning_content",
        "Key of the thinking inside a message, where it is not one that templates read.",
    ),
    field(
        "datasets[].template_thinking_key",
        &[],
        "reasoning_content | thinking | reasoning",
        "reasoning_content",
        "Key under which the chat template reads the thinking.",
    ),
    field(
        "datasets[].field_system",
        &[],
        "column",
        "system",
        "Column with the system message, where `type` is instructions.",
    ),
    field(
        "datasets[].field_history",
        &[],
        "column",
        "history",
        "Column with earlier turns, pairs of texts, where `type` is instructions.",
    ),
    field(
        "datasets[].field_instruction",
        &[],
        "column",
        "instruction",
        "Column with the instruction, where `type` is alpaca or instructions.",
    ),
    field(
        "datasets[].field_input",
        &[],
        "column",
        "input",
        "Column with the input that an instruction may have.",
    ),
    field(
        "datasets[].field_output",
        &[],
        "column",
        "output",
        "Column with the answer to an instruction.",
    ),
    field(
        "datasets[].field_text",
        &["field", "text_field", "text_column"],
        "column",
        "text",
        "Column with plain text.",
    ),
    field(
        "datasets[].field_role",
        &["message_field_role"],
        "key",
        "role",
        "Key of the role inside a message.",
    ),
    field(
        "datasets[].field_content",
        &["message_field_content"],
        "key",
        "content",
        "Key of the content inside a message.",
    ),
    field(
        "datasets[].field_tools",
        &["tools_field"],
        "column",
        "tools",
        "Column with the tools that a chat may call.",
    ),
    field(
        "test_datasets",
        &[
            "eval_dataset",
            "eval_datasets",
            "eval_file",
            "validation_file",
            "validation_files",
        ],
        "list of files or of mappings",
        "none",
        "Data to evaluate that is never trained on, instead of `val_set_size`. Entries are those of `datasets`; where one names no split, it is `test` if there is one.",
    ),
    field(
        "dataset_train_split",
        &["train_on_split"],
        "as split of a dataset",
        "train",
        "`split` of every entry of `datasets` that does not say its own.",
    ),
    field(
        "dataset_test_split",
        &[],
        "as split of a dataset",
        "none; `test` with `dataset_name` and an `eval_strategy`",
        "TRL's way to name data to evaluate: the datasets that are trained on, with this split in place of theirs.",
    ),
    field(
        "dataset_dir",
        &[],
        "folder",
        "data",
        "Folder of LLaMA-Factory's dataset_info.json, which says what the names under `dataset` are; for its dialect only.",
    ),
    field(
        "max_samples",
        &["max_train_samples"],
        "1 or more",
        "all",
        "`max_samples` of every dataset that does not say its own.",
    ),
    field(
        "mix_strategy",
        &[],
        "concat | interleave_under | interleave_over | interleave_once",
        "concat",
        "How datasets are joined: one after the other; or a row of each by turns, or at random with `interleave_probs`, until one of them has no more rows, until every row was there (datasets that are over begin again), or until every row was there once.",
    ),
    field(
        "interleave_probs",
        &[],
        "list of numbers that add up to 1",
        "none",
        "How likely the next row is one of each dataset, in their order. The weights of the datasets are another way to say it.",
    ),
    field(
        "shuffle_before_merging_datasets",
        &[],
        "true | false",
        "false",
        "Draw the rows of each dataset into another order before they are joined, from the seed. With `shuffle` it makes no difference that matters.",
    ),
    field(
        "min_sample_len",
        &[],
        "0 or more, tokens",
        "0",
        "Leave out examples that have fewer tokens.",
    ),
    field(
        "dataset_exact_deduplication",
        &[],
        "true | false",
        "false",
        "Leave out rows whose tokens, and which of them are learned, were there before in any of the datasets. What is held out is then in no training row.",
    ),
    field(
        "dataset_prepared_path",
        &["tokenized_path"],
        "folder",
        "last_run_prepared for `coordinator preprocess`, else the run's own",
        "Folder in which prepared data is kept and found again, by this job and by others that read the same data in the same way.",
    ),
    field(
        "max_eval_samples",
        &[],
        "1 or more",
        "max_samples",
        "`max_samples` of every entry of `test_datasets` that does not say its own.",
    ),
    field(
        "dataset_text_field",
        &[],
        "column",
        "text",
        "`field_text` of every dataset that does not say its own.",
    ),
    field(
        "chat_template",
        &[],
        "tokenizer_default | NAME | tokenizer_default_fallback_NAME | jinja",
        "tokenizer_default",
        "Template that conversations are written with: the model's own, one of Muster's by Axolotl's name for it (`chatml`, `llama3` ...), the model's own or else one of Muster's, or the text of `chat_template_jinja`. The result gets the template that it was trained with.",
    ),
    field(
        "template",
        &[],
        "name",
        "none",
        "LLaMA-Factory's name of the template.",
    ),
    field(
        "chat_template_jinja",
        &["chat_template_path"],
        "Jinja text, or a file of it",
        "none",
        "The template itself; alone it is used as with `chat_template: jinja`.",
    ),
    field(
        "chat_template_kwargs",
        &[],
        "mapping of names and values",
        "none",
        "Variables that the template sees in every conversation. The column `chat_template_kwargs` of a row has the last word.",
    ),
    field(
        "enable_thinking",
        &[],
        "true | false",
        "none",
        "Another way to write `chat_template_kwargs: {enable_thinking: ...}`.",
    ),
    field(
        "default_system_message",
        &["default_system"],
        "text",
        "none",
        "System message of conversations that have none.",
    ),
    field(
        "eos_token",
        &[],
        "token",
        "the tokenizer's",
        "The token that ends texts, in place of the tokenizer's own: any that it has. The result's tokenizer_config.json and generation_config.json name it.",
    ),
    field(
        "eot_tokens",
        &[],
        "list of tokens",
        "none",
        "Tokens that end a turn, beside those that the tokenizer and generation_config.json name.",
    ),
    field(
        "val_set_size",
        &["test_size", "eval_size", "val_size", "test_split_size"],
        "fraction below 1, or a number of examples",
        "0",
        "How much of the data is held out for evaluation. 0 holds nothing out. Data of its own to evaluate is named by test_datasets.",
    ),
    field(
        "sequence_len",
        &[
            "max_length",
            "max_seq_length",
            "max_seq_len",
            "model_max_length",
            "cutoff_len",
        ],
        "2 to 1048576",
        "2048, less for small data",
        "Tokens in a block. Longer examples are split, unless excess_length_strategy says otherwise.",
    ),
    field(
        "excess_length_strategy",
        &[],
        "split | drop | truncate | raise",
        "split",
        "What becomes of examples longer than sequence_len: divided into pieces with every token learned, left out, cut off behind their first tokens, or refused.",
    ),
    field(
        "sample_packing",
        &["packing"],
        "true | false",
        "true",
        "Several examples share a block and never see each other. Off: one example a block.",
    ),
    field(
        "sample_packing_sequentially",
        &[],
        "true | false",
        "false",
        "Pack examples in their order, each beside the one before where there is room, instead of best fit first.",
    ),
    field(
        "train_on_inputs",
        &["train_on_prompt"],
        "true | false",
        "false",
        "Learn prompts and user turns too, instead of the assistant's turns or the completions only.",
    ),
    field(
        "mask_history",
        &[],
        "true | false",
        "false",
        "Learn the last answer of each conversation alone (LLaMA-Factory's name).",
    ),
    field(
        "assistant_only_loss",
        &["completion_only_loss"],
        "true | false",
        "true",
        "The opposite of `train_on_inputs`.",
    ),
    field(
        "shuffle",
        &["shuffle_dataset", "shuffle_merged_datasets"],
        "true | false",
        "true",
        "Draw the order of the blocks anew for every epoch, from the seed. Off: the order of the data.",
    ),
    field(
        "curriculum_sampling",
        &[],
        "true | false",
        "false",
        "Another way to write `shuffle: false`. With sample_packing, short examples fill up earlier blocks unless `sample_packing_sequentially` is on.",
    ),
    // ---- method ----
    field(
        "adapter",
        &["finetuning_type"],
        "lora | full",
        "full",
        "`lora` trains a low-rank adapter; `full`, or no adapter at all, trains every weight.",
    ),
    field(
        "use_peft",
        &[],
        "true | false",
        "false",
        "Another way to write `adapter: lora` (true).",
    ),
    field(
        "lora_r",
        &["r", "lora_rank"],
        "1 to 4096",
        "16",
        "Rank of the adapter.",
    ),
    field(
        "lora_alpha",
        &["alpha"],
        "above 0",
        "32",
        "The update is scaled by lora_alpha / lora_r.",
    ),
    field(
        "lora_dropout",
        &[],
        "from 0, below 1",
        "0",
        "Share of an adapter's inputs that is dropped in training.",
    ),
    field(
        "lora_target_modules",
        &["target_modules", "lora_target"],
        "all-linear, or a list of module names",
        "all-linear",
        "Which linear layers get an adapter; all-linear leaves the output layer out.",
    ),
    field(
        "lora_target_linear",
        &[],
        "true | false",
        "false",
        "Another way to write `lora_target_modules: all-linear` (true).",
    ),
    field(
        "use_rslora",
        &["peft_use_rslora", "lora_use_rslora"],
        "true | false",
        "false",
        "Scale by lora_alpha / sqrt(lora_r) instead.",
    ),
    field(
        "lora_model_dir",
        &["adapter_name_or_path"],
        "folder",
        "none",
        "Start from this PEFT adapter; its adapter_config.json gives the defaults of the other lora fields.",
    ),
    // ---- batch and length ----
    field(
        "global_batch_size",
        &["batch_size", "total_batch_size"],
        "blocks, 1 to 1048576",
        "8 or the next multiple of micro_batch_size, less for small data",
        "Blocks in a step, over all workers together; at most 65,536 times micro_batch_size.",
    ),
    field(
        "micro_batch_size",
        &["per_device_train_batch_size"],
        "blocks, 1 to 4096",
        "1",
        "Blocks that go through the model at once. Divides global_batch_size; the result depends on it, memory too.",
    ),
    field(
        "gradient_accumulation_steps",
        &[],
        "1 to 1048576",
        "none",
        "Another way to give global_batch_size: micro_batch_size times this, whatever the number of workers.",
    ),
    field(
        "num_epochs",
        &["num_train_epochs", "epochs"],
        "above 0, at most 100000",
        "1, or 3 for small data",
        "Passes over the data. A fraction is allowed.",
    ),
    field(
        "max_steps",
        &["max_train_steps"],
        "1 to 10^9, or -1 for none",
        "none",
        "Stop after this many steps instead of num_epochs.",
    ),
    // ---- optimizer ----
    field(
        "learning_rate",
        &["lr"],
        "above 0",
        "2e-4 with lora, 2e-5 without",
        "Peak learning rate.",
    ),
    field(
        "lr_scheduler",
        &["lr_scheduler_type"],
        "cosine | linear | constant | constant_with_warmup | cosine_with_restarts | cosine_with_min_lr | cosine_warmup_with_min_lr | polynomial | inverse_sqrt | warmup_stable_decay | one_cycle | rex",
        "cosine",
        "Curve of the learning rate after the warm-up, as Transformers, or Axolotl for the last two, computes it.",
    ),
    field(
        "lr_scheduler_kwargs",
        &[],
        "mapping, or JSON text",
        "none",
        "Settings of the curve; see Learning rate above.",
    ),
    field(
        "cosine_min_lr_ratio",
        &[],
        "0 to 1",
        "0",
        "Lowest learning rate of cosine or rex as a share of learning_rate.",
    ),
    field(
        "cosine_constant_lr_ratio",
        &[],
        "0 to 1",
        "none",
        "Share of the run at which cosine comes to the rate of cosine_min_lr_ratio and stays there.",
    ),
    field(
        "lr_quadratic_warmup",
        &[],
        "true | false",
        "false",
        "Whether the learning rate rises as the square of the steps, with lr_scheduler: cosine.",
    ),
    field(
        "warmup_ratio",
        &[],
        "0 to 1",
        "0.03; 0 where that is less than 2 steps, or with lr_scheduler: constant",
        "Share of all steps over which the learning rate rises from 0.",
    ),
    field(
        "warmup_steps",
        &["num_warmup_steps"],
        "steps, or a fraction below 1",
        "none",
        "Steps over which the learning rate rises from 0, instead of warmup_ratio.",
    ),
    field(
        "optimizer",
        &["optim"],
        "adamw | sgd | lion | muon",
        "adamw",
        "The optimizer. Every other spelling of these four is known (`adamw_torch_fused`, `paged_adamw_8bit`, `lion_32bit` ...); moments are always float32. See Optimizers above.",
    ),
    field(
        "optim_args",
        &[],
        "mapping, or text (momentum=0.9,nesterov=true)",
        "none",
        "Settings of sgd: momentum, dampening, nesterov.",
    ),
    field(
        "use_muon",
        &[],
        "true | false",
        "false",
        "LLaMA-Factory's way to ask for Muon: as `optimizer: muon`, but norms and biases are trained too, by AdamW.",
    ),
    field(
        "loraplus_lr_ratio",
        &[],
        "above 0",
        "none",
        "LoRA+: the factor B of each adapter learns at this multiple of the learning rate.",
    ),
    field(
        "loraplus_lr_embedding",
        &[],
        "0 or more",
        "none",
        "Rate of adapters on embeddings with LoRA+. There are none here.",
    ),
    field(
        "lr_groups",
        &[],
        "list of {name, modules, lr}",
        "none",
        "Matrices with a learning rate of their own: those whose names contain one of `modules`, of the first group that has one.",
    ),
    field(
        "embedding_lr",
        &[],
        "0 or more",
        "learning_rate",
        "Learning rate of embedding and output layer, which do not decay then; 0 is as none.",
    ),
    field(
        "embedding_lr_scale",
        &[],
        "0 or more",
        "none",
        "Another way to give embedding_lr: this multiple of learning_rate.",
    ),
    // ---- loss ----
    field(
        "loss_type",
        &[],
        "nll | dft",
        "nll",
        "Loss of a trained token: its cross-entropy (nll), or that times the token's own probability (dft, Dynamic Fine-Tuning).",
    ),
    field(
        "use_dft_loss",
        &[],
        "true | false",
        "false",
        "LLaMA-Factory's way to write `loss_type: dft`.",
    ),
    field(
        "use_eaft_loss",
        &[],
        "true | false",
        "false",
        "LLaMA-Factory's entropy-adaptive loss: cross-entropy times (H / 3) ^ eaft_alpha, where H is the entropy of the 20 likeliest tokens.",
    ),
    field(
        "use_eaft",
        &[],
        "true | false",
        "false",
        "Axolotl's entropy-adaptive loss: cross-entropy times H ^ eaft_alpha, where H is the entropy of the eaft_k likeliest tokens.",
    ),
    field(
        "eaft_alpha",
        &[],
        "0 to 100",
        "1",
        "Exponent of the entropy.",
    ),
    field(
        "eaft_k",
        &[],
        "1 to 1024",
        "20",
        "Number of likeliest tokens that the entropy is of.",
    ),
    field(
        "label_smoothing_factor",
        &[],
        "from 0, below 1",
        "0",
        "Share of each target's probability that is spread evenly over all tokens.",
    ),
    field(
        "adam_beta1",
        &[],
        "from 0, below 1",
        "0.9; 0.95 with optimizer: muon",
        "AdamW's decay of the first moment, and Lion's weight of it.",
    ),
    field(
        "adam_beta2",
        &[],
        "from 0, below 1",
        "0.999; 0.99 with lion, 0.95 with optimizer: muon",
        "AdamW's decay of the second moment, and Lion's of its only one.",
    ),
    field(
        "adam_epsilon",
        &["adam_eps"],
        "above 0",
        "1e-8",
        "AdamW's epsilon.",
    ),
    field(
        "weight_decay",
        &[],
        "0 or more",
        "0",
        "Weight decay of matrices: decoupled, but with sgd added to the gradient.",
    ),
    field(
        "max_grad_norm",
        &["gradient_clipping", "gradient_clip_val"],
        "0 or more",
        "1.0",
        "Gradients are scaled down to this norm. 0 does not clip.",
    ),
    field(
        "gradient_checkpointing",
        &["activation_checkpointing"],
        "auto | true | false",
        "auto",
        "Compute activations again in the backward pass: less memory, more time, the same result. `auto`: where a worker has \
         not twice the memory to spare that they take.",
    ),
    field(
        "seed",
        &[],
        "0 to 2^64 - 1",
        "42",
        "Decides the order of the data, dropout and new weights.",
    ),
    // ---- what is written, and when ----
    field(
        "output_dir",
        &[],
        "folder",
        "output",
        "Where results and checkpoints go.",
    ),
    field(
        "logging_steps",
        &[],
        "steps, 1 or more",
        "10",
        "How often a line is printed; metrics.jsonl has every step.",
    ),
    field(
        "logging_first_step",
        &[],
        "true | false",
        "false",
        "Print the first step, too.",
    ),
    field(
        "save_steps",
        &[],
        "auto | steps, 0 or more | a fraction below 1",
        "auto",
        "How often a checkpoint is saved. `auto`: when 100 times what the last one took has passed, from the step to the disk, so that saving costs at most 1% of the time where a state arrives within 6 s; at most once a minute, and at least every 10 minutes unless a state needs longer than a minute to arrive. A number: after so many steps, whatever that costs; a fraction: of all steps. 0: only when the job is stopped. At the end the result itself is written.",
    ),
    field(
        "save_strategy",
        &[],
        "steps | epoch | best | no",
        "steps",
        "Transformers' way to say `saves_per_epoch: 1` (epoch) or `save_steps: 0` (no). `best`: a checkpoint of the weights with the best evaluation so far, and no others.",
    ),
    field(
        "saves_per_epoch",
        &[],
        "0 to 10000",
        "none",
        "How many checkpoints are saved in an epoch, instead of save_steps: after every so many steps, rounded up, which the plan tells. 0 is as none.",
    ),
    field(
        "save_first_step",
        &[],
        "true | false",
        "false",
        "Save a checkpoint after the first step, too.",
    ),
    field(
        "save_total_limit",
        &[],
        "1 or more",
        "3 with `save_steps: auto`, else none: all are kept",
        "How many checkpoints are kept, the newest; the one of the best weights is kept beside them where the job tells which those are.",
    ),
    field(
        "eval_steps",
        &[],
        "steps, 0 or more | a fraction below 1",
        "0: only at the end",
        "After how many steps, or what fraction of all of them, the held-out data is evaluated.",
    ),
    field(
        "eval_strategy",
        &["evaluation_strategy"],
        "steps | epoch | no",
        "steps with eval_steps, else no",
        "Transformers' way to say when the run stops for evaluations: `epoch` is `evals_per_epoch: 1`, and `no` needs `val_set_size: 0`.",
    ),
    field(
        "evals_per_epoch",
        &[],
        "0 to 10000",
        "none",
        "How often the held-out data is evaluated in an epoch, instead of eval_steps: after every so many steps, rounded up, which the plan tells. 0 is as none.",
    ),
    field(
        "eval_on_start",
        &[],
        "true | false",
        "false",
        "Evaluate the weights that the run begins with, too. They are no candidates for the best.",
    ),
    field(
        "load_best_model_at_end",
        &[],
        "true | false",
        "true with early_stopping_patience, else false",
        "The result is the weights with the best evaluation, instead of the last ones. Each that is the best so far is saved as a checkpoint before the next step ends.",
    ),
    field(
        "metric_for_best_model",
        &[],
        "loss | eval_loss",
        "loss",
        "What tells the best weights: the loss of their evaluation.",
    ),
    field(
        "greater_is_better",
        &[],
        "true | false",
        "false",
        "Whether a greater loss is a better one.",
    ),
    field(
        "early_stopping_patience",
        &["early_stopping_steps"],
        "evaluations, 0 or more",
        "0: never",
        "End the run once so many evaluations in a row have not been better than the best one before. The result is the best weights then, unless `load_best_model_at_end: false` or LLaMA-Factory's name `early_stopping_steps` says otherwise.",
    ),
    field(
        "early_stopping_threshold",
        &[],
        "0 or more",
        "0",
        "An evaluation that is better by no more than this counts for early_stopping_patience as if it were not.",
    ),
    field(
        "max_skipped_steps",
        &[],
        "0 or more",
        "5",
        "Steps in a row that may be skipped because a gradient was not finite before the job stops.",
    ),
    field(
        "resume",
        &["resume_from_checkpoint", "auto_resume_from_checkpoints"],
        "auto | never | checkpoint folder",
        "auto",
        "`auto` continues from the newest checkpoint in output_dir that verifies, if there is one. `never` begins anew each time that the command is given; checkpoints of the run before are renamed to `*.old`.",
    ),
    field(
        "test_prompts",
        &["test_prompt"],
        "text, or a list of texts",
        "none",
        "Asked before and after training; both answers are shown.",
    ),
    // ---- hub ----
    field(
        "push_to_hub",
        &[],
        "true | false",
        "true where hub_model_id is given",
        "Push the result to the Hugging Face hub once it is done: adapter or model, tokenizer, and a card, in one commit. A push that fails loses nothing: `coordinator push` does it again.",
    ),
    field(
        "hub_model_id",
        &["export_hub_model_id"],
        "owner/name, or name",
        "the name of output_dir",
        "Id of the result on the hub.",
    ),
    field(
        "hub_private_repo",
        &[],
        "true | false",
        "true",
        "Whether a repository that is made for the result is private.",
    ),
    field(
        "hub_token",
        &["hf_hub_token"],
        "text",
        "HF_TOKEN, or what `hf auth login` has stored",
        "Token of the hub for the push. It is written nowhere; a variable is a better place than a job file.",
    ),
    // ---- cluster ----
    field(
        "reduction",
        &[],
        "exact | fast",
        "exact",
        "`exact` sums gradients in 64-bit fixed point, so that the result does not depend on the workers; `fast` in float32.",
    ),
    field(
        "cluster.min_workers",
        &[],
        "1 to 10000",
        "1",
        "The run waits below it, at the start and also later when workers are lost.",
    ),
    field(
        "cluster.max_workers",
        &[],
        "1 to 10000",
        "none",
        "Further workers wait as spares: one takes the place of a worker that is lost.",
    ),
];

/// How the value of a flag stands on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagValue {
    One,
    /// The flag alone means true.
    Switch,
    /// Each flag adds an entry to the list in this field.
    Entry(&'static str),
    /// The entries of the list in this field follow the flag, or stand between commas.
    List(&'static str),
    /// A key of other trainers, with or without a value.
    Foreign,
}

/// What follows `--base-model` or another flag of a job, with dashes or underscores.
pub fn flag_value(flag: &str) -> FlagValue {
    let name = flag.trim_start_matches('-').replace('-', "_");
    let Some(field) = find(&name) else {
        return match CLUSTER_FLAGS.contains(&name.as_str()) {
            true => FlagValue::One,
            false => FlagValue::Foreign,
        };
    };
    match field.name {
        "datasets" | "test_datasets" | "test_prompts" => FlagValue::Entry(field.name),
        "lora_target_modules" => FlagValue::List(field.name),
        _ if field.values.contains("true | false") => FlagValue::Switch,
        _ => FlagValue::One,
    }
}

/// Every name that may stand behind the dashes of a flag, with underscores: fields of a job, their aliases, and keys of
/// other trainers, of which something can be said at least.
pub fn flag_names() -> impl Iterator<Item = &'static str> {
    names()
        .filter(|name| *name != "cluster")
        .chain(CLUSTER_FLAGS)
        .chain(super::unsupported::names())
}

/// Fields of `cluster`, which have no dots on the command line.
pub(super) const CLUSTER_FLAGS: [&str; 2] = ["min_workers", "max_workers"];

/// A name that a user may have written at the top of a job file, resolved.
pub(super) fn find(name: &str) -> Option<&'static Field> {
    FIELDS
        .iter()
        .find(|field| field.name == name || (!is_nested(field) && field.aliases.contains(&name)))
}

/// A name inside an entry of `datasets`, resolved.
pub(super) fn find_in_dataset(name: &str) -> Option<&'static Field> {
    dataset_fields().find(|field| {
        field.name.strip_prefix("datasets[].") == Some(name) || field.aliases.contains(&name)
    })
}

/// All names at the top of a job file, for a did-you-mean.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FIELDS
        .iter()
        .filter(|field| !is_nested(field))
        .flat_map(|field| std::iter::once(field.name).chain(field.aliases.iter().copied()))
        .chain(["cluster"])
}

/// All names inside an entry of `datasets`, for a did-you-mean.
pub(super) fn dataset_names() -> impl Iterator<Item = &'static str> {
    dataset_fields().flat_map(|field| {
        field
            .name
            .strip_prefix("datasets[].")
            .into_iter()
            .chain(field.aliases.iter().copied())
    })
}

fn dataset_fields() -> impl Iterator<Item = &'static Field> {
    FIELDS
        .iter()
        .filter(|field| field.name.starts_with("datasets[]."))
}

fn is_nested(field: &Field) -> bool {
    field.name.contains('.')
}
