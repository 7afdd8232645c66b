//! The `csi-driver-oci` command.

fn main() {}
