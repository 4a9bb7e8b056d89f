//! What the comparisons share: golden cases, the job they stand for, and training by slots as a worker does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::data::block::Block;
use common::files::adapter::AdapterConfig;
use common::job::{
    BaseDtype, Checkpointing, ClusterSpec, InitWeights, JobSpec, LrScheduler, Method, Reduction,
    Resume, SaveSteps, ValSetSize, Warmup,
};
use serde::Deserialize;
use worker::ComputeDevice;
use worker::engine::MeanGradient;
use worker::engine::{Trainer, TrainerOptions};

#[derive(Deserialize)]
pub struct Golden {
    pub learning_rate_lora: f64,
    pub learning_rate_full: f64,
    pub sequence_len: usize,
    pub batch: usize,
    pub examples: Vec<Example>,
    pub lora: Vec<Step>,
    pub full: Vec<Step>,
    pub greedy_base: Vec<u32>,
    pub greedy_adapter: Vec<u32>,
    /// A text of several chunks, where layers go through a text chunk by chunk.
    #[serde(default)]
    pub long: Vec<u32>,
}

#[derive(Deserialize)]
pub struct Example {
    pub tokens: Vec<u32>,
    /// -100 where nothing is learned.
    pub labels: Vec<i64>,
}

#[derive(Deserialize)]
pub struct Step {
    pub loss: f64,
    pub grad_norm: f64,
}

#[derive(Clone, Copy)]
pub enum Training {
    Lora,
    Full,
}

pub struct Case {
    pub dir: PathBuf,
    pub golden: Golden,
}

impl Case {
    pub fn open(golden_dir: &Path, name: &str) -> Self {
        let dir = golden_dir.join(name);
        let text = std::fs::read(dir.join("golden.json")).unwrap();
        Self {
            golden: serde_json::from_slice(&text).unwrap(),
            dir,
        }
    }

    pub fn trainer(&self, training: Training, checkpointing: bool) -> Trainer {
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
        if checkpointing {
            job.gradient_checkpointing = Checkpointing::Always;
        }
        self.load(job, "model", adapter_dir)
    }

    /// A trainer for this job on the model in that folder of the case.
    pub fn load(&self, job: JobSpec, model: &str, adapter_dir: Option<PathBuf>) -> Trainer {
        Trainer::load(TrainerOptions {
            job: Arc::new(job),
            model_dir: self.dir.join(model),
            adapter_dir,
            threads: 2,
            device: ComputeDevice::Cpu,
        })
        .unwrap()
    }

    /// One example a block.
    pub fn blocks(&self) -> Vec<Block> {
        self.golden
            .examples
            .iter()
            .map(|example| block(&[example], self.golden.sequence_len))
            .collect()
    }

    /// Trains as the golden run was, and gives back loss and gradient norm of every step.
    pub fn train(&self, trainer: &mut Trainer, learning_rate: f64) -> Vec<Step> {
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

pub fn train_step(
    trainer: &mut Trainer,
    step: u64,
    slots: &[&[Block]],
    learning_rate: f64,
) -> Step {
    let trained_tokens = slots
        .iter()
        .flat_map(|blocks| blocks.iter())
        .map(Block::trained_tokens)
        .sum();
    trainer
        .begin_step(step, trained_tokens, slots.len())
        .unwrap();
    let mut loss = 0.0;
    for (slot, blocks) in slots.iter().enumerate() {
        loss += trainer.train_slot(slot as u32, blocks).unwrap().loss_sum;
    }
    let reduced = MeanGradient {
        values: trainer.accumulator().mean(),
        invalid: trainer.accumulator().invalid(),
    };
    let outcome = trainer.apply(&reduced, learning_rate).unwrap();
    assert!(!outcome.skipped, "step {step} was skipped");
    Step {
        loss: loss / trained_tokens as f64,
        grad_norm: outcome.grad_norm,
    }
}

/// The examples one after the other, and padding.
pub fn block(examples: &[&Example], sequence_len: usize) -> Block {
    let mut block = Block::default();
    for (index, example) in examples.iter().enumerate() {
        block.tokens.extend(&example.tokens);
        let segment = index as u16 + 1;
        block.segments.resize(block.tokens.len(), segment);
        // Nothing comes before the first token from which it could be predicted.
        let labels = example.labels.iter().enumerate();
        let trained = labels.map(|(index, label)| index > 0 && *label >= 0);
        block.trained.extend(trained);
    }
    assert!(block.tokens.len() <= sequence_len);
    block.tokens.resize(sequence_len, 0);
    block.segments.resize(sequence_len, 0);
    block.trained.resize(sequence_len, false);
    block
}

pub fn job(method: Method, learning_rate: f64, sequence_len: usize) -> JobSpec {
    JobSpec {
        base_model: PathBuf::new(),
        base_model_id: None,
        asked_revision: None,
        model_revision: None,
        init_weights: InitWeights::Pretrained,
        base_dtype: BaseDtype::Float32,
        pure_bf16: false,
        quantization: None,
        datasets: Vec::new(),
        mixture: Default::default(),
        chat_template: Default::default(),
        chat_template_kwargs: Default::default(),
        default_system_message: None,
        eos_token: None,
        eot_tokens: Vec::new(),
        tokens: Vec::new(),
        added_tokens_overrides: Default::default(),
        val_set_size: ValSetSize::None,
        test_datasets: Vec::new(),
        sequence_len,
        excess_length_strategy: Default::default(),
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
        optimizer: Default::default(),
        unfrozen: Default::default(),
        router_loss: Default::default(),
        lr_groups: Default::default(),
        token_loss: Default::default(),
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: Some(1.0),
        gradient_checkpointing: Checkpointing::Never,
        seed: 1,
        logging_steps: 1,
        save_steps: SaveSteps::Never,
        save_total_limit: None,
        eval_steps: None,
        eval_on_start: false,
        logging_first_step: false,
        save_first_step: false,
        best_model: None,
        max_skipped_steps: 1,
        output_dir: PathBuf::new(),
        resume: Resume::Never,
        reduction: Reduction::Exact,
        cluster: ClusterSpec {
            min_workers: 1,
            max_workers: None,
        },
        test_prompts: Vec::new(),
        reading: Default::default(),
    }
}
