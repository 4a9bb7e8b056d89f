//! Compiles `muster/v1/*.proto` with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=muster");
    let descriptors = protox::compile(["muster/v1/muster.proto"], ["."])?;
    tonic_prost_build::configure()
        .bytes(".muster.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
