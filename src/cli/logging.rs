//! Structured logs on standard error.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// One JSON object for each line.
    Json,
    /// Text for people.
    Text,
}

/// The crates of this project. A bare level such as `debug` applies to them only.
const CRATES: [&str; 11] = [
    "csi_driver_oci",
    "oci",
    "oci_types",
    "policy",
    "preload",
    "pull",
    "store",
    "sys",
    "telemetry",
    "text",
    "unpack",
];

/// Starts logging. `level` is a level, or directives such as `info,store=debug`.
pub(super) fn start(level: &str, format: Option<LogFormat>) -> Result<(), String> {
    // A bare level applies to this program. The libraries' messages below "info" are for their authors.
    let directives = match level {
        "debug" | "trace" => {
            format!("info,{}", CRATES.map(|name| format!("{name}={level}")).join(","))
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_counts_for_every_crate_of_the_project() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/crates");
        let entries = std::fs::read_dir(folder).expect("the crates");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("a crate").file_name().to_string_lossy().replace('-', "_")
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.push("csi_driver_oci".to_owned());
        names.sort();
        assert_eq!(names, CRATES);
    }
}
