//! From a job and its weights to a model on the GPU. In: the base model's tensors, and where the trainable ones lie. Out:
//! the model with all its frozen weights; the trainable ones come with the first refresh.

use common::files::adapter::{Factor, tensor_name};
use common::files::layout::Layout;
use common::job::{BaseDtype, LoraSpec};

use super::blas::GpuElement;
use super::gpu::Gpu;
use super::layers::{self, Vector};
use super::model::{GpuModel, TokenMatrix};
use super::ops::projection::{self, Adapter, Place, Projection};
use crate::engine::EngineError;
use crate::engine::config::ModelConfig;
use crate::engine::ops::element::Element;
use crate::engine::weights::{
    EMBEDDING, FINAL_NORM, HEAD, LinearShape, WeightSource, linears, name_key,
};

/// Where everything comes from.
pub struct Parts<'a> {
    pub gpu: &'a Gpu,
    pub config: &'a ModelConfig,
    pub source: &'a WeightSource,
    /// Of the trainable tensors.
    pub layout: &'a Layout,
    pub lora: Option<&'a LoraSpec>,
    pub dtype: BaseDtype,
}

impl Parts<'_> {
    pub fn model<E: Element + GpuElement>(
        &self,
        sequence_len: usize,
    ) -> Result<GpuModel<E>, EngineError> {
        let embedding = self.token_matrix::<E>(EMBEDDING)?;
        let head = match self.config.tied {
            true => None,
            false => Some(self.token_matrix(HEAD)?),
        };
        let layers = (0..self.config.layers)
            .map(|layer| self.layer(layer))
            .collect::<Result<_, _>>()?;
        let norm = self.vector(FINAL_NORM, self.config.hidden_size)?;
        let tokens = (embedding, head);
        Ok(GpuModel::new(
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
        Ok(TokenMatrix {
            values: self.gpu.upload(&self.matrix::<E>(name, shape)?)?,
            place: self.place(name),
        })
    }

    fn layer<E: Element + GpuElement>(
        &self,
        layer: usize,
    ) -> Result<layers::Layer<E>, EngineError> {
        let config = self.config;
        let prefix = format!("model.layers.{layer}.");
        let [query, key, value, output, gate, up, down] = linears(config);
        let vector = |name: &str, len: usize| self.vector(&format!("{prefix}{name}.weight"), len);
        let head_norms = match config.head_norms {
            true => Some([
                vector("self_attn.q_norm", config.head_dim)?,
                vector("self_attn.k_norm", config.head_dim)?,
            ]),
            false => None,
        };
        Ok(layers::Layer {
            attention_norm: vector("input_layernorm", config.hidden_size)?,
            qkv: self.projection(&prefix, &[query, key, value])?,
            head_norms,
            output: self.projection(&prefix, &[output])?,
            mlp_norm: vector("post_attention_layernorm", config.hidden_size)?,
            gate_up: self.projection(&prefix, &[gate, up])?,
            down: self.projection(&prefix, &[down])?,
            layout: config.head_layout(),
            epsilon: config.rms_norm_epsilon as f32,
        })
    }

    fn projection<E: Element + GpuElement>(
        &self,
        prefix: &str,
        shapes: &[LinearShape],
    ) -> Result<Projection<E>, EngineError> {
        let width = shapes.first().map_or(0, |shape| shape.width);
        let (mut layers, mut weights, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        for shape in shapes {
            let path = format!("{prefix}{}", shape.path);
            let (weight, bias) = (format!("{path}.weight"), format!("{path}.bias"));
            weights.extend(self.matrix::<E>(&weight, [shape.out, shape.width])?);
            if shape.bias {
                biases.extend(self.values(&bias, &[shape.out])?);
            } else {
                biases.resize(biases.len() + shape.out, 0.0);
            }
            layers.push(projection::Layer {
                out: shape.out,
                weight: self.place(&weight),
                bias: self.place(&bias),
                adapter: self.adapter(&path),
            });
        }
        let any = shapes.iter().any(|shape| shape.bias);
        let bias = any.then_some(&biases[..]);
        Ok(Projection::new(self.gpu, layers, width, &weights, bias)?)
    }

    fn adapter(&self, path: &str) -> Option<Adapter> {
        let lora = self.lora?;
        Some(Adapter {
            a: self.place(&tensor_name(path, Factor::A))?,
            b: self.place(&tensor_name(path, Factor::B))?,
            rank: lora.r,
            scale: lora.scale() as f32,
            dropout: lora.dropout,
            module: name_key(path),
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vector, EngineError> {
        let values = self.values(name, &[len])?;
        Ok(Vector::new(self.gpu, &values, self.place(name))?)
    }

    /// A matrix of the base model; zeros where it is trainable.
    fn matrix<E: Element + GpuElement>(
        &self,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Vec<E>, EngineError> {
        if self.place(name).is_some() {
            return Ok(vec![<E as Default>::default(); shape[0] * shape[1]]);
        }
        let weight = self.source.tensor(name, &shape, self.dtype)?;
        let reading = weight.read();
        Ok(reading.elements::<E>().to_vec())
    }

    /// As [`Self::matrix`], in float32.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; shape.iter().product()];
        if self.place(name).is_none() {
            self.source.check(name, shape)?;
            self.source.read_f32(name, shape, &mut values)?;
        }
        Ok(values)
    }

    fn place(&self, name: &str) -> Option<Place> {
        let tensor = self.layout.find(name)?;
        Some(Place {
            offset: tensor.offset,
            scalars: tensor.scalars(),
        })
    }
}
