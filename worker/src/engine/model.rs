//! The decoder: embedding, layers, final norm, and the loss or the logits. Shapes: t tokens of a slot, h hidden size,
//! v vocabulary.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor, Var};

use super::batch::Batch;
use super::config::ModelConfig;
use super::layers::Pass;
use super::layers::attention::AttentionBlock;
use super::layers::decoder::{Decoder, DecoderLayer, Keep, decode};
use super::layers::mlp::Mlp;
use super::ops::cross_entropy::{LossSum, cross_entropy};
use super::ops::embedding;
use super::ops::lora_linear::{Lora, MaskKey};
use super::ops::projection::{Linear, project};
use super::ops::rms_norm::RmsNorm;
use super::ops::rope::{HeadNorms, RopeTable};
use super::params::Weight;
use super::weights::{EMBEDDING, FINAL_NORM, HEAD, LinearShape, linears};

/// Where the model gets its tensors.
pub trait Tensors {
    type Error: From<candle_core::Error>;
    fn weight(&self, name: &str, shape: &[usize]) -> std::result::Result<Weight, Self::Error>;
    /// The adapter of the linear at this path, where it has one.
    fn adapter(&self, path: &str) -> std::result::Result<Option<Lora>, Self::Error>;
}

pub struct Model {
    config: ModelConfig,
    embedding: Weight,
    decoder: Arc<Decoder>,
    head: Weight,
    rope: Mutex<Arc<RopeTable>>,
    checkpointing: bool,
}

impl Model {
    /// `sequence_len` is a hint: tables grow when longer sequences come.
    pub fn build<T: Tensors>(
        config: &ModelConfig,
        tensors: &T,
        sequence_len: usize,
        checkpointing: bool,
    ) -> std::result::Result<Self, T::Error> {
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = tensors.weight(EMBEDDING, &shape)?;
        let head = if config.tied {
            embedding.clone()
        } else {
            tensors.weight(HEAD, &shape)?
        };
        let layers = (0..config.layers)
            .map(|layer| build_layer(config, tensors, layer))
            .collect::<std::result::Result<_, T::Error>>()?;
        Ok(Self {
            embedding,
            decoder: Arc::new(Decoder {
                layers,
                norm: norm(config, tensors, FINAL_NORM)?,
            }),
            head,
            rope: Mutex::new(Arc::new(RopeTable::new(
                &config.rope_frequencies(),
                sequence_len,
            ))),
            checkpointing,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Forward and backward over one batch with at least one target: hands every trainable tensor's gradient of the
    /// summed loss to its sink.
    pub fn train(&self, batch: &Batch, mask: Option<MaskKey>) -> Result<LossSum> {
        let pass = self.pass(batch, mask);
        let embedded_th = Var::from_tensor(&embedding::embed(&batch.ids, &self.embedding)?)?;
        let keep = match self.checkpointing {
            true => Keep::Inputs,
            false => Keep::Everything,
        };
        let hidden_th = decode(&self.decoder, embedded_th.as_tensor(), &pass, keep)?;
        let targets = batch.targets.clone();
        let (loss, sum) = cross_entropy(&hidden_th, &self.head, targets, true)?;
        let gradients = loss.backward()?;
        if let Some(gradient) = gradients.get(embedded_th.as_tensor()) {
            embedding::backward(&batch.ids, &self.embedding, gradient)?;
        }
        Ok(sum)
    }

    /// Forward only.
    pub fn evaluate(&self, batch: &Batch) -> Result<LossSum> {
        let hidden_th = self.hidden(batch)?;
        Ok(cross_entropy(&hidden_th, &self.head, batch.targets.clone(), false)?.1)
    }

    /// `[t, v]`, for comparison with other implementations.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let hidden_th = self.hidden(batch)?;
        let head = Linear {
            weight: self.head.clone(),
            bias: None,
            lora: None,
        };
        project(&hidden_th, &Arc::new(vec![head]), None)
    }

    fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let embedded_th = embedding::embed(&batch.ids, &self.embedding)?;
        let pass = self.pass(batch, None);
        decode(&self.decoder, &embedded_th, &pass, Keep::Nothing)
    }

    fn pass(&self, batch: &Batch, mask: Option<MaskKey>) -> Pass {
        let mut table = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < batch.longest_segment() {
            let frequencies = self.config.rope_frequencies();
            *table = Arc::new(RopeTable::new(&frequencies, batch.longest_segment()));
        }
        Pass::new(batch, table.clone(), mask)
    }
}

fn norm<T: Tensors>(
    config: &ModelConfig,
    tensors: &T,
    name: &str,
) -> std::result::Result<RmsNorm, T::Error> {
    Ok(RmsNorm {
        weight: tensors.weight(name, &[config.hidden_size])?,
        epsilon: config.rms_norm_epsilon as f32,
    })
}

fn build_layer<T: Tensors>(
    config: &ModelConfig,
    tensors: &T,
    layer: usize,
) -> std::result::Result<DecoderLayer, T::Error> {
    let prefix = format!("model.layers.{layer}.");
    let build = |shapes: &[LinearShape]| {
        let built: std::result::Result<Vec<_>, T::Error> = shapes
            .iter()
            .map(|shape| build_linear(tensors, &prefix, shape))
            .collect();
        built.map(Arc::new)
    };
    let [query, key, value, output, gate, up, down] = linears(config);
    let head_norm = |name: &str| {
        let name = format!("{prefix}self_attn.{name}.weight");
        tensors.weight(&name, &[config.head_dim])
    };
    let head_norms = match config.head_norms {
        true => Some(HeadNorms {
            query: head_norm("q_norm")?,
            key: head_norm("k_norm")?,
            epsilon: config.rms_norm_epsilon as f32,
        }),
        false => None,
    };
    let layer_norm = |name: &str| norm(config, tensors, &format!("{prefix}{name}.weight"));
    Ok(DecoderLayer {
        attention: AttentionBlock {
            norm: layer_norm("input_layernorm")?,
            qkv: build(&[query, key, value])?,
            output: build(&[output])?,
            layout: config.head_layout(),
            head_norms,
        },
        mlp: Mlp {
            norm: layer_norm("post_attention_layernorm")?,
            gate_up: build(&[gate, up])?,
            down: build(&[down])?,
        },
    })
}

fn build_linear<T: Tensors>(
    tensors: &T,
    prefix: &str,
    shape: &LinearShape,
) -> std::result::Result<Linear, T::Error> {
    let path = format!("{prefix}{}", shape.path);
    let bias = match shape.bias {
        true => Some(tensors.weight(&format!("{path}.bias"), &[shape.out])?),
        false => None,
    };
    Ok(Linear {
        weight: tensors.weight(&format!("{path}.weight"), &[shape.out, shape.width])?,
        bias,
        lora: tensors.adapter(&path)?,
    })
}
