//! Compiles the protos to Rust with protox, so that no protoc is needed on the machine that builds.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let protos = ["proto/csi.proto", "proto/pluginregistration.proto", "proto/admin.proto"];
    let descriptors = protox::compile(protos, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
