//! Tells the program which commit it is built from, and compiles the GPU kernels where the feature `cuda` is on: each file of `src/engine/cuda/kernels` to a fatbin of its own.
//!
//! `CUDA_COMPUTE_CAP` names the target, such as 90; without it Ampere, Hopper and what comes later are served. nvcc is
//! `$CUDA_HOME/bin/nvcc`, or the one on the path.

#[path = "../common/build/commit.rs"]
mod commit;

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNELS: &str = "src/engine/cuda/kernels";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../common/build/commit.rs");
    commit::tell(&["src", "../common/src", "../proto"]);
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for variable in ["CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed={KERNELS}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let nvcc = nvcc();
    println!(
        "cargo::rustc-env=KERNELS_CUDA_MAJOR={}",
        major_version(&nvcc)?
    );
    let mut list = String::from("&[\n");
    for source in sources()? {
        println!("cargo::rerun-if-changed={}", source.display());
        if source
            .extension()
            .is_some_and(|extension| extension == "cu")
        {
            let compiled = out.join(
                source
                    .with_extension("fatbin")
                    .file_name()
                    .ok_or("a name")?,
            );
            compile(&nvcc, &source, &compiled)?;
            writeln!(list, "    include_bytes!({compiled:?}),")?;
        }
    }
    list.push(']');
    fs::write(out.join("kernels.rs"), list)?;
    Ok(())
}

fn sources() -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(KERNELS)? {
        sources.push(entry?.path());
    }
    sources.sort();
    Ok(sources)
}

fn nvcc() -> OsString {
    match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc").into(),
        None => "nvcc".into(),
    }
}

/// Which drivers run what it compiles.
fn major_version(nvcc: &OsString) -> Result<u32, Box<dyn Error>> {
    let told = Command::new(nvcc)
        .arg("--version")
        .output()
        .map_err(|error| missing(nvcc, &error))?;
    let told = String::from_utf8_lossy(&told.stdout);
    let version = told
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split('.').next());
    let major = version.and_then(|major| major.parse().ok());
    major.ok_or_else(|| format!("{} --version names no release: {told}", nvcc.display()).into())
}

fn missing(nvcc: &OsString, error: &io::Error) -> String {
    format!(
        "{}: {error}. The feature `cuda` needs nvcc: install the CUDA toolkit and set CUDA_HOME",
        nvcc.display()
    )
}

fn compile(nvcc: &OsString, source: &Path, compiled: &Path) -> Result<(), Box<dyn Error>> {
    let status = Command::new(nvcc)
        .args(["-fatbin", "-std=c++17", "-O3"])
        .args(targets()?)
        .arg("-o")
        .args([compiled, source])
        .status()
        .map_err(|error| missing(nvcc, &error))?;
    if !status.success() {
        return Err(format!("nvcc could not compile {}", source.display()).into());
    }
    Ok(())
}

fn targets() -> Result<Vec<String>, Box<dyn Error>> {
    // A container file passes it on empty where it was not given.
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
    if capability.is_empty() {
        return Ok(vec![
            "-gencode=arch=compute_80,code=sm_80".to_owned(),
            "-gencode=arch=compute_90,code=[sm_90,compute_90]".to_owned(),
        ]);
    }
    let number = capability.replace('.', "");
    match number.parse::<u32>() {
        Ok(80..) => Ok(vec![format!(
            "-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"
        )]),
        _ => Err(format!(
            "CUDA_COMPUTE_CAP is {capability:?}: bfloat16 products need 80 (Ampere) or later"
        )
        .into()),
    }
}
