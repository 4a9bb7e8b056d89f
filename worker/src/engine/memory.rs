//! Memory that this process may still take, as far as the system says: the machine's, and its container's. And memory
//! for what lives as long as the trainer.

use std::collections::TryReserveError;

use bytemuck::Zeroable;

/// Bytes that this process may still take. None where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| of_machine(&text));
    let container = || {
        let limit = read("/sys/fs/cgroup/memory.max")?;
        let used = read("/sys/fs/cgroup/memory.current")?;
        of_container(&limit, &used, &read("/sys/fs/cgroup/memory.stat")?)
    };
    match (machine, container()) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
}

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

fn of_machine(meminfo: &str) -> Option<u64> {
    word(meminfo, "MemAvailable:")?.checked_mul(1024)
}

/// Bytes left below the container's limit; memory that only holds files makes room.
fn of_container(limit: &str, used: &str, stat: &str) -> Option<u64> {
    // "max" is no limit.
    let limit: u64 = limit.trim().parse().ok()?;
    let used: u64 = used.trim().parse().ok()?;
    let files = word(stat, "inactive_file").unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

/// The number behind `name` at the beginning of a line.
fn word(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find_map(|mut line| (line.next() == Some(name)).then_some(line))?;
    line.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_the_machine_s_or_the_container_s() {
        let meminfo = "MemTotal:  24000 kB\nMemFree:  10 kB\nMemAvailable:  2000 kB\n";
        assert_eq!(of_machine(meminfo), Some(2_048_000));
        assert_eq!(of_machine("MemTotal: 24000 kB\n"), None);
        let stat = "anon 400\nfile 90\ninactive_file 70\n";
        assert_eq!(of_container("1000\n", "600\n", stat), Some(470));
        assert_eq!(of_container("500\n", "600\n", ""), Some(0));
        assert_eq!(of_container("max\n", "600\n", stat), None);
    }
}
