//! From a job and its weights to a model on the GPU. In: the base model's tensors, and where the trainable ones lie. Out:
//! the model with all its frozen weights; the trainable ones come with the first refresh.

use common::files::adapter::{Factor, tensor_name};
use common::files::layout::Layout;
use common::job::{BaseDtype, LoraSpec};
use common::model::{EMBEDDING, FINAL_NORM, HEAD, LinearShape, ModelConfig, linears};

use super::blas::GpuElement;
use super::gpu::Gpu;
use super::layers::{self, Vector};
use super::model::{GpuModel, TokenMatrix};
use super::ops::adapter::Adapter;
use super::ops::projection::{self, Place, Projection, Staged};
use crate::engine::EngineError;
use crate::engine::model::weights::{WeightSource, name_key};
use crate::engine::ops::element::Element;
use crate::engine::ops::rope::HeadLayout;

/// What a model on the GPU is built from.
pub struct Parts<'a> {
    pub gpu: &'a Gpu,
    pub config: &'a ModelConfig,
    pub source: &'a WeightSource,
    /// Layout of the trainable tensors.
    pub layout: &'a Layout,
    pub lora: Option<&'a LoraSpec>,
    pub dtype: BaseDtype,
}

impl Parts<'_> {
    /// Builds the model with its frozen weights on the GPU.
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
        let place = self.place(name);
        let values = match place {
            // The first refresh writes it.
            Some(_) => self.gpu.take(shape[0] * shape[1])?,
            None => {
                let weight = self.source.tensor(name, &shape, self.dtype)?;
                self.gpu.upload::<E>(weight.read().elements())?
            }
        };
        Ok(TokenMatrix { values, place })
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
            layout: HeadLayout::of(config),
            epsilon: config.rms_norm_epsilon as f32,
        })
    }

    fn projection<E: Element + GpuElement>(
        &self,
        prefix: &str,
        shapes: &[LinearShape],
    ) -> Result<Projection<E>, EngineError> {
        let width = shapes.first().map_or(0, |shape| shape.width);
        let paths = shapes.iter().map(|shape| format!("{prefix}{}", shape.path));
        let layers = shapes
            .iter()
            .zip(paths)
            .map(|(shape, path)| projection::Layer {
                out: shape.out,
                weight: self.place(&format!("{path}.weight")),
                bias: self.place(&format!("{path}.bias")),
                adapter: self.adapter(&path),
            });
        let mut staged = Staged::<E>::new(layers.collect(), width);
        let mut biases = Vec::new();
        for (index, shape) in shapes.iter().enumerate() {
            let path = format!("{prefix}{}", shape.path);
            let weight = format!("{path}.weight");
            if self.place(&weight).is_none() {
                let weight = self
                    .source
                    .tensor(&weight, &[shape.out, shape.width], self.dtype)?;
                staged.set(index, weight.read().elements());
            }
            if shape.bias {
                biases.extend(self.values(&format!("{path}.bias"), &[shape.out])?);
            } else {
                biases.resize(biases.len() + shape.out, 0.0);
            }
        }
        let any = shapes.iter().any(|shape| shape.bias);
        Ok(staged.upload(self.gpu, any.then_some(&biases[..]))?)
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

    /// Values of a tensor of the base model in float32; zeros where it is trainable.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; shape.iter().product()];
        if self.place(name).is_none() {
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
