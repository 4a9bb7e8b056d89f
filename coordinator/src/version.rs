//! What this program is: version, commit, what it was built with, and what it computes with on this machine.

use std::sync::LazyLock;

/// For `--version`.
pub fn long() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(text);
    &TEXT
}

fn text() -> String {
    let features = [
        (cfg!(feature = "single-node"), "single-node"),
        (cfg!(feature = "cuda"), "cuda"),
        (cfg!(feature = "object-store"), "object-store"),
    ];
    let features = features.iter().filter(|(is_on, _)| *is_on);
    let features: Vec<&str> = features.map(|(_, name)| *name).collect();
    let features = match features.is_empty() {
        true => "none".to_owned(),
        false => features.join(", "),
    };
    format!(
        "{} (commit {})\nfeatures         {features}\n{}",
        env!("CARGO_PKG_VERSION"),
        env!("MUSTER_COMMIT"),
        engine()
    )
}

#[cfg(feature = "single-node")]
fn engine() -> String {
    format!(
        "instruction set  {}\nnumerics class   {}",
        worker::instruction_set(),
        worker::ComputeDevice::Cpu.numerics_class()
    )
}

#[cfg(not(feature = "single-node"))]
fn engine() -> String {
    "instruction set  none used: this build has no engine".to_owned()
}
