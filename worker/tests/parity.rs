//! The engine against Transformers and PEFT: logits, ten AdamW steps of LoRA and of full training, and greedy
//! continuations, on the golden files that `parity/make_golden.py` makes. `MUSTER_GOLDEN=FOLDER` compares with freshly
//! made ones instead.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::data::block::Block;
use common::files::adapter::AdapterConfig;
use common::files::snapshot::{Snapshot, WeightsFormat, read_weights};
use common::files::tensors::TensorFile;
use common::job::{
    BaseDtype, ClusterSpec, InitWeights, JobSpec, LrScheduler, Method, Reduction, Resume,
    ValSetSize, Warmup,
};
use serde::Deserialize;
use worker::engine::generate::Sampling;
use worker::engine::inference::InferenceModel;
use worker::engine::trainer::Reduced;
use worker::engine::{Trainer, TrainerOptions};

const CASES: [&str; 4] = ["llama", "qwen2-tied", "qwen3-tied", "qwen3-untied"];
const LOGIT_TOLERANCE: f64 = 1e-4;
const TRAINING_TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Golden {
    learning_rate_lora: f64,
    learning_rate_full: f64,
    sequence_len: usize,
    batch: usize,
    examples: Vec<Example>,
    lora: Vec<Step>,
    full: Vec<Step>,
    greedy_base: Vec<u32>,
    greedy_adapter: Vec<u32>,
}

#[derive(Deserialize)]
struct Example {
    tokens: Vec<u32>,
    /// -100 where nothing is learned.
    labels: Vec<i64>,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm: f64,
}

#[derive(Clone, Copy)]
enum Training {
    Lora,
    Full,
}

struct Case {
    dir: PathBuf,
    golden: Golden,
}

impl Case {
    fn open(name: &str) -> Self {
        let golden_dir = std::env::var_os("MUSTER_GOLDEN").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/golden"),
            PathBuf::from,
        );
        let dir = golden_dir.join(name);
        let text = std::fs::read(dir.join("golden.json")).unwrap();
        Self {
            golden: serde_json::from_slice(&text).unwrap(),
            dir,
        }
    }

    fn trainer(&self, training: Training, checkpointing: bool) -> Trainer {
        let (method, learning_rate, adapter_dir) = match training {
            Training::Lora => {
                let dir = self.dir.join("adapter");
                let lora = AdapterConfig::read(&dir).unwrap().to_lora();
                let rate = self.golden.learning_rate_lora;
                (Method::Lora(lora), rate, Some(dir))
            }
            Training::Full => (Method::Full, self.golden.learning_rate_full, None),
        };
        let mut job = job(method, learning_rate, self.golden.sequence_len);
        job.gradient_checkpointing = checkpointing;
        Trainer::load(TrainerOptions {
            job: Arc::new(job),
            model_dir: self.dir.join("model"),
            adapter_dir,
            threads: 2,
        })
        .unwrap()
    }

    /// One example a block.
    fn blocks(&self) -> Vec<Block> {
        self.golden
            .examples
            .iter()
            .map(|example| block(&[example], self.golden.sequence_len))
            .collect()
    }

    /// Trains as the golden run was, and gives back loss and gradient norm of every step.
    fn train(&self, trainer: &mut Trainer, learning_rate: f64) -> Vec<Step> {
        let blocks = self.blocks();
        let steps = blocks.chunks(self.golden.batch).enumerate();
        steps
            .map(|(step, blocks)| {
                let slots: Vec<&[Block]> = blocks.chunks(2).collect();
                train_step(trainer, step as u64, &slots, learning_rate)
            })
            .collect()
    }
}

fn train_step(trainer: &mut Trainer, step: u64, slots: &[&[Block]], learning_rate: f64) -> Step {
    let trained_tokens = slots
        .iter()
        .flat_map(|blocks| blocks.iter())
        .map(Block::trained_tokens)
        .sum();
    trainer.begin_step(step, trained_tokens, slots.len());
    let mut loss = 0.0;
    for (slot, blocks) in slots.iter().enumerate() {
        loss += trainer.train_slot(slot as u32, blocks).unwrap().loss_sum;
    }
    let reduced = Reduced {
        mean: trainer.accumulator().mean(),
        invalid: trainer.accumulator().invalid(),
    };
    let outcome = trainer.apply(reduced, learning_rate).unwrap();
    assert!(!outcome.skipped, "step {step} was skipped");
    Step {
        loss: loss / trained_tokens as f64,
        grad_norm: outcome.grad_norm,
    }
}

/// The examples one after the other, and padding.
fn block(examples: &[&Example], sequence_len: usize) -> Block {
    let mut block = Block::default();
    for (index, example) in examples.iter().enumerate() {
        block.tokens.extend(&example.tokens);
        let segment = index as u16 + 1;
        block.segments.resize(block.tokens.len(), segment);
        let trained = example.labels.iter().map(|label| *label >= 0);
        block.trained.extend(trained);
    }
    assert!(block.tokens.len() <= sequence_len);
    block.tokens.resize(sequence_len, 0);
    block.segments.resize(sequence_len, 0);
    block.trained.resize(sequence_len, false);
    block
}

fn job(method: Method, learning_rate: f64, sequence_len: usize) -> JobSpec {
    JobSpec {
        base_model: PathBuf::new(),
        model_revision: None,
        init_weights: InitWeights::Pretrained,
        base_dtype: BaseDtype::Float32,
        datasets: Vec::new(),
        val_set_size: ValSetSize::None,
        sequence_len,
        sample_packing: false,
        train_on_inputs: false,
        shuffle: false,
        method,
        global_batch_size: 4,
        micro_batch_size: 2,
        num_epochs: 1.0,
        max_steps: None,
        learning_rate,
        lr_scheduler: LrScheduler::Constant,
        warmup: Warmup::Steps(0),
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: Some(1.0),
        gradient_checkpointing: false,
        seed: 1,
        logging_steps: 1,
        save_steps: None,
        save_total_limit: None,
        eval_steps: None,
        max_skipped_steps: 1,
        output_dir: PathBuf::new(),
        resume: Resume::Never,
        reduction: Reduction::Exact,
        cluster: ClusterSpec {
            min_workers: 1,
            max_workers: None,
        },
        test_prompts: Vec::new(),
    }
}

/// Largest difference, in units of the largest expected value.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| {
        values.fold(0.0f64, |largest, value| largest.max(f64::from(value.abs())))
    };
    let difference = largest(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    difference / largest(&mut expected.iter().copied())
}

fn assert_steps(name: &str, found: &[Step], expected: &[Step]) {
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
fn assert_weights(name: &str, start: &Snapshot, found: &Snapshot, expected: &[f32]) {
    let layout = &found.layout;
    let tensors = layout
        .tensors
        .iter()
        .zip(layout.split(&start.weights))
        .zip(layout.split(&found.weights).zip(layout.split(expected)));
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

fn check_training(training: Training) {
    for name in CASES {
        let case = Case::open(name);
        let (expected, learning_rate, trained) = match training {
            Training::Lora => (
                &case.golden.lora,
                case.golden.learning_rate_lora,
                "trained_adapter",
            ),
            Training::Full => (&case.golden.full, case.golden.learning_rate_full, "full"),
        };
        let mut trainer = case.trainer(training, false);
        let start = trainer.snapshot();
        let steps = case.train(&mut trainer, learning_rate);
        assert_steps(name, &steps, expected);
        let end = trainer.snapshot();
        let expected = read_weights(&case.dir.join(trained), &end.layout).unwrap();
        assert_weights(name, &start, &end, &expected);
    }
}

#[test]
fn logits_are_transformers_s() {
    for name in CASES {
        let case = Case::open(name);
        let trainer = case.trainer(Training::Full, false);
        let file = TensorFile::open(&case.dir.join("logits.safetensors")).unwrap();
        for (index, example) in case.golden.examples[..3].iter().enumerate() {
            let found = trainer.logits(&example.tokens).unwrap();
            let view = file.get(&format!("logits.{index}")).unwrap();
            let mut expected = vec![0.0; view.scalars()];
            view.to_f32(&mut expected).unwrap();
            let off = distance(&found, &expected);
            assert!(off < LOGIT_TOLERANCE, "{name}, example {index}: {off}");

            let mut inference = InferenceModel::load(&case.dir.join("model"), None).unwrap();
            let last = inference.append(&example.tokens).unwrap();
            let off = distance(&last, &expected[expected.len() - last.len()..]);
            assert!(off < LOGIT_TOLERANCE, "{name}, generated from: {off}");
        }
    }
}

#[test]
fn lora_training_follows_peft() {
    check_training(Training::Lora);
}

#[test]
fn full_training_follows_transformers() {
    check_training(Training::Full);
}

#[test]
fn greedy_continuations_are_transformers_s_with_and_without_the_adapter() {
    let greedy = Sampling {
        max_new_tokens: 0,
        temperature: 0.0,
        seed: 0,
    };
    for name in CASES {
        let case = Case::open(name);
        let adapter = case.dir.join("trained_adapter");
        for (adapter, expected) in [
            (None, &case.golden.greedy_base),
            (Some(adapter.as_path()), &case.golden.greedy_adapter),
        ] {
            let mut model = InferenceModel::load(&case.dir.join("model"), adapter).unwrap();
            let mut input = case.golden.examples[0].tokens.clone();
            for (index, token) in expected.iter().enumerate() {
                let found = greedy.choose(&model.append(&input).unwrap(), index);
                assert_eq!(found, *token, "{name}, token {index}");
                input = vec![found];
            }
        }
    }
}

#[test]
fn a_packed_block_trains_like_its_examples_one_by_one() {
    for name in CASES {
        for training in [Training::Lora, Training::Full] {
            let case = Case::open(name);
            let examples: Vec<&Example> = case.golden.examples[..3].iter().collect();
            let length = examples.iter().map(|e| e.tokens.len()).sum::<usize>() + 3;
            let packed = [block(&examples, length)];
            let single: Vec<Block> = examples.iter().map(|e| block(&[e], 20)).collect();
            let single: Vec<&[Block]> = single.chunks(1).collect();
            let mut packed_trainer = case.trainer(training, false);
            let mut single_trainer = case.trainer(training, false);
            let start = packed_trainer.snapshot();
            let packed = train_step(&mut packed_trainer, 0, &[&packed], 1e-3);
            let single = train_step(&mut single_trainer, 0, &single, 1e-3);
            assert_steps(name, &[packed], &[single]);
            let expected = single_trainer.snapshot();
            // The first moment is a tenth of the clipped gradient.
            let found = packed_trainer.snapshot();
            let off = distance(&found.exp_avg, &expected.exp_avg);
            assert!(off < 1e-5, "{name}: gradients differ by {off}");
            assert_weights(name, &start, &found, &expected.weights);
        }
    }
}

#[test]
fn checkpointing_and_resuming_change_no_bit() {
    for training in [Training::Lora, Training::Full] {
        let case = Case::open("qwen3-tied");
        let mut plain = case.trainer(training, false);
        case.train(&mut plain, 1e-3);

        let mut checkpointed = case.trainer(training, true);
        case.train(&mut checkpointed, 1e-3);
        assert_eq!(checkpointed.weights_digest(), plain.weights_digest());

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
                dtype: common::files::tensors::Dtype::BF16,
            },
        };
        first
            .snapshot()
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
        assert_eq!(second.weights_digest(), plain.weights_digest());
    }
}
