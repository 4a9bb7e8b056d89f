//! What this program is: version, commit, what it was built with, and what it computes with on this machine.

use std::sync::LazyLock;

/// The version with all that belongs to it, for `--version`.
pub fn long() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let features = if cfg!(feature = "cuda") {
            "cuda"
        } else {
            "none"
        };
        format!(
            "{} (commit {})\nfeatures         {features}\ninstruction set  {}\nnumerics class   {}",
            env!("CARGO_PKG_VERSION"),
            env!("MUSTER_COMMIT"),
            worker::instruction_set(),
            worker::ComputeDevice::Cpu.numerics_class()
        )
    });
    &TEXT
}
