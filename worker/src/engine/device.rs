//! What a worker computes on.
//!
//! In: the device that was asked for. Out: the one that is used, opened. No other place decides it.

use std::fmt;
use std::str::FromStr;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use thiserror::Error;

#[cfg(feature = "cuda")]
use crate::engine::cuda::{Gpu, GpuError};
use crate::engine::numerics;

/// The device that was asked for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The first GPU that this build can use, or the processor.
    #[default]
    Auto,
    Cpu,
    /// An NVIDIA GPU by its number.
    Cuda(usize),
}

/// Why the device that was asked for cannot be used.
#[derive(Debug, Error)]
pub enum DeviceError {
    #[error("{0:?} is no device: use auto, cpu, cuda or cuda:N")]
    Unknown(String),
    #[error(
        "this program was built without GPUs: build it with --features cuda, or compute on the processor with --device cpu"
    )]
    NotBuilt,
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(text.to_owned());
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let number = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                number.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// The device that is used, opened.
#[derive(Clone, Default)]
pub enum ComputeDevice {
    #[default]
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda { ordinal: usize, gpu: Arc<Gpu> },
}

impl Device {
    /// Opens the device that was asked for.
    ///
    /// # Errors
    /// Where a GPU was asked for that cannot be used.
    #[cfg(feature = "cuda")]
    pub fn open(self) -> Result<ComputeDevice, DeviceError> {
        let cuda = |ordinal| {
            let gpu = Arc::new(Gpu::open(ordinal)?);
            Ok(ComputeDevice::Cuda { ordinal, gpu })
        };
        match self {
            Self::Cpu => Ok(ComputeDevice::Cpu),
            Self::Cuda(ordinal) => cuda(ordinal).map_err(DeviceError::Gpu),
            Self::Auto => Ok(cuda(0).unwrap_or_else(|error| {
                match error {
                    GpuError::Library { .. } | GpuError::Missing { .. } => {
                        tracing::info!("computing on the processor: {error}");
                    }
                    _ => tracing::warn!("computing on the processor: {error}"),
                }
                ComputeDevice::Cpu
            })),
        }
    }

    /// Opens the processor, the only device of a build without CUDA.
    ///
    /// # Errors
    /// Where a GPU was asked for.
    #[cfg(not(feature = "cuda"))]
    pub fn open(self) -> Result<ComputeDevice, DeviceError> {
        match self {
            Self::Auto | Self::Cpu => Ok(ComputeDevice::Cpu),
            Self::Cuda(_) => Err(DeviceError::NotBuilt),
        }
    }
}

impl ComputeDevice {
    /// The numerics class of this device: what, beside a run's inputs, decides its bits here.
    pub fn numerics_class(&self) -> String {
        match self {
            Self::Cpu => numerics::numerics_class(),
            #[cfg(feature = "cuda")]
            Self::Cuda { gpu, .. } => gpu.numerics_class(),
        }
    }

    /// Peak of bfloat16 products in operations a second, as NVIDIA publishes it. None where it is not known, or on a processor.
    pub fn published_peak(&self) -> Option<f64> {
        match self {
            Self::Cpu => None,
            #[cfg(feature = "cuda")]
            Self::Cuda { gpu, .. } => common::flops::published_peak(gpu.name()),
        }
    }

    /// The most memory that was taken at a time, in bytes: the GPU's, or this process's. 0 where the system does not say.
    pub fn peak_memory_bytes(&self) -> u64 {
        match self {
            Self::Cpu => peak_of_this_process(),
            #[cfg(feature = "cuda")]
            Self::Cuda { gpu, .. } => gpu.peak_memory().unwrap_or(0),
        }
    }

    /// Begins to count peak memory anew. Where that is not to be had, the peak of the whole process is reported.
    pub fn reset_peak_memory(&self) {
        match self {
            Self::Cpu => drop(forget_peak_of_this_process()),
            #[cfg(feature = "cuda")]
            Self::Cuda { gpu, .. } => drop(gpu.reset_peak_memory()),
        }
    }
}

/// Writes the device as the coordinator is told it: `cuda:0 (NAME)` or `cpu (NAME)`.
impl fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Cpu => match name_of_processor() {
                Some(name) => write!(f, "cpu ({name})"),
                None => f.write_str("cpu"),
            },
            #[cfg(feature = "cuda")]
            Self::Cuda { ordinal, gpu } => write!(f, "cuda:{ordinal} ({})", gpu.name()),
        }
    }
}

impl fmt::Debug for ComputeDevice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Name of the processor, where Linux has one; it has none for ARM's.
fn name_of_processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
}

/// Begins to count this process's peak memory anew: what it took before is no part of it, unless it still has it. Returns
/// false where the system does not allow that.
pub fn forget_peak_of_this_process() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it gives memory that is free back to the system, and takes no pointers.
    unsafe {
        libc::malloc_trim(0);
    }
    // See proc_pid_clear_refs(5): 5 sets the peak to what is resident now.
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn peak_of_this_process() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes =
        line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn what_was_given_back_is_no_part_of_the_peak() {
        const BYTES: usize = 256 << 20;
        let before = vec![1_u8; BYTES];
        assert!(peak_of_this_process() > before.iter().map(|byte| u64::from(*byte)).sum());
        drop(before);
        // Sandboxes may have no such file; then it is said, and the peak is the whole process's.
        if forget_peak_of_this_process() {
            // Other tests take memory meanwhile, but less.
            let peak = ComputeDevice::Cpu.peak_memory_bytes();
            assert!(peak < BYTES as u64, "{peak}");
        }
    }

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda:3", Device::Cuda(3)),
        ] {
            assert_eq!(text.parse::<Device>().unwrap(), device);
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            let error = wrong.parse::<Device>().unwrap_err().to_string();
            assert!(error.contains("use auto, cpu, cuda or cuda:N"), "{error}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_without_the_feature_is_refused_with_what_to_do() {
        let error = Device::Cuda(0).open().unwrap_err().to_string();
        assert!(error.contains("--features cuda") && error.contains("--device cpu"));
        let processor = Device::Auto.open().unwrap().to_string();
        assert!(processor.starts_with("cpu"), "{processor}");
    }
}
