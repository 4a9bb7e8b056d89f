//! The trainer: slots in, gradients summed; a reduced gradient in, weights updated.
//!
//! Lives on one thread and computes on a pool of its own. Everything it does is a function of its inputs alone: never
//! of the number of threads, of what ran before, or of time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::data::block::Block;
use common::files::Flat;
use common::files::layout::{Layout, weights_digest};
use common::files::model::ModelFolder;
use common::files::snapshot::Snapshot;
use common::job::{BaseDtype, Checkpointing, InitWeights, JobSpec, LoraSpec, Method};

use super::accumulator::Accumulator;
use super::adapter::{adapted_modules, adapter_layout, adapter_of, initial_values, values_from};
use super::batch::Batch;
use super::config::ModelConfig;
use super::model::{Model, PassTimes, Tensors};
use super::ops::lora_linear::{Lora, MaskKey};
use super::optim::{AdamW, Mean, Update, clip_coefficient, gradient_norm};
use super::params::{Collect, Parameters, Weight};
use super::weights::{WeightSource, base_tensors};
use super::{Abandon, EngineError, memory};
use crate::slot::{HeldSlots, SlotOutcome};

pub struct TrainerOptions {
    pub job: Arc<JobSpec>,
    /// Where the base model is on this machine.
    pub model_dir: PathBuf,
    /// Where the PEFT adapter to start from is on this machine.
    pub adapter_dir: Option<PathBuf>,
    /// At least 1.
    pub threads: usize,
}

/// How long the parts of a slot took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotTimes {
    pub pass: PassTimes,
    /// Adding the gradient to the accumulator, where that comes last.
    pub accumulate: Duration,
}

/// The sum over all workers, as the exchange gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct Reduced {
    /// The mean gradient, in layout order.
    pub mean: Vec<f32>,
    /// Scalars that were not finite or out of range, on any worker.
    pub invalid: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateOutcome {
    /// Before clipping.
    pub grad_norm: f64,
    /// The gradient was not finite; weights and moments are as before.
    pub skipped: bool,
}

pub struct Trainer {
    job: Arc<JobSpec>,
    pool: rayon::ThreadPool,
    model: Model,
    parameters: Parameters,
    total_scalars: u64,
    accumulator: Accumulator,
    /// Of the slots held.
    outcomes: HeldSlots,
    optimizer: AdamW,
    exp_avg: Flat,
    exp_avg_sq: Flat,
    step: u64,
    slot_times: SlotTimes,
}

impl Trainer {
    pub fn load(options: TrainerOptions) -> Result<Self, EngineError> {
        let TrainerOptions {
            job,
            model_dir,
            adapter_dir,
            threads,
        } = options;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("engine-{index}"))
            .build()
            .map_err(|error| EngineError::Threads {
                threads,
                reason: error.to_string(),
            })?;
        let folder = ModelFolder::open(&model_dir, job.init_weights)?;
        let config = ModelConfig::of(&folder)?;
        config.check_sequence_len(job.sequence_len, &model_dir.join("config.json"))?;
        let source = match job.init_weights {
            InitWeights::Pretrained => WeightSource::open(&folder)?,
            InitWeights::Random => WeightSource::Random {
                seed: job.seed,
                standard_deviation: config.initializer_range,
            },
        };
        let parameters =
            pool.install(|| starting_parameters(&job, &config, &source, adapter_dir))?;
        let tensors = JobTensors {
            job: &job,
            source: &source,
            parameters: &parameters,
        };
        let mut model = pool.install(|| Model::build(&config, &tensors, job.sequence_len))?;
        let scalars = parameters.layout().scalars;
        let (exp_avg, exp_avg_sq) = (zeros(scalars)?.into(), zeros(scalars)?.into());
        model.set_checkpointing(checkpoints(&job, &model, scalars));
        Ok(Self {
            total_scalars: total_scalars(&config, &job, scalars),
            accumulator: Accumulator::new(job.reduction, scalars),
            outcomes: HeldSlots::new(),
            optimizer: AdamW::from_job(&job),
            exp_avg,
            exp_avg_sq,
            step: 0,
            slot_times: SlotTimes::default(),
            pool,
            model,
            parameters,
            job,
        })
    }

    pub fn layout(&self) -> Arc<Layout> {
        self.parameters.layout()
    }

    /// Of the whole model, frozen and trainable.
    pub fn total_scalars(&self) -> u64 {
        self.total_scalars
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Updates seen, skipped ones included.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Opens `step` for slots. What is held stays if it is this step's already.
    ///
    /// `trained_tokens` and `slots` are those of the whole step, over all workers.
    pub fn begin_step(&mut self, step: u64, trained_tokens: u64, slots: usize) {
        self.pool.install(|| {
            self.accumulator
                .begin(step, trained_tokens.max(1), slots.max(1))
        });
        let held = self.accumulator.held();
        self.outcomes.retain(|slot, _| held.contains(slot));
    }

    /// Adds the gradient of a slot of the open step. A slot that is already held is not computed again.
    pub fn train_slot(&mut self, slot: u32, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        if let Some(outcome) = self.outcomes.get(&slot) {
            return Ok(*outcome);
        }
        let batch = Batch::from_blocks(blocks, self.model.config().vocab_size)?;
        let mask = MaskKey {
            seed: self.job.seed,
            step: self.accumulator.step().unwrap_or(self.step),
            slot,
        };
        let Self {
            pool,
            model,
            parameters,
            accumulator,
            ..
        } = self;
        let trained = pool.install(|| train(model, parameters, accumulator, slot, &batch, mask));
        match trained {
            Ok((outcome, times)) => {
                self.outcomes.insert(slot, outcome);
                self.slot_times = times;
                Ok(outcome)
            }
            Err(error) => {
                let held = accumulator.held();
                self.outcomes.retain(|slot, _| held.contains(slot));
                Err(error)
            }
        }
    }

    /// How long the parts of the last slot took.
    pub fn slot_times(&self) -> SlotTimes {
        self.slot_times
    }

    /// Asks for the slot in hand to be given up: it ends with [`EngineError::Abandoned`] and leaves the accumulator as it
    /// was, unless gradients were added already that cannot be taken back, or it is as good as done. Must be cleared before another slot.
    pub fn abandon(&self) -> Abandon {
        self.model.abandon().clone()
    }

    /// Forward only, nothing dropped.
    pub fn eval_slot(&mut self, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        let batch = Batch::from_blocks(blocks, self.model.config().vocab_size)?;
        if batch.targets.is_empty() {
            return Ok(SlotOutcome::default());
        }
        let sum = self.pool.install(|| self.model.evaluate(&batch));
        let sum = sum.ok_or(EngineError::Abandoned)?;
        Ok(SlotOutcome {
            loss_sum: sum.loss,
            trained_tokens: batch.targets.len() as u64,
            correct_tokens: sum.correct,
            invalid_scalars: 0,
        })
    }

    /// The logits of one sequence, `[tokens][vocabulary]` in one line.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let batch = Batch::from_tokens(tokens, self.model.config().vocab_size)?;
        Ok(self.pool.install(|| self.model.logits(&batch)))
    }

    /// The slots in the accumulator, with what they amount to.
    pub fn held(&self) -> &HeldSlots {
        &self.outcomes
    }

    /// Empties the accumulator.
    pub fn forget_slots(&mut self) {
        self.accumulator.clear();
        self.outcomes.clear();
    }

    pub fn accumulator(&self) -> &Accumulator {
        &self.accumulator
    }

    /// Clips, updates weights and moments, and counts a step. An invalid gradient counts as a step too, but changes
    /// nothing.
    pub fn apply(
        &mut self,
        reduced: &Reduced,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError> {
        let mean = Mean::Flat(&reduced.mean);
        Ok(self.update(mean, reduced.invalid, learning_rate))
    }

    /// As [`apply`](Self::apply) of the accumulator's mean, which never stands in memory: where every slot of the step
    /// is held here.
    pub fn apply_held(&mut self, learning_rate: f64) -> Result<UpdateOutcome, EngineError> {
        let accumulator = std::mem::take(&mut self.accumulator);
        let mean = Mean::Sums(&accumulator);
        let outcome = self.update(mean, accumulator.invalid(), learning_rate);
        self.accumulator = accumulator;
        Ok(outcome)
    }

    fn update(&mut self, mean: Mean, invalid: u64, learning_rate: f64) -> UpdateOutcome {
        let Self {
            pool,
            parameters,
            optimizer,
            exp_avg,
            exp_avg_sq,
            ..
        } = self;
        let grad_norm = pool.install(|| gradient_norm(mean));
        let skipped = invalid > 0 || !grad_norm.is_finite();
        self.step += 1;
        if !skipped {
            let update = Update {
                number: self.step,
                learning_rate,
                gradient_scale: clip_coefficient(grad_norm, self.job.max_grad_norm),
            };
            let layout = parameters.layout();
            parameters.update(|weights| {
                pool.install(|| {
                    let moments = (&mut exp_avg[..], &mut exp_avg_sq[..]);
                    update_tensors(optimizer, &update, &layout, weights, moments, mean);
                });
            });
        }
        UpdateOutcome { grad_norm, skipped }
    }

    pub fn weights_digest(&self) -> String {
        let layout = self.layout();
        let digest = |flat: &[f32]| {
            self.pool
                .install(|| weights_digest(&layout, layout.split(flat)))
        };
        self.parameters.read(digest)
    }

    /// The state as it is now, without a copy: the next update makes one where somebody still reads this then.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            step: self.step,
            layout: self.layout(),
            weights: self.parameters.share(),
            exp_avg: self.exp_avg.clone(),
            exp_avg_sq: self.exp_avg_sq.clone(),
        }
    }

    /// Takes over a state of the same layout. Slots held are forgotten: their gradients were of other weights.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), EngineError> {
        let layout = self.layout();
        if *snapshot.layout != *layout {
            return Err(EngineError::LayoutMismatch {
                found: snapshot.layout.digest(),
                expected: layout.digest(),
            });
        }
        self.parameters.replace(snapshot.weights.clone());
        self.exp_avg = snapshot.exp_avg.clone();
        self.exp_avg_sq = snapshot.exp_avg_sq.clone();
        self.step = snapshot.step;
        self.forget_slots();
        Ok(())
    }
}

/// One slot, forward and backward, into the accumulator.
fn train(
    model: &Model,
    parameters: &Parameters,
    accumulator: &mut Accumulator,
    slot: u32,
    batch: &Batch,
    mask: MaskKey,
) -> Result<(SlotOutcome, SlotTimes), EngineError> {
    if batch.targets.is_empty() {
        accumulator.hold(slot);
        return Ok((SlotOutcome::default(), SlotTimes::default()));
    }
    let invalid_before = accumulator.invalid();
    let gradients = parameters.gradients();
    gradients.begin(accumulator, model.gradient_parts(batch));
    let Some((sum, pass)) = model.train(batch, Some(mask), gradients.can_be_dropped()) else {
        gradients.drop_slot(accumulator);
        return Err(EngineError::Abandoned);
    };
    common::failpoint::reached("forward");
    let computed = Instant::now();
    gradients.finish(slot, accumulator)?;
    let outcome = SlotOutcome {
        loss_sum: sum.loss,
        trained_tokens: batch.targets.len() as u64,
        correct_tokens: sum.correct,
        invalid_scalars: accumulator.invalid() - invalid_before,
    };
    let accumulate = computed.elapsed();
    Ok((outcome, SlotTimes { pass, accumulate }))
}

/// As Transformers' trainer does, norms and biases do not decay.
fn update_tensors(
    optimizer: &AdamW,
    update: &Update,
    layout: &Layout,
    weights: &mut [f32],
    (exp_avg, exp_avg_sq): (&mut [f32], &mut [f32]),
    mean: Mean,
) {
    for tensor in &layout.tensors {
        let range = tensor.offset..tensor.offset + tensor.scalars();
        let mut optimizer = *optimizer;
        if tensor.shape.len() < 2 {
            optimizer.weight_decay = 0.0;
        }
        optimizer.update(
            update,
            &mut weights[range.clone()],
            &mut exp_avg[range.clone()],
            &mut exp_avg_sq[range],
            (mean, tensor.offset),
        );
    }
}

fn starting_parameters(
    job: &JobSpec,
    config: &ModelConfig,
    source: &WeightSource,
    adapter_dir: Option<PathBuf>,
) -> Result<Parameters, EngineError> {
    let (layout, values, collect) = match &job.method {
        Method::Full => {
            let layout = Layout::new(base_tensors(config));
            for tensor in &layout.tensors {
                source.check(&tensor.name, &tensor.shape)?;
            }
            let mut values = zeros(layout.scalars)?;
            for tensor in &layout.tensors {
                let range = tensor.offset..tensor.offset + tensor.scalars();
                source.read_f32(&tensor.name, &tensor.shape, &mut values[range])?;
            }
            (layout, values, Collect::Sums)
        }
        Method::Lora(lora) => {
            let modules = adapted_modules(config, &lora.target_modules)?;
            let layout = adapter_layout(&modules, lora.r);
            let values = match adapter_dir {
                Some(dir) => values_from(&dir, &layout, lora)?,
                None => initial_values(&layout, job.seed),
            };
            (layout, values, Collect::Slot)
        }
    };
    Ok(Parameters::new(layout, values, collect))
}

/// Whether activations are computed again. All but the sums and gradients of `scalars` is in memory already.
fn checkpoints(job: &JobSpec, model: &Model, scalars: usize) -> bool {
    /// The sums, and the gradient of a slot or the mean of several workers.
    const BYTES_PER_SCALAR: u64 = 10;
    match job.gradient_checkpointing {
        Checkpointing::Always => true,
        Checkpointing::Never => false,
        Checkpointing::Auto => {
            let kept = model.kept_bytes(job.micro_batch_size * job.sequence_len) as u64;
            let Some(free) = memory::available_bytes() else {
                return false;
            };
            let free = free.saturating_sub(BYTES_PER_SCALAR * scalars as u64);
            let scarce = memory::is_scarce(kept, free);
            if scarce {
                tracing::info!(
                    "activations are computed again in the backward pass: they would take {} MB of {} MB",
                    kept / 1_000_000,
                    free / 1_000_000
                );
            }
            scarce
        }
    }
}

/// # Errors
/// Where the machine has not the memory.
fn zeros(scalars: usize) -> Result<Vec<f32>, EngineError> {
    memory::try_zeros(scalars).map_err(|_| EngineError::Memory { scalars })
}

fn total_scalars(config: &ModelConfig, job: &JobSpec, trainable: usize) -> u64 {
    let base: usize = base_tensors(config)
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    match job.method {
        Method::Full => base as u64,
        Method::Lora(_) => (base + trainable) as u64,
    }
}

/// The model's tensors: trainable ones from the parameters, the others frozen from the base model.
struct JobTensors<'a> {
    job: &'a JobSpec,
    source: &'a WeightSource,
    parameters: &'a Parameters,
}

impl JobTensors<'_> {
    fn lora(&self) -> Option<&LoraSpec> {
        match &self.job.method {
            Method::Lora(lora) => Some(lora),
            Method::Full => None,
        }
    }

    fn dtype(&self) -> BaseDtype {
        self.job.base_dtype
    }
}

impl Tensors for JobTensors<'_> {
    type Error = EngineError;

    fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight, EngineError> {
        match self.parameters.weight(name) {
            Some(weight) => Ok(weight),
            None => self.source.tensor(name, shape, self.dtype()),
        }
    }

    fn adapter(&self, path: &str) -> Result<Option<Lora>, EngineError> {
        let lora = self.lora();
        Ok(lora.and_then(|lora| adapter_of(path, self.parameters, lora)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
