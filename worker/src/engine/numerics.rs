//! The numerics class: what, beside a run's inputs, decides its bits on this machine.

use common::instruction_set::InstructionSet;

/// The numerics class of this machine's processor: workers of equal classes get equal bits. That of every x86-64 one is the same; on
/// other architectures numbers at the border of those that bfloat16's products take for zero may be others, so that each has its own.
///
/// It is compared when a worker joins and recorded in the run's manifest. Sums are fused products and additions in one order, and
/// functions are computed by code of this program, so that neither instructions, caches, threads nor the C library matter. The number
/// rises with every change of a bit.
pub fn numerics_class() -> String {
    match std::env::consts::ARCH {
        "x86_64" => "cpu-v1".to_owned(),
        other => format!("cpu-v1-{other}"),
    }
}

/// The instructions that products and loops use on this processor.
pub fn instruction_set() -> &'static str {
    InstructionSet::chosen().name()
}
