//! In how many bits the frozen weights are kept, whoever's names say it.

use super::*;
use crate::job::{BaseDtype, Quantization};

const USUAL: Quantization = Quantization {
    nested_scales: true,
    embeddings: false,
    experts: false,
};

#[test]
fn four_bits_are_asked_for_by_the_names_of_each_program() {
    for text in [
        "adapter: qlora\n",
        "adapter: qlora\nload_in_4bit: true\nload_in_8bit: false\n",
        "adapter: lora\nload_in_4bit: true\n",
        "use_peft: true\nload_in_4bit: true\nbnb_4bit_quant_type: nf4\nuse_bnb_nested_quant: true\n",
        "use_peft: true\nuse_4bit: true\n",
        "stage: sft\nquantization_bit: 4\nquantization_method: bnb\ndouble_quantization: true\n",
        "adapter: qlora\nbnb_config_kwargs: {llm_int8_has_fp16_weight: false, bnb_4bit_use_double_quant: true, bnb_4bit_quant_type: nf4}\n",
    ] {
        let job = job(text);
        assert_eq!(job.quantization, Some(USUAL), "{text}");
        assert_eq!(job.base_dtype, BaseDtype::Bfloat16, "{text}");
        assert!(matches!(job.method, Method::Lora(_)), "{text}");
    }
    for text in [
        "adapter: lora\n",
        "adapter: lora\nload_in_4bit: false\n",
        "stage: sft\nquantization_bit: none\n",
    ] {
        assert_eq!(job(text).quantization, None, "{text}");
    }
}

#[test]
fn scales_and_types_are_as_they_are_asked_for() {
    let of = |text: &str| {
        let job = job(&format!("adapter: qlora\n{text}"));
        (job.quantization.unwrap(), job.base_dtype)
    };
    let plain = Quantization {
        nested_scales: false,
        ..USUAL
    };
    let all = Quantization {
        embeddings: true,
        ..USUAL
    };
    let experts = Quantization {
        experts: true,
        ..USUAL
    };
    let (float32, bfloat16) = (BaseDtype::Float32, BaseDtype::Bfloat16);
    assert_eq!(of("bnb_4bit_use_double_quant: false\n"), (plain, bfloat16));
    assert_eq!(
        of("bnb_config_kwargs: {bnb_4bit_use_double_quant: false}\n"),
        (plain, bfloat16)
    );
    assert_eq!(of("quantize_embeddings: true\n"), (all, bfloat16));
    assert_eq!(of("quantize_moe_experts: true\n"), (experts, bfloat16));
    assert_eq!(of("bnb_4bit_compute_dtype: float32\n"), (USUAL, float32));
    assert_eq!(of("bnb_4bit_compute_dtype: float16\n"), (USUAL, bfloat16));
    assert_eq!(
        of("bnb_config_kwargs: {bnb_4bit_compute_dtype: float32}\n"),
        (USUAL, float32)
    );
    assert_eq!(of("base_dtype: float32\n"), (USUAL, float32));
    assert_eq!(of("bf16: auto\n"), (USUAL, bfloat16));
    assert_eq!(of("bf16: true\n"), (USUAL, bfloat16));
}

#[test]
fn pure_bfloat16_is_for_full_training_and_makes_the_base_bfloat16() {
    let of = |text: &str| {
        let job = job(text);
        (job.base_dtype, job.pure_bf16, job.trained_dtype())
    };
    let (float32, bfloat16) = (BaseDtype::Float32, BaseDtype::Bfloat16);
    assert_eq!(of("pure_bf16: true\n"), (bfloat16, true, bfloat16));
    assert_eq!(
        of("pure_bf16: true\nbf16: auto\ntorch_dtype: auto\n"),
        (bfloat16, true, bfloat16)
    );
    assert_eq!(of("bf16: true\n"), (bfloat16, false, float32));
    let adapter = "adapter: lora\npure_bf16: true\n";
    assert_eq!(of(adapter), (bfloat16, false, float32));
    let told = job(adapter).reading.notices;
    assert!(
        told[0].contains("the adapter is trained in float32"),
        "{told:?}"
    );
    assert_ne!(
        job("pure_bf16: true\n").digest(),
        job("bf16: true\n").digest()
    );
    check_problems(
        "pure_bf16: true\nbase_dtype: float32\n",
        &["4: `base_dtype` is float32, but `pure_bf16` keeps the weights in bfloat16; remove one"],
    );
}

#[test]
fn eight_bits_and_settings_without_effect_are_told() {
    let notices = |text: &str| job(text).reading.notices;
    assert_eq!(
        notices(
            "adapter: lora\nbnb_4bit_quant_type: nf4\nquantize_embeddings: true\nquantize_moe_experts: true\n"
        ),
        [
            "bnb_4bit_quant_type, quantize_embeddings, quantize_moe_experts: changes nothing without load_in_4bit"
        ]
    );
    let pure = notices("adapter: qlora\npure_bf16: true\nbnb_4bit_compute_dtype: float32\n");
    let told = "bnb_4bit_compute_dtype: changes nothing with pure_bf16";
    assert!(pure.iter().any(|line| line == told), "{pure:?}");
    let eight = notices("stage: sft\nquantization_bit: 8\n");
    assert!(
        eight
            .iter()
            .any(|line| line.starts_with("quantization_bit: ")),
        "{eight:?}"
    );
}

#[test]
fn four_bits_are_part_of_what_comes_out() {
    let digest = |text: &str| job(text).digest();
    let dense = digest("adapter: lora\nbase_dtype: bfloat16\n");
    let usual = digest("adapter: qlora\n");
    assert_ne!(usual, dense);
    assert_ne!(
        digest("adapter: qlora\nbnb_4bit_use_double_quant: false\n"),
        usual
    );
    assert_ne!(digest("adapter: qlora\nquantize_embeddings: true\n"), usual);
    assert_ne!(
        digest("adapter: qlora\nquantize_moe_experts: true\n"),
        usual
    );
    assert_eq!(
        digest("adapter: lora\nload_in_4bit: true\nbase_dtype: bfloat16\n"),
        usual
    );
}
