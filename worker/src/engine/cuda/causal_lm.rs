//! The decoder on the GPU: embedding, layers, final norm, and the loss or the logits. Shapes: t tokens of a slot, h hidden
//! size, v vocabulary.

use std::time::{Duration, Instant};

use common::job::TokenLoss;
use common::model::ModelConfig;

use super::batch::GpuBatch;
use super::blas::GpuElement;
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use super::layers::Pass;
use super::layers::decoder::{self, DecoderLayer};
use super::layers::ropes::GpuRopes;
use super::ops::cross_entropy::{LossHead, chunk_count};
use super::ops::elementwise::Rows;
use super::ops::embedding;
use super::ops::rms_norm::RmsNorm;
use super::ops::token_matrix::TokenMatrix;
use super::params::GradientSink;
use crate::engine::Abandon;
use crate::engine::batch::Batch;
use crate::engine::model::causal_lm::PassTimes;
use crate::engine::model::layers::decoder::Keep;
use crate::engine::ops::cross_entropy::{LogitRule, LossSum};
use crate::engine::ops::element::Element;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::router_loss::RouterLoss;

/// A decoder that is trained on a GPU.
pub struct CausalLm<E> {
    config: ModelConfig,
    embedding: TokenMatrix<E>,
    layers: Vec<DecoderLayer<E>>,
    norm: RmsNorm,
    /// The output layer; None where that is the embedding.
    head: Option<TokenMatrix<E>>,
    ropes: GpuRopes,
    /// All windows that layers have.
    windows: Vec<usize>,
    checkpointing: bool,
    token_loss: TokenLoss,
    abandon: Abandon,
}

impl<E: GpuElement + Element> CausalLm<E> {
    /// Puts a model together. `sequence_len` is a hint: tables grow when longer sequences come.
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        (embedding, head): (TokenMatrix<E>, Option<TokenMatrix<E>>),
        layers: Vec<DecoderLayer<E>>,
        norm: RmsNorm,
        sequence_len: usize,
    ) -> Result<Self, GpuError> {
        Ok(Self {
            embedding,
            layers,
            norm,
            head,
            ropes: GpuRopes::new(gpu, config, sequence_len)?,
            windows: config.windows(),
            checkpointing: false,
            token_loss: TokenLoss::default(),
            config: config.clone(),
            abandon: Abandon::default(),
        })
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.embedding.refresh(gpu, flat)?;
        if let Some(head) = &mut self.head {
            head.refresh(gpu, flat)?;
        }
        self.norm.weight.refresh(gpu, flat)?;
        self.layers
            .iter_mut()
            .try_for_each(|layer| layer.refresh(gpu, flat))
    }

    /// Sets what a trained token adds to the loss, from now on. Until then it is its cross-entropy.
    pub fn set_token_loss(&mut self, token_loss: TokenLoss) {
        self.token_loss = token_loss;
    }

    /// Sets whether layers keep their inputs alone and run again in the backward pass, from now on.
    pub fn set_checkpointing(&mut self, checkpointing: bool) {
        self.checkpointing = checkpointing;
    }

    /// Bytes that a training pass without checkpointing keeps for so many tokens.
    pub fn kept_bytes(&self, tokens: usize) -> usize {
        tokens
            * self
                .layers
                .iter()
                .map(DecoderLayer::kept_bytes)
                .sum::<usize>()
    }

    /// The request to give up a pass: once asked, a pass ends between two layers, and what it gives is of no use.
    pub fn abandon(&self) -> &Abandon {
        &self.abandon
    }

    /// Makes the tables of rotary positions reach to the batch's last position.
    pub fn prepare(&mut self, gpu: &Gpu, batch: &Batch) -> Result<(), GpuError> {
        let positions = batch.longest_segment();
        if self.ropes.positions() < positions {
            self.ropes = GpuRopes::new(gpu, &self.config, positions)?;
        }
        Ok(())
    }

    /// Runs forward and backward over one batch with at least one target, and hands every trainable tensor's gradient of the
    /// summed loss to the sink.
    ///
    /// None where it was abandoned, which with `droppable` may happen after some gradients were handed over.
    pub fn train(
        &self,
        gpu: &Gpu,
        batch: &Batch,
        mask: Option<MaskKey>,
        (sink, droppable): (&mut dyn GradientSink, bool),
    ) -> Result<Option<(LossSum, PassTimes)>, GpuError> {
        let started = Instant::now();
        let uploaded = self.upload(gpu, batch)?;
        let router_loss = self.router_loss(batch);
        let mut pass = self.pass(gpu, &uploaded, mask);
        pass.router_loss = router_loss.as_ref();
        let keep = match self.checkpointing {
            true => Keep::Inputs,
            false => Keep::Everything,
        };
        let forward = decoder::forward(&self.layers, self.embed(pass)?, pass, keep)?;
        let Some((x, tape)) = forward else {
            return Ok(None);
        };
        // The loss hands over the first gradient.
        pass.abandon = pass.abandon.filter(|_| droppable);
        let mut gradient = gpu.take::<f32>(x.len())?;
        let dx = &mut gradient.as_view_mut();
        let mut sum = self
            .loss_head()
            .loss(gpu, &x.as_view(), &batch.targets, Some((dx, sink)))?;
        sum.loss += router_loss.as_ref().map_or(0.0, RouterLoss::loss);
        drop(x);
        let lost = Instant::now();
        if decoder::backward(&self.layers, tape, dx, pass, sink)?.is_none() {
            return Ok(None);
        }
        let embedding = (&self.embedding, self.embedding_scale());
        embedding::backward(gpu, &batch.ids, embedding, &dx.as_view(), sink)?;
        gpu.wait()?;
        // Forward and loss run together: the processor waits for the GPU only where it reads the loss.
        let times = PassTimes {
            forward: lost - started,
            loss: Duration::ZERO,
            backward: lost.elapsed(),
        };
        Ok(Some((sum, times)))
    }

    /// How often a training pass hands over a gradient of the same tensor, at most: one for each chunk of the loss, and
    /// one for the embedding where it is the output layer too.
    pub fn gradient_parts(&self, batch: &Batch) -> u64 {
        chunk_count(batch.targets.len(), self.config.vocab_size) as u64 + 1
    }

    /// Computes the loss of a batch, forward only. None where it was abandoned.
    pub fn evaluate(&self, gpu: &Gpu, batch: &Batch) -> Result<Option<LossSum>, GpuError> {
        let router_loss = self.router_loss(batch);
        let Some(x) = self.hidden(gpu, batch, router_loss.as_ref())? else {
            return Ok(None);
        };
        let loss_head = self.loss_head();
        let mut sum = loss_head.loss(gpu, &x.as_view(), &batch.targets, None)?;
        sum.loss += router_loss.as_ref().map_or(0.0, RouterLoss::loss);
        Ok(Some(sum))
    }

    /// The logits of all tokens, flat `[t][v]`, for comparison with other implementations. None where it was abandoned.
    pub fn logits(&self, gpu: &Gpu, batch: &Batch) -> Result<Option<Vec<f32>>, GpuError> {
        let Some(x) = self.hidden(gpu, batch, None)? else {
            return Ok(None);
        };
        let (tokens, head) = (batch.ids.len(), self.head());
        let (vocabulary, width) = (head.vocabulary, head.width);
        let mut normed = gpu.take::<E>(tokens * width)?;
        let out = (&mut normed.as_view_mut(), Rows::new(tokens, width));
        self.norm.forward(gpu, &x.as_view(), out)?;
        let mut logits = gpu.take::<f32>(tokens * vocabulary)?;
        let rule = LogitRule::of(&self.config);
        head.logits(
            gpu,
            (&normed.as_view(), tokens),
            &mut logits.as_view_mut(),
            1.0,
        )?;
        let mut logits = gpu.download(&logits, tokens * vocabulary)?;
        logits
            .chunks_exact_mut(vocabulary)
            .for_each(|row| rule.apply(row));
        Ok(Some(logits))
    }

    fn hidden(
        &self,
        gpu: &Gpu,
        batch: &Batch,
        router_loss: Option<&RouterLoss>,
    ) -> Result<Option<DeviceBuffer<f32>>, GpuError> {
        let uploaded = self.upload(gpu, batch)?;
        let pass = Pass {
            router_loss,
            ..self.pass(gpu, &uploaded, None)
        };
        let kept = decoder::forward(&self.layers, self.embed(pass)?, pass, Keep::Nothing)?;
        Ok(kept.map(|(x, _)| x))
    }

    fn embed(&self, pass: Pass) -> Result<DeviceBuffer<f32>, GpuError> {
        let mut x = pass
            .gpu
            .take::<f32>(pass.tokens() * self.config.hidden_size)?;
        let (ids, out) = (pass.batch.ids.as_view(), &mut x.as_view_mut());
        embedding::forward(pass.gpu, &ids, &self.embedding, out, self.embedding_scale())?;
        Ok(x)
    }

    /// What embeddings are multiplied by, rounded to the type that the model is computed in, as Transformers does.
    fn embedding_scale(&self) -> f32 {
        E::round_from(self.config.scales.embedding as f32).wide()
    }

    /// The router's loss of a slot, where the model has one.
    fn router_loss(&self, batch: &Batch) -> Option<RouterLoss> {
        let coefficient = self.config.experts.as_ref()?.router_loss()?;
        Some(RouterLoss::new(coefficient, batch.targets.len()))
    }

    fn loss_head(&self) -> LossHead<'_, E> {
        LossHead {
            norm: &self.norm,
            head: self.head(),
            loss: self.token_loss,
            logits: LogitRule::of(&self.config),
        }
    }

    fn upload(&self, gpu: &Gpu, batch: &Batch) -> Result<GpuBatch, GpuError> {
        let rows = self.ropes.rows(&batch.positions);
        let is_chunked = self.config.linear_attention.is_some();
        GpuBatch::upload(gpu, batch, &rows, &self.windows, is_chunked)
    }

    fn head(&self) -> &TokenMatrix<E> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    fn pass<'a>(&'a self, gpu: &'a Gpu, batch: &'a GpuBatch, mask: Option<MaskKey>) -> Pass<'a> {
        Pass {
            gpu,
            batch,
            ropes: &self.ropes,
            mask,
            router_loss: None,
            abandon: Some(&self.abandon),
        }
    }
}
