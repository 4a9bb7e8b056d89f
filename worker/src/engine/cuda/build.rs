//! From a job and its weights to a model on the GPU. In: the base model's tensors, and where the trainable ones lie. Out:
//! the model with all its frozen weights; the trainable ones come with the first refresh.

mod experts;
mod mixer;

use std::sync::Arc;

use common::files::adapter::{Factor, tensor_name};
use common::files::layout::Layout;
use common::job::{BaseDtype, Quantization};
use common::model::{EMBEDDING, FINAL_NORM, HEAD, LinearShape, ModelConfig, projections};

use super::blas::GpuElement;
use super::causal_lm::CausalLm;
use super::gpu::Gpu;
use super::layers::decoder::DecoderLayer;
use super::layers::feed_forward::FeedForward;
use super::layers::mlp::Mlp;
use super::layers::residual::Residual;
use super::ops::frozen::{Frozen, Scratch};
use super::ops::lora_linear::Lora;
use super::ops::projection::{Linear, Projection, Staged};
use super::ops::rms_norm::RmsNorm;
use super::ops::token_matrix::TokenMatrix;
use super::params::{FlatRange, Vector};
use crate::engine::EngineError;
use crate::engine::adapter::JobAdapter;
use crate::engine::model::weights::{WeightSource, name_key};
use crate::engine::ops::element::Element;

/// What a model on the GPU is built from.
pub struct Parts<'a> {
    pub gpu: &'a Gpu,
    pub config: &'a ModelConfig,
    pub source: &'a WeightSource,
    /// Layout of the trainable tensors.
    pub layout: &'a Layout,
    pub lora: Option<JobAdapter<'a>>,
    pub dtype: BaseDtype,
    /// How frozen matrices are kept in 4 bits, if they are.
    pub quantization: Option<Quantization>,
    /// What those of 4 bits are widened to.
    pub scratch: Arc<Scratch>,
}

impl Parts<'_> {
    /// Builds the model with its frozen weights on the GPU.
    pub fn model<E: Element + GpuElement>(
        &self,
        sequence_len: usize,
    ) -> Result<CausalLm<E>, EngineError> {
        let embedding = self.token_matrix::<E>(EMBEDDING)?;
        let head = match self.config.tied {
            true => None,
            false => Some(self.token_matrix(HEAD)?),
        };
        let layers = (0..self.config.layers)
            .map(|layer| self.layer(layer))
            .collect::<Result<_, _>>()?;
        let norm = self.norm(FINAL_NORM)?;
        head.as_ref().unwrap_or(&embedding).reserve();
        self.scratch.open(self.gpu)?;
        let tokens = (embedding, head);
        Ok(CausalLm::new(
            self.gpu,
            self.config,
            tokens,
            layers,
            norm,
            sequence_len,
        )?)
    }

    fn token_matrix<E: Element + GpuElement>(
        &self,
        name: &str,
    ) -> Result<TokenMatrix<E>, EngineError> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        if let Some(range) = self.range(name) {
            return Ok(TokenMatrix::trainable(self.gpu, shape, range)?);
        }
        let quantization = self.quantization.filter(|how| how.embeddings);
        let values = self.frozen(name, &shape, quantization)?;
        Ok(TokenMatrix::frozen(shape, values, &self.scratch))
    }

    fn layer<E: Element + GpuElement>(&self, layer: usize) -> Result<DecoderLayer<E>, EngineError> {
        let config = self.config;
        let prefix = format!("model.layers.{layer}.");
        let [input, output, gate_up, down, shared, ..] = projections(config, layer);
        let mlp_norm = || self.layer_norm(&prefix, config.norms.mlp_input);
        Ok(DecoderLayer {
            mixer: self.mixer(layer, &prefix, [&input, &output])?,
            mlp: match config.experts_of(layer) {
                None => FeedForward::Dense(Box::new(Mlp {
                    norm: mlp_norm()?,
                    gate_up: self.projection(&prefix, &gate_up)?,
                    down: self.projection(&prefix, &down)?,
                    residual: self.residual(&prefix, config.norms.mlp_output)?,
                    activation: config.activation,
                })),
                Some(experts) => {
                    let norm = mlp_norm()?;
                    let shared = [gate_up, down, shared];
                    let experts = self.experts(&prefix, experts, norm, &shared)?;
                    FeedForward::Experts(Box::new(experts))
                }
            },
        })
    }

    /// The norm of this name in a layer, where it has one.
    fn layer_norm(&self, prefix: &str, name: Option<&str>) -> Result<Option<RmsNorm>, EngineError> {
        name.map(|name| self.norm(&format!("{prefix}{name}.weight")))
            .transpose()
    }

    /// How what a half of a layer computes is added, normed by the norm of this name where there is one.
    fn residual(&self, prefix: &str, norm: Option<&str>) -> Result<Residual, EngineError> {
        Ok(Residual {
            norm: self.layer_norm(prefix, norm)?,
            scale: self.config.scales.residual as f32,
        })
    }

    fn projection<E: Element + GpuElement>(
        &self,
        prefix: &str,
        shapes: &[LinearShape],
    ) -> Result<Projection<E>, EngineError> {
        let width = shapes.first().map_or(0, |shape| shape.width);
        let paths = shapes.iter().map(|shape| format!("{prefix}{}", shape.path));
        let linears = shapes.iter().zip(paths).map(|(shape, path)| Linear {
            out: shape.out,
            weight: self.range(&format!("{path}.weight")),
            bias: self.range(&format!("{path}.bias")),
            lora: self.lora(&path),
        });
        let linears: Vec<Linear> = linears.collect();
        let biases = self.biases(prefix, shapes)?;
        let named = |shape: &LinearShape| format!("{prefix}{}.weight", shape.path);
        let is_quantised = shapes
            .iter()
            .any(|shape| self.has_four_bits(&named(shape), self.quantization));
        if is_quantised {
            let weights = shapes.iter().map(|shape| {
                self.frozen(&named(shape), &[shape.out, shape.width], self.quantization)
            });
            let weights = weights.collect::<Result<_, _>>()?;
            let linears = (linears, width);
            let biases = biases.as_deref();
            let frozen = Projection::frozen(self.gpu, linears, weights, biases, &self.scratch);
            return Ok(frozen?);
        }
        let mut staged = Staged::<E>::new(linears, width);
        for (index, shape) in shapes.iter().enumerate() {
            let name = named(shape);
            if self.range(&name).is_none() {
                let shape = [shape.out, shape.width];
                let weight = self.source.tensor(&name, &shape, self.dtype)?;
                staged.set(index, weight.read().elements());
            }
        }
        Ok(staged.upload(self.gpu, biases.as_deref())?)
    }

    /// The biases of all linears of one input, where one has some.
    fn biases(
        &self,
        prefix: &str,
        shapes: &[LinearShape],
    ) -> Result<Option<Vec<f32>>, EngineError> {
        if !shapes.iter().any(|shape| shape.bias) {
            return Ok(None);
        }
        let mut biases = Vec::new();
        for shape in shapes {
            match shape.bias {
                true => {
                    let name = format!("{prefix}{}.bias", shape.path);
                    biases.extend(self.values(&name, &[shape.out])?);
                }
                false => biases.resize(biases.len() + shape.out, 0.0),
            }
        }
        Ok(Some(biases))
    }

    /// Whether a matrix is frozen and in 4 bits.
    fn has_four_bits(&self, name: &str, quantization: Option<Quantization>) -> bool {
        self.range(name).is_none() && self.source.has_four_bits(name, quantization)
    }

    /// A frozen matrix as it is kept: in 4 bits, where it has these.
    fn frozen<E: Element + GpuElement>(
        &self,
        name: &str,
        shape: &[usize; 2],
        quantization: Option<Quantization>,
    ) -> Result<Frozen<E>, EngineError> {
        let weight = self.source.matrix(name, shape, self.dtype, quantization)?;
        Ok(Frozen::upload(self.gpu, &weight)?)
    }

    /// How experts are quantised, where the job asks for that.
    fn quantization_of_experts(&self) -> Option<Quantization> {
        self.quantization.filter(|how| how.experts)
    }

    fn lora(&self, path: &str) -> Option<Lora> {
        let lora = self.lora.as_ref()?;
        Some(Lora {
            a: self.range(&tensor_name(path, Factor::A))?,
            b: self.range(&tensor_name(path, Factor::B))?,
            rank: lora.sizes.rank(path),
            scale: lora.sizes.scale(path) as f32,
            dropout: lora.spec.dropout,
            module: name_key(path),
        })
    }

    fn norm(&self, name: &str) -> Result<RmsNorm, EngineError> {
        Ok(RmsNorm {
            weight: self.vector(name, self.config.hidden_size)?,
            epsilon: self.config.rms_norm_epsilon as f32,
            offset: self.config.norm_offset,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vector, EngineError> {
        let values = self.values(name, &[len])?;
        Ok(Vector::new(self.gpu, &values, self.range(name))?)
    }

    /// Values of a tensor of the base model in float32; zeros where it is trainable.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; shape.iter().product()];
        if self.range(name).is_none() {
            self.source.read_f32(name, shape, &mut values)?;
        }
        Ok(values)
    }

    fn range(&self, name: &str) -> Option<FlatRange> {
        let tensor = self.layout.find(name)?;
        Some(FlatRange {
            offset: tensor.offset,
            scalars: tensor.scalars(),
        })
    }
}
