//! What a GPU, or the driver of it, says went wrong.

use common::memory::bytes;
use thiserror::Error;

/// Why work on a GPU failed.
#[derive(Debug, Error)]
pub enum GpuError {
    #[error(
        "{library} is not on this machine: {remedy}, or compute on the processor with --device cpu"
    )]
    Library {
        library: &'static str,
        remedy: &'static str,
    },
    #[error(
        "NVIDIA's driver here is for CUDA {found} and this program was built with CUDA {needed}: install a newer driver (580 or later for CUDA 13), or compute on the processor with --device cpu"
    )]
    OldDriver { found: String, needed: i32 },
    #[error(
        "there is no GPU {ordinal}: the driver sees {count}; --device cpu computes on the processor"
    )]
    Missing { ordinal: usize, count: usize },
    #[error(
        "GPU {ordinal} ({name}) has compute capability {major}.{minor}; 8.0 (Ampere) or later is needed"
    )]
    TooOld {
        ordinal: usize,
        name: String,
        major: i32,
        minor: i32,
    },
    #[error(
        "heads of {head_dim} cannot be computed on {name}: {reason}; --device cpu computes on the processor"
    )]
    Heads {
        head_dim: usize,
        name: String,
        reason: &'static str,
    },
    #[error(
        "out of GPU memory: {} more were asked for where {} of {} are free",
        bytes(*wanted as u64),
        bytes(*free as u64),
        bytes(*total as u64)
    )]
    Memory {
        wanted: usize,
        free: usize,
        total: usize,
    },
    #[error("the GPU failed in {what}: {reason}")]
    Driver { what: &'static str, reason: String },
    #[error(transparent)]
    Blas(#[from] BlasError),
}

/// Why a product through cuBLASLt failed.
#[derive(Debug, Error)]
pub enum BlasError {
    #[error("cuBLAS failed in {what}: {reason}")]
    Library { what: &'static str, reason: String },
    #[error("{error}, for {shape}")]
    Product { error: Box<Self>, shape: String },
    #[error("no memory on the GPU for cuBLAS's workspace")]
    Workspace,
}
