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

/// Serializes seconds since 1970 as RFC 3339. 0 is null.
fn serialize_time<S: serde::Serializer>(seconds: &i64, to: S) -> Result<S::Ok, S::Error> {
    let time = jiff::Timestamp::from_second(*seconds).ok().filter(|_| *seconds != 0);
    serde::Serialize::serialize(&time.map(|time| time.to_string()), to)
}

fn serialize_warm_state<S: serde::Serializer>(state: &i32, to: S) -> Result<S::Ok, S::Error> {
    let state = admin::warm_reference::State::try_from(*state).unwrap_or_default();
    to.serialize_str(state.name())
}

impl admin::warm_reference::State {
    /// Returns the word that people and programs read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unknown",
            Self::Waiting => "waiting",
            Self::Pulling => "pulling",
            Self::Present => "present",
            Self::Failed => "failed",
        }
    }
}

/// The admin interface.
pub mod admin {
    tonic::include_proto!("csi_driver_oci.admin.v1");
}
