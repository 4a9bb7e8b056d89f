//! Tests of what runs on the GPU: on the real one where there is one, on the emulator of `tests/emulator` where
//! LD_LIBRARY_PATH names that, and not at all elsewhere.

use std::sync::OnceLock;

use super::{Gpu, GpuError};

/// The GPU, or None where there is none. With `MUSTER_NEEDS_GPU` set that is a failure.
pub fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(open).as_ref()
}

/// Opens the GPU anew, as [`gpu`] finds it.
pub fn open() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error @ (GpuError::Library { .. } | GpuError::Missing { .. })) => {
            assert!(std::env::var_os("MUSTER_NEEDS_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Asserts that values agree to a share of the largest: 1e-5 where sums are float32, 1e-2 where operands are bfloat16.
pub fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-6f32, |most, x| most.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * largest;
        assert!(
            close,
            "{what}, scalar {index}: {found} instead of {expected}"
        );
    }
}
