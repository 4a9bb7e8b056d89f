//! Memory for what lives as long as the trainer.

use std::collections::TryReserveError;

use bytemuck::Zeroable;

/// Zeros in large pages where the system has them: memory that every step reads all over wants few pages.
///
/// # Errors
/// Where the machine has not the memory.
pub fn try_zeros<T: Zeroable + Copy>(len: usize) -> Result<Vec<T>, TryReserveError> {
    let mut values: Vec<T> = Vec::new();
    values.try_reserve_exact(len)?;
    prefer_large_pages(values.spare_capacity_mut());
    values.resize(len, T::zeroed());
    Ok(values)
}

/// Zeros as [`try_zeros`] makes them; without the memory for them, the allocator ends the process and says so.
pub fn zeros<T: Zeroable + Copy>(len: usize) -> Vec<T> {
    try_zeros(len).unwrap_or_else(|_| vec![T::zeroed(); len])
}

/// Asks for large pages for the whole pages of `memory`, which nobody has written to yet. Only a hint.
fn prefer_large_pages<T>(memory: &mut [T]) {
    const PAGE_BYTES: usize = 4 << 10;
    let bytes = size_of_val(memory);
    let start = memory.as_mut_ptr().cast::<u8>();
    let skipped = start.align_offset(PAGE_BYTES).min(bytes);
    let whole = (bytes - skipped) / PAGE_BYTES * PAGE_BYTES;
    #[cfg(target_os = "linux")]
    if whole > 0 {
        // SAFETY: the range lies within an allocation that is exclusively ours, and what is in it stays.
        unsafe { libc::madvise(start.add(skipped).cast(), whole, libc::MADV_HUGEPAGE) };
    }
}
