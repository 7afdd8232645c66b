//! Structured logs on standard error.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Starts logging. `level` is a level, or directives as `info,csi_driver_oci=debug`.
pub(super) fn start(level: &str, format: Option<LogFormat>) -> Result<(), String> {
    // A bare level is for this program; what its libraries say below "info" is for their authors.
    let directives = match level {
        "debug" | "trace" => format!("info,csi_driver_oci={level}"),
        other => other.to_owned(),
    };
    let filter = EnvFilter::try_new(directives).map_err(|error| {
        format!("\"{level}\" is not a log level ({error}): use error, warn, info, debug or trace")
    })?;
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
        LogFormat::Text => subscriber.with_ansi(terminal).init(),
    }
    Ok(())
}
