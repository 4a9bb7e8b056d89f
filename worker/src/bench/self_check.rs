//! `worker self-check`: does a device train right, and how fast. In: a device. Out: a table of what was compared with the
//! processor, what had to be the same to the bit, and what speeds it reached. Nothing but this program is needed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use common::data::block::Block;
use common::exact::dequantize;
use serde_json::{Value, json};
use worker::engine::accumulator::Sums;
use worker::engine::{Reduced, Trainer, TrainerOptions};
use worker::{ComputeDevice, Device};

use super::{BenchArgs, BenchError, Dtype, Mode, Work, job_of, random_blocks};
#[cfg(feature = "cuda")]
use super::{Report, measure};

const STEPS: usize = 10;
const LEARNING_RATE: f64 = 3e-3;

#[derive(Args)]
pub struct SelfCheckArgs {
    /// What to check: `auto` takes the first GPU where this program can use one, and the processor elsewhere
    #[arg(long, value_name = "auto|cpu|cuda|cuda:N", default_value_t = Device::Auto)]
    device: Device,
    /// Leave the speeds out
    #[arg(long)]
    quick: bool,
    /// Only train the shape of this number, and print the digest of its weights: for checks of several processes
    #[arg(long, hide = true)]
    digest_of: Option<usize>,
}

/// A model to compare on.
struct Shape {
    name: &'static str,
    config: Value,
    mode: Mode,
    dtype: Dtype,
    seq: u32,
}

/// What a comparison came to.
enum Verdict {
    Passed(String),
    Failed(String),
}

struct Table {
    failures: usize,
}

impl Table {
    fn row(&mut self, shape: &str, what: &str, verdict: Result<Verdict, BenchError>) {
        let (mark, found) = match verdict {
            Ok(Verdict::Passed(found)) => ("pass", found),
            Ok(Verdict::Failed(found)) => ("FAIL", found),
            Err(error) => ("FAIL", error.to_string()),
        };
        self.failures += usize::from(mark == "FAIL");
        println!("{mark}  {shape:<34} {what:<42} {found}");
    }
}

/// # Errors
/// Where the device cannot be used, or a comparison failed.
pub fn run(args: SelfCheckArgs) -> Result<(), BenchError> {
    let device = args.device.open()?;
    if let Some(number) = args.digest_of {
        return print_digest(number, &device);
    }
    println!("device {device}, class {}", device.numerics_class());
    let mut table = Table { failures: 0 };
    for (number, shape) in shapes().into_iter().enumerate() {
        let began = Instant::now();
        check(&shape, number, &device, &mut table);
        println!(
            "      {:<34} {:.1} s",
            shape.name,
            began.elapsed().as_secs_f64()
        );
    }
    match (&device, args.quick) {
        (_, true) => {}
        (ComputeDevice::Cpu, false) => {
            println!("      speeds of large models: left out without a GPU")
        }
        #[cfg(feature = "cuda")]
        (ComputeDevice::Cuda { .. }, false) => speeds(&device, &mut table),
    }
    #[cfg(feature = "cuda")]
    if let ComputeDevice::Cuda { ordinal, .. } = &device {
        for tool in ["memcheck", "racecheck"] {
            println!(
                "next: compute-sanitizer --tool {tool} worker self-check --device cuda:{ordinal} --quick"
            );
        }
    }
    match table.failures {
        0 => {
            println!("all checks passed");
            Ok(())
        }
        failures => Err(BenchError::Failures { failures }),
    }
}

/// Every family, method and type; heads of 64 and 128, and sequences that fill no tile.
fn shapes() -> Vec<Shape> {
    let config = |architecture: &str, head_dim: usize| {
        json!({
            "architectures": [architecture], "vocab_size": 1000, "hidden_size": 256,
            "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": head_dim, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": false,
            "tie_word_embeddings": architecture == "Qwen3ForCausalLM", "initializer_range": 0.05
        })
    };
    let shape = |name, architecture, head_dim, mode, dtype, seq| Shape {
        name,
        config: config(architecture, head_dim),
        mode,
        dtype,
        seq,
    };
    vec![
        shape(
            "Qwen3, LoRA, float32",
            "Qwen3ForCausalLM",
            64,
            Mode::Lora,
            Dtype::Float32,
            100,
        ),
        shape(
            "Qwen3, LoRA, bfloat16",
            "Qwen3ForCausalLM",
            128,
            Mode::Lora,
            Dtype::Bfloat16,
            300,
        ),
        shape(
            "Qwen2, all weights, float32",
            "Qwen2ForCausalLM",
            64,
            Mode::Full,
            Dtype::Float32,
            130,
        ),
        shape(
            "Llama, all weights, bfloat16",
            "LlamaForCausalLM",
            128,
            Mode::Full,
            Dtype::Bfloat16,
            129,
        ),
    ]
}

/// `number` is that of the shape.
fn check(shape: &Shape, number: usize, device: &ComputeDevice, table: &mut Table) {
    let folder = match prepared(shape) {
        Ok(folder) => folder,
        Err(error) => return table.row(shape.name, "preparing a model", Err(error)),
    };
    let bench = Checked {
        shape,
        folder: folder.path(),
        device,
    };
    table.row(
        shape.name,
        "gradient and loss as on the processor",
        bench.gradient(),
    );
    table.row(
        shape.name,
        "ten steps follow the processor's losses",
        bench.losses(),
    );
    table.row(
        shape.name,
        "the same bits again, with checkpointing",
        bench.bits(),
    );
    table.row(
        shape.name,
        "two workers come to the bits of one",
        bench.two_workers(),
    );
    table.row(
        shape.name,
        "two processes at once, the same bits",
        bench.two_processes(number),
    );
    if !matches!(device, ComputeDevice::Cpu) {
        let what = "memory at the peak as expected";
        for checkpointing in [false, true] {
            table.row(shape.name, what, bench.memory(checkpointing));
        }
    }
}

fn prepared(shape: &Shape) -> Result<tempfile::TempDir, BenchError> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("config.json"), shape.config.to_string())?;
    Ok(folder)
}

struct Checked<'a> {
    shape: &'a Shape,
    folder: &'a Path,
    device: &'a ComputeDevice,
}

impl Checked<'_> {
    fn args(&self, dtype: Dtype, gradient_checkpointing: bool) -> BenchArgs {
        BenchArgs {
            config: self.folder.join("config.json"),
            mode: self.shape.mode,
            dtype,
            batch: 2,
            seq: self.shape.seq,
            gradient_checkpointing,
            ..BenchArgs::default()
        }
    }

    fn load(
        &self,
        device: &ComputeDevice,
        dtype: Dtype,
        checkpointing: bool,
    ) -> Result<Trainer, BenchError> {
        let job = job_of(&self.args(dtype, checkpointing), self.folder)?;
        Ok(Trainer::load(TrainerOptions {
            job: Arc::new(job),
            model_dir: self.folder.to_owned(),
            adapter_dir: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            device: device.clone(),
        })?)
    }

    /// After a step on the processor, so that both factors of adapters have gradients.
    fn trained(
        &self,
        device: &ComputeDevice,
        dtype: Dtype,
        checkpointing: bool,
    ) -> Result<Trainer, BenchError> {
        let mut start = self.load(&ComputeDevice::Cpu, dtype, false)?;
        step(&mut start, &self.blocks())?;
        let mut trainer = self.load(device, dtype, checkpointing)?;
        trainer.restore(&start.snapshot()?)?;
        Ok(trainer)
    }

    fn blocks(&self) -> Vec<Block> {
        let vocabulary = self.shape.config["vocab_size"].as_u64().unwrap_or(2);
        let args = self.args(self.shape.dtype, false);
        let mut blocks = random_blocks(&args, vocabulary as usize);
        // One with two segments, the border inside a tile.
        for (index, segment) in blocks[0].segments.iter_mut().enumerate() {
            *segment = 1 + u16::from(index >= 37);
        }
        blocks[0].trained[37] = false;
        blocks
    }

    fn gradient(&self) -> Result<Verdict, BenchError> {
        let run = |device: &ComputeDevice, dtype| {
            sums(&mut self.trained(device, dtype, false)?, &self.blocks())
        };
        let dtype = self.shape.dtype;
        let exact = run(&ComputeDevice::Cpu, Dtype::Float32)?;
        let found = run(self.device, dtype)?;
        let apart = distance(&found.0, &exact.0);
        let allowed = match dtype {
            Dtype::Float32 => 1e-5,
            // As far as the rounding of a few layers takes it, on processors too.
            Dtype::Bfloat16 => 3e-2,
        };
        let loss = (found.1 / exact.1 - 1.0).abs();
        let told = format!("{apart:.1e} apart ({allowed:.0e} allowed), loss {loss:.1e}");
        Ok(verdict(apart <= allowed && loss <= allowed, told))
    }

    fn losses(&self) -> Result<Verdict, BenchError> {
        let run = |device: &ComputeDevice, dtype| -> Result<Vec<f64>, BenchError> {
            let mut trainer = self.load(device, dtype, false)?;
            (0..STEPS)
                .map(|_| step(&mut trainer, &self.blocks()))
                .collect()
        };
        let expected = run(&ComputeDevice::Cpu, Dtype::Float32)?;
        let found = run(self.device, self.shape.dtype)?;
        let pairs = found.iter().zip(&expected);
        let apart = pairs.map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
        let allowed = match self.shape.dtype {
            Dtype::Float32 => 1e-4,
            Dtype::Bfloat16 => 2e-2,
        };
        let (first, last) = (found[0], found[STEPS - 1]);
        let told = format!("{first:.4} -> {last:.4}, {apart:.1e} apart ({allowed:.0e} allowed)");
        Ok(verdict(apart <= allowed && last < first, told))
    }

    fn bits(&self) -> Result<Verdict, BenchError> {
        let run = |checkpointing, before| -> Result<_, BenchError> {
            let mut trainer = self.trained(self.device, self.shape.dtype, checkpointing)?;
            for _ in 0..before {
                sums(&mut trainer, &self.blocks()[..1])?;
            }
            sums(&mut trainer, &self.blocks())
        };
        let expected = run(false, 0)?;
        let same = run(false, 2)? == expected && run(true, 0)? == expected;
        Ok(verdict(same, String::new()))
    }

    /// Of the weights after two steps.
    fn digest(&self) -> Result<String, BenchError> {
        let mut trainer = self.load(self.device, self.shape.dtype, false)?;
        for _ in 0..2 {
            step(&mut trainer, &self.blocks())?;
        }
        Ok(trainer.weights_digest()?)
    }

    /// Both compute on the device while this one holds an engine there, too.
    fn two_processes(&self, number: usize) -> Result<Verdict, BenchError> {
        let device = match self.device {
            ComputeDevice::Cpu => Device::Cpu,
            #[cfg(feature = "cuda")]
            ComputeDevice::Cuda { ordinal, .. } => Device::Cuda(*ordinal),
        };
        let start = || {
            Command::new(std::env::current_exe()?)
                .args(["self-check", "--device", &device.to_string()])
                .args(["--digest-of", &number.to_string()])
                .stdout(Stdio::piped())
                .spawn()
        };
        let others = [start()?, start()?];
        let digest = self.digest()?;
        let mut same = true;
        for other in others {
            let output = other.wait_with_output()?;
            same &= output.status.success();
            same &= String::from_utf8_lossy(&output.stdout).trim() == digest;
        }
        Ok(verdict(same, digest.chars().take(16).collect()))
    }

    /// Of the engine's buffers, without the library's workspace, which would hide what is wrong with the rest.
    fn memory(&self, checkpointing: bool) -> Result<Verdict, BenchError> {
        const ALLOWED: f64 = 0.1;
        let args = BenchArgs {
            gradient_checkpointing: checkpointing,
            ..self.args(self.shape.dtype, checkpointing)
        };
        let needed = Work::of(&args, self.device.clone())?.needed;
        let mut trainer = self.load(self.device, self.shape.dtype, checkpointing)?;
        self.device.reset_peak_memory();
        whole_step(&mut trainer, &self.blocks())?;
        let libraries = needed.libraries;
        let found = self.device.peak_memory_bytes().saturating_sub(libraries);
        let expected = needed.total() - libraries;
        let apart = expected as f64 / found.max(1) as f64 - 1.0;
        let told = format!(
            "{:.1} MB, {:.1} expected ({:+.1}%)",
            found as f64 / 1e6,
            expected as f64 / 1e6,
            100.0 * apart
        );
        Ok(verdict(apart.abs() <= ALLOWED, told))
    }

    /// Each holds a slot, their sums are added, both update from the mean.
    fn two_workers(&self) -> Result<Verdict, BenchError> {
        let load = || self.load(self.device, self.shape.dtype, false);
        let (mut alone, mut first, mut second) = (load()?, load()?, load()?);
        let blocks = self.blocks();
        for _ in 0..2 {
            step(&mut alone, &blocks)?;
            let trained = blocks.iter().map(Block::trained_tokens).sum();
            let mut total = vec![0i64; alone.layout().scalars];
            for (slot, worker) in [&mut first, &mut second].into_iter().enumerate() {
                worker.begin_step(worker.step(), trained, 2)?;
                worker.train_slot(slot as u32, &blocks[slot..=slot])?;
                for (total, sum) in total.iter_mut().zip(held(worker)?) {
                    *total = total.wrapping_add(sum);
                }
            }
            let mean = total.into_iter().map(dequantize).collect();
            let reduced = Reduced { mean, invalid: 0 };
            for worker in [&mut first, &mut second] {
                worker.apply(&reduced, LEARNING_RATE)?;
            }
        }
        let digest = alone.weights_digest()?;
        let same = first.weights_digest()? == digest && second.weights_digest()? == digest;
        Ok(verdict(same, digest.chars().take(16).collect()))
    }
}

/// What [`Checked::two_processes`] starts.
fn print_digest(number: usize, device: &ComputeDevice) -> Result<(), BenchError> {
    let Some(shape) = shapes().into_iter().nth(number) else {
        return Err(BenchError::Failures { failures: 1 });
    };
    let folder = prepared(&shape)?;
    let bench = Checked {
        shape: &shape,
        folder: folder.path(),
        device,
    };
    println!("{}", bench.digest()?);
    Ok(())
}

fn verdict(passed: bool, told: String) -> Verdict {
    match passed {
        true => Verdict::Passed(told),
        false => Verdict::Failed(told),
    }
}

/// The exact sums that a slot leaves, and its loss.
fn sums(trainer: &mut Trainer, blocks: &[Block]) -> Result<(Vec<i64>, f64), BenchError> {
    let trained = blocks.iter().map(Block::trained_tokens).sum();
    trainer.forget_slots();
    trainer.begin_step(trainer.step(), trained, 1)?;
    let outcome = trainer.train_slot(0, blocks)?;
    Ok((held(trainer)?, outcome.loss_sum))
}

/// A step whose blocks are one slot.
fn whole_step(trainer: &mut Trainer, blocks: &[Block]) -> Result<(), BenchError> {
    let trained = blocks.iter().map(Block::trained_tokens).sum();
    trainer.begin_step(trainer.step(), trained, 1)?;
    trainer.train_slot(0, blocks)?;
    trainer.apply_held(LEARNING_RATE)?;
    Ok(())
}

fn held(trainer: &mut Trainer) -> Result<Vec<i64>, BenchError> {
    trainer.collect()?;
    let mut plain = vec![0; trainer.layout().scalars];
    if let Sums::Exact { sums, .. } = trainer.accumulator().sums() {
        sums.read(0, &mut plain);
    }
    Ok(plain)
}

/// A whole step with a slot for each block. Returns the mean loss.
fn step(trainer: &mut Trainer, blocks: &[Block]) -> Result<f64, BenchError> {
    let trained: u64 = blocks.iter().map(Block::trained_tokens).sum();
    trainer.begin_step(trainer.step(), trained, blocks.len())?;
    let mut loss = 0.0;
    for (slot, block) in blocks.iter().enumerate() {
        let outcome = trainer.train_slot(slot as u32, std::slice::from_ref(block))?;
        loss += outcome.loss_sum;
    }
    trainer.apply_held(LEARNING_RATE)?;
    Ok(loss / trained as f64)
}

/// The distance of two gradients, as a share of the second one's length.
fn distance(found: &[i64], expected: &[i64]) -> f64 {
    let value = |sum: &i64| f64::from(dequantize(*sum));
    let pairs = || {
        found
            .iter()
            .zip(expected)
            .map(|(a, b)| (value(a), value(b)))
    };
    let apart: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    let length: f64 = pairs().map(|(_, b)| b.powi(2)).sum();
    (apart / length).sqrt()
}

/// The shapes of Qwen3-0.6B and of Llama 3.1 8B, on random weights.
#[cfg(feature = "cuda")]
fn speeds(device: &ComputeDevice, table: &mut Table) {
    let small = json!({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "attention_bias": false, "tie_word_embeddings": true
    });
    let large = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "attention_bias": false, "tie_word_embeddings": false
    });
    for (name, config, mode, batch, seq, gradient_checkpointing) in [
        (
            "0.6B, LoRA, bfloat16, 8 x 2048",
            &small,
            Mode::Lora,
            8,
            2048,
            false,
        ),
        (
            "0.6B, all weights, bfloat16, 8 x 2048",
            &small,
            Mode::Full,
            8,
            2048,
            false,
        ),
        (
            "8B, LoRA, bfloat16, 2 x 4096",
            &large,
            Mode::Lora,
            2,
            4096,
            true,
        ),
    ] {
        let measured = (|| {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("config.json");
            std::fs::write(&path, config.to_string())?;
            let args = BenchArgs {
                config: path,
                mode,
                batch,
                seq,
                gradient_checkpointing,
                ..BenchArgs::default()
            };
            measure(&args, &Work::of(&args, device.clone())?)
        })();
        table.row(
            name,
            "speed",
            measured.map(|report| Verdict::Passed(told(&report))),
        );
    }
}

#[cfg(feature = "cuda")]
fn told(report: &Report) -> String {
    let mfu = report.mfu.map(|mfu| format!(", MFU {:.1}%", 100.0 * mfu));
    format!(
        "{:.0} tokens/s, {:.1} GB, {:.1} TFLOP/s, {:.0}% of the {:.0} that products alone reach{}",
        report.tokens_per_second_median,
        report.peak_memory_bytes as f64 / 1e9,
        report.gflops / 1e3,
        100.0 * report.share_of_gemm_peak,
        report.gemm_peak_gflops / 1e3,
        mfu.unwrap_or_default()
    )
}
