//! The trainer: slots in, gradients summed; a reduced gradient in, weights updated.
//!
//! Lives on one thread and computes on a pool of its own. Everything it does is a function of its inputs alone: never
//! of the number of threads, of what ran before, or of time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use common::data::block::Block;
use common::files::layout::{Layout, weights_digest};
use common::files::model::ModelFolder;
use common::files::snapshot::Snapshot;
use common::job::{BaseDtype, InitWeights, JobSpec, LoraSpec, Method};

use super::EngineError;
use super::accumulator::Accumulator;
use super::adapter::{adapted_modules, adapter_layout, adapter_of, initial_values, values_from};
use super::batch::Batch;
use super::config::ModelConfig;
use super::model::{Model, Tensors};
use super::ops::lora_linear::{Lora, MaskKey};
use super::optim::{AdamW, Update, clip_coefficient, gradient_norm};
use super::params::{Parameters, Weight};
use super::weights::{WeightSource, base_tensors};

/// The backward pass walks candle's graph by recursion.
const THREAD_STACK_BYTES: usize = 64 << 20;

pub struct TrainerOptions {
    pub job: Arc<JobSpec>,
    /// Where the base model is on this machine.
    pub model_dir: PathBuf,
    /// Where the PEFT adapter to start from is on this machine.
    pub adapter_dir: Option<PathBuf>,
    /// At least 1.
    pub threads: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotOutcome {
    pub loss_sum: f64,
    pub trained_tokens: u64,
    /// Trained tokens that the model held for the likeliest.
    pub correct_tokens: u64,
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
    outcomes: BTreeMap<u32, SlotOutcome>,
    optimizer: AdamW,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    step: u64,
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
            .stack_size(THREAD_STACK_BYTES)
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
        let parameters = starting_parameters(&job, &config, &source, adapter_dir)?;
        let tensors = JobTensors {
            job: &job,
            source: &source,
            parameters: &parameters,
        };
        let model = pool.install(|| {
            Model::build(
                &config,
                &tensors,
                job.sequence_len,
                job.gradient_checkpointing,
            )
        })?;
        let scalars = parameters.layout().scalars;
        Ok(Self {
            total_scalars: total_scalars(&config, &job, scalars),
            accumulator: Accumulator::new(job.reduction, scalars),
            outcomes: BTreeMap::new(),
            optimizer: AdamW::from_job(&job),
            exp_avg: zeros(scalars)?,
            exp_avg_sq: zeros(scalars)?,
            step: 0,
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
        self.pool
            .install(|| self.accumulator.begin(step, trained_tokens, slots));
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
        let outcome = pool.install(|| train(model, parameters, accumulator, slot, &batch, mask))?;
        self.outcomes.insert(slot, outcome);
        Ok(outcome)
    }

    /// Forward only, nothing dropped.
    pub fn eval_slot(&mut self, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        let batch = Batch::from_blocks(blocks, self.model.config().vocab_size)?;
        if batch.targets.is_empty() {
            return Ok(SlotOutcome::default());
        }
        let sum = self.pool.install(|| self.model.evaluate(&batch))?;
        Ok(SlotOutcome {
            loss_sum: sum.loss,
            trained_tokens: batch.targets.len() as u64,
            correct_tokens: sum.correct,
        })
    }

    /// The logits of one sequence, `[tokens][vocabulary]` in one line.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let batch = Batch::from_tokens(tokens, self.model.config().vocab_size)?;
        let logits = self.pool.install(|| self.model.logits(&batch))?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    pub fn accumulator(&self) -> &Accumulator {
        &self.accumulator
    }

    /// Clips, updates weights and moments, and counts a step. An invalid gradient counts as a step too, but changes
    /// nothing.
    pub fn apply(
        &mut self,
        reduced: Reduced,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError> {
        let Self {
            pool,
            parameters,
            optimizer,
            exp_avg,
            exp_avg_sq,
            ..
        } = self;
        let grad_norm = pool.install(|| gradient_norm(&reduced.mean));
        let skipped = reduced.invalid > 0 || !grad_norm.is_finite();
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
                    let moments = (exp_avg.as_mut_slice(), exp_avg_sq.as_mut_slice());
                    update_tensors(optimizer, &update, &layout, weights, moments, &reduced.mean);
                });
            })?;
        }
        Ok(UpdateOutcome { grad_norm, skipped })
    }

    pub fn weights_digest(&self) -> String {
        let layout = self.layout();
        let digest = |flat: &[f32]| {
            self.pool
                .install(|| weights_digest(&layout, layout.split(flat)))
        };
        self.parameters
            .read(digest)
            .expect("trainable weights are on the CPU")
    }

    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            step: self.step,
            layout: self.layout(),
            weights: self
                .parameters
                .read(<[f32]>::to_vec)
                .expect("trainable weights are on the CPU"),
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
        self.parameters
            .update(|weights| weights.copy_from_slice(&snapshot.weights))?;
        self.exp_avg.copy_from_slice(&snapshot.exp_avg);
        self.exp_avg_sq.copy_from_slice(&snapshot.exp_avg_sq);
        self.step = snapshot.step;
        self.accumulator.clear();
        self.outcomes.clear();
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
) -> Result<SlotOutcome, EngineError> {
    if batch.targets.is_empty() {
        let zeros = vec![0.0; parameters.layout().scalars];
        accumulator.add(slot, [zeros.as_slice()]);
        return Ok(SlotOutcome::default());
    }
    parameters.gradients().reset();
    let sum = model.train(batch, Some(mask))?;
    parameters
        .gradients()
        .read(|flat| accumulator.add(slot, [flat]))?;
    Ok(SlotOutcome {
        loss_sum: sum.loss,
        trained_tokens: batch.targets.len() as u64,
        correct_tokens: sum.correct,
    })
}

/// As Transformers' trainer does, norms and biases do not decay.
fn update_tensors(
    optimizer: &AdamW,
    update: &Update,
    layout: &Layout,
    weights: &mut [f32],
    (exp_avg, exp_avg_sq): (&mut [f32], &mut [f32]),
    gradient: &[f32],
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
            &mut exp_avg_sq[range.clone()],
            &gradient[range],
        );
    }
}

fn starting_parameters(
    job: &JobSpec,
    config: &ModelConfig,
    source: &WeightSource,
    adapter_dir: Option<PathBuf>,
) -> Result<Parameters, EngineError> {
    let (layout, values) = match &job.method {
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
            (layout, values)
        }
        Method::Lora(lora) => {
            let modules = adapted_modules(config, &lora.target_modules)?;
            let layout = adapter_layout(&modules, lora.r);
            let values = match adapter_dir {
                Some(dir) => values_from(&dir, &layout, lora)?,
                None => initial_values(&layout, job.seed),
            };
            (layout, values)
        }
    };
    Ok(Parameters::new(layout, values)?)
}

/// # Errors
/// Where the machine has not the memory.
fn zeros(scalars: usize) -> Result<Vec<f32>, EngineError> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(scalars)
        .map_err(|_| EngineError::Memory { scalars })?;
    values.resize(scalars, 0.0);
    Ok(values)
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
        match self.parameters.weight(name)? {
            Some(weight) => Ok(weight),
            None => {
                let tensor = self.source.tensor(name, shape, self.dtype())?;
                Ok(Weight::frozen(tensor)?)
            }
        }
    }

    fn adapter(&self, path: &str) -> Result<Option<Lora>, EngineError> {
        match self.lora() {
            Some(lora) => Ok(adapter_of(path, self.parameters, lora)?),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{block, config, job, load, lora, slot_sums, step, write_model};
    use crate::engine::weights::linears;
    use common::job::TargetModules;

    const FAMILIES: [&str; 3] = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

    fn model(architecture: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config(architecture), 7);
        dir
    }

    fn methods() -> [Method; 3] {
        let named =
            |names: &[&str]| TargetModules::Named(names.iter().map(|n| n.to_string()).collect());
        [
            Method::Full,
            lora(TargetModules::AllLinear, 0.1),
            lora(named(&["q_proj", "layers.1.mlp.down_proj"]), 0.0),
        ]
    }

    fn blocks() -> [Block; 2] {
        [block(&[20, 17, 9], 1), block(&[40, 3], 2)]
    }

    #[test]
    fn the_loss_falls_for_every_family_and_method() {
        for architecture in FAMILIES {
            let dir = model(architecture);
            for method in methods() {
                let mut trainer = load(dir.path(), job(method.clone()), 2);
                let first = step(&mut trainer, &blocks(), 1e-2);
                let mut last = first;
                for _ in 0..20 {
                    last = step(&mut trainer, &blocks(), 1e-2);
                }
                assert!(
                    last < 0.8 * first,
                    "{architecture} {method:?}: {first} -> {last}"
                );
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let dir = model("Qwen3ForCausalLM");
        for method in methods() {
            let run = |threads| {
                let mut trainer = load(dir.path(), job(method.clone()), threads);
                let losses: Vec<f64> = (0..3)
                    .map(|_| step(&mut trainer, &blocks(), 1e-2))
                    .collect();
                (losses, trainer.weights_digest())
            };
            let expected = run(1);
            assert_eq!(run(2), expected);
            assert_eq!(run(3), expected);
        }
    }

    #[test]
    fn checkpointing_does_not_change_a_bit() {
        let dir = model("Qwen3ForCausalLM");
        for method in methods() {
            let run = |gradient_checkpointing| {
                let job = JobSpec {
                    gradient_checkpointing,
                    ..job(method.clone())
                };
                slot_sums(&mut load(dir.path(), job, 2), 0, &blocks())
            };
            assert_eq!(run(true), run(false));
        }
    }

    #[test]
    fn a_packed_block_equals_its_documents_one_by_one() {
        for architecture in FAMILIES {
            let dir = model(architecture);
            let method = lora(TargetModules::AllLinear, 0.0);
            for method in [Method::Full, method] {
                let mut trainer = load(dir.path(), job(method), 2);
                step(&mut trainer, &blocks(), 1e-2);
                let packed = block(&[20, 17, 9], 1);
                let document = |range: std::ops::Range<usize>| Block {
                    tokens: packed.tokens[range.clone()].to_vec(),
                    segments: vec![1; range.len()],
                    trained: packed.trained[range].to_vec(),
                };
                let alone = [document(0..20), document(20..37), document(37..46)];
                let whole = slot_sums(&mut trainer, 1, std::slice::from_ref(&packed));
                // The same divisor for all, so that the sums can be added.
                let tokens = packed.trained_tokens();
                trainer.begin_step(2, tokens, 3);
                let mut loss = 0.0;
                for (slot, document) in alone.iter().enumerate() {
                    let outcome = trainer.train_slot(slot as u32, std::slice::from_ref(document));
                    loss += outcome.unwrap().loss_sum;
                }
                assert!((loss - whole.1).abs() < 1e-4 * loss, "{loss} {}", whole.1);
                let mean = trainer.accumulator().mean();
                let expected: Vec<f32> = whole
                    .0
                    .iter()
                    .map(|sum| common::exact::dequantize(*sum))
                    .collect();
                let norm = gradient_norm(&expected);
                let difference: Vec<f32> = mean.iter().zip(&expected).map(|(a, b)| a - b).collect();
                assert!(gradient_norm(&difference) < 1e-4 * norm);
            }
        }
    }

    #[test]
    fn a_slot_gives_the_same_bits_whatever_ran_before() {
        let dir = model("LlamaForCausalLM");
        let job = job(lora(TargetModules::AllLinear, 0.2));
        let mut fresh = load(dir.path(), job.clone(), 2);
        let expected = slot_sums(&mut fresh, 5, &blocks());
        let mut used = load(dir.path(), job, 2);
        slot_sums(&mut used, 3, &[block(&[64], 9)]);
        used.eval_slot(&[block(&[11], 8)]).unwrap();
        assert_eq!(slot_sums(&mut used, 5, &blocks()), expected);
    }

    #[test]
    fn a_held_slot_is_not_added_twice() {
        let dir = model("LlamaForCausalLM");
        let mut trainer = load(dir.path(), job(Method::Full), 1);
        trainer.begin_step(0, 10, 1);
        let first = trainer.train_slot(0, &blocks()).unwrap();
        let sums = trainer.accumulator().mean();
        trainer.begin_step(0, 10, 1);
        assert_eq!(trainer.train_slot(0, &blocks()).unwrap(), first);
        assert_eq!(trainer.accumulator().mean(), sums);
    }

    #[test]
    fn an_invalid_gradient_skips_the_update_but_not_the_step() {
        let dir = model("LlamaForCausalLM");
        let mut trainer = load(dir.path(), job(Method::Full), 1);
        let before = trainer.weights_digest();
        let mean = vec![1.0; trainer.layout().scalars];
        let outcome = trainer.apply(Reduced { mean, invalid: 1 }, 1.0).unwrap();
        assert!(outcome.skipped);
        assert_eq!((trainer.step(), trainer.weights_digest()), (1, before));
    }

    #[test]
    fn a_bfloat16_base_trains_close_to_the_float32_one() {
        let dir = model("Qwen3ForCausalLM");
        let run = |base_dtype, threads| {
            let job = JobSpec {
                base_dtype,
                ..job(lora(TargetModules::AllLinear, 0.0))
            };
            let mut trainer = load(dir.path(), job, threads);
            (0..3)
                .map(|_| step(&mut trainer, &blocks(), 1e-2))
                .collect::<Vec<f64>>()
        };
        let (narrow, wide) = (run(BaseDtype::Bfloat16, 1), run(BaseDtype::Float32, 1));
        for (narrow, wide) in narrow.iter().zip(&wide) {
            assert!((narrow - wide).abs() < 0.02 * wide, "{narrow} {wide}");
        }
        assert_ne!(narrow, wide);
        assert_eq!(run(BaseDtype::Bfloat16, 3), narrow);
    }

    #[test]
    fn training_starts_from_an_adapter_of_the_job_s_rank_and_targets() {
        use common::files::adapter::AdapterConfig;
        use common::files::snapshot::WeightsFormat;
        let dir = model("LlamaForCausalLM");
        let method = lora(TargetModules::AllLinear, 0.0);
        let mut first = load(dir.path(), job(method.clone()), 1);
        step(&mut first, &blocks(), 1e-2);
        let Method::Lora(spec) = &method else {
            unreachable!("made as LoRA");
        };
        let names = linears(first.model().config()).map(|linear| linear.path.to_owned());
        let config = AdapterConfig::from_lora(spec, "model", names);
        let adapter = tempfile::tempdir().unwrap();
        let format = WeightsFormat::Adapter(config);
        first
            .snapshot()
            .write_weights(adapter.path(), &format)
            .unwrap();
        let start = |method: Method| {
            Trainer::load(TrainerOptions {
                job: Arc::new(job(method)),
                model_dir: dir.path().to_owned(),
                adapter_dir: Some(adapter.path().to_owned()),
                threads: 1,
            })
        };
        let second = start(method.clone()).unwrap();
        assert_eq!(second.weights_digest(), first.weights_digest());
        let other_rank = Method::Lora(LoraSpec {
            r: 8,
            ..spec.clone()
        });
        let message = start(other_rank).err().unwrap().to_string();
        assert!(
            message.contains("rank is 4") && message.contains("8 in the job"),
            "{message}"
        );
        let fewer = lora(TargetModules::Named(vec!["q_proj".to_owned()]), 0.0);
        let message = start(fewer).err().unwrap().to_string();
        assert!(
            message.contains("which the job's adapter has not"),
            "{message}"
        );
    }

    #[test]
    fn a_target_that_matches_nothing_is_named() {
        let dir = model("LlamaForCausalLM");
        let names = vec!["q_proj".to_owned(), "query".to_owned()];
        let options = TrainerOptions {
            job: Arc::new(job(lora(TargetModules::Named(names), 0.0))),
            model_dir: dir.path().to_owned(),
            adapter_dir: None,
            threads: 1,
        };
        let message = Trainer::load(options).err().unwrap().to_string();
        assert!(
            message.contains("\"query\"") && message.contains("mlp.up_proj"),
            "{message}"
        );
    }

    #[test]
    fn a_slot_without_trained_tokens_adds_nothing() {
        let dir = model("LlamaForCausalLM");
        let mut trainer = load(dir.path(), job(Method::Full), 1);
        let mut silent = block(&[20], 1);
        silent.trained.fill(false);
        trainer.begin_step(0, 1, 1);
        let outcome = trainer.train_slot(0, &[silent]).unwrap();
        assert_eq!(outcome, SlotOutcome::default());
        assert!(trainer.accumulator().mean().iter().all(|g| *g == 0.0));
    }

    #[test]
    fn a_restored_trainer_goes_on_to_the_same_bits() {
        let dir = model("Qwen3ForCausalLM");
        let job = job(lora(TargetModules::AllLinear, 0.1));
        let mut whole = load(dir.path(), job.clone(), 2);
        step(&mut whole, &blocks(), 1e-2);
        let snapshot = whole.snapshot();
        step(&mut whole, &blocks(), 1e-2);
        let mut resumed = load(dir.path(), job, 1);
        resumed.restore(&snapshot).unwrap();
        step(&mut resumed, &blocks(), 1e-2);
        assert_eq!(resumed.weights_digest(), whole.weights_digest());
        assert_eq!(resumed.snapshot(), whole.snapshot());
        let mut other = load(dir.path(), crate::engine::testing::job(Method::Full), 1);
        assert!(other.restore(&snapshot).is_err());
    }
}
