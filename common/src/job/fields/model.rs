//! What is trained: dialect and model.

use super::{Field, field};

pub(super) const FIELDS: &[Field] = &[
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
        "float32 | bfloat16 | auto",
        "float32",
        "Storage type of the base weights and of the model that full training writes; `auto` is what the model's config.json names, with float32 for all but bfloat16. Adapters, optimizer and sums are always float32.",
    ),
    field(
        "bf16",
        &["bfloat16"],
        "true | false | auto",
        "auto",
        "Another way to write `base_dtype: bfloat16` (true); false and auto change nothing.",
    ),
    field(
        "load_in_4bit",
        &["use_4bit"],
        "true | false",
        "false",
        "Keep every linear of the decoder in 4 bits (NF4), frozen, under adapters; products are computed in `base_dtype`, which then is bfloat16 unless given. `adapter: qlora` asks for it too.",
    ),
    field(
        "quantization_bit",
        &[],
        "4 | 8 | none",
        "none",
        "LLaMA-Factory's way to write `load_in_4bit: true` (4). With 8 nothing is quantised, and the plan says so.",
    ),
    field(
        "bnb_4bit_quant_type",
        &["quantization_type"],
        "nf4",
        "nf4",
        "The levels of 4 bits.",
    ),
    field(
        "bnb_4bit_use_double_quant",
        &["use_bnb_nested_quant", "double_quantization"],
        "true | false",
        "true",
        "Whether the scales of the 4-bit blocks are kept in 8 bits: 4.13 bits a weight instead of 4.5.",
    ),
    field(
        "bnb_4bit_compute_dtype",
        &[],
        "bfloat16 | float32 | float16",
        "bfloat16",
        "What products are computed in, where `base_dtype` does not say it. float16 is computed as bfloat16.",
    ),
    field(
        "bnb_config_kwargs",
        &[],
        "mapping of bnb_4bit_use_double_quant, bnb_4bit_quant_type, bnb_4bit_compute_dtype",
        "none",
        "Axolotl's way to write them.",
    ),
    field(
        "quantize_embeddings",
        &[],
        "true | false",
        "false",
        "With `load_in_4bit`, keep the embedding and the output layer in 4 bits too: other programs do not, and of small models they are a quarter.",
    ),
    field(
        "special_tokens",
        &[],
        "mapping of bos_token, eos_token, unk_token, pad_token",
        "those of the tokenizer",
        "Axolotl's way to name them. `eos_token` is read as the field of that name; the others must be those of the tokenizer, but `pad_token` may be any, because nothing is learned of padding and none is added.",
    ),
];
