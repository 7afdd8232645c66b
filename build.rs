//! Compiles the protos to Rust with protox, so that no protoc is needed on the machine that builds.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let protos = ["proto/csi.proto", "proto/pluginregistration.proto", "proto/admin.proto"];
    let descriptors = protox::compile(protos, ["proto"])?;
    // The command line prints messages of the admin interface as JSON.
    let serialize = r#"#[derive(serde::Serialize)] #[serde(rename_all = "camelCase")]"#;
    tonic_prost_build::configure()
        .type_attribute(".csi_driver_oci.admin.v1", serialize)
        .field_attribute("Artifact.view", "#[serde(flatten)]")
        .field_attribute("Part.view", "#[serde(flatten)]")
        .field_attribute("last_used", r#"#[serde(serialize_with = "super::serialize_time")]"#)
        .field_attribute(
            "WarmReference.state",
            r#"#[serde(serialize_with = "super::serialize_warm_state")]"#,
        )
        .compile_fds(descriptors)?;
    Ok(())
}
