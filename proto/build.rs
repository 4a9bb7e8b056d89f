//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=muster");
    println!("cargo::rerun-if-changed=grpc");
    let files = ["muster/v1/muster.proto", "grpc/health/v1/health.proto"];
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure()
        .bytes(".muster.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
