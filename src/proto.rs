//! Messages and services that the build generates from `proto/`.
#![allow(missing_docs, reason = "the protos carry the documentation")]
#![allow(clippy::all, clippy::pedantic, reason = "generated code")]
#![allow(clippy::allow_attributes_without_reason, unreachable_pub, reason = "generated code")]

/// The Container Storage Interface.
pub mod csi {
    pub mod v1 {
        tonic::include_proto!("csi.v1");
    }
}

/// The kubelet's plugin registration.
pub mod pluginregistration {
    tonic::include_proto!("pluginregistration");
}

/// The admin interface.
pub mod admin {
    tonic::include_proto!("csi_driver_oci.admin.v1");
}
