//! The decoder: embedding, layers, final norm, and the loss or the logits. Shapes: t tokens of a slot, h hidden size,
//! v vocabulary.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::job::{BaseDtype, TokenLoss};
use common::model::ModelConfig;
use half::bf16;
use rayon::prelude::*;

use super::layers::decoder::{self, DecoderLayer, Gradients, Keep};
use super::layers::layer_state::LayerState;
use super::layers::{BatchRopes, Pass, RopeTables};
use super::own_inputs::OwnInputs;
use crate::engine::EngineError;
use crate::engine::abandon::Abandon;
use crate::engine::batch::Batch;
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::ops::cross_entropy::{LogitRule, LossHead, LossSum, chunk_count};
use crate::engine::ops::element::Element;
use crate::engine::ops::embedding::Embedding;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::matrix::View;
use crate::engine::ops::output_layer::OutputLayer;
use crate::engine::ops::projection::Context;
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::router_loss::RouterLoss;
use crate::engine::ops::scale_in_place;
use crate::engine::ops::segments::SegmentViews;

/// A decoder that is trained on the processor.
pub struct CausalLm {
    config: ModelConfig,
    /// What activations are stored and multiplied as.
    dtype: BaseDtype,
    embedding: Embedding,
    own_inputs: Option<OwnInputs>,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: OutputLayer,
    ropes: Mutex<Arc<RopeTables>>,
    /// All windows that layers have.
    windows: Vec<usize>,
    /// Of the layers before this one nothing learns.
    first_learning: usize,
    checkpointing: bool,
    token_loss: TokenLoss,
    pool: Pool,
    abandon: Abandon,
}

/// A text, with what every layer knows of it.
#[derive(Default)]
pub struct Text {
    tokens: Vec<u32>,
    layers: Vec<LayerState<f32>>,
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
        (embedding, head): (Embedding, OutputLayer),
        layers: Vec<DecoderLayer>,
        norm: RmsNorm,
        sequence_len: usize,
    ) -> Self {
        let ropes = RopeTables::new(config, sequence_len);
        Self {
            embedding,
            own_inputs: None,
            layers,
            norm,
            head,
            ropes: Mutex::new(Arc::new(ropes)),
            windows: config.windows(),
            first_learning: 0,
            checkpointing: false,
            token_loss: TokenLoss::default(),
            config: config.clone(),
            dtype,
            pool: Pool::default(),
            abandon: Abandon::default(),
        }
    }

    /// Says before which layer nothing learns, but perhaps the embedding. Until then every layer is thought to.
    pub fn learning_from(self, layer: usize) -> Self {
        Self {
            first_learning: layer,
            ..self
        }
    }

    /// Gives the layers what they have inputs of their own from.
    pub fn with_own_inputs(self, own_inputs: Option<OwnInputs>) -> Self {
        Self { own_inputs, ..self }
    }

    /// The first layer that a gradient goes through.
    fn first_in_backward(&self) -> usize {
        match self.embedding.is_trained() || self.trains_own_inputs() {
            true => 0,
            false => self.first_learning,
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
                .skip(self.first_in_backward())
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
        let (ropes, segments) = (self.ropes(batch), self.segments(batch));
        let router_loss = self.router_loss(batch);
        let embedded = self.embed(batch);
        let own_inputs = self.own_inputs_of::<E>(batch, &embedded, mask);
        let mut pass = self.pass(batch, (&ropes, &segments), mask);
        pass.router_loss = router_loss.as_ref();
        pass.own_inputs = own_inputs.as_deref();
        let keep = match self.checkpointing {
            true => Keep::Inputs,
            false => Keep::Everything,
        };
        let keep = (keep, self.first_in_backward());
        let (x, tape) = decoder::forward::<E>(&self.layers, embedded, pass, keep)?;
        let ran = Instant::now();
        // The loss hands over the first gradient.
        pass.abandon = pass.abandon.filter(|_| droppable);
        let mut gradient = self.pool.take(x.len());
        let mut sum = self
            .loss_head(mask)
            .loss::<E>(&x, &batch.targets, Some(&mut gradient));
        sum.loss += router_loss.as_ref().map_or(0.0, RouterLoss::loss);
        drop(x);
        let lost = Instant::now();
        let wanted = self.embedding.is_trained();
        let inputs = own_inputs.as_ref();
        let inputs = inputs.filter(|_| wanted || self.trains_own_inputs());
        let mut d_inputs = inputs.map(|inputs| self.pool.zeroed::<f32>(inputs.len()));
        let gradients = Gradients {
            residual: &mut gradient,
            wanted,
            own_inputs: d_inputs.as_deref_mut(),
        };
        decoder::backward(&self.layers, tape, gradients, pass)?;
        self.backward_to_tokens::<E>((batch, mask), d_inputs.as_deref(), &mut gradient);
        drop(gradient);
        self.pool.end_slot();
        let times = PassTimes {
            forward: ran - started,
            loss: lost - ran,
            backward: lost.elapsed(),
        };
        Some((sum, times))
    }

    /// Hands over the gradients of what comes before the layers, from those of their own inputs and of the first one's input.
    fn backward_to_tokens<E: Element>(
        &self,
        (batch, mask): (&Batch, Option<MaskKey>),
        d_inputs: Option<&[f32]>,
        gradient: &mut [f32],
    ) {
        let wanted = self.embedding.is_trained();
        if let (Some(own), Some(d_inputs)) = (&self.own_inputs, d_inputs) {
            let from = (&batch.ids[..], &self.embed(batch)[..]);
            let dx = wanted.then_some(&mut *gradient);
            own.backward::<E>(from, d_inputs, dx, self.context(batch, mask));
        }
        if wanted {
            let scale = self.embedding_scale();
            if scale != 1.0 {
                scale_in_place(gradient, scale);
            }
            self.embedding.backward(&batch.ids, gradient, &self.pool);
        }
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
        let router_loss = self.router_loss(batch);
        let x = self.hidden::<E>(batch, Some(&self.abandon), router_loss.as_ref())?;
        let mut sum = self.loss_head(None).loss::<E>(&x, &batch.targets, None);
        sum.loss += router_loss.as_ref().map_or(0.0, RouterLoss::loss);
        Some(sum)
    }

    /// The logits of all tokens, flat `[t][v]`, for comparison with other implementations.
    pub fn logits(&self, batch: &Batch) -> Vec<f32> {
        match self.dtype {
            BaseDtype::Bfloat16 => self.logits_as::<bf16>(batch),
            BaseDtype::Float32 => self.logits_as::<f32>(batch),
        }
    }

    fn logits_as<E: Element>(&self, batch: &Batch) -> Vec<f32> {
        let x = self.hidden::<E>(batch, None, None);
        let x = x.expect("nobody may abandon this pass");
        self.logits_of::<E>(&x)
    }

    /// Appends tokens, at least one, to a text, and returns the logits of what follows it. Only what is new goes through the layers.
    ///
    /// # Errors
    /// Where a token is outside the vocabulary; the text is as before then.
    pub fn append(&self, text: &mut Text, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        assert_eq!(self.dtype, BaseDtype::Float32, "texts are in float32");
        let all = [&text.tokens, tokens].concat();
        let is_long = |tokens: usize| self.config.rope.is_long(tokens);
        // A text that becomes long turns otherwise from its first token on.
        let known = match is_long(all.len()) == is_long(text.tokens.len()) {
            true => text.tokens.len(),
            false => 0,
        };
        let batch = Batch::continuing(&all, known, self.config.vocab_size)?;
        text.tokens = all;
        text.layers
            .resize_with(self.layers.len(), LayerState::default);
        let (ropes, segments) = (self.ropes(&batch), self.segments(&batch));
        let mut x = self.embed(&batch);
        let own_inputs = self.own_inputs_of::<f32>(&batch, &x, None);
        let pass = Pass {
            abandon: None,
            own_inputs: own_inputs.as_deref(),
            ..self.pass(&batch, (&ropes, &segments), None)
        };
        if known == 0 {
            text.layers.fill_with(LayerState::default);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward_last(&x, (&mut text.layers, index), pass);
        }
        let last = &x[x.len() - self.config.hidden_size..];
        Ok(self.logits_of::<f32>(last))
    }

    /// The logits of some rows of the last layer's result.
    fn logits_of<E: Element>(&self, x: &[f32]) -> Vec<f32> {
        let mut normed = self.pool.take::<E>(x.len());
        self.norm.forward(x, &mut normed[..]);
        let (vocabulary, width) = self.head.dims();
        let tokens = x.len() / width;
        let mut logits = vec![0.0f32; tokens * vocabulary];
        let normed = View::new(&normed[..], tokens, width);
        let factors = self.head.factors::<E>(&self.pool);
        let context = Context {
            tokens,
            mask: None,
            pool: &self.pool,
        };
        let factors = factors.as_ref();
        self.head.multiply(factors, normed, &mut logits, context);
        let rule = LogitRule::of(&self.config);
        logits
            .par_chunks_mut(vocabulary)
            .for_each(|row| rule.apply(row));
        logits
    }

    fn hidden<E: Element>(
        &self,
        batch: &Batch,
        abandon: Option<&Abandon>,
        router_loss: Option<&RouterLoss>,
    ) -> Option<Buffer<f32>> {
        let (ropes, segments) = (self.ropes(batch), self.segments(batch));
        let embedded = self.embed(batch);
        let own_inputs = self.own_inputs_of::<E>(batch, &embedded, None);
        let pass = Pass {
            abandon,
            router_loss,
            own_inputs: own_inputs.as_deref(),
            ..self.pass(batch, (&ropes, &segments), None)
        };
        let keep = (Keep::Nothing, 0);
        let kept = decoder::forward::<E>(&self.layers, embedded, pass, keep)?;
        Some(kept.0)
    }

    fn embed(&self, batch: &Batch) -> Buffer<f32> {
        let mut x = self.pool.take(batch.ids.len() * self.config.hidden_size);
        self.embedding.forward(&batch.ids, &mut x, &self.pool);
        let scale = self.embedding_scale();
        if scale != 1.0 {
            scale_in_place(&mut x, scale);
        }
        x
    }

    fn trains_own_inputs(&self) -> bool {
        self.own_inputs.as_ref().is_some_and(OwnInputs::is_trained)
    }

    /// The layers' own inputs of a batch, from its embeddings, where layers have some.
    fn own_inputs_of<E: Element>(
        &self,
        batch: &Batch,
        embedded: &[f32],
        mask: Option<MaskKey>,
    ) -> Option<Buffer<f32>> {
        let own = self.own_inputs.as_ref()?;
        Some(own.forward::<E>(&batch.ids, embedded, self.context(batch, mask)))
    }

    fn context(&self, batch: &Batch, mask: Option<MaskKey>) -> Context<'_> {
        Context {
            tokens: batch.ids.len(),
            mask,
            pool: &self.pool,
        }
    }

    /// What embeddings are multiplied by, rounded to the type that the model is computed in, as Transformers does.
    fn embedding_scale(&self) -> f32 {
        let scale = self.config.scales.embedding as f32;
        match self.dtype {
            BaseDtype::Float32 => scale,
            BaseDtype::Bfloat16 => bf16::from_f32(scale).to_f32(),
        }
    }

    /// The router's loss of a slot, where the model has one.
    fn router_loss(&self, batch: &Batch) -> Option<RouterLoss> {
        let coefficient = self.config.experts.as_ref()?.router_loss()?;
        Some(RouterLoss::new(coefficient, batch.targets.len()))
    }

    fn loss_head(&self, mask: Option<MaskKey>) -> LossHead<'_> {
        LossHead {
            norm: &self.norm,
            head: &self.head,
            mask,
            pool: &self.pool,
            loss: self.token_loss,
            logits: LogitRule::of(&self.config),
        }
    }

    fn pass<'a>(
        &'a self,
        batch: &'a Batch,
        (ropes, segments): (&'a BatchRopes, &'a SegmentViews),
        mask: Option<MaskKey>,
    ) -> Pass<'a> {
        Pass {
            batch,
            segments,
            ropes,
            mask,
            pool: &self.pool,
            router_loss: None,
            own_inputs: None,
            abandon: Some(&self.abandon),
        }
    }

    fn ropes(&self, batch: &Batch) -> BatchRopes {
        let mut tables = self.ropes.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.positions() < batch.longest_segment() {
            *tables = Arc::new(RopeTables::new(&self.config, batch.longest_segment()));
        }
        BatchRopes::new(tables.clone(), &batch.positions)
    }

    fn segments(&self, batch: &Batch) -> SegmentViews {
        let longest = batch.longest_segment();
        SegmentViews::new(batch.segments.clone(), &self.windows, longest)
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
            let (ropes, segments) = (model.ropes(&batch), model.segments(&batch));
            let x = model.embed(&batch);
            let own_inputs = model.own_inputs_of::<E>(&batch, &x, None);
            let pass = Pass {
                own_inputs: own_inputs.as_deref(),
                ..model.pass(&batch, (&ropes, &segments), None)
            };
            let keep = (Keep::Everything, model.first_in_backward());
            let (_, tape) = decoder::forward::<E>(&model.layers, x, pass, keep).unwrap();
            assert_eq!(tape.bytes(), model.kept_bytes(tokens.len()));
        }
        let named = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned());
            lora(TargetModules::Named(names.collect()), 0.0)
        };
        for architecture in [
            "LlamaForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen2MoeForCausalLM",
            "OlmoeForCausalLM",
            "GptOssForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "Qwen3NextForCausalLM",
            "Gemma4ForCausalLM",
        ] {
            let dir = tempfile::tempdir().unwrap();
            write_model(dir.path(), &config(architecture), 7);
            check::<f32>(load(dir.path(), job(Method::Full), 1).model());
            let narrow = JobSpec {
                base_dtype: BaseDtype::Bfloat16,
                ..job(lora(TargetModules::AllLinear, 0.0))
            };
            check::<bf16>(load(dir.path(), narrow, 1).model());
            // Of layers before the first that learns nothing is kept.
            let of = |names: &[&str]| {
                let trainer = load(dir.path(), job(named(names)), 1);
                check::<f32>(trainer.model());
                trainer.model().kept_bytes(1)
            };
            let all = of(&["o_proj", "out_proj"]);
            assert!(of(&["layers.1.self_attn.o_proj"]) < all, "{architecture}");
            assert_eq!(of(&["lm_head"]), 0, "{architecture}");
            assert_eq!(of(&["embed_tokens"]), all, "{architecture}");
        }
    }

    #[test]
    fn a_text_goes_on_token_by_token_as_if_it_were_computed_anew() {
        let longrope = |json: &mut serde_json::Value| {
            json["original_max_position_embeddings"] = 12.into();
            json["rope_scaling"] = serde_json::json!({
                "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 4.0, 8.0, 16.0]
            });
        };
        for architecture in [
            "MistralForCausalLM",
            "Gemma2ForCausalLM",
            "Olmo3ForCausalLM",
            "Phi3ForCausalLM",
            "Glm4ForCausalLM",
            "Qwen2MoeForCausalLM",
            "MixtralForCausalLM",
            "GptOssForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "Qwen3NextForCausalLM",
            "Gemma4ForCausalLM",
        ] {
            let mut json = config(architecture);
            json["sliding_window"] = 7.into();
            if architecture == "Phi3ForCausalLM" {
                longrope(&mut json);
            }
            let dir = tempfile::tempdir().unwrap();
            write_model(dir.path(), &json, 7);
            let trainer = load(dir.path(), job(Method::Full), 1);
            let model = trainer.model();
            let (mut text, mut tokens) = (Text::default(), vec![5, 17, 42]);
            let mut found = model.append(&mut text, &tokens).unwrap();
            for _ in 0..20 {
                let batch = Batch::from_tokens(&tokens, 61).unwrap();
                let all = model.logits(&batch);
                let expected = &all[all.len() - found.len()..];
                let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let pairs = found.iter().zip(expected);
                let off = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(
                    off < 1e-5 * largest,
                    "{architecture}, {}: {off}",
                    tokens.len()
                );
                let best =
                    |logits: &[f32]| (0..61).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
                assert_eq!(best(&found), best(expected));
                let next = best(expected).unwrap() as u32;
                assert!(
                    model.append(&mut text, &[next, 61]).is_err(),
                    "no such token"
                );
                found = model.append(&mut text, &[next]).unwrap();
                tokens.push(next);
            }
        }
    }
}
