//! What a worker computes on.
//!
//! In: the device that was asked for. Out: the one that is used. No other place decides it.

use clap::ValueEnum;

/// The device that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The best that this build can use
    #[default]
    Auto,
    Cpu,
}

impl Device {
    /// The name of the device that is used, as the coordinator is told it.
    pub fn resolve(self) -> &'static str {
        match self {
            Self::Auto | Self::Cpu => "cpu",
        }
    }
}
