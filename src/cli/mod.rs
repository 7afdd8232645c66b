//! The command line: arguments, output and failures.
//!
//! Exit status: 0 done, 1 failed (one line on standard error), 2 wrong usage.

mod admin_call;
mod artifact_commands;
mod check_command;
mod check_config;
mod check_uninstall;
mod client_credentials;
mod completions;
mod controller_command;
mod crds;
mod environment;
mod gc_command;
mod import_command;
mod layout_tar;
mod logging;
mod mount_command;
mod node_command;
mod output;
mod pin_commands;
mod status_command;
#[cfg(test)]
mod tests;
mod text_table;
mod trust_command;
mod verify_command;
mod version_command;
mod warm_command;
mod warm_list_status;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use sys::mount::syscalls;

/// The number of malloc arenas. Threads of a pull start and end; with an arena for each, a third of the memory was
/// freed by one thread and usable by no other.
const MEMORY_POOLS: i32 = 2;
/// The size from which a freed block returns to the kernel: that of the windows of decompressors, and of no buffer that
/// is allocated again and again.
const LARGE_BLOCK: i32 = 1 << 20;

/// Serves OCI artifacts as read-only Kubernetes pod volumes.
#[derive(Debug, Parser)]
#[command(name = "csi-driver-oci", version, propagate_version = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node plugin, as the DaemonSet does on every node.
    Node(node_command::NodeArguments),
    /// Run the controller of ArtifactPreloads, as the chart's Deployment does.
    Controller(controller_command::ControllerArguments),
    /// Mount an artifact at a directory, without a kubelet.
    Mount(mount_command::MountArguments),
    /// Unmount what `mount` has mounted.
    #[command(visible_alias = "umount")]
    Unmount(mount_command::UnmountArguments),
    /// Print the status of the node plugin on this node.
    Status(status_command::StatusArguments),
    /// List the artifacts on this node and the volumes that show them.
    #[command(after_help = "Examples:\n  csi-driver-oci ls\n  csi-driver-oci ls -o json")]
    Ls(admin_call::AdminCallArguments),
    /// Check what a registry would serve: platforms, files and signatures.
    Check(check_command::CheckArguments),
    /// Print everything that this node knows about a reference.
    #[command(after_help = "Example:\n  csi-driver-oci inspect registry.example.com/app:v2")]
    Inspect(artifact_commands::InspectArguments),
    /// Fetch artifacts before a pod needs them.
    Warm(warm_command::WarmArguments),
    /// Import an artifact from an OCI image layout, without a registry.
    Import(import_command::ImportArguments),
    /// Pin artifacts on this node, so that they are not evicted.
    #[command(
        after_help = "Examples:\n  csi-driver-oci pin registry.example.com/app:v2 registry.example.com/model:v1\n  csi-driver-oci pin registry.example.com/app:v2 --platform linux/arm64"
    )]
    Pin(pin_commands::PinArguments),
    /// Unpin artifacts, so that they can be evicted.
    #[command(after_help = "Example:\n  csi-driver-oci unpin registry.example.com/app:v2")]
    Unpin(pin_commands::PinArguments),
    /// Remove references. Mounted content stays until its last unpublish.
    #[command(after_help = "Example:\n  csi-driver-oci rm registry.example.com/app:v1")]
    Rm(pin_commands::RemoveArguments),
    /// Free disk space.
    Gc(gc_command::CollectArguments),
    /// Read all content back, and find damage.
    Verify(verify_command::VerifyArguments),
    /// Validate a configuration file as `node` does at its start.
    CheckConfig(check_config::CheckConfigArguments),
    /// Fetch and update trust roots, by which keyless signatures are verified.
    #[command(
        subcommand,
        after_help = "Example:\n  csi-driver-oci trust fetch --to trusted_root.json"
    )]
    Trust(trust_command::TrustCommand),
    /// Check whether pods of the cluster still use the driver.
    CheckUninstall(check_uninstall::CheckUninstallArguments),
    /// Print the `CustomResourceDefinition` objects, for `kubectl apply --server-side -f -`.
    #[command(after_help = "Example:\n  csi-driver-oci crds | kubectl apply --server-side -f -")]
    Crds,
    /// Print a script that makes a shell complete commands and flags.
    Completions(completions::CompletionsArguments),
    /// Print the version of this program.
    #[command(after_help = "Example:\n  csi-driver-oci version")]
    Version(output::OutputArguments),
}

/// A failure as one line.
type CommandError = String;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let matches = environment::with_prefix(CommandLine::command()).try_get_matches();
    let done = match matches.and_then(|matches| CommandLine::from_arg_matches(&matches)) {
        Ok(arguments) => run(arguments.command),
        Err(message) if message.exit_code() == 0 => {
            output::record(message.print());
            Ok(())
        }
        Err(wrong_usage) => wrong_usage.exit(),
    };
    match done.and_then(|()| output::check()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::print_error(&format!("csi-driver-oci: {failure}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Node(arguments) => node_command::run(arguments),
        Command::Controller(arguments) => controller_command::run(arguments),
        Command::Mount(arguments) => mount_command::mount(&arguments),
        Command::Unmount(arguments) => mount_command::unmount(&arguments),
        Command::Check(arguments) => check_command::run(&arguments),
        Command::Status(arguments) => status_command::run(&arguments),
        Command::Ls(arguments) => artifact_commands::list(&arguments),
        Command::Inspect(arguments) => artifact_commands::inspect(&arguments),
        Command::Warm(arguments) => warm_command::run(arguments),
        Command::Import(arguments) => import_command::run(&arguments),
        Command::Pin(arguments) => pin_commands::pin(&arguments),
        Command::Unpin(arguments) => pin_commands::unpin(&arguments),
        Command::Rm(arguments) => pin_commands::remove(&arguments),
        Command::Gc(arguments) => gc_command::run(&arguments),
        Command::Verify(arguments) => verify_command::run(&arguments),
        Command::CheckConfig(arguments) => check_config::run(&arguments),
        Command::Trust(command) => trust_command::run(&command),
        Command::CheckUninstall(arguments) => check_uninstall::run(&arguments),
        Command::Crds => crds::run(),
        Command::Completions(arguments) => {
            completions::run(&arguments);
            Ok(())
        }
        Command::Version(arguments) => version_command::run(&arguments),
    }
}

/// Ends the process as wrong usage of the command line does.
fn wrong_usage(error: &dyn std::fmt::Display) -> ! {
    CommandLine::command().error(clap::error::ErrorKind::ValueValidation, error).exit()
}

/// Builds the async runtime of a command.
fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    // TLS needs a provider before the first connection. A second call would only repeat this one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    syscalls::limit_malloc_arenas(MEMORY_POOLS, LARGE_BLOCK);
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))
}
