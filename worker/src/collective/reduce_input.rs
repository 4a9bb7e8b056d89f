//! What the two kinds of sums, exact and fast, do differently in an exchange.
//!
//! In: the sums of a member, and the bytes that others send of theirs. Out: bytes to send, and sums to add. Never
//! touches a connection.

use std::ops::Range;

use super::sum_codec;
use crate::engine::ops::vector::dispatch;
use crate::engine::packed::PackedSums;

/// Scalars that are read and added at a time.
pub(super) use super::sum_codec::BLOCK;

/// The sums that a member brings, exact or fast, as an exchange reads them.
pub(super) trait ReduceInput: Sync {
    type ReduceElement: ReduceElement;

    fn scalars(&self) -> usize;

    /// Copies the local sums `start..start + block.len()` into `block`.
    fn read(&self, start: usize, block: &mut [Self::ReduceElement]);

    /// Encodes a part to be sent: in `buffer` ([`ReduceElement::encoded_limit`] bytes) where the bytes are not those in memory.
    fn encode<'a>(&'a self, part: Range<usize>, buffer: &'a mut [u8]) -> &'a [u8];
}

/// The type of the sums in an exchange: how they are encoded, added and turned into means.
pub(super) trait ReduceElement: bytemuck::Pod + Send + Sync {
    /// Number of the kind of sums, by which members notice that theirs differ.
    const MODE: u8;
    /// Whether the order of addition matters: contributions are added by rank then.
    const ORDERED: bool;

    /// Most bytes that so many encoded scalars take.
    fn encoded_limit(scalars: usize) -> usize;

    /// An encoded part that is being read.
    type Part<'a>;

    /// Begins to read an encoded part of so many scalars, or says what is wrong with it.
    fn open(bytes: &[u8], scalars: usize) -> Result<Self::Part<'_>, String>;

    /// Reads the next values of a part: whole blocks, and in the end what is left.
    fn next(part: &mut Self::Part<'_>, values: &mut [Self]);

    fn add(sum: &mut [Self], part: &[Self]);

    /// Turns finished sums into mean gradients.
    fn finish(sums: &[Self], means: &mut [f32]);
}

impl ReduceElement for i64 {
    const MODE: u8 = 1;
    const ORDERED: bool = false;

    fn encoded_limit(scalars: usize) -> usize {
        sum_codec::encoded_limit(scalars)
    }

    type Part<'a> = sum_codec::Encoded<'a>;

    fn open(bytes: &[u8], scalars: usize) -> Result<sum_codec::Encoded<'_>, String> {
        sum_codec::Encoded::open(bytes, scalars)
    }

    fn next(part: &mut sum_codec::Encoded<'_>, values: &mut [Self]) {
        part.next(values);
    }

    fn add(sum: &mut [Self], part: &[Self]) {
        dispatch(
            #[inline(always)]
            || {
                for (sum, part) in sum.iter_mut().zip(part) {
                    // Partial sums may leave the range and come back (common::exact).
                    *sum = sum.wrapping_add(*part);
                }
            },
        );
    }

    fn finish(sums: &[Self], means: &mut [f32]) {
        sum_codec::finish(sums, means);
    }
}

impl ReduceElement for f32 {
    const MODE: u8 = 2;
    const ORDERED: bool = true;

    fn encoded_limit(scalars: usize) -> usize {
        scalars * size_of::<f32>()
    }

    type Part<'a> = &'a [u8];

    fn open(bytes: &[u8], scalars: usize) -> Result<&[u8], String> {
        let (sent, due) = (bytes.len(), Self::encoded_limit(scalars));
        match sent == due {
            true => Ok(bytes),
            false => Err(format!("sent a part of {sent} bytes where {due} were due")),
        }
    }

    fn next(part: &mut &[u8], values: &mut [Self]) {
        let (bytes, rest) = part.split_at(Self::encoded_limit(values.len()));
        bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
        *part = rest;
    }

    fn add(sum: &mut [Self], part: &[Self]) {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += *part;
        }
    }

    fn finish(sums: &[Self], means: &mut [f32]) {
        means.copy_from_slice(sums);
    }
}

impl ReduceInput for [i64] {
    type ReduceElement = i64;

    fn scalars(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, block: &mut [i64]) {
        block.copy_from_slice(&self[start..start + block.len()]);
    }

    fn encode<'a>(&'a self, part: Range<usize>, buffer: &'a mut [u8]) -> &'a [u8] {
        narrowed(self, part, buffer)
    }
}

impl ReduceInput for PackedSums {
    type ReduceElement = i64;

    fn scalars(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, block: &mut [i64]) {
        PackedSums::read(self, start, block);
    }

    fn encode<'a>(&'a self, part: Range<usize>, buffer: &'a mut [u8]) -> &'a [u8] {
        narrowed(self, part, buffer)
    }
}

impl ReduceInput for [f32] {
    type ReduceElement = f32;

    fn scalars(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, block: &mut [f32]) {
        block.copy_from_slice(&self[start..start + block.len()]);
    }

    fn encode<'a>(&'a self, part: Range<usize>, _: &'a mut [u8]) -> &'a [u8] {
        bytemuck::cast_slice(&self[part])
    }
}

fn narrowed<'a, S>(sums: &S, part: Range<usize>, buffer: &'a mut [u8]) -> &'a [u8]
where
    S: ReduceInput<ReduceElement = i64> + ?Sized,
{
    let read = |start: usize, block: &mut [i64]| sums.read(part.start + start, block);
    let length = sum_codec::encode(part.len(), read, buffer);
    &buffer[..length]
}
