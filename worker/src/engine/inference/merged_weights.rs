//! The weights of a model as it answers: as 4 bits leave them where these are asked for, with an adapter merged into them.
//!
//! In: a model folder and perhaps a PEFT adapter, neither trusted. Out: float32 tensors by name.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use common::files::FileError;
use common::files::adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, Factor, factors_at, is_kept_beside_factors,
    is_kept_beside_tokens, parse_tensor_name, tensor_name,
};
use common::files::model::{ModelFolder, WeightFiles};
use common::files::tensors::TensorFile;
use common::job::{
    AdapterSizes, BaseDtype, JobSpec, Quantization, TOKEN_MODULES, TrainedBiases, TrainedRows,
};
use common::model::{
    EMBEDDING, HEAD, INPUT_EMBEDDING, ModelConfig, base_tensors, is_norm_or_bias, is_of_expert,
    is_router, token_tensor, token_tensors,
};
use common::nf4::{Nf4, NotQuantised};
use half::bf16;

use super::adapter_tensor::read_tensor;
use super::error::InferenceError;
use super::merged_experts::StackedAdapters;
use crate::engine::buffer::Pool;
use crate::engine::model::weights::WeightSource;
use crate::engine::ops::dora::row_norms;
use crate::engine::ops::matrix::View;

/// How weights are quantised before anything is computed with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourBits {
    /// The type that they are rounded to first, and when they are widened again.
    pub dtype: BaseDtype,
    pub quantization: Quantization,
}

impl FourBits {
    /// As a job has it that says no more than `load_in_4bit: true`.
    pub const USUAL: Self = Self {
        dtype: BaseDtype::Bfloat16,
        quantization: Quantization {
            nested_scales: true,
            embeddings: false,
            experts: false,
        },
    };

    /// What this job trains its adapter on, if it quantises anything.
    pub fn of(job: &JobSpec) -> Option<Self> {
        Some(Self {
            dtype: job.base_dtype,
            quantization: job.quantization?,
        })
    }

    /// Whether a tensor of the base model is quantised.
    fn changes(&self, name: &str, shape: &[usize]) -> bool {
        let is_of_tokens = [EMBEDDING, HEAD, INPUT_EMBEDDING].contains(&name);
        let stays = (is_of_tokens && !self.quantization.embeddings)
            || (is_of_expert(name) && !self.quantization.experts)
            || is_router(name);
        shape.len() >= 2 && !stays && !is_norm_or_bias(name, shape.len())
    }

    /// Puts in place of a tensor's scalars what is left of them in 4 bits. Each expert of a fused tensor is a matrix of its own.
    fn round(&self, scalars: &mut [f32], shape: &[usize]) -> Result<(), NotQuantised> {
        let [.., rows, columns] = shape else {
            return Ok(());
        };
        let mut matrices = scalars.chunks_mut((rows * columns).max(1));
        matrices.try_for_each(|matrix| self.round_matrix(matrix))
    }

    fn round_matrix(&self, scalars: &mut [f32]) -> Result<(), NotQuantised> {
        let round = |scalars: &mut [f32]| {
            if self.dtype == BaseDtype::Bfloat16 {
                for scalar in scalars {
                    *scalar = bf16::from_f32(*scalar).to_f32();
                }
            }
        };
        round(scalars);
        let matrix = Nf4::quantise(scalars, self.quantization.nested_scales)?;
        matrix.dequantise(0, scalars);
        round(scalars);
        Ok(())
    }
}

/// An adapter's folder, opened.
pub(super) struct Adapter {
    config: AdapterConfig,
    file: TensorFile,
}

impl Adapter {
    pub fn open(dir: &Path) -> Result<Self, InferenceError> {
        Ok(Self {
            config: AdapterConfig::read(dir)?,
            file: TensorFile::open(&dir.join(ADAPTER_WEIGHTS))?,
        })
    }

    /// Whether it has weights of tokens of its own.
    pub fn has_tokens(&self) -> bool {
        !self.config.tokens.is_none()
    }

    /// Whether it has factors on the embedding or the output layer.
    fn adapts_tokens(&self) -> bool {
        TOKEN_MODULES.into_iter().any(|module| {
            let [a, _] = factors_at(module);
            self.file.get(&tensor_name(module, a)).is_some()
        })
    }

    /// The model with as many tokens as the adapter has, whose output layer is the embedding only where both stay one matrix.
    pub fn on(&mut self, config: ModelConfig) -> Result<ModelConfig, InferenceError> {
        let tokens = std::mem::take(&mut self.config.tokens).of_model(config.tied);
        self.config.tokens = tokens.ok_or_else(|| InferenceError::UnknownModule {
            path: self.file.path().to_owned(),
            module: "rows of the output layer apart from the embedding".to_owned(),
        })?;
        let mut config = config.with_trained_tokens(&self.config.tokens);
        // What an adapter adds to the embedding is not in the output layer, nor the other way.
        config.tied &= !self.adapts_tokens();
        for (name, _) in token_tensors(&config, &self.config.tokens) {
            // A matrix that was trained as a whole has as many rows as there were tokens.
            let rows = self
                .file
                .get(&name)
                .and_then(|view| view.shape.first().copied());
            config.vocab_size = config.vocab_size.max(rows.unwrap_or(0));
        }
        Ok(config)
    }
}

/// All weights of the model in float32, as 4 bits leave them where these are asked for, with `W + scale · B A` for those that
/// the adapter changes, its rows scaled to their magnitudes where they have some. `config` may have more tokens than the folder.
pub(super) fn merged_weights(
    folder: &ModelFolder,
    config: &ModelConfig,
    adapter: Option<&Adapter>,
    four_bits: Option<FourBits>,
) -> Result<HashMap<String, Tensor>, InferenceError> {
    let own = ModelConfig::of(folder)?;
    let stored = base_tensors(&own);
    let files = WeightFiles::open(folder, &stored)?;
    for notice in files.notices() {
        tracing::warn!("{notice}");
    }
    // A folder of 4 bits is as it is.
    let four_bits = four_bits.filter(|_| !files.are_four_bits());
    let source = WeightSource::of(files, &stored);
    let mut weights = HashMap::new();
    for (name, shape) in base_tensors(config) {
        let mut scalars = vec![0.0f32; shape.iter().product()];
        source.read_f32(&name, &shape, &mut scalars)?;
        if let Some(how) = four_bits.filter(|how| how.changes(&name, &shape)) {
            let rounded = how.round(&mut scalars, &shape);
            rounded.map_err(|reason| source.not_quantised(&name, reason))?;
        }
        weights.insert(name, Tensor::from_vec(scalars, shape, &Device::Cpu)?);
    }
    if let Some(adapter) = adapter {
        merge_adapter(&mut weights, config, adapter)?;
    }
    Ok(weights)
}

fn merge_adapter(
    weights: &mut HashMap<String, Tensor>,
    config: &ModelConfig,
    Adapter {
        config: adapter,
        file,
    }: &Adapter,
) -> Result<(), InferenceError> {
    let of_tokens = token_tensors(config, &adapter.tokens);
    let is_kept = |name: &str| {
        is_kept_beside_tokens(name, &adapter.tokens, config.tied)
            || is_kept_beside_factors(name, |name| file.get(name).is_some())
    };
    let sizes = adapter.sizes();
    let stacked = StackedAdapters::of(config, &adapter.shape.parameters);
    for name in file.names() {
        let unknown = |module: &str| InferenceError::UnknownModule {
            path: file.path().to_owned(),
            module: module.to_owned(),
        };
        if of_tokens.iter().any(|(token, _)| token == name) || is_kept(name) {
            continue;
        }
        let (module, factor) = parse_tensor_name(name).ok_or_else(|| unknown(name))?;
        if stacked.has(module, factor) {
            continue;
        }
        let is_expected = match factor {
            Factor::A | Factor::B | Factor::EmbeddingA | Factor::EmbeddingB => true,
            Factor::Magnitude => adapter.use_dora,
            Factor::BiasOfB => adapter.lora_bias,
            Factor::Bias => !adapter.biases.is_none(),
            Factor::BiasAlone => adapter.biases == TrainedBiases::All,
        };
        let bias_name = format!("{module}.bias");
        let is_bias = matches!(factor, Factor::BiasOfB | Factor::Bias | Factor::BiasAlone);
        if !is_expected || (is_bias && !weights.contains_key(&bias_name)) {
            return Err(unknown(name));
        }
        match factor {
            Factor::A => merge_linear(weights, module, (file, adapter, &sizes))?,
            Factor::EmbeddingA => merge_embedding(weights, module, (file, &sizes))?,
            Factor::BiasAlone => {
                let own = weights.get(&bias_name).ok_or_else(|| unknown(name))?;
                let trained = read_tensor(file, name, own.dims())?;
                weights.insert(bias_name, trained);
            }
            // Read with its A; one without an A is reported as missing.
            _ => {
                let a = match factor {
                    Factor::EmbeddingB => Factor::EmbeddingA,
                    _ => Factor::A,
                };
                let missing = || FileError::MissingTensor {
                    path: file.path().to_owned(),
                    tensor: tensor_name(module, a),
                };
                file.get(&tensor_name(module, a)).ok_or_else(missing)?;
            }
        }
    }
    stacked.merge(weights, (file, &sizes))?;
    let both = [
        (EMBEDDING, &adapter.tokens.embedding),
        (HEAD, &adapter.tokens.head),
    ];
    for (matrix, rows) in both.into_iter().filter(|(_, rows)| !rows.is_none()) {
        merge_tokens(weights, config, file, (matrix, rows))?;
    }
    Ok(())
}

/// Merges the adapter of the embedding, whose factor A has a column for each token.
fn merge_embedding(
    weights: &mut HashMap<String, Tensor>,
    module: &str,
    (file, sizes): (&TensorFile, &AdapterSizes),
) -> Result<(), InferenceError> {
    let unknown = || InferenceError::UnknownModule {
        path: file.path().to_owned(),
        module: module.to_owned(),
    };
    let name = format!("{module}.weight");
    let weight = weights.get(&name).filter(|_| name == EMBEDDING);
    let weight = weight.ok_or_else(unknown)?;
    let (tokens, width) = weight.dims2()?;
    let (rank, scale) = (sizes.rank(module), sizes.scale(module));
    let read = |factor, shape: &[usize]| read_tensor(file, &tensor_name(module, factor), shape);
    let a = read(Factor::EmbeddingA, &[rank, tokens])?;
    let b = read(Factor::EmbeddingB, &[width, rank])?;
    let added = (a.t()?.matmul(&b.t()?)? * scale)?;
    let merged = (weight + added)?;
    weights.insert(name, merged);
    Ok(())
}

/// Merges all that an adapter has for one linear into its weight and bias.
fn merge_linear(
    weights: &mut HashMap<String, Tensor>,
    module: &str,
    (file, adapter, sizes): (&TensorFile, &AdapterConfig, &AdapterSizes),
) -> Result<(), InferenceError> {
    let unknown = || InferenceError::UnknownModule {
        path: file.path().to_owned(),
        module: module.to_owned(),
    };
    let weight_name = format!("{module}.weight");
    let weight = weights.get(&weight_name).ok_or_else(unknown)?;
    let (out, input) = weight.dims2().map_err(|_| unknown())?;
    let read = |factor, shape: &[usize]| read_tensor(file, &tensor_name(module, factor), shape);
    // What adapter_config.json says is there beside the factors.
    let read_said = |factor, said: &str| {
        let name = tensor_name(module, factor);
        match file.get(&name) {
            Some(_) => read_tensor(file, &name, &[out]),
            None => {
                let reason = format!("no tensor {name}, which {said} in {ADAPTER_CONFIG} asks for");
                Err(FileError::malformed(file.path(), reason).into())
            }
        }
    };
    let (rank, scale) = (sizes.rank(module), sizes.scale(module));
    let a = read(Factor::A, &[rank, input])?;
    let b = read(Factor::B, &[out, rank])?;
    let mut merged = (weight + (b.matmul(&a)? * scale)?)?;
    if adapter.use_dora {
        merged = with_magnitudes(&merged, &read_said(Factor::Magnitude, "use_dora")?)?;
    }
    weights.insert(weight_name, merged);

    let bias_name = format!("{module}.bias");
    let Some(bias) = weights.get(&bias_name) else {
        return match adapter.lora_bias {
            true => Err(InferenceError::UnknownModule {
                path: file.path().to_owned(),
                module: bias_name,
            }),
            false => Ok(()),
        };
    };
    let mut bias = match adapter.biases {
        TrainedBiases::None => bias.clone(),
        TrainedBiases::LoraOnly | TrainedBiases::All => read_said(Factor::Bias, "bias")?,
    };
    if adapter.lora_bias {
        bias = (bias + (read_said(Factor::BiasOfB, "lora_bias")? * scale)?)?;
    }
    weights.insert(bias_name, bias);
    Ok(())
}

/// Scales each row to its magnitude. A row of zeros stays one.
fn with_magnitudes(weight: &Tensor, magnitudes: &Tensor) -> Result<Tensor, InferenceError> {
    let (rows, columns) = weight.dims2()?;
    let mut values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
    let view = View::new(&values, rows, columns);
    let norms = row_norms(view.into(), None, &Pool::default());
    let magnitudes: Vec<f32> = magnitudes.to_vec1()?;
    let rows = values
        .chunks_exact_mut(columns)
        .zip(norms.iter().zip(&magnitudes));
    for (row, (norm, magnitude)) in rows.filter(|(_, (norm, _))| **norm > 0.0) {
        row.iter_mut().for_each(|x| *x *= magnitude / norm);
    }
    let shape = weight.dims().to_vec();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Puts what an adapter has of the embedding or the output layer in place of what the model has.
fn merge_tokens(
    weights: &mut HashMap<String, Tensor>,
    config: &ModelConfig,
    file: &TensorFile,
    (matrix, rows): (&str, &TrainedRows),
) -> Result<(), InferenceError> {
    let width = config.hidden_size;
    let name = token_tensor(matrix, rows);
    let unknown = || InferenceError::UnknownModule {
        path: file.path().to_owned(),
        module: matrix.to_owned(),
    };
    let weight = weights.get(matrix).ok_or_else(unknown)?;
    let TrainedRows::These(ids) = rows else {
        let whole = read_tensor(file, &name, &[config.vocab_size, width])?;
        weights.insert(matrix.to_owned(), whole);
        return Ok(());
    };
    let own = read_tensor(file, &name, &[ids.len(), width])?;
    let own: Vec<f32> = own.flatten_all()?.to_vec1()?;
    let mut values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
    for (id, row) in ids.iter().zip(own.chunks_exact(width)) {
        values[*id as usize * width..][..width].copy_from_slice(row);
    }
    let shape = weight.dims().to_vec();
    weights.insert(
        matrix.to_owned(),
        Tensor::from_vec(values, shape, &Device::Cpu)?,
    );
    Ok(())
}
