//! The `csi-driver-oci` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    csi_driver_oci::cli::main()
}
