//! The decoder's layers, each built of fused ops on buffers of one pool.

pub mod attention;
pub mod decoder;
pub mod mlp;

use crate::engine::abandon::Abandon;
use crate::engine::batch::Batch;
use crate::engine::buffer::Pool;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::projection::Context;
use crate::engine::ops::rope::RopeTable;

/// What every layer of a pass needs beside its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub batch: &'a Batch,
    pub rope: &'a RopeTable,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    pub pool: &'a Pool,
    /// The request to give up the pass: once it is asked, what the pass computes is of no use. None where nobody may ask.
    pub abandon: Option<&'a Abandon>,
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
