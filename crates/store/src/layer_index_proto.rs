//! The index of an unpacked layer, as `proto/layer_index.proto` has it.
#![allow(missing_docs, reason = "the proto carries the documentation")]
#![allow(clippy::all, clippy::pedantic, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/csi_driver_oci.store.v1.rs"));
