//! The moments of an optimizer: each in float32, flat as the weights are, or in 8 bits.
//!
//! In 8 bits a tensor is cut into blocks of [`BLOCK_SCALARS`] from its first scalar on. Each scalar has a code, each block the
//! magnitude that its codes are multiplied by. Which tensor is cut, and where, follows from the layout alone. What the codes
//! stand for is the optimizer's.

use super::flat::Flat;
use super::layout::{Layout, TensorLayout};
use crate::job::MomentDtype;

/// Scalars of a moment of 8 bits that share a scale.
pub const BLOCK_SCALARS: usize = 256;

/// Least scalars of a tensor whose moments have 8 bits; those of a smaller one are float32.
///
/// Source: bitsandbytes 0.50, `optim/optimizer.py`, `min_8bit_size`.
pub const MIN_8BIT_SCALARS: usize = 4096;

/// One moment of all trainable scalars.
#[derive(Clone, Debug, PartialEq)]
pub enum Moment {
    /// Flat in the order of the layout.
    Float32(Flat),
    EightBits(EightBits),
}

/// A moment in 8 bits. Each buffer has the tensors that belong there, in the order of the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct EightBits {
    pub codes: Flat<u8>,
    /// The largest magnitude of each block.
    pub absmax: Flat,
    /// The moment of tensors that stay in float32.
    pub float32: Flat,
}

/// Whether moments of 8 bits have 8 bits of a tensor of so many scalars. Those of embeddings stay in float32, as with
/// Transformers' trainer: most of their rows have no gradient in most steps.
pub(crate) fn has_8bit_moments(scalars: usize, is_embedding: bool) -> bool {
    scalars >= MIN_8BIT_SCALARS && !is_embedding
}

/// Whether a tensor of that name is an embedding as a whole. Of an adapter, the one that is trained as a whole has this name's end
/// too; its rows and factors have others.
pub(crate) fn is_whole_embedding(name: &str) -> bool {
    name.ends_with("embed_tokens.weight") || name.ends_with("embed_tokens_per_layer.weight")
}

/// Lengths of the buffers of a moment in 8 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EightBitLengths {
    pub codes: usize,
    pub blocks: usize,
    pub float32: usize,
}

/// Where a tensor begins in the buffers of a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MomentPlace {
    Float32 { scalar: usize },
    EightBits { code: usize, block: usize },
}

/// A moment of one tensor, or of a part of it that begins with a block.
#[derive(Clone, Copy, Debug)]
pub enum MomentPart<'a> {
    Float32(&'a [f32]),
    EightBits { codes: &'a [u8], absmax: &'a [f32] },
}

/// A [`MomentPart`] open for changes.
#[derive(Debug)]
pub enum MomentPartMut<'a> {
    Float32(&'a mut [f32]),
    EightBits(BlocksMut<'a>),
}

/// Blocks of a moment in 8 bits, open for changes.
#[derive(Debug)]
pub struct BlocksMut<'a> {
    pub codes: &'a mut [u8],
    /// The largest magnitude of each block.
    pub absmax: &'a mut [f32],
}

impl From<Flat> for Moment {
    fn from(flat: Flat) -> Self {
        Self::Float32(flat)
    }
}

impl TensorLayout {
    /// Whether moments of 8 bits have 8 bits of this tensor too.
    pub fn has_8bit_moments(&self) -> bool {
        has_8bit_moments(self.scalars(), is_whole_embedding(&self.name))
    }

    fn blocks(&self) -> usize {
        self.scalars().div_ceil(BLOCK_SCALARS)
    }
}

impl Layout {
    /// Lengths of the buffers of a moment in 8 bits.
    pub fn eight_bit_lengths(&self) -> EightBitLengths {
        let mut lengths = EightBitLengths::default();
        for tensor in &self.tensors {
            lengths.add(tensor);
        }
        lengths
    }

    /// Where each tensor begins in the buffers of a moment.
    pub fn moment_places(&self) -> Vec<MomentPlace> {
        let has_codes = self.moments.dtype == MomentDtype::EightBits;
        let mut before = EightBitLengths::default();
        let places = self.tensors.iter().map(|tensor| {
            let place = match (has_codes, tensor.has_8bit_moments()) {
                (true, true) => MomentPlace::EightBits {
                    code: before.codes,
                    block: before.blocks,
                },
                (true, false) => MomentPlace::Float32 {
                    scalar: before.float32,
                },
                (false, _) => MomentPlace::Float32 {
                    scalar: tensor.offset,
                },
            };
            before.add(tensor);
            place
        });
        places.collect()
    }

    /// Bytes of the buffers of each moment, in the order of [`Moment::buffers`].
    pub(super) fn moment_bytes(&self) -> Vec<usize> {
        const F32: usize = size_of::<f32>();
        let lengths = self.eight_bit_lengths();
        let each = match self.moments.dtype {
            MomentDtype::Float32 => vec![self.scalars * F32],
            MomentDtype::EightBits => {
                vec![lengths.codes, lengths.blocks * F32, lengths.float32 * F32]
            }
        };
        each.repeat(self.moments.count)
    }
}

impl EightBitLengths {
    fn add(&mut self, tensor: &TensorLayout) {
        match tensor.has_8bit_moments() {
            true => {
                self.codes += tensor.scalars();
                self.blocks += tensor.blocks();
            }
            false => self.float32 += tensor.scalars(),
        }
    }
}

impl Moment {
    /// A moment as it is before the first update.
    pub fn zeros(layout: &Layout) -> Self {
        match layout.moments.dtype {
            MomentDtype::Float32 => Self::Float32(vec![0.0; layout.scalars].into()),
            MomentDtype::EightBits => {
                let lengths = layout.eight_bit_lengths();
                Self::EightBits(EightBits {
                    codes: vec![0; lengths.codes].into(),
                    absmax: vec![0.0; lengths.blocks].into(),
                    float32: vec![0.0; lengths.float32].into(),
                })
            }
        }
    }

    /// The bytes of all buffers, in an order of their own.
    pub fn buffers(&self) -> Vec<&[u8]> {
        match self {
            Self::Float32(flat) => vec![bytemuck::cast_slice(flat)],
            Self::EightBits(moment) => vec![
                &moment.codes,
                bytemuck::cast_slice(&moment.absmax),
                bytemuck::cast_slice(&moment.float32),
            ],
        }
    }

    /// The [`buffers`](Self::buffers), open for changes.
    pub fn buffers_mut(&mut self) -> Vec<&mut [u8]> {
        match self {
            Self::Float32(flat) => vec![bytemuck::cast_slice_mut(flat)],
            Self::EightBits(moment) => vec![
                &mut moment.codes,
                bytemuck::cast_slice_mut(&mut moment.absmax),
                bytemuck::cast_slice_mut(&mut moment.float32),
            ],
        }
    }

    /// The moment of each tensor, in the order of the layout.
    pub fn parts<'a>(&'a self, layout: &'a Layout) -> impl Iterator<Item = MomentPart<'a>> {
        let (mut codes, mut absmax, mut float32): (&[u8], &[f32], &[f32]) = match self {
            Self::Float32(flat) => (&[], &[], flat),
            Self::EightBits(moment) => (&moment.codes, &moment.absmax, &moment.float32),
        };
        let has_codes = matches!(self, Self::EightBits(_));
        layout
            .tensors
            .iter()
            .map(move |tensor| match has_codes && tensor.has_8bit_moments() {
                true => MomentPart::EightBits {
                    codes: first(codes.split_off(..tensor.scalars())),
                    absmax: first(absmax.split_off(..tensor.blocks())),
                },
                false => MomentPart::Float32(first(float32.split_off(..tensor.scalars()))),
            })
    }

    /// The [`parts`](Self::parts), open for changes.
    pub fn parts_mut<'a>(
        &'a mut self,
        layout: &'a Layout,
    ) -> impl Iterator<Item = MomentPartMut<'a>> {
        let has_codes = matches!(self, Self::EightBits(_));
        let (mut codes, mut absmax, mut float32): (&mut [u8], &mut [f32], &mut [f32]) = match self {
            Self::Float32(flat) => (&mut [], &mut [], flat),
            Self::EightBits(moment) => (&mut moment.codes, &mut moment.absmax, &mut moment.float32),
        };
        layout
            .tensors
            .iter()
            .map(move |tensor| match has_codes && tensor.has_8bit_moments() {
                true => MomentPartMut::EightBits(BlocksMut {
                    codes: first(codes.split_off_mut(..tensor.scalars())),
                    absmax: first(absmax.split_off_mut(..tensor.blocks())),
                }),
                false => MomentPartMut::Float32(first(float32.split_off_mut(..tensor.scalars()))),
            })
    }
}

fn first<T>(split: Option<T>) -> T {
    split.expect("the buffers are as long as the layout")
}

impl MomentPartMut<'_> {
    /// Number of scalars.
    pub fn len(&self) -> usize {
        match self {
            Self::Float32(scalars) => scalars.len(),
            Self::EightBits(blocks) => blocks.codes.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> MomentPartMut<'a> {
    /// Takes its first scalars away: of 8 bits a whole number of blocks, or all that is left.
    pub fn split_off(&mut self, scalars: usize) -> MomentPartMut<'a> {
        match self {
            Self::Float32(rest) => Self::Float32(first(rest.split_off_mut(..scalars))),
            Self::EightBits(rest) => {
                let is_whole = scalars.is_multiple_of(BLOCK_SCALARS) || scalars == rest.codes.len();
                assert!(is_whole, "{scalars} scalars end within a block");
                Self::EightBits(BlocksMut {
                    codes: first(rest.codes.split_off_mut(..scalars)),
                    absmax: first(rest.absmax.split_off_mut(..scalars.div_ceil(BLOCK_SCALARS))),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Optimizer;

    #[test]
    fn blocks_follow_from_the_tensors_alone() {
        let layout = Layout::new([
            ("a.weight".into(), vec![4096]),
            ("b.embed_tokens.weight".into(), vec![4096, 2]),
            ("c.weight".into(), vec![4095]),
            ("d.weight".into(), vec![5, 1000]),
        ]);
        let lengths = layout.eight_bit_lengths();
        let expected = EightBitLengths {
            codes: 4096 + 5000,
            blocks: 16 + 20,
            float32: 8192 + 4095,
        };
        assert_eq!(lengths, expected);
        let layout = layout.with_moments(Optimizer::Adamw8bit.moments());
        let bytes = [9096, 36 * 4, 12_287 * 4];
        assert_eq!(layout.moment_bytes(), [bytes, bytes].concat());
        assert_eq!(
            layout.state_bytes(),
            (4096 + 8192 + 4095 + 5000) * 4 + 2 * bytes.iter().sum::<usize>()
        );
        let expected = [
            MomentPlace::EightBits { code: 0, block: 0 },
            MomentPlace::Float32 { scalar: 0 },
            MomentPlace::Float32 { scalar: 8192 },
            MomentPlace::EightBits {
                code: 4096,
                block: 16,
            },
        ];
        assert_eq!(layout.moment_places(), expected);
        let mut moment = Moment::zeros(&layout);
        let mut sizes = Vec::new();
        for part in moment.parts_mut(&layout) {
            match part {
                MomentPartMut::Float32(scalars) => sizes.push((scalars.len(), 0)),
                MomentPartMut::EightBits(BlocksMut { codes, absmax }) => {
                    codes.fill(sizes.len() as u8 + 1);
                    sizes.push((codes.len(), absmax.len()));
                }
            }
        }
        assert_eq!(sizes, [(4096, 16), (8192, 0), (4095, 0), (5000, 20)]);
        let codes = moment.parts(&layout).filter_map(|part| match part {
            MomentPart::Float32(_) => None,
            MomentPart::EightBits { codes, .. } => Some((codes[0], codes[codes.len() - 1])),
        });
        assert_eq!(codes.collect::<Vec<_>>(), [(1, 1), (4, 4)]);
    }
}
