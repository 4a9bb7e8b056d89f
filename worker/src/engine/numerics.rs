//! The numerics class: what, beside a run's inputs, decides its bits on this machine.

/// The numerics class of this machine's processor: workers of equal classes get equal bits.
///
/// It is compared when a worker joins and recorded in the run's manifest. Products are blocked by cache size and computed by
/// the best instruction set there is; logarithms and cosines come from the C library.
pub fn numerics_class() -> String {
    let caches: Vec<String> = gemm_common::cache::CACHE_INFO
        .iter()
        .map(|cache| format!("{}/{}", cache.cache_bytes >> 10, cache.associativity))
        .collect();
    format!(
        "cpu-{}-{}-cache-{}-{}-muster-{}",
        std::env::consts::ARCH,
        instruction_set(),
        caches.join("-"),
        c_library(),
        env!("CARGO_PKG_VERSION")
    )
}

/// The instruction sets that the `gemm` crate and the bfloat16 products pick.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        match (has!("avx512f"), has!("fma")) {
            (true, _) if crate::engine::ops::avx512::is_supported::<half::bf16>() => "avx512-bf16",
            (true, _) => "avx512",
            (false, true) => "fma",
            (false, false) => "baseline",
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    "baseline"
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn c_library() -> String {
    unsafe extern "C" {
        fn gnu_get_libc_version() -> *const std::ffi::c_char;
    }
    // SAFETY: glibc returns a pointer to a static, terminated string.
    let version = unsafe { std::ffi::CStr::from_ptr(gnu_get_libc_version()) };
    format!("glibc-{}", version.to_string_lossy())
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn c_library() -> String {
    std::env::consts::OS.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_names_architecture_and_version() {
        let class = numerics_class();
        assert!(
            class.contains(std::env::consts::ARCH) && class.ends_with(env!("CARGO_PKG_VERSION"))
        );
        assert_eq!(class, numerics_class());
    }
}
