//! Parts of base weights: one expert's of a tensor that has those of all. In: where base weights come from, and which part. Out: a
//! frozen weight, in the job's base type or in 4 bits.

use common::job::{BaseDtype, Quantization};
use common::nf4::Nf4;
use half::bf16;

use super::weights::{WeightSource, check_rounded};
use crate::engine::EngineError;
use crate::engine::buffer::Pool;
use crate::engine::ops::element::{round_slice, widen};
use crate::engine::params::Weight;

/// One of the equal parts that the first dimension of a tensor counts.
#[derive(Clone, Copy, Debug)]
pub struct TensorPart<'a> {
    pub name: &'a str,
    /// Of the whole tensor.
    pub shape: &'a [usize],
    pub index: usize,
}

impl TensorPart<'_> {
    /// The shape of the part itself.
    pub fn own_shape(&self) -> &[usize] {
        &self.shape[1..]
    }

    fn scalars(&self) -> usize {
        self.own_shape().iter().product()
    }

    /// The first scalar of the part among those of the tensor.
    fn first(&self) -> usize {
        self.index * self.scalars()
    }
}

impl WeightSource {
    /// Reads or draws a frozen part in its storage type: vectors in float32, matrices in `dtype`, or in 4 bits where these are
    /// asked for, as they are in `dtype`.
    pub fn part(
        &self,
        part: TensorPart,
        dtype: BaseDtype,
        quantization: Option<Quantization>,
    ) -> Result<Weight, EngineError> {
        let shape = part.own_shape();
        // Pools of their own: what is no part of the weight is given up here, and the rest with it.
        let mut wide = Pool::default().take::<f32>(part.scalars());
        self.read_part(part, &mut wide)?;
        let is_matrix = shape.len() > 1;
        let mut narrow = None;
        if is_matrix && dtype == BaseDtype::Bfloat16 {
            let mut rounded = Pool::default().take::<bf16>(wide.len());
            round_slice(&wide, 1.0, &mut rounded);
            if let Self::Files { files, .. } = self {
                check_rounded(files, part.name, &wide, &rounded)?;
            }
            narrow = Some(rounded);
        }
        match (narrow, self.quantisation_of(quantization, is_matrix)) {
            (None, None) => Ok(Weight::frozen_f32(wide, shape)),
            (Some(narrow), None) => Ok(Weight::frozen_bf16(narrow, shape)),
            (narrow, Some(how)) => {
                if let Some(narrow) = narrow {
                    widen(&narrow[..], &mut wide);
                }
                let matrix = Nf4::quantise(&wide, how.nested_scales);
                let matrix = matrix.map_err(|reason| self.not_quantised(part.name, reason))?;
                Ok(Weight::frozen_nf4(matrix, shape))
            }
        }
    }

    /// Whether [`part`](Self::part) has matrices in 4 bits.
    #[cfg(feature = "cuda")]
    pub fn quantises_parts(&self, quantization: Option<Quantization>) -> bool {
        self.quantisation_of(quantization, true).is_some()
    }

    /// How a part is quantised, if it is: what the files of a folder of 4 bits leave as it is, whoever made them had a reason for.
    fn quantisation_of(
        &self,
        quantization: Option<Quantization>,
        is_matrix: bool,
    ) -> Option<Quantization> {
        let are_four_bits = matches!(self, Self::Files { files, .. } if files.are_four_bits());
        quantization.filter(|_| is_matrix && !are_four_bits)
    }

    fn read_part(&self, part: TensorPart, out: &mut [f32]) -> Result<(), EngineError> {
        match self {
            Self::Files { files, .. } => {
                files.read_part(part.name, part.shape, part.first(), out)?;
            }
            Self::Random { .. } => self.draw(part.name, part.shape, part.first(), out),
            Self::Memory(values) => {
                let values = values.get(part.name).expect("all tensors of the model");
                out.copy_from_slice(&values[part.first()..][..out.len()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_drawn_are_those_of_the_whole() {
        let source = WeightSource::Random {
            seed: 3,
            standard_deviation: 0.5,
            norm: 1.0,
        };
        let shape = [3, 700, 100];
        let mut whole = vec![0.0; 210_000];
        source.read_f32("a", &shape, &mut whole).unwrap();
        for index in 0..3 {
            let part = TensorPart {
                name: "a",
                shape: &shape,
                index,
            };
            let weight = source.part(part, BaseDtype::Float32, None).unwrap();
            assert_eq!(weight.dims(), [700, 100]);
            assert_eq!(*weight.read_f32(), whole[index * 70_000..][..70_000]);
        }
    }
}
