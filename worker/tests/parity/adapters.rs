//! Adapters that are more than LoRA on linear layers: ten AdamW steps by PEFT, the logits and the greedy continuations of what
//! comes out, merged and not. The golden files are made by `make_golden.py`.

use common::files::adapter::AdapterConfig;
use common::files::snapshot::{Snapshot, WeightsFormat};
use common::job::{AdapterInit, BaseDtype, LoraSpec, Method, TargetModules};
use worker::engine::inference::merge::merge;

use crate::golden::{
    assert_adapter_training, assert_greedy, assert_last_logits, assert_steps, golden_dir,
};
use crate::support::{Case, Training, job};

const CASES: [&str; 27] = [
    "tokens-tied",
    "tokens-untied",
    "tokens-gemma3",
    "saved-tied",
    "saved-untied",
    "added-tokens",
    "added-tokens-tied",
    "rank-pattern",
    "rank-pattern-rslora",
    "exclude-modules",
    "layers-to-transform",
    "qwen2-moe-all-linear",
    "dora",
    "dora-bias",
    "bias-lora-only",
    "bias-all",
    "lora-bias",
    "lora-embedding",
    "lora-embedding-tied",
    "lora-embedding-gemma3",
    "dora-lm-head",
    "qwen3-moe-all-linear",
    "experts-alone",
    "experts-mixtral",
    "experts-down",
    "experts-gate-up",
    "experts-gpt-oss",
];

#[test]
fn training_follows_peft() {
    CASES.into_iter().for_each(assert_adapter_training);
}

#[test]
fn logits_and_continuations_are_peft_s() {
    for name in CASES {
        let case = Case::open(&golden_dir(), name);
        let (model, adapter) = (case.dir.join("model"), case.dir.join("trained_adapter"));
        assert_last_logits(&case, Some(&adapter), "trained");
        assert_greedy(&case, &model, Some(&adapter), &case.golden.greedy_adapter);
        let folder = tempfile::tempdir().unwrap();
        let merged = folder.path().join("merged");
        merge(&model, &adapter, &merged, None).unwrap();
        assert_greedy(&case, &merged, None, &case.golden.greedy_adapter);
    }
}

#[test]
fn what_is_saved_is_what_goes_on() {
    for name in CASES {
        let case = Case::open(&golden_dir(), name);
        let mut trainer = case.trainer(Training::Lora, false);
        case.train(&mut trainer, 1e-3);
        let folder = tempfile::tempdir().unwrap();
        let config = AdapterConfig::read(&case.dir.join("adapter")).unwrap();
        let format = WeightsFormat::Adapter(config.clone());
        let snapshot = trainer.snapshot().unwrap();
        snapshot.write_files(folder.path(), &format).unwrap();
        assert_eq!(AdapterConfig::read(folder.path()).unwrap(), config);
        let read = Snapshot::read_files(folder.path(), &trainer.layout()).unwrap();
        assert_eq!(read.weights, snapshot.weights);
        let lora = job(
            Method::Lora(config.to_lora()),
            1e-3,
            case.golden.sequence_len,
        );
        let again = case.load(lora, "model", Some(folder.path().to_owned()));
        assert_eq!(
            again.weights_digest().unwrap(),
            trainer.weights_digest().unwrap()
        );
    }
}

#[test]
fn training_beside_a_bfloat16_base_is_close_to_that_beside_float32() {
    for name in CASES {
        let case = Case::open(&golden_dir(), name);
        let dir = case.dir.join("adapter");
        let lora = AdapterConfig::read(&dir).unwrap().to_lora();
        let mut narrow = job(
            Method::Lora(lora),
            case.golden.learning_rate_lora,
            case.golden.sequence_len,
        );
        narrow.base_dtype = BaseDtype::Bfloat16;
        let mut trainer = case.load(narrow, "model", Some(dir));
        let steps = case.train(&mut trainer, case.golden.learning_rate_lora);
        for (found, expected) in steps.iter().zip(&case.golden.lora) {
            let off = (found.loss - expected.loss).abs() / expected.loss;
            assert!(off < 0.02, "{name}: {} for {}", found.loss, expected.loss);
        }
    }
}

/// The signs of singular directions are anybody's, so that losses and outputs are compared, not factors. PEFT's own conversion to an
/// adapter for the base as it was is `converted_adapter`.
#[test]
fn adapters_that_begin_with_a_part_of_the_base_follow_peft() {
    for (name, init) in [
        ("pissa", AdapterInit::Pissa { iterations: None }),
        ("olora", AdapterInit::Olora),
    ] {
        let case = Case::open(&golden_dir(), name);
        let converted_dir = case.dir.join("converted_adapter");
        let converted = AdapterConfig::read(&converted_dir).unwrap();
        let lora = LoraSpec {
            r: 4,
            alpha: 8.0,
            init,
            ..converted.to_lora()
        };
        let rate = case.golden.learning_rate_lora;
        let training = job(Method::Lora(lora.clone()), rate, case.golden.sequence_len);
        let mut trainer = case.load(training, "model", None);
        let steps = case.train(&mut trainer, rate);
        assert_steps(name, &steps, &case.golden.lora);

        let TargetModules::Named(targets) = converted.target_modules.clone() else {
            panic!("{name}: PEFT's targets are a list")
        };
        let config = AdapterConfig::from_lora(&lora, "model", targets);
        assert_eq!(config.r, converted.r);
        assert!((config.lora_alpha - converted.lora_alpha).abs() < 1e-9);
        let folder = tempfile::tempdir().unwrap();
        let snapshot = trainer.snapshot().unwrap();
        let format = WeightsFormat::Adapter(config);
        snapshot.write_files(folder.path(), &format).unwrap();
        let model = case.dir.join("model");
        for adapter in [folder.path(), &converted_dir] {
            assert_last_logits(&case, Some(adapter), "trained");
            assert_greedy(&case, &model, Some(adapter), &case.golden.greedy_adapter);
        }
    }
}
