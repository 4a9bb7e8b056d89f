//! Resolves in how many bits the frozen weights are kept, and the type of those that are not quantised.
//!
//! Sources of the names: Transformers' `BitsAndBytesConfig`, TRL's `ModelConfig`, Axolotl's `bnb_config_kwargs`,
//! LLaMA-Factory's `quantization_bit`.

use super::settings::Settings;
use crate::job::read::Reader;
use crate::job::spec::{BaseDtype, Method, Quantization};
use crate::job::yaml::{Node, Value};

const KWARGS: &str = "bnb_config_kwargs";

/// What is kept in 4 bits, if anything is.
pub(super) fn quantization(reader: &mut Reader<'_>, method: &Method) -> Option<Quantization> {
    let asked = asked(reader);
    let nested = nested_scales(reader);
    is_nf4(reader);
    let kwargs = kwargs(reader);
    let embeddings = reader.switch("quantize_embeddings");
    let experts = reader.switch("quantize_moe_experts");
    let asked = asked?;
    if *method == Method::Full
        && let Some(given) = reader.given(asked)
    {
        let message = "needs `adapter: lora`: weights of 4 bits stay as they are, and full training would train them";
        reader.problem(given, message.to_owned());
    }
    Some(Quantization {
        nested_scales: nested.or(kwargs).unwrap_or(true),
        embeddings: embeddings.unwrap_or(false),
        experts: experts.unwrap_or(false),
    })
}

/// Whether the job asks for bfloat16 in all weights. Adapters are float32 all the same.
pub(super) fn is_pure_bf16(reader: &mut Reader<'_>, method: &Method) -> bool {
    let is_pure = reader.switch("pure_bf16").unwrap_or(false);
    if is_pure && matches!(method, Method::Lora(_)) {
        let notice = "pure_bf16: the base weights are bfloat16, and the adapter is trained in float32, which is more exact";
        reader.notices.push(notice.to_owned());
    }
    is_pure
}

/// The type of the base weights that are not quantised, in which all products are computed. `is_pure_bf16` says that what is trained
/// is to be bfloat16, too.
pub(super) fn base_dtype(
    reader: &mut Reader<'_>,
    is_quantised: bool,
    is_pure_bf16: bool,
) -> BaseDtype {
    let choices: &[(&[&str], BaseDtype)] = &[
        (
            &["float32", "fp32", "torch.float32", "float"],
            BaseDtype::Float32,
        ),
        (&["bfloat16", "bf16", "torch.bfloat16"], BaseDtype::Bfloat16),
    ];
    // What the model's own type is, is known once the model is.
    let is_auto = says_auto(reader, "base_dtype");
    let dtype = match is_auto {
        true => None,
        false => reader.choice("base_dtype", choices),
    };
    let bf16: &[(&[&str], bool)] = &[
        (&["true", "full", "yes", "on"], true),
        (&["false", "auto", "no", "off"], false),
    ];
    let bf16 = reader.choice("bf16", bf16).unwrap_or(false);
    let computed = compute_dtype(reader);
    if is_pure_bf16 {
        if dtype == Some(BaseDtype::Float32)
            && let Some(given) = reader.given("base_dtype")
        {
            let message = "is float32, but `pure_bf16` keeps the weights in bfloat16; remove one";
            reader.problem(given, message.to_owned());
        }
        return BaseDtype::Bfloat16;
    }
    if bf16 {
        let fields = match is_auto {
            true => &["bf16"][..],
            false => &["base_dtype", "bf16"],
        };
        return match reader.one_of(fields, "the type of the base weights") {
            Some("base_dtype") => dtype.unwrap_or(BaseDtype::Float32),
            _ => BaseDtype::Bfloat16,
        };
    }
    match (dtype, is_quantised) {
        (Some(dtype), _) => dtype,
        // What everybody computes with beside 4-bit weights: float32 would take twice the memory for activations.
        (None, true) => computed.unwrap_or(BaseDtype::Bfloat16),
        (None, false) => BaseDtype::Float32,
    }
}

/// Whether the base weights have the type that their `config.json` names: Transformers' `dtype: auto`.
pub(super) fn is_dtype_of_model(reader: &Reader<'_>) -> bool {
    let bf16 = reader
        .given("bf16")
        .is_some_and(|given| !given.is_switched_off() && !given.node.is_text("auto"));
    says_auto(reader, "base_dtype") && !bf16
}

fn says_auto(reader: &Reader<'_>, name: &str) -> bool {
    reader
        .given(name)
        .is_some_and(|given| given.node.is_text("auto"))
}

/// The field that asks for 4 bits, if one does.
fn asked(reader: &mut Reader<'_>) -> Option<&'static str> {
    let names = ["adapter", "load_in_4bit", "quantization_bit"];
    let is_qlora = matches!(
        reader.given("adapter").map(|given| &given.node.value),
        Some(Value::Scalar { text, .. }) if text.trim().eq_ignore_ascii_case("qlora")
    );
    let switch = reader.switch("load_in_4bit");
    let bits = quantization_bit(reader);
    if is_qlora
        && switch == Some(false)
        && let Some(given) = reader.given("load_in_4bit")
    {
        let message = "is false, but `adapter: qlora` trains on weights of 4 bits; write adapter: lora, or remove it";
        reader.problem(given, message.to_owned());
    }
    if bits == Some(4)
        && switch == Some(false)
        && let Some(given) = reader.given("quantization_bit")
    {
        let message = "is 4, but `load_in_4bit` is false; remove one";
        reader.problem(given, message.to_owned());
    }
    let asks = [is_qlora, switch == Some(true), bits == Some(4)];
    let asked = names.into_iter().zip(asks).find(|(_, asks)| *asks);
    asked.map(|(name, _)| name)
}

/// LLaMA-Factory's number of bits.
fn quantization_bit(reader: &mut Reader<'_>) -> Option<u8> {
    let bits = reader.choice(
        "quantization_bit",
        &[(&["4"], 4), (&["8"], 8), (&["none", "0", "false"], 0)],
    );
    if bits == Some(8) && reader.switch("load_in_4bit") != Some(true) {
        let told = "quantization_bit: the base weights are not quantised to 8 bits, which is more exact; base_dtype: bfloat16 takes 2 \
                    bytes for each, load_in_4bit: true half a byte";
        reader.notices.push(told.to_owned());
    }
    bits
}

fn nested_scales(reader: &mut Reader<'_>) -> Option<bool> {
    reader.switch("bnb_4bit_use_double_quant")
}

const QUANT_TYPES: &[(&str, ())] = &[("nf4", ())];

/// Checks that the levels are those of NF4.
fn is_nf4(reader: &mut Reader<'_>) {
    reader.choice("bnb_4bit_quant_type", &[(&["nf4"], ())]);
}

const DTYPES: &[(&str, Option<BaseDtype>)] = &[
    ("bfloat16", Some(BaseDtype::Bfloat16)),
    ("float32", Some(BaseDtype::Float32)),
    ("float16", None),
    ("torch.bfloat16", Some(BaseDtype::Bfloat16)),
    ("torch.float32", Some(BaseDtype::Float32)),
    ("torch.float16", None),
    ("bf16", Some(BaseDtype::Bfloat16)),
    ("fp32", Some(BaseDtype::Float32)),
    ("fp16", None),
    ("auto", None),
];

/// What products are computed in; float16 is not, and bfloat16 is as short.
fn compute_dtype(reader: &mut Reader<'_>) -> Option<BaseDtype> {
    let names: Vec<[&str; 1]> = DTYPES.iter().map(|(name, _)| [*name]).collect();
    let choices: Vec<(&[&str], Option<BaseDtype>)> = names
        .iter()
        .zip(DTYPES)
        .map(|(name, (_, dtype))| (&name[..], *dtype))
        .collect();
    let own = reader.choice("bnb_4bit_compute_dtype", &choices);
    let mut kwargs = settings(reader);
    own.or_else(|| kwargs.choice(reader, "bnb_4bit_compute_dtype", DTYPES))?
}

/// Reads Axolotl's mapping of the same settings. Leaves whether scales are nested, where it says so.
fn kwargs(reader: &mut Reader<'_>) -> Option<bool> {
    let mut kwargs = settings(reader);
    let nested = kwargs.switch(reader, "bnb_4bit_use_double_quant");
    kwargs.choice(reader, "bnb_4bit_quant_type", QUANT_TYPES);
    // Read with the type of the base weights.
    kwargs.known.push("bnb_4bit_compute_dtype");
    // How the bytes lie in memory, and what 8 bits would do.
    kwargs.known.extend([
        "bnb_4bit_quant_storage",
        "load_in_4bit",
        "llm_int8_has_fp16_weight",
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
    ]);
    let skipped = kwargs.get("llm_int8_skip_modules");
    if skipped.is_none_or(names_the_head_alone) {
        kwargs.known.push("llm_int8_skip_modules");
    }
    for key in kwargs.unknown() {
        let message = format!(
            "`{KWARGS}` has `{}`, which is not supported: every linear of the decoder is kept in 4 bits, as NF4; remove it",
            key.text
        );
        reader.problems.add(&key.origin, message);
    }
    nested
}

fn settings(reader: &mut Reader<'_>) -> Settings {
    Settings::read(reader, KWARGS, "{bnb_4bit_use_double_quant: true}")
}

/// Whether nothing but the output layer is left out, which never is quantised by that name.
fn names_the_head_alone(node: &Node) -> bool {
    let is_head =
        |node: &Node| matches!(&node.value, Value::Scalar { text, .. } if text.trim() == "lm_head");
    match &node.value {
        Value::Sequence(items) => items.iter().all(is_head),
        _ => is_head(node),
    }
}
