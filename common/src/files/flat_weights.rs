//! The trainable weights of a state, flat in the order of the layout: float32, or bfloat16 where they are trained in it.

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::flat::Flat;
use super::layout::{Layout, weights_digest};
use crate::job::BaseDtype;

/// The weights of all trainable tensors. Cloning shares them.
#[derive(Clone, Debug, PartialEq)]
pub enum FlatWeights {
    Float32(Flat),
    Bfloat16(Flat<bf16>),
}

/// The weights of one tensor, open for changes.
#[derive(Debug)]
pub enum WeightsPartMut<'a> {
    Float32(&'a mut [f32]),
    Bfloat16(&'a mut [bf16]),
}

impl From<Flat> for FlatWeights {
    fn from(weights: Flat) -> Self {
        Self::Float32(weights)
    }
}

impl From<Vec<f32>> for FlatWeights {
    fn from(weights: Vec<f32>) -> Self {
        Self::Float32(weights.into())
    }
}

impl FromIterator<f32> for FlatWeights {
    fn from_iter<Scalars: IntoIterator<Item = f32>>(weights: Scalars) -> Self {
        Self::Float32(weights.into_iter().collect())
    }
}

impl FlatWeights {
    pub fn zeros(layout: &Layout) -> Self {
        match layout.weights {
            BaseDtype::Float32 => Self::Float32(vec![0.0; layout.scalars].into()),
            BaseDtype::Bfloat16 => Self::Bfloat16(vec![bf16::ZERO; layout.scalars].into()),
        }
    }

    pub fn dtype(&self) -> BaseDtype {
        match self {
            Self::Float32(_) => BaseDtype::Float32,
            Self::Bfloat16(_) => BaseDtype::Bfloat16,
        }
    }

    /// Number of scalars.
    pub fn len(&self) -> usize {
        match self {
            Self::Float32(flat) => flat.len(),
            Self::Bfloat16(flat) => flat.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of the weights, widened where they are narrower than float32.
    pub fn widened(&self, range: Range<usize>) -> Vec<f32> {
        match self {
            Self::Float32(flat) => flat[range].to_vec(),
            Self::Bfloat16(flat) => flat[range].to_f32_vec(),
        }
    }

    /// The `weights_digest`.
    pub fn digest(&self, layout: &Layout) -> String {
        match self {
            Self::Float32(flat) => weights_digest(layout, layout.split(flat)),
            Self::Bfloat16(flat) => weights_digest(layout, layout.split(flat)),
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Float32(flat) => bytemuck::cast_slice(flat),
            Self::Bfloat16(flat) => bytemuck::cast_slice(flat),
        }
    }

    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Float32(flat) => bytemuck::cast_slice_mut(flat),
            Self::Bfloat16(flat) => bytemuck::cast_slice_mut(flat),
        }
    }

    /// The weights of each tensor, in the order of the layout.
    pub fn parts_mut<'a>(
        &'a mut self,
        layout: &'a Layout,
    ) -> impl Iterator<Item = WeightsPartMut<'a>> {
        let (mut float32, mut narrow): (&mut [f32], &mut [bf16]) = match self {
            Self::Float32(flat) => (flat, &mut []),
            Self::Bfloat16(flat) => (&mut [], flat),
        };
        layout.tensors.iter().map(move |tensor| {
            let scalars = ..tensor.scalars();
            match layout.weights {
                BaseDtype::Float32 => {
                    WeightsPartMut::Float32(first(float32.split_off_mut(scalars)))
                }
                BaseDtype::Bfloat16 => {
                    WeightsPartMut::Bfloat16(first(narrow.split_off_mut(scalars)))
                }
            }
        })
    }
}

impl WeightsPartMut<'_> {
    /// Number of scalars.
    pub fn len(&self) -> usize {
        match self {
            Self::Float32(weights) => weights.len(),
            Self::Bfloat16(weights) => weights.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn first<T>(split: Option<T>) -> T {
    split.expect("the weights are as many as the layout has, and of its type")
}
