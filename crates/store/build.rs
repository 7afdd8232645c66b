//! Compiles the index of layers to Rust with protox, so that no protoc is needed on the machine that builds.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto/layer_index.proto");
    let descriptors = protox::compile(["layer_index.proto"], ["../../proto"])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}
