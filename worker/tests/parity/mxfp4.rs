//! A model whose experts are stored in MXFP4: its weights to the byte, logits, ten AdamW steps of LoRA by PEFT, and greedy
//! continuations. The golden files are made by `make_mxfp4.py`.

use std::path::Path;

use common::files::adapter::AdapterConfig;
use common::files::model::{ModelFolder, WeightFiles};
use common::files::tensors::TensorFile;
use common::job::{BaseDtype, InitWeights, JobSpec, Method, Quantization};
use common::model::{ModelConfig, base_tensors};
use worker::engine::inference::merge::merge;

use crate::golden::{assert_adapter_training, assert_greedy, assert_last_logits, golden_dir};
use crate::support::{Case, job};

const CASE: &str = "gpt-oss-mxfp4";

fn case() -> Case {
    Case::open(&golden_dir(), CASE)
}

/// The bits of every weight of a folder, by name.
fn weights(dir: &Path) -> Vec<(String, Vec<u32>)> {
    let folder = ModelFolder::open(dir, InitWeights::Pretrained).unwrap();
    let expected = base_tensors(&ModelConfig::of(&folder).unwrap());
    let files = WeightFiles::open(&folder, &expected).unwrap();
    assert!(files.notices().is_empty(), "{:?}", files.notices());
    files.check_bfloat16(&expected).unwrap();
    let bits = expected.iter().map(|(name, shape)| {
        let mut values = vec![0.0; shape.iter().product()];
        files.read_f32(name, shape, &mut values).unwrap();
        let bits = values.iter().map(|value: &f32| value.to_bits());
        (name.clone(), bits.collect())
    });
    bits.collect()
}

#[test]
fn weights_are_what_transformers_dequantises_to_the_bit() {
    let case = case();
    let (found, expected) = (
        weights(&case.dir.join("model")),
        weights(&case.dir.join("base")),
    );
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected, "{}", found.0);
    }
    assert_eq!(found.len(), expected.len());
}

#[test]
fn adapters_are_trained_and_texts_continued_as_transformers_does() {
    assert_last_logits(&case(), None, "logits");
    assert_adapter_training(CASE);
    let case = case();
    let (model, adapter) = (case.dir.join("model"), case.dir.join("trained_adapter"));
    assert_greedy(&case, &model, None, &case.golden.greedy_base);
    assert_greedy(&case, &model, Some(&adapter), &case.golden.greedy_adapter);
}

#[test]
fn training_comes_to_the_bits_of_the_dequantised_folder_by_every_method() {
    let case = case();
    let run = |folder: &str, full: bool, base_dtype, quantization| {
        let dir = case.dir.join("adapter");
        let (method, adapter) = match full {
            true => (Method::Full, None),
            false => {
                let lora = AdapterConfig::read(&dir).unwrap().to_lora();
                (Method::Lora(lora), Some(dir))
            }
        };
        let job = JobSpec {
            base_dtype,
            quantization,
            ..job(method, 1e-3, case.golden.sequence_len)
        };
        let mut trainer = case.load(job, folder, adapter);
        case.train(&mut trainer, 1e-3);
        trainer.weights_digest().unwrap()
    };
    let four_bits = Some(Quantization {
        nested_scales: true,
        embeddings: false,
        experts: true,
    });
    let mut digests = Vec::new();
    for (full, base_dtype, quantization) in [
        (true, BaseDtype::Float32, None),
        (false, BaseDtype::Float32, None),
        (false, BaseDtype::Bfloat16, None),
        (false, BaseDtype::Bfloat16, four_bits),
    ] {
        let found = run("model", full, base_dtype, quantization);
        assert_eq!(found, run("base", full, base_dtype, quantization));
        digests.push(found);
    }
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), 4, "every method trains another model");
}

#[test]
fn a_merged_model_has_bfloat16_experts_and_says_nothing_of_mxfp4() {
    let case = case();
    let folder = tempfile::tempdir().unwrap();
    let merged = folder.path().join("merged");
    let (model, adapter) = (case.dir.join("model"), case.dir.join("trained_adapter"));
    merge(&model, &adapter, &merged, None).unwrap();
    let config = std::fs::read_to_string(merged.join("config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
    let file = |dir: &Path| TensorFile::open(&dir.join("model.safetensors")).unwrap();
    let (found, base) = (file(&merged), file(&case.dir.join("base")));
    let experts: Vec<&str> = base
        .names()
        .filter(|name| name.contains("experts"))
        .collect();
    assert_eq!(experts.len(), 2 * 4);
    for name in experts {
        let (found, base) = (found.get(name).unwrap(), base.get(name).unwrap());
        assert_eq!(
            (found.dtype, found.shape, found.bytes),
            (base.dtype, base.shape, base.bytes)
        );
    }
}
