//! Models that Transformers and bitsandbytes saved in 4 bits, and the same quantised here: logits, ten AdamW steps of LoRA
//! by PEFT on them, and greedy continuations. The golden files are made by `make_quantised.py`.

use common::files::adapter::AdapterConfig;
use common::job::{JobSpec, Method, Quantization};

use crate::golden::{assert_adapter_training, assert_greedy, assert_last_logits, golden_dir};
use crate::support::{Case, job};

/// The last with layers that were left out.
const CASES: [&str; 3] = ["llama-nf4", "qwen3-tied-nf4", "qwen3-untied-nf4"];
/// Those that Muster quantises the same, and whether their scales are nested.
const QUANTISED_ALIKE: [(&str, bool); 2] = [("llama-nf4", true), ("qwen3-tied-nf4", false)];

#[test]
fn logits_of_a_quantised_folder_are_transformers_s() {
    for name in CASES {
        let case = Case::open(&golden_dir(), name);
        assert_last_logits(&case, None, "logits");
    }
}

#[test]
fn adapters_on_a_quantised_folder_are_trained_as_peft_trains_them() {
    CASES.into_iter().for_each(assert_adapter_training);
}

#[test]
fn a_quantised_folder_continues_texts_as_transformers_does() {
    for name in CASES {
        let case = Case::open(&golden_dir(), name);
        let (model, adapter) = (case.dir.join("model"), case.dir.join("trained_adapter"));
        assert_greedy(&case, &model, None, &case.golden.greedy_base);
        assert_greedy(&case, &model, Some(&adapter), &case.golden.greedy_adapter);
    }
}

#[test]
fn what_muster_quantises_trains_to_the_bits_of_what_bitsandbytes_saved() {
    for (name, nested_scales) in QUANTISED_ALIKE {
        let case = Case::open(&golden_dir(), name);
        let run = |folder: &str, quantization| {
            let adapter = case.dir.join("adapter");
            let lora = AdapterConfig::read(&adapter).unwrap().to_lora();
            let rate = case.golden.learning_rate_lora;
            let job = JobSpec {
                quantization,
                ..job(Method::Lora(lora), rate, case.golden.sequence_len)
            };
            let mut trainer = case.load(job, folder, Some(adapter));
            case.train(&mut trainer, rate);
            trainer.weights_digest().unwrap()
        };
        let how = Quantization {
            nested_scales,
            embeddings: false,
            experts: false,
        };
        assert_eq!(run("base", Some(how)), run("model", None), "{name}");
        assert_ne!(run("base", None), run("model", None), "{name}");
    }
}
