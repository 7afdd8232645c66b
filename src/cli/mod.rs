//! The command line: what may be typed, and how failures are told.
//!
//! Exit status: 0 done, 1 failed (one line on standard error), 2 wrong usage.

mod artifacts;
mod ask;
mod check;
mod check_config;
mod check_uninstall;
mod completions;
mod controller;
mod crds;
mod gc;
mod import;
mod layout_tar;
mod logging;
mod mount;
mod node;
mod pins;
mod status;
mod table;
mod verify;
mod warm;
mod warm_list;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use sys::mount::syscalls;
use text::printable::printable;

/// Threads of a pull come and go; with a pool for each of them, a third of the memory was what
/// one had freed and no other could use.
const MEMORY_POOLS: i32 = 2;
/// Bytes of a block that is not kept for others: the windows of decompressors, and no buffer
/// that is wanted again and again.
const LARGE_BLOCK: i32 = 1 << 20;

/// Serves OCI artifacts as read-only Kubernetes pod volumes.
#[derive(Debug, Parser)]
#[command(name = "csi-driver-oci", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node plugin: what the `DaemonSet` runs on every node.
    Node(node::NodeArguments),
    /// Run the controller that warms a fleet: what the chart's `Deployment` runs.
    Controller(controller::ControllerArguments),
    /// Mount an artifact at a folder, without a kubelet.
    Mount(mount::MountArguments),
    /// Take away what `mount` has mounted.
    Unmount(mount::UnmountArguments),
    /// Say how the node plugin on this node is.
    #[command(
        after_help = "Examples:\n  csi-driver-oci status\n  csi-driver-oci status --output json"
    )]
    Status(ask::AskArguments),
    /// List what this node holds and who shows it.
    #[command(after_help = "Examples:\n  csi-driver-oci ls\n  csi-driver-oci ls --output json")]
    Ls(ask::AskArguments),
    /// Ask a registry what it would serve: for which platforms, which files, signed by whom.
    Check(check::CheckArguments),
    /// Say all that this node knows of a reference.
    #[command(after_help = "Example:\n  csi-driver-oci inspect registry.example.com/app:v2")]
    Inspect(artifacts::InspectArguments),
    /// Fetch artifacts before a pod asks for them.
    Warm(warm::WarmArguments),
    /// Take an artifact from an OCI image layout, without a registry.
    Import(import::ImportArguments),
    /// Keep an artifact on this node.
    #[command(
        after_help = "Examples:\n  csi-driver-oci pin registry.example.com/app:v2\n  csi-driver-oci pin registry.example.com/app:v2 --platform linux/arm64"
    )]
    Pin(pins::PinArguments),
    /// Let a pinned artifact be evicted again.
    #[command(after_help = "Example:\n  csi-driver-oci unpin registry.example.com/app:v2")]
    Unpin(pins::PinArguments),
    /// Forget a reference; what is mounted stays until its last unpublish.
    #[command(after_help = "Example:\n  csi-driver-oci rm registry.example.com/app:v1")]
    Rm(pins::RemoveArguments),
    /// Free room.
    Gc(gc::CollectArguments),
    /// Read everything back, and find what the disk has changed.
    Verify(verify::VerifyArguments),
    /// Say what `node` would say about a configuration file.
    CheckConfig(check_config::CheckConfigArguments),
    /// Say whether pods of the cluster still use the driver.
    CheckUninstall(check_uninstall::CheckUninstallArguments),
    /// Print the `CustomResourceDefinition` objects, for `kubectl apply --server-side -f -`.
    #[command(after_help = "Example:\n  csi-driver-oci crds | kubectl apply --server-side -f -")]
    Crds,
    /// Print what makes a shell complete commands and flags.
    Completions(completions::CompletionsArguments),
}

/// How data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// A failure as one line.
type Failure = String;

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Command::Node(arguments) => node::run(arguments),
        Command::Controller(arguments) => controller::run(arguments),
        Command::Mount(arguments) => mount::mount(&arguments),
        Command::Unmount(arguments) => mount::unmount(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Ls(arguments) => artifacts::list(&arguments),
        Command::Inspect(arguments) => artifacts::inspect(&arguments),
        Command::Warm(arguments) => warm::run(&arguments),
        Command::Import(arguments) => import::run(&arguments),
        Command::Pin(arguments) => pins::pin(&arguments),
        Command::Unpin(arguments) => pins::unpin(&arguments),
        Command::Rm(arguments) => pins::remove(&arguments),
        Command::Gc(arguments) => gc::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::CheckConfig(arguments) => check_config::run(&arguments),
        Command::CheckUninstall(arguments) => check_uninstall::run(&arguments),
        Command::Crds => crds::run(),
        Command::Completions(arguments) => {
            completions::run(&arguments);
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tell(&format!("csi-driver-oci: {failure}"));
            ExitCode::FAILURE
        }
    }
}

/// Writes a line to standard error. A terminal that has vanished, or a reader that has had enough,
/// is no reason not to go on: the exit status says how it ended. Names of artifacts and files come
/// from their authors: what could change the terminal or begin another line is escaped.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{}", printable(line));
}

/// Writes a line to standard output, as [`tell`].
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{}", printable(line));
}

/// Writes text of this program's own to standard output, as it is.
fn print_text(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// The async runtime of a command.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // TLS needs a provider before the first connection; a second call of this would only repeat it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    syscalls::limit_malloc_arenas(MEMORY_POOLS, LARGE_BLOCK);
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))
}
