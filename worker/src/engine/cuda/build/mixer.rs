//! The first half of a layer, of whichever kind it is, on the GPU.

use common::memory::LinearAttention;
use common::model::{CONVOLUTION, DECAY, DECAY_BIAS, HEAD_NORM, HeadNormKind, LinearShape, SINKS};

use super::Parts;
use crate::engine::EngineError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::layers::attention::AttentionBlock;
use crate::engine::cuda::layers::gated_delta_net::GatedDeltaNet;
use crate::engine::cuda::layers::token_mixer::TokenMixer;
use crate::engine::cuda::ops::causal_conv::CausalConv;
use crate::engine::cuda::ops::delta_gates::DeltaGates;
use crate::engine::cuda::ops::gated_norm::GatedNorm;
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rope::HeadNorms;
use crate::engine::cuda::ops::{delta_rule, key_groups};
use crate::engine::ops::delta_rule::DeltaHeads;
use crate::engine::ops::element::Element;
use crate::engine::ops::key_groups::KeyGroups;
use crate::engine::ops::rope::HeadLayout;

impl Parts<'_> {
    /// The first half of a layer, by the linears that read the residual and the one that adds to it.
    pub(super) fn mixer<E: Element + GpuElement>(
        &self,
        layer: usize,
        prefix: &str,
        [input, output]: [&[LinearShape]; 2],
    ) -> Result<TokenMixer<E>, EngineError> {
        let linears = (
            self.projection(prefix, input)?,
            self.projection(prefix, output)?,
        );
        Ok(match self.config.linear_attention_of(layer) {
            None => TokenMixer::Attention(Box::new(self.attention(layer, prefix, linears)?)),
            Some(sizes) => TokenMixer::Linear(Box::new(self.delta_net(sizes, prefix, linears)?)),
        })
    }

    fn attention<E: Element + GpuElement>(
        &self,
        layer: usize,
        prefix: &str,
        (qkv, output): (Projection<E>, Projection<E>),
    ) -> Result<AttentionBlock<E>, EngineError> {
        let config = self.config;
        let [query_width, key_width] = config.head_norm_widths(layer);
        let head_norm = |name: &str, width: usize| {
            let name = format!("{prefix}self_attn.{name}.weight");
            self.vector(&name, width)
        };
        let head_norms = match config.head_norms {
            HeadNormKind::None => None,
            HeadNormKind::EachHead | HeadNormKind::AllHeads => Some(HeadNorms {
                query: head_norm("q_norm", query_width)?,
                key: head_norm("k_norm", key_width)?,
                epsilon: config.rms_norm_epsilon as f32,
                offset: config.norm_offset,
                is_wide: config.head_norms == HeadNormKind::AllHeads,
            }),
        };
        Ok(AttentionBlock {
            norm: self.layer_norm(prefix, config.norms.attention_input)?,
            qkv,
            gated: config.output_gate,
            output,
            residual: self.residual(prefix, config.norms.attention_output)?,
            layout: HeadLayout::of(config, layer),
            head_norms,
            kind: config.layer_kinds[layer],
            scale: config.scales.attention as f32,
            cap: config.caps.attention.map(|cap| cap as f32),
            sinks: match config.sinks {
                true => Some(self.vector(&format!("{prefix}{SINKS}"), config.heads)?),
                false => None,
            },
        })
    }

    fn delta_net<E: Element + GpuElement>(
        &self,
        sizes: &LinearAttention,
        prefix: &str,
        (input, output): (Projection<E>, Projection<E>),
    ) -> Result<GatedDeltaNet<E>, EngineError> {
        let config = self.config;
        let heads = DeltaHeads {
            key_heads: sizes.key_heads,
            value_heads: sizes.value_heads,
            key_dim: sizes.key_dim,
            value_dim: sizes.value_dim,
        };
        let groups = sizes.is_grouped.then_some(KeyGroups(heads));
        delta_rule::check_heads(self.gpu, heads)?;
        if let Some(groups) = groups {
            key_groups::check_rows::<E>(self.gpu, groups)?;
        }
        let vector = |name: &str, len: usize| self.vector(&format!("{prefix}{name}"), len);
        Ok(GatedDeltaNet {
            norm: self.layer_norm(prefix, config.norms.attention_input)?,
            input,
            groups,
            heads,
            conv: self.convolution(sizes, &format!("{prefix}{CONVOLUTION}"))?,
            gates: DeltaGates {
                decay: vector(DECAY, sizes.value_heads)?,
                bias: vector(DECAY_BIAS, sizes.value_heads)?,
            },
            output_norm: GatedNorm {
                weight: vector(HEAD_NORM, sizes.value_dim)?,
                epsilon: config.rms_norm_epsilon as f32,
            },
            output,
            residual: self.residual(prefix, config.norms.attention_output)?,
        })
    }

    /// The convolution of a layer, which is never quantised.
    fn convolution<E: Element + GpuElement>(
        &self,
        sizes: &LinearAttention,
        name: &str,
    ) -> Result<CausalConv<E>, EngineError> {
        let (channels, kernel) = (sizes.convolved(), sizes.kernel);
        let range = self.range(name);
        let values = match range {
            // The first refresh writes it.
            Some(_) => self.gpu.take(channels * kernel)?,
            None => {
                let shape = [channels, 1, kernel];
                let weight = self.source.tensor(name, &shape, self.dtype)?;
                self.gpu.upload::<E>(weight.read().elements())?
            }
        };
        Ok(CausalConv {
            values,
            channels,
            kernel,
            range,
        })
    }
}
