//! The decoder's layers, each built of fused ops on buffers of one pool.

pub mod attention;
pub mod decoder;
pub mod mlp;
pub mod residual;

use common::model::{ModelConfig, Rope, Rotation};

use crate::engine::abandon::Abandon;
use crate::engine::batch::Batch;
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::ops::element::Element;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::projection::Context;
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::rope::RopeTable;
use crate::engine::ops::segments::SegmentViews;
use crate::engine::ops::{add_in_place, round_into};

/// The tables of rotary positions.
#[derive(Debug)]
pub struct RopeTables {
    pub usual: RopeTable,
    /// Of layers with a window, where these have their own.
    pub local: Option<RopeTable>,
}

impl RopeTables {
    /// Makes tables that reach to so many positions.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let table = |rope: &Rope| {
            let frequencies = rope.frequencies(config.head_dim);
            RopeTable::new(&frequencies, positions, rope.attention_factor() as f32)
        };
        Self {
            usual: table(&config.rope),
            local: config.local_rope.as_ref().map(table),
        }
    }

    /// The table of a layer; none where it rotates nothing.
    pub fn of(&self, rotation: Rotation) -> Option<&RopeTable> {
        match rotation {
            Rotation::None => None,
            Rotation::Usual => Some(&self.usual),
            Rotation::Local => Some(self.local.as_ref().unwrap_or(&self.usual)),
        }
    }
}

/// What every layer of a pass needs beside its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub batch: &'a Batch,
    /// What each token sees, through the windows that layers have.
    pub segments: &'a SegmentViews,
    pub ropes: &'a RopeTables,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    pub pool: &'a Pool,
    /// The request to give up the pass: once it is asked, what the pass computes is of no use. None where nobody may ask.
    pub abandon: Option<&'a Abandon>,
}

/// What a half of a layer reads: the residual, normed where there is a norm.
fn norm_forward<E: Element>(norm: &Option<RmsNorm>, x: &[f32], pass: Pass) -> Buffer<E> {
    let mut read = pass.pool.take(x.len());
    match norm {
        Some(norm) => norm.forward(x, &mut read[..]),
        None => round_into(x, &mut read),
    }
    read
}

/// Adds to `gradient` what comes back through [`norm_forward`].
fn norm_backward(norm: &Option<RmsNorm>, x: &[f32], d_read: &[f32], gradient: &mut [f32]) {
    match norm {
        Some(norm) => norm.backward(x, d_read, gradient),
        None => add_in_place(gradient, d_read),
    }
}

impl Pass<'_> {
    fn is_abandoned(&self) -> bool {
        self.abandon.is_some_and(Abandon::is_asked)
    }

    pub fn tokens(&self) -> usize {
        self.batch.ids.len()
    }

    fn context(&self) -> Context<'_> {
        Context {
            tokens: self.tokens(),
            mask: self.mask,
            pool: self.pool,
        }
    }
}
