//! Facts about single decisions, as events and the commands they lead to.

use std::sync::Arc;

use common::job::{
    BaseDtype, ClusterSpec, InitWeights, JobSpec, LrScheduler, Method, Reduction, Resume,
    ValSetSize, Warmup,
};
use proto::v1;

use super::*;

pub fn job(total_steps: u64, slots: u32) -> JobSpec {
    JobSpec {
        base_model: "model".into(),
        model_revision: None,
        init_weights: InitWeights::Pretrained,
        base_dtype: BaseDtype::Float32,
        datasets: Vec::new(),
        val_set_size: ValSetSize::None,
        sequence_len: 8,
        sample_packing: true,
        train_on_inputs: false,
        shuffle: false,
        method: Method::Full,
        global_batch_size: slots as usize,
        micro_batch_size: 1,
        num_epochs: 1.0,
        max_steps: Some(total_steps),
        learning_rate: 0.5,
        lr_scheduler: LrScheduler::Constant,
        warmup: Warmup::Steps(0),
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: None,
        gradient_checkpointing: false,
        seed: 42,
        logging_steps: 1,
        save_steps: Some(3),
        save_total_limit: None,
        eval_steps: Some(2),
        max_skipped_steps: 1,
        output_dir: "out".into(),
        resume: Resume::Auto,
        reduction: Reduction::Exact,
        cluster: ClusterSpec {
            min_workers: 1,
            max_workers: None,
        },
        test_prompts: Vec::new(),
    }
}

/// `slots` blocks of one trained token for training, two for evaluation.
pub fn course(total_steps: u64, slots: u32) -> Course {
    let block = BlockTokens {
        used: 4,
        trained: 1,
    };
    let blocks = vec![block; slots as usize + 2];
    Course::new(Arc::new(job(total_steps, slots)), u64::from(slots), blocks)
}

pub fn settings() -> Settings {
    Settings {
        version: "1".into(),
        job_digest: "job".into(),
        start_step: 0,
        start_weights_digest: None,
        start_numerics_class: None,
        min_workers: 1,
        max_workers: None,
        max_skipped_steps: 1,
    }
}

pub fn join(worker: WorkerId) -> Event {
    let join = v1::Join {
        version: "1".into(),
        name: format!("w{}", worker.0),
        numerics_class: "cpu".into(),
        ..Default::default()
    };
    let address = format!("10.0.0.{}:9", worker.0);
    Event::WorkerJoined {
        worker,
        join,
        address,
    }
}

pub fn ready(worker: WorkerId, step: u64) -> Event {
    let ready = v1::Ready {
        step,
        layout_digest: "layout".into(),
        trainable_scalars: 10,
        weights_digest: format!("weights-{step}"),
        job_digest: "job".into(),
        total_scalars: 10,
    };
    Event::WorkerReady { worker, ready }
}
