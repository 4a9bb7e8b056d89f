//! The sizes that packing and the kernels share.

use std::arch::x86_64::__mmask16;

/// Output columns of a panel: four vectors of 16 float32.
pub(super) const PANEL: usize = 64;

/// Float32 elements of a vector.
pub(super) const LANES: usize = 16;
pub(super) const LINE_BYTES: usize = 64;

/// Number of elements in a word of 32 bits.
pub(super) const fn per_word<E>() -> usize {
    size_of::<u32>() / size_of::<E>()
}

/// The mask of the first `count` lanes.
pub(super) fn lanes(count: usize) -> __mmask16 {
    ((1u32 << count.min(LANES)) - 1) as __mmask16
}
