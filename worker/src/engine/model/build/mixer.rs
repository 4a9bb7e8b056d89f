//! The first half of a layer, of whichever kind it is.

use common::memory::{KeyValues, LinearAttention};
use common::model::{CONVOLUTION, DECAY, DECAY_BIAS, HEAD_NORM, HeadNormKind, LinearShape, SINKS};

use super::Parts;
use crate::engine::EngineError;
use crate::engine::buffer::Pool;
use crate::engine::model::layers::attention::AttentionBlock;
use crate::engine::model::layers::gated_delta_net::GatedDeltaNet;
use crate::engine::model::layers::shared_keys::KeySource;
use crate::engine::model::layers::token_mixer::TokenMixer;
use crate::engine::ops::causal_conv::CausalConv;
use crate::engine::ops::delta_gates::DeltaGates;
use crate::engine::ops::delta_rule::DeltaHeads;
use crate::engine::ops::gated_norm::GatedNorm;
use crate::engine::ops::key_groups::KeyGroups;
use crate::engine::ops::projection::Projection;
use crate::engine::ops::rope::{HeadLayout, HeadNorms, Values};
use crate::engine::params::Weight;

impl Parts<'_> {
    /// The first half of a layer, by the linears that read the residual and the one that adds to it.
    pub(super) fn mixer(
        &self,
        layer: usize,
        prefix: &str,
        [input, output]: [&[LinearShape]; 2],
    ) -> Result<TokenMixer, EngineError> {
        let linears = (
            self.projection(prefix, input)?,
            self.projection(prefix, output)?,
        );
        Ok(match self.config.linear_attention_of(layer) {
            None => TokenMixer::Attention(Box::new(self.attention(layer, prefix, linears)?)),
            Some(sizes) => TokenMixer::Linear(Box::new(self.delta_net(sizes, prefix, linears)?)),
        })
    }

    fn attention(
        &self,
        layer: usize,
        prefix: &str,
        (qkv, output): (Projection, Projection),
    ) -> Result<AttentionBlock, EngineError> {
        let config = self.config;
        let [query_width, key_width] = config.head_norm_widths(layer);
        let head_norm = |name: &str, width: usize| match width {
            // A layer that has the keys of another norms none.
            0 => Ok(Weight::frozen_f32(Pool::default().take(0), &[0])),
            _ => self.weight(&format!("{prefix}self_attn.{name}.weight"), &[width]),
        };
        let head_norms = match config.head_norms {
            HeadNormKind::None => None,
            HeadNormKind::EachHead | HeadNormKind::AllHeads => Some(HeadNorms {
                query: head_norm("q_norm", query_width)?,
                key: head_norm("k_norm", key_width)?,
                epsilon: config.rms_norm_epsilon as f32,
                offset: config.norm_offset,
            }),
        };
        let key_values = config.sizes_of(layer).key_values;
        let mut later = layer + 1..config.layers;
        let is_lent = later.any(|l| config.sizes_of(l).key_values == KeyValues::Of(layer));
        Ok(AttentionBlock {
            layer,
            keys: match key_values {
                KeyValues::Of(lender) => KeySource::Borrowed(lender),
                KeyValues::Apart | KeyValues::Same if is_lent => KeySource::Lent,
                KeyValues::Apart | KeyValues::Same => KeySource::Own,
            },
            norm: self.layer_norm(prefix, config.norms.attention_input)?,
            qkv,
            gated: config.output_gate,
            output,
            residual: self.residual(prefix, config.norms.attention_output)?,
            layout: HeadLayout::of(config, layer),
            head_norms,
            values: Values {
                norm: config.value_norms.then_some(config.rms_norm_epsilon as f32),
                source: key_values,
            },
            kind: config.layer_kinds[layer],
            scale: config.scales.attention as f32,
            cap: config.caps.attention.map(|cap| cap as f32),
            sinks: match config.sinks {
                true => Some(self.weight(&format!("{prefix}{SINKS}"), &[config.heads])?),
                false => None,
            },
        })
    }

    fn delta_net(
        &self,
        sizes: &LinearAttention,
        prefix: &str,
        (input, output): (Projection, Projection),
    ) -> Result<GatedDeltaNet, EngineError> {
        let config = self.config;
        let weight = |name: &str, shape: &[usize]| self.weight(&format!("{prefix}{name}"), shape);
        let heads = DeltaHeads {
            key_heads: sizes.key_heads,
            value_heads: sizes.value_heads,
            key_dim: sizes.key_dim,
            value_dim: sizes.value_dim,
        };
        Ok(GatedDeltaNet {
            norm: self.layer_norm(prefix, config.norms.attention_input)?,
            input,
            groups: sizes.is_grouped.then_some(KeyGroups(heads)),
            heads,
            conv: CausalConv {
                weight: weight(CONVOLUTION, &[sizes.convolved(), 1, sizes.kernel])?,
            },
            gates: DeltaGates {
                decay: weight(DECAY, &[sizes.value_heads])?,
                bias: weight(DECAY_BIAS, &[sizes.value_heads])?,
            },
            output_norm: GatedNorm {
                weight: weight(HEAD_NORM, &[sizes.value_dim])?,
                epsilon: config.rms_norm_epsilon as f32,
            },
            output,
            residual: self.residual(prefix, config.norms.attention_output)?,
        })
    }
}
