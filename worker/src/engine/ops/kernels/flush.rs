//! Numbers below the normal ones as zero, read and written, as instructions for pairs of bfloat16 have them.

/// Runs `work` so that instructions of the processor take such numbers for zero. `work` must be one call that is not inlined, and leave
/// what it computes in memory.
#[inline(always)]
pub(super) fn without_subnormals(work: impl FnOnce()) {
    let before = switch_on();
    work();
    switch_back(before);
}

#[cfg(target_arch = "x86_64")]
fn switch_on() -> u64 {
    /// Flush to zero, and denormals are zero.
    const BOTH: u32 = 1 << 15 | 1 << 6;
    let mut before = 0u32;
    // SAFETY: Rust takes the switches for unchanged. What they change is what operations give for numbers that are not normal; the
    // compiler could only tell where it computes such an operation itself, or moves one across this. Between here and where they are
    // set back is one call that it does not inline (`Instructions::multiply`), whose operands and results are in memory, which both
    // blocks of assembly are taken to read and write.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut before, options(nostack));
        let now = before | BOTH;
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const now, options(nostack));
    }
    u64::from(before)
}

#[cfg(target_arch = "x86_64")]
fn switch_back(before: u64) {
    let before = before as u32;
    // SAFETY: as it was.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const before, options(nostack)) }
}

#[cfg(target_arch = "aarch64")]
fn switch_on() -> u64 {
    /// Flush to zero.
    const FLUSH: u64 = 1 << 24;
    let before: u64;
    // SAFETY: as on x86-64.
    unsafe {
        std::arch::asm!("mrs {}, fpcr", out(reg) before, options(nostack));
        std::arch::asm!("msr fpcr, {}", in(reg) before | FLUSH, options(nostack));
    }
    before
}

#[cfg(target_arch = "aarch64")]
fn switch_back(before: u64) {
    // SAFETY: as it was.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) before, options(nostack)) }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn switch_on() -> u64 {
    0
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn switch_back(_: u64) {}
