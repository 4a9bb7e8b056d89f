//! What of the model is trained.

use super::{Field, field};

pub(super) const FIELDS: &[Field] = &[
    // ---- method ----
    field(
        "adapter",
        &["finetuning_type"],
        "lora | qlora | full",
        "full",
        "`lora` trains a low-rank adapter, `qlora` one on a base of 4 bits (`load_in_4bit: true`); `full`, or no adapter at all, trains every weight.",
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
        "exclude_modules",
        &["peft_exclude_modules"],
        "list of module names, or a regular expression",
        "none",
        "Linear layers among the targets that get no adapter.",
    ),
    field(
        "layers_to_transform",
        &["peft_layers_to_transform"],
        "list of numbers, from 0",
        "all",
        "The layers whose linear layers get an adapter.",
    ),
    field(
        "rank_pattern",
        &["lora_rank_pattern"],
        "mapping of patterns to ranks",
        "none",
        "Other ranks for some linear layers: the first pattern that fits the end of a path counts, as in PEFT.",
    ),
    field(
        "alpha_pattern",
        &["lora_alpha_pattern"],
        "mapping of patterns to numbers",
        "none",
        "Other alphas, likewise.",
    ),
    field(
        "trainable_token_indices",
        &["peft_trainable_token_indices"],
        "list of ids, or mapping of embed_tokens, lm_head",
        "those of added tokens",
        "Tokens whose rows of the embedding (a list) or of either matrix (a mapping) are trained beside the adapter. A tied output layer is the embedding.",
    ),
    field(
        "lora_modules_to_save",
        &[
            "modules_to_save",
            "peft_modules_to_save",
            "additional_target",
        ],
        "list of embed_tokens, lm_head",
        "none",
        "What is trained as a whole beside the adapter, in float32. Of an output layer that is the embedding each becomes a matrix of its own, as in PEFT.",
    ),
    field(
        "lora_model_dir",
        &["adapter_name_or_path"],
        "folder, or id on the hub",
        "none",
        "Start from this PEFT adapter: a folder, or an adapter on the Hugging Face hub (`owner/adapter`), of the newest commit of `main`. Its adapter_config.json gives the defaults of the other lora fields.",
    ),
];
