//! The types that activations are stored as between operations: float32, or bfloat16 beside a bfloat16 base. Operations
//! widen what they read, compute in float32, and round once where they write.

use common::nf4::Nf4;
use half::bf16;

use super::vector;

/// The type of an activation, or of a factor of a product.
pub trait Element: bytemuck::Pod + Send + Sync {
    fn wide(self) -> f32;
    /// Rounds to the nearest, ties to even.
    fn round_from(x: f32) -> Self;
    /// The weights as elements of this type, if they are.
    fn of(weights: WeightSlice<'_>) -> Option<&[Self]>;
    /// The elements as float32, if they are.
    fn as_f32(elements: &[Self]) -> Option<&[f32]>;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round_from(x: f32) -> Self {
        x
    }

    fn of(weights: WeightSlice<'_>) -> Option<&[Self]> {
        match weights {
            WeightSlice::F32(data) => Some(data),
            WeightSlice::Bf16(_) | WeightSlice::Nf4(_) => None,
        }
    }

    fn as_f32(elements: &[Self]) -> Option<&[f32]> {
        Some(elements)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Rounds as `bf16::from_f32` does, in a form that the compiler makes vector code of.
    #[inline(always)]
    fn round_from(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        let bits = if x.is_nan() { quiet } else { rounded };
        bf16::from_bits(bits as u16)
    }

    fn of(weights: WeightSlice<'_>) -> Option<&[Self]> {
        match weights {
            WeightSlice::Bf16(data) => Some(data),
            WeightSlice::F32(_) | WeightSlice::Nf4(_) => None,
        }
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// A weight matrix as it lies in memory, row-major `[out, in]`.
#[derive(Clone, Copy)]
pub enum WeightSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Nf4(&'a Nf4),
}

impl WeightSlice<'_> {
    /// Copies row `row` of a matrix `columns` wide, as float32.
    pub fn copy_row(&self, row: usize, columns: usize, out: &mut [f32]) {
        let range = row * columns..(row + 1) * columns;
        match self {
            Self::F32(data) => out.copy_from_slice(&data[range]),
            Self::Bf16(data) => widen(&data[range], out),
            Self::Nf4(matrix) => matrix.dequantise(range.start, out),
        }
    }
}

/// `to = scale · from`, rounded where `to` is narrower.
pub fn round_slice<E: Element>(from: &[f32], scale: f32, to: &mut [E]) {
    vector::dispatch(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = E::round_from(from * scale);
            }
        },
    );
}

/// `to = from`, as float32.
pub fn widen<E: Element>(from: &[E], to: &mut [f32]) {
    vector::dispatch(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.wide();
            }
        },
    );
}

/// Rounds a row in place: the rounded elements come to stand at its beginning.
pub fn round_in_place<E: Element>(row: &mut [f32]) {
    const BLOCK: usize = 64;
    if size_of::<E>() == size_of::<f32>() {
        return;
    }
    vector::dispatch(
        #[inline(always)]
        || {
            for start in (0..row.len()).step_by(BLOCK) {
                let end = (start + BLOCK).min(row.len());
                let mut block = [E::zeroed(); BLOCK];
                for (to, from) in block.iter_mut().zip(&row[start..end]) {
                    *to = E::round_from(*from);
                }
                let row: &mut [E] = bytemuck::cast_slice_mut(row);
                row[start..end].copy_from_slice(&block[..end - start]);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let mut values: Vec<f32> = (0..100_000u32)
            .map(|i| f32::from_bits(i.wrapping_mul(42_949)))
            .collect();
        values.extend([f32::NAN, f32::INFINITY, f32::MIN, 1.003_906_3, 1.011_718_8]);
        let mut rounded = vec![bf16::ZERO; values.len()];
        round_slice(&values, 1.0, &mut rounded);
        for (x, rounded) in values.iter().zip(&rounded) {
            assert_eq!(rounded.to_bits(), bf16::from_f32(*x).to_bits(), "{x}");
        }
        let mut row = values.clone();
        round_in_place::<bf16>(&mut row);
        let row: &[bf16] = bytemuck::cast_slice(&row);
        let bits = |row: &[bf16]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&row[..values.len()]), bits(&rounded));
    }
}
