//! The decoder's layers, each built of fused ops on buffers of one pool.

pub mod attention;
pub mod decoder;
pub mod dense_and_experts;
pub mod expert;
pub mod experts;
pub mod feed_forward;
pub mod gated_delta_net;
pub mod layer_state;
pub mod mlp;
pub mod own_input;
pub mod residual;
pub mod shared_expert;
pub mod shared_keys;
pub mod token_mixer;

use std::sync::Arc;

use common::model::{ModelConfig, Rope, Rotation};

use crate::engine::abandon::Abandon;
use crate::engine::batch::Batch;
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::ops::element::Element;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::projection::Context;
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::rope::RopeTable;
use crate::engine::ops::router_loss::RouterLoss;
use crate::engine::ops::segments::SegmentViews;
use crate::engine::ops::{add_in_place, round_into};

/// The tables of rotary positions.
#[derive(Debug)]
pub struct RopeTables {
    /// Number of positions in the tables.
    positions: usize,
    usual: RopeTable,
    /// Of layers with a window, where these have their own.
    local: Option<RopeTable>,
    long: Option<LongRows>,
}

/// Where in the usual table the rows of long texts are.
#[derive(Clone, Copy, Debug)]
struct LongRows {
    /// Texts of more tokens are long.
    above: usize,
    /// Row of their position 0.
    first: usize,
}

impl RopeTables {
    /// Makes tables that reach to so many positions.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let table_of = |rope: &Rope, frequencies: &[f32], positions: usize| {
            let factor = rope.attention_factor() as f32;
            RopeTable::new(frequencies, positions, factor).of_pairs(config.rotary_pairs)
        };
        let table = |rope: &Rope, rotated: usize, positions: usize| {
            table_of(rope, &rope.frequencies(rotated), positions)
        };
        let rope = &config.rope;
        let long_texts = rope.long_texts(config.rotary_dim);
        let long_texts = long_texts.filter(|long| positions > long.above);
        let short = long_texts.as_ref().map_or(positions, |long| long.above);
        let mut usual = table(rope, config.rotary_dim, short);
        let long = long_texts.map(|long| {
            let first = usual.rows();
            usual.extend(&table_of(rope, &long.frequencies, positions));
            LongRows {
                above: long.above,
                first,
            }
        });
        let local = config.local_rope.as_ref();
        Self {
            positions,
            usual,
            local: local.map(|rope| table(rope, config.local_rotary_dim, positions)),
            long,
        }
    }

    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The table of a layer; none where it rotates nothing.
    pub fn of(&self, rotation: Rotation) -> Option<&RopeTable> {
        match rotation {
            Rotation::None => None,
            Rotation::Usual => Some(&self.usual),
            Rotation::Local => Some(self.local.as_ref().unwrap_or(&self.usual)),
        }
    }

    /// The row of each token of a batch: its position, but that of long texts where these turn otherwise. Each text decides for
    /// itself, so that nothing hangs on what it is packed or computed with.
    pub fn rows(&self, positions: &Arc<Vec<u32>>) -> Arc<Vec<u32>> {
        let Some(long) = self.long else {
            return positions.clone();
        };
        let texts = positions.chunk_by(|position, next| next > position);
        let rows = texts.flat_map(|text| {
            // Of a text that goes on the batch has the last tokens only.
            let is_long = text.last().is_some_and(|last| *last as usize >= long.above);
            let first = match is_long {
                true => long.first as u32,
                false => 0,
            };
            text.iter().map(move |position| first + position)
        });
        Arc::new(rows.collect())
    }
}

/// The rotary positions of a batch.
pub struct BatchRopes {
    tables: Arc<RopeTables>,
    rows: Arc<Vec<u32>>,
}

impl BatchRopes {
    /// Those of a batch's positions, to which the tables must reach.
    pub fn new(tables: Arc<RopeTables>, positions: &Arc<Vec<u32>>) -> Self {
        Self {
            rows: tables.rows(positions),
            tables,
        }
    }
}

/// What every layer of a pass needs beside its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub batch: &'a Batch,
    /// What each token sees, through the windows that layers have.
    pub segments: &'a SegmentViews,
    pub ropes: &'a BatchRopes,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    pub pool: &'a Pool,
    /// The loss that spreads tokens over experts, if the router has one.
    pub router_loss: Option<&'a RouterLoss>,
    /// What each layer has of each token beside the residual, `[layers][tokens][width]`, where layers have such.
    pub own_inputs: Option<&'a [f32]>,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::config;
    use serde_json::json;

    #[test]
    fn each_text_of_a_batch_is_long_or_not_for_itself() {
        let mut json = config("Phi3ForCausalLM");
        json["original_max_position_embeddings"] = 2.into();
        json["rope_scaling"] = json!({
            "type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [2.0, 2.0, 2.0, 2.0]
        });
        let config = ModelConfig::parse(&json, "config.json".as_ref()).unwrap();
        let positions = Arc::new(vec![0, 1, 0, 1, 2, 0]);
        let long = RopeTables::new(&config, 3);
        assert_eq!(*long.rows(&positions), [0, 1, 2, 3, 4, 0]);
        assert_eq!((long.usual.rows(), long.positions()), (5, 3));
        // Where no text can be long there are no rows for one.
        let short = RopeTables::new(&config, 2);
        assert_eq!((short.usual.rows(), short.positions()), (2, 2));
        assert_eq!(*short.rows(&Arc::new(vec![0, 1, 0])), [0, 1, 0]);
    }
}
