//! Logits, ten AdamW steps of LoRA and of full training, and greedy continuations, on the golden files that
//! `make_golden.py` makes.

use std::path::{Path, PathBuf};

use common::data::block::Block;
use common::files::Moment;
use common::files::adapter::AdapterConfig;
use common::files::snapshot::{Snapshot, WeightsFormat, read_weights};
use common::files::tensors::{Dtype, TensorFile};
use worker::engine::inference::decoder::InferenceModel;
use worker::engine::inference::generate::Sampling;
use worker::engine::inference::merge::merge;

use crate::support::{Case, Example, Step, Training, block, train_step};

const CASES: [&str; 29] = [
    "llama",
    "qwen2-tied",
    "qwen3-tied",
    "qwen3-untied",
    "mistral",
    "mistral-window",
    "gemma2",
    "gemma3",
    "granite",
    "smollm3",
    "olmo2",
    "olmo3",
    "phi3",
    "phi3-longrope",
    "phi3-longrope-long",
    "glm",
    "glm4",
    "qwen3-moe",
    "qwen3-moe-router-loss",
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "gpt-oss",
    "qwen3.5",
    "qwen3.5-moe",
    "qwen3-next",
    "gemma4",
    "gemma4-shared",
    "gemma4-experts",
];
pub const LOGIT_TOLERANCE: f64 = 1e-4;
const TRAINING_TOLERANCE: f64 = 1e-3;

pub fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/golden")
}

/// Largest difference, in units of the largest expected value.
pub fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| {
        values.fold(0.0f64, |largest, value| largest.max(f64::from(value.abs())))
    };
    let difference = largest(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    difference / largest(&mut expected.iter().copied())
}

pub fn assert_steps(name: &str, found: &[Step], expected: &[Step]) {
    assert_eq!(found.len(), expected.len());
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (what, found, expected) in [
            ("loss", found.loss, expected.loss),
            ("grad_norm", found.grad_norm, expected.grad_norm),
        ] {
            let difference = (found - expected).abs() / expected;
            assert!(
                difference < TRAINING_TOLERANCE,
                "{name}, step {}: {what} is {found}, expected {expected}",
                step + 1
            );
        }
    }
}

/// Each tensor by its norm, each weight by itself, and the way the tensor went since the start to a hundredth.
///
/// Adam's first update is the sign of the gradient, so a single weight whose gradient is rounding noise may end up
/// elsewhere: hence norms.
pub fn assert_weights(name: &str, start: &Snapshot, found: &Snapshot, expected: &[f32]) {
    let layout = &found.layout;
    let [start, found] = [start, found].map(|state| state.weights.widened(0..layout.scalars));
    let tensors = layout
        .tensors
        .iter()
        .zip(layout.split(&start))
        .zip(layout.split(&found).zip(layout.split(expected)));
    for ((tensor, start), (found, expected)) in tensors {
        let what = format!("{name}, {}", tensor.name);
        let zeros = vec![0.0; expected.len()];
        let off = norm(found, expected);
        let relative = off / norm(expected, &zeros);
        assert!(relative < TRAINING_TOLERANCE, "{what}: off by {relative}");
        let change = off / norm(expected, start);
        assert!(change < 1e-2, "{what}: change is off by {change}");
        for (found, expected) in found.iter().zip(expected) {
            let off = f64::from((found - expected).abs());
            assert!(off < TRAINING_TOLERANCE, "{what}: {found} for {expected}");
        }
    }
}

/// Euclidean, of the difference.
fn norm(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn check_training(golden: &Path, training: Training) {
    for name in CASES {
        let case = Case::open(golden, name);
        let (expected, learning_rate, trained) = match training {
            Training::Lora => (
                &case.golden.lora,
                case.golden.learning_rate_lora,
                "trained_adapter",
            ),
            Training::Full => (&case.golden.full, case.golden.learning_rate_full, "full"),
        };
        let mut trainer = case.trainer(training, false);
        let start = trainer.snapshot().unwrap();
        let steps = case.train(&mut trainer, learning_rate);
        assert_steps(name, &steps, expected);
        let end = trainer.snapshot().unwrap();
        let expected = read_weights(&case.dir.join(trained), &end.layout).unwrap();
        assert_weights(name, &start, &end, &expected);
    }
}

pub fn check_logits(golden: &Path) {
    for name in CASES {
        let case = Case::open(golden, name);
        let mut trainer = case.trainer(Training::Full, false);
        for (example, expected) in case
            .golden
            .examples
            .iter()
            .zip(expected_logits(&case, "logits"))
        {
            let found = trainer.logits(&example.tokens).unwrap();
            let off = distance(&found, &expected);
            assert!(off < LOGIT_TOLERANCE, "{name}: {off}");
        }
        assert_last_logits(&case, None, "logits");
    }
}

/// The logits of every position of the first examples, as the golden file has them under a name.
fn expected_logits(case: &Case, name: &str) -> Vec<Vec<f32>> {
    let file = TensorFile::open(&case.dir.join("logits.safetensors")).unwrap();
    let of_example = |index: usize| {
        let view = file.get(&format!("{name}.{index}")).unwrap();
        let mut logits = vec![0.0; view.scalars()];
        view.to_f32(&mut logits).unwrap();
        logits
    };
    (0..3).map(of_example).collect()
}

/// The logits behind the first examples, of the model that answers.
pub fn assert_last_logits(case: &Case, adapter: Option<&Path>, name: &str) {
    for (example, expected) in case.golden.examples.iter().zip(expected_logits(case, name)) {
        let mut model = InferenceModel::load(&case.dir.join("model"), adapter, None).unwrap();
        let last = model.append(&example.tokens).unwrap();
        let off = distance(&last, &expected[expected.len() - last.len()..]);
        assert!(off < LOGIT_TOLERANCE, "{:?}, {name}: {off}", case.dir);
    }
}

/// Ten AdamW steps of the case's adapter, with and without gradient checkpointing.
pub fn assert_adapter_training(name: &str) {
    let case = Case::open(&golden_dir(), name);
    for checkpointing in [false, true] {
        let mut trainer = case.trainer(Training::Lora, checkpointing);
        let start = trainer.snapshot().unwrap();
        let steps = case.train(&mut trainer, case.golden.learning_rate_lora);
        assert_steps(name, &steps, &case.golden.lora);
        let end = trainer.snapshot().unwrap();
        let expected = read_weights(&case.dir.join("trained_adapter"), &end.layout).unwrap();
        assert_weights(name, &start, &end, &expected);
    }
}

pub fn check_lora_training(golden: &Path) {
    check_training(golden, Training::Lora);
}

pub fn check_full_training(golden: &Path) {
    check_training(golden, Training::Full);
}

pub fn check_greedy(golden: &Path) {
    for name in CASES {
        let case = Case::open(golden, name);
        let (model, adapter) = (case.dir.join("model"), case.dir.join("trained_adapter"));
        assert_greedy(&case, &model, None, &case.golden.greedy_base);
        assert_greedy(&case, &model, Some(&adapter), &case.golden.greedy_adapter);
    }
}

pub fn assert_greedy(case: &Case, model: &Path, adapter: Option<&Path>, expected: &[u32]) {
    let greedy = Sampling {
        max_new_tokens: 0,
        temperature: 0.0,
        seed: 0,
    };
    let mut model = InferenceModel::load(model, adapter, None).unwrap();
    let mut input = case.golden.examples[0].tokens.clone();
    for (index, token) in expected.iter().enumerate() {
        let found = greedy.choose(&model.append(&input).unwrap(), index);
        assert_eq!(found, *token, "{:?}, token {index}", case.dir);
        input = vec![found];
    }
}

#[test]
fn a_merged_model_continues_like_model_and_adapter() {
    for name in CASES {
        let case = Case::open(&golden_dir(), name);
        let folder = tempfile::tempdir().unwrap();
        let merged = folder.path().join("merged");
        let (model, adapter) = (case.dir.join("model"), case.dir.join("trained_adapter"));
        merge(&model, &adapter, &merged, None).unwrap();
        assert_greedy(&case, &merged, None, &case.golden.greedy_adapter);
        assert!(
            merge(&model, &adapter, &merged, None).is_err(),
            "overwrites"
        );
    }
}

#[test]
fn logits_are_transformers_s() {
    check_logits(&golden_dir());
}

#[test]
fn logits_of_a_text_of_several_chunks_are_transformers_s() {
    for name in ["qwen3.5", "qwen3.5-moe", "qwen3-next"] {
        let case = Case::open(&golden_dir(), name);
        let file = TensorFile::open(&case.dir.join("logits.safetensors")).unwrap();
        let view = file.get("long").unwrap();
        let mut expected = vec![0.0; view.scalars()];
        view.to_f32(&mut expected).unwrap();
        let text = &case.golden.long;
        let found = case.trainer(Training::Full, false).logits(text).unwrap();
        let off = distance(&found, &expected);
        assert!(off < LOGIT_TOLERANCE, "{name}: {off}");
        // As a prompt that goes on in the middle of a chunk.
        let mut model = InferenceModel::load(&case.dir.join("model"), None, None).unwrap();
        model.append(&text[..100]).unwrap();
        let last = model.append(&text[100..]).unwrap();
        let off = distance(&last, &expected[expected.len() - last.len()..]);
        assert!(off < LOGIT_TOLERANCE, "{name}: {off}");
    }
}

#[test]
fn lora_training_follows_peft() {
    check_lora_training(&golden_dir());
}

#[test]
fn full_training_follows_transformers() {
    check_full_training(&golden_dir());
}

#[test]
fn greedy_continuations_are_transformers_s_with_and_without_the_adapter() {
    check_greedy(&golden_dir());
}

#[test]
fn a_packed_block_trains_like_its_examples_one_by_one() {
    for name in CASES {
        for training in [Training::Lora, Training::Full] {
            let case = Case::open(&golden_dir(), name);
            let examples: Vec<&Example> = case.golden.examples[..3].iter().collect();
            let length = examples.iter().map(|e| e.tokens.len()).sum::<usize>() + 3;
            let packed = [block(&examples, length)];
            let single: Vec<Block> = examples.iter().map(|e| block(&[e], 20)).collect();
            // A router's loss is one of a slot.
            let of_slot = match name {
                "qwen3-moe-router-loss" | "qwen3-next" => 3,
                _ => 1,
            };
            let single: Vec<&[Block]> = single.chunks(of_slot).collect();
            let mut packed_trainer = case.trainer(training, false);
            let mut single_trainer = case.trainer(training, false);
            let start = packed_trainer.snapshot().unwrap();
            let packed = train_step(&mut packed_trainer, 0, &[&packed], 1e-3);
            let single = train_step(&mut single_trainer, 0, &single, 1e-3);
            assert_steps(name, &[packed], &[single]);
            let expected = single_trainer.snapshot().unwrap();
            // The first moment is a tenth of the clipped gradient.
            let found = packed_trainer.snapshot().unwrap();
            let [
                Moment::Float32(found_moment),
                Moment::Float32(expected_moment),
            ] = [&found.moments[0], &expected.moments[0]]
            else {
                panic!("AdamW's moments are float32")
            };
            let off = distance(found_moment, expected_moment);
            assert!(off < 1e-5, "{name}: gradients differ by {off}");
            let weights = expected.weights.widened(0..expected.layout.scalars);
            assert_weights(name, &start, &found, &weights);
        }
    }
}

/// Where layers have the keys and values of an earlier one, a layer that runs again in the backward pass has them still.
#[test]
fn checkpointing_changes_no_bit_where_layers_share_keys() {
    for name in ["gemma4", "gemma4-shared", "gemma4-experts"] {
        for training in [Training::Lora, Training::Full] {
            let case = Case::open(&golden_dir(), name);
            let [plain, checkpointed] = [false, true].map(|checkpointing| {
                let mut trainer = case.trainer(training, checkpointing);
                case.train(&mut trainer, 1e-3);
                trainer.weights_digest().unwrap()
            });
            assert_eq!(plain, checkpointed, "{name}");
        }
    }
}

#[test]
fn checkpointing_and_resuming_change_no_bit() {
    for training in [Training::Lora, Training::Full] {
        let case = Case::open(&golden_dir(), "qwen3-tied");
        let mut plain = case.trainer(training, false);
        case.train(&mut plain, 1e-3);

        let mut checkpointed = case.trainer(training, true);
        case.train(&mut checkpointed, 1e-3);
        assert_eq!(
            checkpointed.weights_digest().unwrap(),
            plain.weights_digest().unwrap()
        );

        let mut first = case.trainer(training, false);
        let blocks = case.blocks();
        let steps: Vec<&[Block]> = blocks.chunks(4).collect();
        for (step, blocks) in steps.iter().enumerate().take(5) {
            train_step(&mut first, step as u64, &[&blocks[..2], &blocks[2..]], 1e-3);
        }
        let folder = tempfile::tempdir().unwrap();
        let format = match training {
            Training::Lora => {
                WeightsFormat::Adapter(AdapterConfig::read(&case.dir.join("adapter")).unwrap())
            }
            Training::Full => WeightsFormat::Model {
                config: serde_json::json!({"architectures": ["Qwen3ForCausalLM"]}),
                dtype: Dtype::BF16,
                frozen: None,
            },
        };
        first
            .snapshot()
            .unwrap()
            .write_files(folder.path(), &format)
            .unwrap();
        let mut second = case.trainer(training, false);
        let saved = Snapshot::read_files(folder.path(), &second.layout()).unwrap();
        second.restore(&saved).unwrap();
        for (step, blocks) in steps.iter().enumerate().skip(5) {
            train_step(
                &mut second,
                step as u64,
                &[&blocks[..2], &blocks[2..]],
                1e-3,
            );
        }
        assert_eq!(
            second.weights_digest().unwrap(),
            plain.weights_digest().unwrap()
        );
    }
}
