//! From dataset files to a trained adapter: chat template, tokens, mask, blocks, plan and training together, against
//! Transformers and PEFT.

use std::path::Path;
use std::sync::Arc;

use common::data::block::Block;
use common::data::prepare_blocks;
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::files::adapter::AdapterConfig;
use common::files::snapshot::read_weights;
use common::job::{DatasetKind, DatasetSpec, FieldNames, JobSpec, Method};
use common::plan::{Schedule, learning_rate};
use common::progress::Progress;
use serde::Deserialize;
use worker::ComputeDevice;
use worker::engine::{Trainer, TrainerOptions};

use crate::golden::{assert_steps, assert_weights, golden_dir};
use crate::support::{Example, Step, block, job, train_step};

const SEQUENCE_LEN: usize = 96;

#[derive(Deserialize)]
struct Golden {
    learning_rate: f64,
    batch: usize,
    examples: Vec<Example>,
    steps: Vec<Step>,
}

fn dataset_job(dir: &Path, golden: &Golden) -> JobSpec {
    let lora = AdapterConfig::read(&dir.join("adapter")).unwrap().to_lora();
    let mut job = job(Method::Lora(lora), golden.learning_rate, SEQUENCE_LEN);
    job.global_batch_size = golden.batch;
    job.datasets = ["conversations", "completions", "texts"]
        .map(|name| {
            let path = dir.join(name).with_extension("jsonl");
            DatasetSpec::new(path, DatasetKind::Auto, FieldNames::default())
        })
        .to_vec();
    job
}

pub fn check_dataset(golden_dir: &Path) {
    let dir = golden_dir.join("dataset");
    let text = std::fs::read(dir.join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_slice(&text).unwrap();
    let job = Arc::new(dataset_job(&dir, &golden));
    let model_dir = dir.join("model");
    let tokenizer = Tokenizer::load(&model_dir).unwrap();
    let template = ChatTemplate::load(&model_dir).unwrap();
    let work = tempfile::tempdir().unwrap();
    let file = prepare_blocks(
        &job,
        &tokenizer,
        Some(&template),
        work.path(),
        &Progress::default(),
    )
    .unwrap()
    .file;
    let schedule = Schedule::new(&job, file.train_blocks());
    assert_eq!(schedule.total_steps(), golden.steps.len() as u64);
    let mut trainer = Trainer::load(TrainerOptions {
        job: job.clone(),
        model_dir,
        adapter_dir: Some(dir.join("adapter")),
        threads: 2,
        device: ComputeDevice::Cpu,
    })
    .unwrap();
    let start = trainer.snapshot().unwrap();
    let mut examples = golden.examples.iter();
    let mut steps = Vec::new();
    for step in 0..schedule.total_steps() {
        let slots: Vec<Vec<Block>> = schedule
            .step_slots(step)
            .iter()
            .map(|slot| {
                let blocks = slot.iter().map(|index| file.block_bytes(*index).unwrap());
                blocks
                    .map(|bytes| Block::decode(bytes, SEQUENCE_LEN).unwrap())
                    .collect()
            })
            .collect();
        for found in slots.iter().flatten() {
            let expected = block(&[examples.next().unwrap()], SEQUENCE_LEN);
            let used = expected.used_len();
            assert_eq!(found.tokens[..used], expected.tokens[..used]);
            assert_eq!(found.segments, expected.segments);
            assert_eq!(found.trained, expected.trained);
        }
        let slots: Vec<&[Block]> = slots.iter().map(Vec::as_slice).collect();
        let rate = learning_rate(&job, step, schedule.total_steps());
        steps.push(train_step(&mut trainer, step, &slots, rate));
    }
    assert!(examples.next().is_none(), "examples were left out");
    assert_steps("dataset", &steps, &golden.steps);
    let end = trainer.snapshot().unwrap();
    let expected = read_weights(&dir.join("trained_adapter"), &end.layout).unwrap();
    assert_weights("dataset", &start, &end, &expected);
}

#[test]
fn training_on_dataset_files_follows_peft() {
    check_dataset(&golden_dir());
}
