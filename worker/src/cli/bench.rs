//! `worker bench`: how fast this machine trains a model of a given shape. Random weights and tokens, real steps.
//!
//! In: a `config.json` and a batch. Out: tokens a second, memory, arithmetic and its share of the peak that matrix
//! products alone reach in the same process, and where the time goes.

pub mod exchange;
pub mod self_check;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use common::data::block::Block;
use common::flops;
use common::job::{self, InitWeights, JobErrors, JobSources, JobSpec};
use common::memory::{Bytes, bytes};
use common::model::ModelConfig;
use common::rng::CounterRng;
use half::bf16;
use serde::Serialize;
use thiserror::Error;
#[cfg(feature = "cuda")]
use worker::engine::cuda::peak::product_gflops;
use worker::engine::estimate::{estimate, shapes};
use worker::engine::ops::element::Element;
use worker::engine::ops::matrix::{Along, Target, View};
use worker::engine::ops::product::multiply;
use worker::engine::trainer::SlotTimes;
use worker::engine::{EngineError, Trainer, TrainerOptions};
use worker::{ComputeDevice, Device, DeviceError};

#[derive(Args)]
pub struct BenchArgs {
    /// The model's config.json
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// What is trained
    #[arg(long, value_enum, default_value_t = Mode::Lora)]
    mode: Mode,
    /// Storage of the base weights
    #[arg(long, value_enum, default_value_t = Dtype::Bfloat16)]
    dtype: Dtype,
    /// With --mode full, train the weights in bfloat16
    #[arg(long)]
    pure_bf16: bool,
    /// Keep the linears in 4 bits (NF4)
    #[arg(long = "load-in-4bit")]
    load_in_4bit: bool,
    /// With --load-in-4bit, the embedding and the output layer too
    #[arg(long, requires = "load_in_4bit")]
    quantize_embeddings: bool,
    /// With --load-in-4bit, the experts of a mixture of experts too
    #[arg(long, requires = "load_in_4bit")]
    quantize_moe_experts: bool,
    /// The optimizer, by a name that jobs have for it
    #[arg(long, value_name = "NAME", default_value = "adamw")]
    optimizer: String,
    /// Sequences in a step, all in one slot
    #[arg(long, value_name = "B", default_value_t = 4, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Tokens in a sequence
    #[arg(long, value_name = "S", default_value_t = 128, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    seq: u32,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// What to compute on
    #[arg(long, value_name = "auto|cpu|cuda|cuda:N", default_value_t = Device::Cpu)]
    device: Device,
    /// Steps that are measured
    #[arg(long, value_name = "N", default_value_t = 5, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Steps before those
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        allow_negative_numbers = true
    )]
    warmup: u16,
    /// Rank of the adapter
    #[arg(long, value_name = "R", default_value_t = 16, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    lora_r: u16,
    /// Keep one tensor a layer and compute the rest again
    #[arg(long)]
    gradient_checkpointing: bool,
    /// How gradients are summed
    #[arg(long, value_enum, default_value_t = ReductionName::Exact)]
    reduction: ReductionName,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    Lora,
    Full,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Dtype {
    Float32,
    Bfloat16,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum ReductionName {
    Exact,
    Fast,
}

/// Why a benchmark or a self-check failed.
#[derive(Debug, Error)]
pub enum BenchError {
    #[error("{path}: {reason}")]
    Config { path: PathBuf, reason: String },
    #[error(transparent)]
    Job(#[from] JobErrors),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("--pure-bf16 goes with --mode full: adapters are trained in float32")]
    PureBf16,
    #[error("the device did not open within {seconds} s")]
    Hangs { seconds: u64 },
    #[error("{failures} checks failed")]
    Failures { failures: usize },
    #[error("cannot prepare the benchmark: {0}")]
    Io(#[from] std::io::Error),
}

/// Seconds of one step, phase by phase.
#[derive(Clone, Copy)]
struct StepTime {
    forward: f64,
    /// Seconds for the output layer, forward and backward.
    loss: f64,
    /// Seconds for the backward pass; with full training, adding to the exact accumulator too.
    backward: f64,
    /// Seconds to add the slot to the exact accumulator.
    accumulate: f64,
    /// Seconds for norm, clipping and AdamW, from the exact sums, as with one worker.
    update: f64,
}

impl StepTime {
    fn compute(&self) -> f64 {
        self.forward + self.loss + self.backward + self.accumulate
    }

    fn total(&self) -> f64 {
        self.compute() + self.update
    }
}

#[derive(Serialize)]
struct Report {
    tokens_per_step: u64,
    tokens_per_second_median: f64,
    tokens_per_second_best: f64,
    peak_memory_bytes: u64,
    /// Bytes of memory that were expected before anything was loaded.
    estimated_memory_bytes: u64,
    estimated_memory: Bytes,
    gflop_per_token: f64,
    gflops: f64,
    gemm_peak_gflops: f64,
    share_of_gemm_peak: f64,
    /// Model FLOPs utilisation: the share of the published peak of bfloat16 products, where that is known.
    mfu: Option<f64>,
    step_seconds: f64,
    compute_seconds: f64,
    forward_seconds: f64,
    loss_seconds: f64,
    backward_seconds: f64,
    accumulate_seconds: f64,
    update_seconds: f64,
    parameters: u64,
    trainable: u64,
    threads: usize,
    device: String,
}

/// The defaults of the command line.
impl Default for BenchArgs {
    fn default() -> Self {
        Self {
            config: PathBuf::new(),
            mode: Mode::Lora,
            dtype: Dtype::Bfloat16,
            pure_bf16: false,
            load_in_4bit: false,
            quantize_embeddings: false,
            quantize_moe_experts: false,
            optimizer: "adamw".to_owned(),
            batch: 4,
            seq: 128,
            threads: None,
            device: Device::Cpu,
            steps: 5,
            warmup: 1,
            lora_r: 16,
            gradient_checkpointing: false,
            reduction: ReductionName::Exact,
            json: false,
        }
    }
}

/// Measures a training step of the model and prints the result.
pub fn run(args: BenchArgs) -> Result<(), BenchError> {
    if args.pure_bf16 && args.mode == Mode::Lora {
        return Err(BenchError::PureBf16);
    }
    let work = Work::of(&args, args.device.open()?)?;
    if !args.json {
        crate::print(format!("needed       {}\n", work.needed.told()));
    }
    print(&measure(&args, &work)?, args.json);
    Ok(())
}

/// A model with its blocks, whose steps are to be measured.
struct Work {
    folder: tempfile::TempDir,
    config: ModelConfig,
    job: Arc<JobSpec>,
    device: ComputeDevice,
    needed: Bytes,
}

impl Work {
    fn of(args: &BenchArgs, device: ComputeDevice) -> Result<Self, BenchError> {
        let folder = tempfile::tempdir()?;
        let config = copy_config(&args.config, folder.path())?;
        let job = Arc::new(job_of(args, folder.path())?);
        Ok(Self {
            needed: estimate(&config, &job, &device, args.gradient_checkpointing)?,
            folder,
            config,
            job,
            device,
        })
    }
}

fn measure(args: &BenchArgs, work: &Work) -> Result<Report, BenchError> {
    let threads = match args.threads {
        Some(threads) => usize::from(threads),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let Work {
        folder,
        config,
        job,
        device,
        needed,
    } = work;
    let mut trainer = Trainer::load(TrainerOptions {
        job: job.clone(),
        model_dir: folder.path().to_owned(),
        adapter_dir: None,
        threads,
        device: device.clone(),
    })?;
    let blocks = random_blocks(args, config.vocab_size);
    device.reset_peak_memory();
    for _ in 0..args.warmup {
        step(&mut trainer, &blocks)?;
    }
    let mut times = (0..args.steps)
        .map(|_| step(&mut trainer, &blocks))
        .collect::<Result<Vec<_>, _>>()?;
    let peak_memory_bytes = device.peak_memory_bytes();
    times.sort_by(|a, b| a.total().total_cmp(&b.total()));
    let tokens = u64::from(args.batch) * u64::from(args.seq);
    let median = times[times.len() / 2];
    let (shape, shaped) = shapes(config, job, args.gradient_checkpointing)?;
    let gflop_per_token = flops::per_token(&shape, &shaped).in_context(f64::from(args.seq)) / 1e9;
    let gflops = gflop_per_token * tokens as f64 / median.total();
    let published = device.published_peak();
    let published = published.filter(|_| args.dtype == Dtype::Bfloat16);
    let gemm_peak_gflops = gemm_peak(args, device, threads)?;
    Ok(Report {
        tokens_per_step: tokens,
        tokens_per_second_median: tokens as f64 / median.total(),
        tokens_per_second_best: tokens as f64 / times[0].total(),
        peak_memory_bytes,
        estimated_memory_bytes: needed.total(),
        estimated_memory: *needed,
        gflop_per_token,
        gflops,
        gemm_peak_gflops,
        share_of_gemm_peak: gflops / gemm_peak_gflops,
        mfu: published.map(|peak| gflops * 1e9 / peak),
        step_seconds: median.total(),
        compute_seconds: median.compute(),
        forward_seconds: median.forward,
        loss_seconds: median.loss,
        backward_seconds: median.backward,
        accumulate_seconds: median.accumulate,
        update_seconds: median.update,
        parameters: trainer.total_scalars(),
        trainable: trainer.layout().scalars as u64,
        threads,
        device: device.to_string(),
    })
}

fn copy_config(path: &Path, folder: &Path) -> Result<ModelConfig, BenchError> {
    let wrong = |reason: String| BenchError::Config {
        path: path.to_owned(),
        reason,
    };
    std::fs::copy(path, folder.join("config.json")).map_err(|error| wrong(error.to_string()))?;
    let opened = common::files::model::ModelFolder::open(folder, InitWeights::Random);
    let opened = opened.map_err(|error| wrong(error.to_string()))?;
    Ok(ModelConfig::of(&opened).map_err(EngineError::from)?)
}

/// The job that a measured step belongs to.
fn job_of(args: &BenchArgs, folder: &Path) -> Result<JobSpec, BenchError> {
    let values = [
        ("base_model", folder.display().to_string()),
        ("dataset", folder.join("config.json").display().to_string()),
        ("adapter", name_of(args.mode)),
        ("base_dtype", name_of(args.dtype)),
        ("pure_bf16", args.pure_bf16.to_string()),
        ("load_in_4bit", args.load_in_4bit.to_string()),
        ("quantize_embeddings", args.quantize_embeddings.to_string()),
        (
            "quantize_moe_experts",
            args.quantize_moe_experts.to_string(),
        ),
        ("reduction", name_of(args.reduction)),
        ("optimizer", args.optimizer.clone()),
        ("lora_r", args.lora_r.to_string()),
        ("lora_alpha", (2 * u32::from(args.lora_r)).to_string()),
        ("sequence_len", args.seq.to_string()),
        ("micro_batch_size", args.batch.to_string()),
        ("global_batch_size", args.batch.to_string()),
        (
            "gradient_checkpointing",
            args.gradient_checkpointing.to_string(),
        ),
    ];
    let wanted = |(name, _): &(&str, String)| args.mode == Mode::Lora || !name.starts_with("lora");
    let flags = values.into_iter().filter(wanted);
    let job = job::load(JobSources {
        flags: flags
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        ..JobSources::default()
    })?;
    // A job would refuse an adapter on random weights, which nobody wants but a benchmark.
    Ok(JobSpec {
        init_weights: InitWeights::Random,
        ..job
    })
}

fn name_of(value: impl ValueEnum) -> String {
    let name = value.to_possible_value();
    name.map_or_else(String::new, |name| name.get_name().to_owned())
}

/// Blocks of whole sequences of random tokens, all trained but the first.
fn random_blocks(args: &BenchArgs, vocabulary: usize) -> Vec<Block> {
    let mut rng = CounterRng::new(0, &[]);
    let length = args.seq as usize;
    let block = |_| Block {
        tokens: (0..length)
            .map(|_| rng.below(vocabulary as u64) as u32)
            .collect(),
        segments: vec![1; length],
        trained: (0..length).map(|index| index > 0).collect(),
    };
    (0..args.batch).map(block).collect()
}

fn step(trainer: &mut Trainer, blocks: &[Block]) -> Result<StepTime, EngineError> {
    let trained = blocks.iter().map(Block::trained_tokens).sum();
    trainer.begin_step(trainer.step(), trained, 1)?;
    trainer.train_slot(0, blocks)?;
    let SlotTimes { pass, accumulate } = trainer.slot_times();
    let computed = Instant::now();
    trainer.apply_held(1e-5)?;
    Ok(StepTime {
        forward: pass.forward.as_secs_f64(),
        loss: pass.loss.as_secs_f64(),
        backward: pass.backward.as_secs_f64(),
        accumulate: accumulate.as_secs_f64(),
        update: computed.elapsed().as_secs_f64(),
    })
}

/// Speed of one large product in GFLOP/s.
fn gemm_peak(args: &BenchArgs, device: &ComputeDevice, threads: usize) -> Result<f64, BenchError> {
    let is_narrow = args.dtype == Dtype::Bfloat16;
    match device {
        ComputeDevice::Cpu => {
            // Full training on processors computes in the type of what it trains.
            let measure = || match is_narrow && (args.mode == Mode::Lora || args.pure_bf16) {
                true => product_speed::<bf16>(),
                false => product_speed::<f32>(),
            };
            Ok(
                match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
                    Ok(pool) => pool.install(measure),
                    Err(_) => measure(),
                },
            )
        }
        #[cfg(feature = "cuda")]
        ComputeDevice::Cuda { gpu, .. } => {
            let measured = match is_narrow {
                true => product_gflops::<bf16>(gpu),
                false => product_gflops::<f32>(gpu),
            };
            Ok(measured.map_err(EngineError::Gpu)?)
        }
    }
}

fn product_speed<E: Element>() -> f64 {
    const ROWS: usize = 512;
    const WIDTH: usize = 2048;
    let filled = |len| std::iter::repeat_n(E::round_from(0.5), len).collect::<Vec<E>>();
    let (x, weight) = (filled(ROWS * WIDTH), filled(WIDTH * WIDTH));
    let mut y = vec![0.0f32; ROWS * WIDTH];
    let mut best = f64::INFINITY;
    let begun = Instant::now();
    // Three times at least, then as often as half a second holds.
    for repeat in 0..100 {
        if repeat >= 3 && begun.elapsed().as_secs_f64() > 0.5 {
            break;
        }
        let started = Instant::now();
        let x = View::new(&x[..], ROWS, WIDTH);
        let weight = View::new(&weight[..], WIDTH, WIDTH);
        let target = Target::new(&mut y[..], ROWS, WIDTH);
        multiply(target, x, weight, Along::Columns);
        best = best.min(started.elapsed().as_secs_f64());
    }
    2.0 * (ROWS * WIDTH * WIDTH) as f64 / best / 1e9
}

/// Prints the report as JSON on one line, for programs.
fn print_json(report: &impl Serialize) {
    match serde_json::to_string(report) {
        Ok(line) => say(format_args!("{line}")),
        Err(error) => crate::end_with(crate::FAILED, &error.to_string()),
    }
}

fn print(report: &Report, json: bool) {
    if json {
        return print_json(report);
    }
    say(format_args!(
        "tokens/s     {:.1} median, {:.1} best, {} tokens a step, on {} with {} threads",
        report.tokens_per_second_median,
        report.tokens_per_second_best,
        report.tokens_per_step,
        report.device,
        report.threads
    ));
    say(format_args!(
        "arithmetic   {:.1} GFLOP/s, {:.0}% of the {:.0} that products alone reach; {:.3} GFLOP a token",
        report.gflops,
        100.0 * report.share_of_gemm_peak,
        report.gemm_peak_gflops,
        report.gflop_per_token
    ));
    if let Some(mfu) = report.mfu {
        say(format_args!(
            "MFU          {:.1}% of the published peak",
            100.0 * mfu
        ));
    }
    say(format_args!(
        "memory       {} at the peak, {} expected; {} parameters, {} of them trainable",
        bytes(report.peak_memory_bytes),
        bytes(report.estimated_memory_bytes),
        report.parameters,
        report.trainable
    ));
    say(format_args!(
        "a step       {:.4} s: forward {:.4}, loss {:.4}, backward {:.4}, accumulate {:.4}, update {:.4}",
        report.step_seconds,
        report.forward_seconds,
        report.loss_seconds,
        report.backward_seconds,
        report.accumulate_seconds,
        report.update_seconds
    ));
}

fn say(line: std::fmt::Arguments<'_>) {
    // Where nobody reads it any more, the exit code still tells.
    crate::print(format!("{line}\n"));
}
