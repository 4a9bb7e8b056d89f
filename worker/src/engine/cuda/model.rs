//! The decoder on the GPU: embedding, layers, final norm, and the loss or the logits. Shapes: t tokens of a slot, h hidden
//! size, v vocabulary.

use std::time::{Duration, Instant};

use common::model::ModelConfig;
use cudarc::driver::CudaViewMut;

use super::blas::{GpuElement, Matrix, Target};
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu, Pace};
use super::layers::{GpuBatch, Inner, Layer, Pass, Vector};
use super::ops::cross_entropy::{LossHead, chunk_count};
use super::ops::elementwise::{Rows, embedding_gradient, gather_rows, narrow_rows};
use super::ops::projection::{Place, Sink};
use super::ops::rope::GpuRopeTable;
use crate::engine::Abandon;
use crate::engine::batch::Batch;
use crate::engine::model::causal_lm::PassTimes;
use crate::engine::ops::cross_entropy::LossSum;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::rope::RopeTable;

/// A matrix with a row for each token of the vocabulary, `[v, h]`.
pub struct TokenMatrix<E> {
    pub values: DeviceBuffer<E>,
    /// Place of the matrix among the trainable tensors, where it is trainable.
    pub place: Option<Place>,
}

/// A decoder that is trained on a GPU.
pub struct GpuModel<E> {
    pub config: ModelConfig,
    pub embedding: TokenMatrix<E>,
    /// The output layer; None where that is the embedding.
    pub head: Option<TokenMatrix<E>>,
    pub layers: Vec<Layer<E>>,
    pub norm: Vector,
    rope: GpuRopeTable,
    /// Whether layers keep their inputs alone and run again in the backward pass (Chen et al., 2016).
    pub checkpointing: bool,
    abandon: Abandon,
}

/// What a forward pass keeps of a layer.
struct Kept<E> {
    x: DeviceBuffer<f32>,
    inner: Option<Inner<E>>,
}

impl<E> TokenMatrix<E>
where
    E: GpuElement,
{
    fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>, rows: Rows) -> Result<(), GpuError> {
        match self.place {
            Some(place) => {
                let to = (&mut self.values.as_view_mut(), rows);
                narrow_rows(gpu, (&place.of(flat), rows), to, 1.0)
            }
            None => Ok(()),
        }
    }
}

impl<E: GpuElement> GpuModel<E> {
    /// Puts a model together. `sequence_len` is a hint: tables grow when longer sequences come.
    pub fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        (embedding, head): (TokenMatrix<E>, Option<TokenMatrix<E>>),
        layers: Vec<Layer<E>>,
        norm: Vector,
        sequence_len: usize,
    ) -> Result<Self, GpuError> {
        let table = RopeTable::new(&config.rope_frequencies(), sequence_len);
        Ok(Self {
            config: config.clone(),
            embedding,
            head,
            layers,
            norm,
            rope: GpuRopeTable::upload(gpu, &table)?,
            checkpointing: false,
            abandon: Abandon::default(),
        })
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        let rows = Rows::new(self.config.vocab_size, self.config.hidden_size);
        self.embedding.refresh(gpu, flat, rows)?;
        if let Some(head) = &mut self.head {
            head.refresh(gpu, flat, rows)?;
        }
        self.norm.refresh(gpu, flat)?;
        self.layers
            .iter_mut()
            .try_for_each(|layer| layer.refresh(gpu, flat))
    }

    /// The request to give up a pass: once asked, a pass ends between two layers, and what it gives is of no use.
    pub fn abandon(&self) -> &Abandon {
        &self.abandon
    }

    /// Makes the tables of rotary positions reach to the batch's last position.
    pub fn prepare(&mut self, gpu: &Gpu, batch: &Batch) -> Result<(), GpuError> {
        let positions = batch.longest_segment();
        if self.rope.positions() < positions {
            let table = RopeTable::new(&self.config.rope_frequencies(), positions);
            self.rope = GpuRopeTable::upload(gpu, &table)?;
        }
        Ok(())
    }

    /// Bytes that a training pass without checkpointing keeps of each token.
    pub fn kept_bytes(&self) -> usize {
        self.layers.iter().map(Layer::kept_bytes).sum()
    }

    /// How often a training pass hands over a gradient of the same tensor, at most.
    pub fn gradient_parts(&self, batch: &Batch) -> u64 {
        chunk_count(batch.targets.len(), self.config.vocab_size) as u64 + 1
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
        (sink, droppable): (&mut dyn Sink, bool),
    ) -> Result<Option<(LossSum, PassTimes)>, GpuError> {
        let started = Instant::now();
        let uploaded = GpuBatch::upload(gpu, batch)?;
        let pass = self.pass(gpu, &uploaded, mask);
        let Some((x, kept)) = self.forward(pass, true)? else {
            return Ok(None);
        };
        let mut gradient = gpu.take::<f32>(x.len())?;
        let dx = &mut gradient.as_view_mut();
        let head = self.loss_head();
        let sum = head.loss(gpu, &x.as_view(), &batch.targets, Some((dx, sink)))?;
        drop(x);
        let lost = Instant::now();
        if !self.backward(pass, kept, dx, sink, droppable)? {
            return Ok(None);
        }
        if let Some(place) = self.embedding.place {
            embed_backward(gpu, batch, place, dx, sink)?;
        }
        gpu.wait()?;
        // Forward and loss run together: the processor waits for the GPU only where it reads the loss.
        let times = PassTimes {
            forward: lost - started,
            loss: Duration::ZERO,
            backward: lost.elapsed(),
        };
        Ok(Some((sum, times)))
    }

    /// Computes the loss of a batch, forward only. None where it was abandoned.
    pub fn evaluate(&self, gpu: &Gpu, batch: &Batch) -> Result<Option<LossSum>, GpuError> {
        let uploaded = GpuBatch::upload(gpu, batch)?;
        let Some((x, _)) = self.forward(self.pass(gpu, &uploaded, None), false)? else {
            return Ok(None);
        };
        let sum = self
            .loss_head()
            .loss(gpu, &x.as_view(), &batch.targets, None)?;
        Ok(Some(sum))
    }

    /// The logits of all tokens, flat `[t][v]`, for comparison with other implementations. None where it was abandoned.
    pub fn logits(&self, gpu: &Gpu, batch: &Batch) -> Result<Option<Vec<f32>>, GpuError> {
        let uploaded = GpuBatch::upload(gpu, batch)?;
        let Some((x, _)) = self.forward(self.pass(gpu, &uploaded, None), false)? else {
            return Ok(None);
        };
        let (tokens, width) = (uploaded.tokens, self.config.hidden_size);
        let vocabulary = self.config.vocab_size;
        let mut normed = gpu.take::<E>(tokens * width)?;
        let out = (&mut normed.as_view_mut(), Rows::new(tokens, width));
        self.norm
            .norm(self.epsilon())
            .forward(gpu, &x.as_view(), out)?;
        let mut logits = gpu.take::<f32>(tokens * vocabulary)?;
        gpu.blas().product(
            Target::new(&mut logits.as_view_mut(), vocabulary),
            Matrix::new(&normed.as_view(), tokens, width),
            Matrix::new(&self.output().values.as_view(), vocabulary, width).transposed(),
        )?;
        Ok(Some(gpu.download(&logits, tokens * vocabulary)?))
    }

    fn forward(&self, pass: Pass, keep: bool) -> Result<Option<Forward<E>>, GpuError> {
        let (gpu, width) = (pass.gpu, self.config.hidden_size);
        let mut x = gpu.take::<f32>(pass.batch.tokens * width)?;
        let (ids, out) = (pass.batch.ids.as_view(), &mut x.as_view_mut());
        gather_rows(gpu, &self.embedding.values.as_view(), &ids, out, width)?;
        let (mut kept, mut pace) = (Vec::new(), Pace::default());
        for layer in &self.layers {
            pace.step(gpu)?;
            if self.abandon.is_asked() {
                return Ok(None);
            }
            let inner = layer.open(pass, &x.as_view())?;
            let y = layer.close(pass, &inner)?;
            let x = std::mem::replace(&mut x, y);
            if keep {
                let inner = Some(inner).filter(|_| !self.checkpointing);
                kept.push(Kept { x, inner });
            }
        }
        Ok(Some((x, kept)))
    }

    /// Runs all layers backward. Returns false where it was abandoned.
    fn backward(
        &self,
        pass: Pass,
        mut kept: Vec<Kept<E>>,
        gradient: &mut CudaViewMut<f32>,
        sink: &mut dyn Sink,
        droppable: bool,
    ) -> Result<bool, GpuError> {
        let mut pace = Pace::default();
        for (layer, Kept { x, inner }) in self.layers.iter().zip(kept.drain(..)).rev() {
            if droppable {
                pace.step(pass.gpu)?;
                if self.abandon.is_asked() {
                    return Ok(false);
                }
            }
            let inner = match inner {
                Some(inner) => inner,
                None => layer.open(pass, &x.as_view())?,
            };
            layer.backward(pass, &x.as_view(), inner, gradient, sink)?;
        }
        Ok(true)
    }

    fn loss_head(&self) -> LossHead<'_, E> {
        let head = self.output();
        LossHead {
            norm: self.norm.norm(self.epsilon()),
            norm_place: self.norm.place,
            head: head.values.as_view(),
            head_place: head.place,
            vocabulary: self.config.vocab_size,
        }
    }

    fn output(&self) -> &TokenMatrix<E> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    fn epsilon(&self) -> f32 {
        self.config.rms_norm_epsilon as f32
    }

    fn pass<'a>(&'a self, gpu: &'a Gpu, batch: &'a GpuBatch, mask: Option<MaskKey>) -> Pass<'a> {
        Pass {
            gpu,
            batch,
            rope: &self.rope,
            mask,
        }
    }
}

/// The last layer's result, and what was kept of each layer.
type Forward<E> = (DeviceBuffer<f32>, Vec<Kept<E>>);

/// Sums each token's gradient by its id, in token order.
fn embed_backward(
    gpu: &Gpu,
    batch: &Batch,
    place: Place,
    gradient: &CudaViewMut<f32>,
    sink: &mut dyn Sink,
) -> Result<(), GpuError> {
    let ids = &batch.ids;
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|token| ids[*token as usize]);
    let (mut rows, mut ends) = (Vec::new(), Vec::new());
    for (index, token) in order.iter().enumerate() {
        let id = ids[*token as usize];
        if rows.last() == Some(&id) {
            ends.pop();
        } else {
            rows.push(id);
        }
        ends.push(index as u32 + 1);
    }
    let width = gradient.len() / ids.len();
    let (order, ends, rows) = (gpu.upload(&order)?, gpu.upload(&ends)?, gpu.upload(&rows)?);
    let mut sums = gpu.take::<f32>(rows.len() * width)?;
    let out = &mut sums.as_view_mut();
    embedding_gradient(
        gpu,
        &gradient.as_view(),
        &order.as_view(),
        &ends.as_view(),
        out,
    )?;
    sink.add_rows(gpu, place, &sums.as_view(), &rows.as_view())
}
