//! The decoder: embedding, layers, final norm, and the loss or the logits. Shapes: t tokens of a slot, h hidden size,
//! v vocabulary.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::job::{BaseDtype, TokenLoss};
use common::model::ModelConfig;
use half::bf16;

use super::layers::Pass;
use super::layers::decoder::{self, DecoderLayer, Keep};
use crate::engine::abandon::Abandon;
use crate::engine::batch::Batch;
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::ops::cross_entropy::{LossHead, LossSum, chunk_count};
use crate::engine::ops::element::Element;
use crate::engine::ops::embedding;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::matrix::{Along, Target, View};
use crate::engine::ops::product::multiply;
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::rope::RopeTable;
use crate::engine::params::Weight;

/// A decoder that is trained on the processor.
pub struct CausalLm {
    config: ModelConfig,
    /// What activations are stored and multiplied as.
    dtype: BaseDtype,
    embedding: Weight,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: Weight,
    rope: Mutex<Arc<RopeTable>>,
    checkpointing: bool,
    token_loss: TokenLoss,
    pool: Pool,
    abandon: Abandon,
}

/// How long the parts of a training pass took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassTimes {
    pub forward: Duration,
    /// Time of forward and backward through the output layer.
    pub loss: Duration,
    pub backward: Duration,
}

impl CausalLm {
    /// Puts a model together. `sequence_len` is a hint: tables grow when longer sequences come.
    pub fn new(
        (config, dtype): (&ModelConfig, BaseDtype),
        (embedding, head): (Weight, Weight),
        layers: Vec<DecoderLayer>,
        norm: RmsNorm,
        sequence_len: usize,
    ) -> Self {
        let table = RopeTable::new(&config.rope_frequencies(), sequence_len);
        Self {
            embedding,
            layers,
            norm,
            head,
            rope: Mutex::new(Arc::new(table)),
            checkpointing: false,
            token_loss: TokenLoss::default(),
            config: config.clone(),
            dtype,
            pool: Pool::default(),
            abandon: Abandon::default(),
        }
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
        let element = match self.dtype {
            BaseDtype::Bfloat16 => size_of::<bf16>(),
            BaseDtype::Float32 => size_of::<f32>(),
        };
        tokens
            * self
                .layers
                .iter()
                .map(|layer| layer.kept_bytes(element))
                .sum::<usize>()
    }

    /// The request to give up a pass: once asked, a pass ends between two layers, and what it gives is of no use.
    pub fn abandon(&self) -> &Abandon {
        &self.abandon
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs forward and backward over one batch with at least one target, and hands every trainable tensor's gradient of the
    /// summed loss to its sink.
    ///
    /// None where it was abandoned, which with `droppable` may happen after some gradients were handed over.
    pub fn train(
        &self,
        batch: &Batch,
        mask: Option<MaskKey>,
        droppable: bool,
    ) -> Option<(LossSum, PassTimes)> {
        match self.dtype {
            BaseDtype::Bfloat16 => self.train_as::<bf16>(batch, mask, droppable),
            BaseDtype::Float32 => self.train_as::<f32>(batch, mask, droppable),
        }
    }

    fn train_as<E: Element>(
        &self,
        batch: &Batch,
        mask: Option<MaskKey>,
        droppable: bool,
    ) -> Option<(LossSum, PassTimes)> {
        let started = Instant::now();
        let rope = self.rope(batch);
        let mut pass = self.pass(batch, &rope, mask);
        let keep = match self.checkpointing {
            true => Keep::Inputs,
            false => Keep::Everything,
        };
        let (x, tape) = decoder::forward::<E>(&self.layers, self.embed(batch), pass, keep)?;
        let ran = Instant::now();
        // The loss hands over the first gradient.
        pass.abandon = pass.abandon.filter(|_| droppable);
        let mut gradient = self.pool.take(x.len());
        let sum = self
            .loss_head()
            .loss::<E>(&x, &batch.targets, Some(&mut gradient));
        drop(x);
        let lost = Instant::now();
        let wanted = self.embedding.is_trainable();
        decoder::backward(&self.layers, tape, &mut gradient, wanted, pass)?;
        embedding::backward(&batch.ids, &self.embedding, &gradient, &self.pool);
        drop(gradient);
        self.pool.end_slot();
        let times = PassTimes {
            forward: ran - started,
            loss: lost - ran,
            backward: lost.elapsed(),
        };
        Some((sum, times))
    }

    /// How often a training pass hands over a gradient of the same tensor, at most: one for each chunk of the loss, and
    /// one for the embedding where it is the output layer too.
    pub fn gradient_parts(&self, batch: &Batch) -> u64 {
        chunk_count(batch.targets.len(), self.config.vocab_size) as u64 + 1
    }

    /// Computes the loss of a batch, forward only. None where it was abandoned.
    pub fn evaluate(&self, batch: &Batch) -> Option<LossSum> {
        match self.dtype {
            BaseDtype::Bfloat16 => self.evaluate_as::<bf16>(batch),
            BaseDtype::Float32 => self.evaluate_as::<f32>(batch),
        }
    }

    fn evaluate_as<E: Element>(&self, batch: &Batch) -> Option<LossSum> {
        let x = self.hidden::<E>(batch, Some(&self.abandon))?;
        Some(self.loss_head().loss::<E>(&x, &batch.targets, None))
    }

    /// The logits of all tokens, flat `[t][v]`, for comparison with other implementations.
    pub fn logits(&self, batch: &Batch) -> Vec<f32> {
        match self.dtype {
            BaseDtype::Bfloat16 => self.logits_as::<bf16>(batch),
            BaseDtype::Float32 => self.logits_as::<f32>(batch),
        }
    }

    fn logits_as<E: Element>(&self, batch: &Batch) -> Vec<f32> {
        let x = self.hidden::<E>(batch, None);
        let x = x.expect("nobody may abandon this pass");
        let mut normed = self.pool.take::<E>(x.len());
        self.norm.forward(&x, &mut normed[..]);
        let (tokens, (vocabulary, width)) = (batch.ids.len(), self.head.matrix_dims());
        let mut logits = vec![0.0f32; tokens * vocabulary];
        let head = self.head.read();
        multiply(
            Target::new(&mut logits[..], tokens, vocabulary),
            View::new(&normed[..], tokens, width),
            head.matrix::<E>(vocabulary, width),
            Along::Columns,
        );
        logits
    }

    fn hidden<E: Element>(&self, batch: &Batch, abandon: Option<&Abandon>) -> Option<Buffer<f32>> {
        let rope = self.rope(batch);
        let pass = Pass {
            abandon,
            ..self.pass(batch, &rope, None)
        };
        let kept = decoder::forward::<E>(&self.layers, self.embed(batch), pass, Keep::Nothing)?;
        Some(kept.0)
    }

    fn embed(&self, batch: &Batch) -> Buffer<f32> {
        let mut x = self.pool.take(batch.ids.len() * self.config.hidden_size);
        embedding::forward(&batch.ids, &self.embedding, &mut x);
        x
    }

    fn loss_head(&self) -> LossHead<'_> {
        LossHead {
            norm: &self.norm,
            head: &self.head,
            pool: &self.pool,
            loss: self.token_loss,
        }
    }

    fn pass<'a>(
        &'a self,
        batch: &'a Batch,
        rope: &'a RopeTable,
        mask: Option<MaskKey>,
    ) -> Pass<'a> {
        Pass {
            batch,
            rope,
            mask,
            pool: &self.pool,
            abandon: Some(&self.abandon),
        }
    }

    fn rope(&self, batch: &Batch) -> Arc<RopeTable> {
        let mut table = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < batch.longest_segment() {
            let frequencies = self.config.rope_frequencies();
            *table = Arc::new(RopeTable::new(&frequencies, batch.longest_segment()));
        }
        table.clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{config, job, load, lora, write_model};
    use common::job::{JobSpec, Method, TargetModules};

    #[test]
    fn kept_bytes_are_what_a_training_pass_keeps() {
        fn check<E: Element>(model: &CausalLm) {
            let tokens: Vec<u32> = (0..70).map(|token| token % 20).collect();
            let batch = Batch::from_tokens(&tokens, model.config.vocab_size).unwrap();
            let rope = model.rope(&batch);
            let pass = model.pass(&batch, &rope, None);
            let (x, keep) = (model.embed(&batch), Keep::Everything);
            let (_, tape) = decoder::forward::<E>(&model.layers, x, pass, keep).unwrap();
            assert_eq!(tape.bytes(), model.kept_bytes(tokens.len()));
        }
        for architecture in ["LlamaForCausalLM", "Qwen3ForCausalLM"] {
            let dir = tempfile::tempdir().unwrap();
            write_model(dir.path(), &config(architecture), 7);
            check::<f32>(load(dir.path(), job(Method::Full), 1).model());
            let narrow = JobSpec {
                base_dtype: BaseDtype::Bfloat16,
                ..job(lora(TargetModules::AllLinear, 0.0))
            };
            check::<bf16>(load(dir.path(), narrow, 1).model());
        }
    }
}
