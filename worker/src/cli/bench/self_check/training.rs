//! Small models, trained on a device and on the processor. In: a device. Out: what was compared, and what had to be the same to
//! the bit.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::data::block::Block;
use common::exact::dequantize;
use common::job::{BaseDtype, InitWeights, JobSpec};
use common::memory::bytes;
use worker::ComputeDevice;
use worker::engine::accumulator::Sums;
use worker::engine::{MeanGradient, Trainer, TrainerOptions};

use super::helper::{Helper, asked};
use super::shapes::{Shape, shapes};
use super::verdict::{Verdict, verdict};
use super::widened::widened;
use crate::cli::bench::{BenchArgs, BenchError, Dtype, Mode, Work, job_of, random_blocks};

const STEPS: usize = 10;
const LEARNING_RATE: f64 = 3e-3;

/// What is checked on a shape.
#[derive(Clone, Copy)]
pub enum Check {
    Gradient,
    Losses,
    Bits,
    TwoWorkers,
    ThreeProcesses,
    Widened,
    Memory { checkpointing: bool },
}

impl Check {
    /// All that can be checked of a shape on such a device.
    pub fn all(shape: &Shape, on_gpu: bool) -> Vec<Self> {
        let mut all = vec![
            Self::Gradient,
            Self::Losses,
            Self::Bits,
            Self::TwoWorkers,
            Self::ThreeProcesses,
        ];
        if shape.in_4_bits {
            all.push(Self::Widened);
        }
        if on_gpu {
            all.extend([false, true].map(|checkpointing| Self::Memory { checkpointing }));
        }
        all
    }

    pub fn told(self) -> &'static str {
        match self {
            Self::Gradient => "gradient and loss as on the processor",
            Self::Losses => "ten steps follow the processor's losses",
            Self::Bits => "the same bits again, with checkpointing",
            Self::TwoWorkers => "two workers come to the bits of one",
            Self::ThreeProcesses => "three processes at once, the same bits",
            Self::Widened => "the bits of weights that were widened before",
            Self::Memory {
                checkpointing: false,
            } => "memory at the peak as expected",
            Self::Memory {
                checkpointing: true,
            } => "memory with checkpointing as expected",
        }
    }
}

/// Makes one check on the shape of this number. `timeout` is for other processes.
pub fn check(
    number: usize,
    what: Check,
    device: &ComputeDevice,
    timeout: Duration,
) -> Result<Verdict, BenchError> {
    on(number, device, |checked| match what {
        Check::Gradient => checked.gradient(),
        Check::Losses => checked.losses(),
        Check::Bits => checked.bits(),
        Check::TwoWorkers => checked.two_workers(),
        Check::ThreeProcesses => checked.three_processes(timeout),
        Check::Widened => checked.widened(),
        Check::Memory { checkpointing } => checked.memory(checkpointing),
    })
}

/// Digest of the weights after two steps of a shape: what the other processes of [`Check::ThreeProcesses`] compute.
pub fn digest(number: usize, device: &ComputeDevice) -> Result<String, BenchError> {
    on(number, device, |checked| checked.digest())
}

fn on<R>(
    number: usize,
    device: &ComputeDevice,
    work: impl FnOnce(&Checked) -> Result<R, BenchError>,
) -> Result<R, BenchError> {
    let Some(shape) = shapes().into_iter().nth(number) else {
        return Err(BenchError::Failures { failures: 1 });
    };
    let folder = prepared(&shape)?;
    let checked = Checked {
        shape: &shape,
        number,
        folder: folder.path(),
        widened: None,
        device,
    };
    match shape.in_4_bits {
        false => work(&checked),
        true => {
            let args = BenchArgs {
                mode: Mode::Full,
                load_in_4bit: false,
                quantize_embeddings: false,
                quantize_moe_experts: false,
                ..checked.args(Dtype::Float32, false)
            };
            let job = job_of(&args, folder.path())?;
            let dtype = match shape.dtype {
                Dtype::Float32 => BaseDtype::Float32,
                Dtype::Bfloat16 => BaseDtype::Bfloat16,
            };
            let widened = widened(folder.path(), job, dtype)?;
            work(&Checked {
                widened: Some(widened.path()),
                ..checked
            })
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
    number: usize,
    folder: &'a Path,
    /// A folder of the weights as they are once they are widened, where the shape's are in 4 bits.
    widened: Option<&'a Path>,
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
            load_in_4bit: self.shape.in_4_bits,
            quantize_embeddings: self.shape.in_4_bits,
            quantize_moe_experts: self.shape.in_4_bits && self.shape.config["num_experts"].is_u64(),
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
        load(self.folder, job, device)
    }

    /// A trainer on the same weights that are not quantised.
    fn load_wide(&self, device: &ComputeDevice, dtype: Dtype) -> Result<Trainer, BenchError> {
        let Some(folder) = self.widened else {
            return self.load(device, dtype, false);
        };
        let args = BenchArgs {
            load_in_4bit: false,
            quantize_embeddings: false,
            quantize_moe_experts: false,
            ..self.args(dtype, false)
        };
        let job = JobSpec {
            init_weights: InitWeights::Pretrained,
            ..job_of(&args, folder)?
        };
        load(folder, job, device)
    }

    /// A trainer in the state after one step on the processor, so that both factors of adapters have gradients.
    fn trained(
        &self,
        device: &ComputeDevice,
        dtype: Dtype,
        checkpointing: bool,
    ) -> Result<Trainer, BenchError> {
        self.begun(dtype, self.load(device, dtype, checkpointing)?)
    }

    /// Puts a trainer into the state after one step on the processor.
    fn begun(&self, dtype: Dtype, mut trainer: Trainer) -> Result<Trainer, BenchError> {
        let mut start = self.load_wide(&ComputeDevice::Cpu, dtype)?;
        step(&mut start, &self.blocks())?;
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
        let dtype = self.shape.dtype;
        let exact = self.load_wide(&ComputeDevice::Cpu, Dtype::Float32)?;
        let mut exact = self.begun(Dtype::Float32, exact)?;
        let exact = sums(&mut exact, &self.blocks())?;
        let found = sums(
            &mut self.trained(self.device, dtype, false)?,
            &self.blocks(),
        )?;
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
        let run = |mut trainer: Trainer| -> Result<Vec<f64>, BenchError> {
            (0..STEPS)
                .map(|_| step(&mut trainer, &self.blocks()))
                .collect()
        };
        let expected = run(self.load_wide(&ComputeDevice::Cpu, Dtype::Float32)?)?;
        let found = run(self.load(self.device, self.shape.dtype, false)?)?;
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

    /// Compares a base of 4 bits with the same weights that were widened when they were loaded.
    fn widened(&self) -> Result<Verdict, BenchError> {
        let dtype = self.shape.dtype;
        let run = |trainer| sums(&mut self.begun(dtype, trainer)?, &self.blocks());
        let found = run(self.load(self.device, dtype, false)?)?;
        let same = found == run(self.load_wide(self.device, dtype)?)?;
        Ok(verdict(same, String::new()))
    }

    /// Digest of the weights after two steps.
    fn digest(&self) -> Result<String, BenchError> {
        let mut trainer = self.load(self.device, self.shape.dtype, false)?;
        for _ in 0..2 {
            step(&mut trainer, &self.blocks())?;
        }
        Ok(trainer.weights_digest()?)
    }

    /// Compares the weights that two other processes come to, which compute on the device while this one holds an engine there.
    fn three_processes(&self, timeout: Duration) -> Result<Verdict, BenchError> {
        let device = asked(self.device).to_string();
        let number = self.number.to_string();
        let start = || Helper::start(&["--device", &device, "--digest-of", &number]);
        let mut others = [start()?, start()?];
        let deadline = Instant::now() + timeout;
        let digest = self.digest()?;
        for other in &mut others {
            let left = deadline.saturating_duration_since(Instant::now());
            match other.answer(left) {
                Ok(found) if found == digest => {}
                Ok(found) => return Ok(Verdict::Failed(format!("{digest} here, {found} there"))),
                Err(reason) => return Ok(Verdict::Failed(format!("the other process {reason}"))),
            }
        }
        Ok(verdict(true, short(&digest)))
    }

    /// Compares the peak memory with what was expected: that of the engine's buffers, without the library's workspace, which
    /// would hide what is wrong with the rest.
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
            "{}, {} expected ({:+.1}%)",
            bytes(found),
            bytes(expected),
            100.0 * apart
        );
        Ok(verdict(apart.abs() <= ALLOWED, told))
    }

    /// Compares two workers with one: each holds a slot, their sums are added, both update from the mean.
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
            let mean = MeanGradient {
                values: mean,
                invalid: 0,
            };
            for worker in [&mut first, &mut second] {
                worker.apply(&mean, LEARNING_RATE)?;
            }
        }
        let digest = alone.weights_digest()?;
        let same = first.weights_digest()? == digest && second.weights_digest()? == digest;
        Ok(verdict(same, short(&digest)))
    }
}

fn load(folder: &Path, job: JobSpec, device: &ComputeDevice) -> Result<Trainer, BenchError> {
    Ok(Trainer::load(TrainerOptions {
        job: Arc::new(job),
        model_dir: folder.to_owned(),
        adapter_dir: None,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        device: device.clone(),
    })?)
}

fn short(digest: &str) -> String {
    digest.chars().take(16).collect()
}

/// The exact sums that a slot leaves, and its loss.
fn sums(trainer: &mut Trainer, blocks: &[Block]) -> Result<(Vec<i64>, f64), BenchError> {
    let trained = blocks.iter().map(Block::trained_tokens).sum();
    trainer.forget_slots();
    trainer.begin_step(trainer.step(), trained, 1)?;
    let outcome = trainer.train_slot(0, blocks)?;
    Ok((held(trainer)?, outcome.loss_sum))
}

/// Makes a step whose blocks are one slot.
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

/// Makes a whole step with a slot for each block. Returns the mean loss.
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
