//! Toy models, jobs and blocks for the engine's tests.

pub mod widened;

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use common::data::block::Block;
use common::files::layout::Layout;
use common::job::*;
use common::rng::CounterRng;
use serde_json::{Value, json};

use super::accumulator::{Accumulator, Sums};
use super::buffer::Pool;
use super::ops::element::round_slice;
use super::params::{Collect, Parameters, Weight};
use super::{Trainer, TrainerOptions};
use crate::ComputeDevice;

/// A `config.json` of two layers.
pub fn config(architecture: &str) -> Value {
    let mut json = json!({
        "architectures": [architecture], "vocab_size": 61, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": architecture == "Qwen3ForCausalLM",
        "attention_bias": false, "initializer_range": 0.2,
        // Read by families with experts, of which some leave the second layer dense.
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "norm_topk_prob": true, "mlp_only_layers": [1],
        // Of linear attention, which the first layer has where a family has it.
        "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12
    });
    if architecture == "Gemma4ForCausalLM" {
        differing(&mut json);
    }
    json
}

/// Four layers, of which the last two have the keys and values of the first two, and all have inputs of their own.
fn differing(json: &mut Value) {
    let kinds = ["sliding_attention", "full_attention"];
    json["num_hidden_layers"] = 4.into();
    json["layer_types"] = json!([kinds, kinds].concat());
    json["sliding_window"] = 7.into();
    json["tie_word_embeddings"] = true.into();
    json["attention_k_eq_v"] = true.into();
    json["use_double_wide_mlp"] = true.into();
    for (key, size) in [
        ("global_head_dim", 16),
        ("num_global_key_value_heads", 1),
        ("num_kv_shared_layers", 2),
        ("hidden_size_per_layer_input", 8),
        ("vocab_size_per_layer_input", 64),
    ] {
        json[key] = size.into();
    }
}

/// Writes a model folder with random weights, through a trainer that drew them.
pub fn write_model(dir: &Path, config: &Value, seed: u64) {
    use common::files::snapshot::{Frozen, WeightsFormat};
    use common::files::tensors::Dtype;
    use common::model::{ModelConfig, frozen_tensors};
    let model = ModelConfig::parse(config, Path::new("config.json")).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let job = JobSpec {
        init_weights: InitWeights::Random,
        seed,
        ..job(Method::Full)
    };
    let trainer = load(dir, job, 1);
    let format = WeightsFormat::Model {
        config: config.clone(),
        dtype: Dtype::F32,
        frozen: Some(Frozen {
            files: None,
            tensors: frozen_tensors(&model, &Unfrozen::default()).unwrap(),
        }),
    };
    trainer
        .snapshot()
        .unwrap()
        .write_weights(dir, &format)
        .unwrap();
}

pub fn lora(targets: TargetModules, dropout: f64) -> Method {
    Method::Lora(LoraSpec {
        r: 4,
        alpha: 8.0,
        dropout,
        target_modules: targets,
        use_rslora: false,
        use_dora: false,
        biases: Default::default(),
        lora_bias: false,
        init: Default::default(),
        shape: Default::default(),
        tokens: Default::default(),
        model_dir: None,
        model_source: None,
    })
}

pub fn job(method: Method) -> JobSpec {
    JobSpec {
        base_model: "model".into(),
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
        sequence_len: 64,
        excess_length_strategy: Default::default(),
        sample_packing: true,
        train_on_inputs: false,
        shuffle: true,
        method,
        global_batch_size: 2,
        micro_batch_size: 1,
        num_epochs: 1.0,
        max_steps: None,
        learning_rate: 1e-2,
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
        weight_decay: 0.0,
        max_grad_norm: Some(1.0),
        gradient_checkpointing: Checkpointing::Never,
        seed: 42,
        logging_steps: 1,
        save_steps: SaveSteps::Never,
        save_total_limit: None,
        eval_steps: None,
        eval_on_start: false,
        logging_first_step: false,
        save_first_step: false,
        best_model: None,
        max_skipped_steps: 3,
        output_dir: "out".into(),
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

pub fn load(dir: &Path, job: JobSpec, threads: usize) -> Trainer {
    load_on(ComputeDevice::Cpu, dir, job, threads)
}

pub fn load_on(device: ComputeDevice, dir: &Path, job: JobSpec, threads: usize) -> Trainer {
    Trainer::load(TrainerOptions {
        job: Arc::new(job),
        model_dir: dir.to_owned(),
        adapter_dir: None,
        threads,
        device,
    })
    .unwrap()
}

/// A block of 64 tokens with segments of these lengths, random tokens, the second half of each segment trained.
pub fn block(lengths: &[usize], seed: u64) -> Block {
    let mut rng = CounterRng::new(seed, &[]);
    let mut block = Block::default();
    for (segment, length) in lengths.iter().enumerate() {
        for index in 0..*length {
            block.tokens.push(rng.below(61) as u32);
            block.segments.push(segment as u16 + 1);
            block.trained.push(index > 0 && index * 2 >= *length);
        }
    }
    block.tokens.resize(64, 0);
    block.segments.resize(64, 0);
    block.trained.resize(64, false);
    block
}

/// The exact sums that slot 0 leaves, and its loss.
pub fn slot_sums(trainer: &mut Trainer, step: u64, blocks: &[Block]) -> (Vec<i64>, f64) {
    let tokens = blocks.iter().map(Block::trained_tokens).sum();
    trainer.begin_step(step, tokens, 1).unwrap();
    let outcome = trainer.train_slot(0, blocks).unwrap();
    trainer.collect().unwrap();
    match trainer.accumulator().sums() {
        Sums::Exact { sums, invalid: 0 } => {
            let mut plain = vec![0; sums.len()];
            sums.read(0, &mut plain);
            (plain, outcome.loss_sum)
        }
        other => panic!("{other:?}"),
    }
}

/// One whole step on these blocks, a slot each. Returns the mean loss.
pub fn step(trainer: &mut Trainer, blocks: &[Block], learning_rate: f64) -> f64 {
    let tokens = blocks.iter().map(Block::trained_tokens).sum();
    trainer
        .begin_step(trainer.step(), tokens, blocks.len())
        .unwrap();
    let mut loss = 0.0;
    for (slot, block) in blocks.iter().enumerate() {
        let slot_blocks = std::slice::from_ref(block);
        loss += trainer
            .train_slot(slot as u32, slot_blocks)
            .unwrap()
            .loss_sum;
    }
    trainer.apply_held(learning_rate).unwrap();
    loss / tokens as f64
}

pub fn random_values(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = CounterRng::new(seed, &[]);
    (0..len).map(|_| rng.normal() as f32).collect()
}

pub fn random_tensor(rows: usize, columns: usize, seed: u64) -> Tensor {
    Tensor::from_vec(
        random_values(rows * columns, seed),
        (rows, columns),
        &Device::Cpu,
    )
    .unwrap()
}

/// Random weights of an op under test: trainable ones for the op, and the same as candle variables for its reference.
pub struct TestWeights {
    parameters: Parameters,
    variables: Vec<(String, Var)>,
}

impl TestWeights {
    pub fn new(shapes: &[(&str, &[usize])]) -> Self {
        let named = shapes
            .iter()
            .map(|(name, shape)| (name.to_string(), shape.to_vec()));
        let layout = Layout::new(named.chain([("~unused".to_owned(), vec![1])]));
        let values = random_values(layout.scalars, 99);
        let variables = layout
            .tensors
            .iter()
            .map(|tensor| {
                let range = tensor.offset..tensor.offset + tensor.scalars();
                let values = values[range].to_vec();
                let variable = Var::from_vec(values, tensor.shape.as_slice(), &Device::Cpu);
                (tensor.name.clone(), variable.unwrap())
            })
            .collect();
        let parameters = Parameters::new(layout, values, Collect::Slot);
        Self {
            parameters,
            variables,
        }
    }

    pub fn trainable(&self, name: &str) -> Weight {
        self.parameters.weight(name).unwrap()
    }

    pub fn frozen(&self, name: &str) -> Weight {
        let tensor = self.variable(name);
        let mut values = Pool::default().take(tensor.elem_count());
        values.copy_from_slice(&flat(&tensor));
        Weight::frozen_f32(values, tensor.dims())
    }

    pub fn frozen_bf16(&self, name: &str) -> Weight {
        let tensor = self.variable(name);
        let mut values = Pool::default().take(tensor.elem_count());
        round_slice(&flat(&tensor), 1.0, &mut values);
        Weight::frozen_bf16(values, tensor.dims())
    }

    pub fn variable(&self, name: &str) -> Tensor {
        let found = self.variables.iter().find(|(known, _)| known == name);
        found.unwrap().1.as_tensor().clone()
    }

    pub fn reset_gradients(&self) {
        let gradients = self.parameters.gradients();
        gradients.begin(&mut Accumulator::default(), 1);
    }

    /// The flat gradient, with one where a tensor of the list is not expected to get any.
    pub fn gradients(&self, untouched: &[&str]) -> Vec<f32> {
        for name in untouched.iter().chain(&["~unused"]) {
            let fill = |_: std::ops::Range<usize>, gradient: &mut [f32], accumulate: bool| {
                assert!(!accumulate, "{name} got a gradient");
                gradient.fill(1.0);
            };
            self.trainable(name).add_gradient(fill);
        }
        self.parameters.gradients().flat().unwrap()
    }
}

/// An op under test: from its input and the gradient of its result to its result and the gradient of its input.
type Run<'a> = &'a (dyn Fn(&[f32], &[f32]) -> (Vec<f32>, Vec<f32>) + Sync);

type Reference<'a> = &'a dyn Fn(&Tensor) -> candle_core::Result<Tensor>;

/// Compares an op with its plain reference, in value and in every gradient, for a random gradient of the result; and
/// with itself for 1, 2 and 3 threads, to the bit. Weights in `frozen` must get no gradient.
pub fn check_op(x: &Tensor, weights: &TestWeights, frozen: &[&str], op: Run, reference: Reference) {
    let x = Var::from_tensor(x).unwrap();
    let result = reference(x.as_tensor()).unwrap();
    let seeds = match result.dims2() {
        Ok((rows, columns)) => random_tensor(rows, columns, 77),
        Err(_) => result.ones_like().unwrap(),
    };
    let scalar = (&result * &seeds).unwrap().sum_all().unwrap();
    let gradients = scalar.backward().unwrap();

    let (values, seeds) = (flat(x.as_tensor()), flat(&seeds));
    let run = |threads: usize| {
        in_pool(threads, || {
            weights.reset_gradients();
            let (y, dx) = op(&values, &seeds);
            (y, dx, weights.gradients(frozen))
        })
    };
    let (y, dx, dw) = run(1);
    assert_eq!(run(2), (y.clone(), dx.clone(), dw.clone()));
    assert_eq!(run(3), (y.clone(), dx.clone(), dw.clone()));

    assert_close("value", &y, &flat(&result));
    assert_close("input gradient", &dx, &flat(gradients.get(&x).unwrap()));
    for (tensor, (name, variable)) in weights
        .parameters
        .layout()
        .tensors
        .iter()
        .zip(&weights.variables)
    {
        if name != "~unused" && !frozen.contains(&name.as_str()) {
            let range = tensor.offset..tensor.offset + tensor.scalars();
            let expected = flat(gradients.get(variable).expect(name));
            assert_close(name, &dw[range], &expected);
        }
    }
}

/// One for the largest few of each row, and zero for the others.
pub fn largest_few(rows: &Tensor, count: usize) -> candle_core::Result<Tensor> {
    let width = rows.dim(1)?;
    let of_row = |row: &[f32]| -> Vec<f32> {
        let larger = |x: &f32| row.iter().filter(|other| *other > x).count();
        row.iter()
            .map(|x| f32::from(u8::from(larger(x) < count)))
            .collect()
    };
    let mask: Vec<f32> = flat(rows).chunks(width).flat_map(of_row).collect();
    Tensor::from_vec(mask, rows.dims(), rows.device())
}

pub fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that values agree to a few units in the last place of the largest.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= 5e-6 * largest.max(1e-3);
        assert!(
            close,
            "{what}, scalar {index}: {found} instead of {expected}"
        );
    }
}

pub fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(work)
}
