//! Structured logs on standard error.

use std::ffi::OsStr;
use std::io::IsTerminal as _;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Args, Command, ValueEnum};
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
const CRATES: [&str; 14] = [
    "controller_runtime",
    "csi_driver_oci",
    "oci",
    "oci_types",
    "policy",
    "preload",
    "provision",
    "pull",
    "sigstore",
    "store",
    "sys",
    "telemetry",
    "text",
    "unpack",
];

/// The levels of log lines.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Flags of commands that run until they are stopped.
#[derive(Debug, Args)]
pub(super) struct LogArguments {
    /// The log level. `debug` and `trace` apply to this program, and its libraries stay at `info`. Directives such as
    /// `info,store=debug` name modules.
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_parser = LevelParser)]
    log_level: String,
    /// The format of log lines [default: json, text on a terminal].
    #[arg(long, env = "LOG_FORMAT")]
    log_format: Option<LogFormat>,
}

impl LogArguments {
    /// Starts logging as the flags say.
    pub(super) fn start(&self) {
        start(&self.log_level, self.log_format);
    }
}

/// Parses a level, which a shell completes, or directives.
#[derive(Clone)]
struct LevelParser;

impl TypedValueParser for LevelParser {
    type Value = String;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().try_map(checked).parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(LEVELS.into_iter().map(PossibleValue::new)))
    }
}

/// Refuses what the filter would take for the name of a module.
fn checked(text: String) -> Result<String, String> {
    let is_level = |part: &str| LEVELS.contains(&part.to_ascii_lowercase().as_str());
    let is_directive = |part: &str| part.contains(['=', '[', ']']);
    match text.split(',').find(|part| !is_level(part) && !is_directive(part)) {
        None if EnvFilter::try_new(&text).is_ok() => Ok(text),
        _ => {
            Err(format!("use one of {}, or directives such as info,store=debug", LEVELS.join(", ")))
        }
    }
}

/// Starts logging, once. `level` is a level, or directives such as `info,store=debug`.
pub(super) fn start(level: &str, format: Option<LogFormat>) {
    // A bare level applies to this program. The libraries' messages below "info" are for their authors.
    let directives = match level {
        "debug" | "trace" => {
            format!("info,{}", CRATES.map(|name| format!("{name}={level}")).join(","))
        }
        other => other.to_owned(),
    };
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(directives))
        .with_writer(std::io::stderr);
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let _started = match format {
        LogFormat::Json => subscriber.json().flatten_event(true).try_init(),
        LogFormat::Text => subscriber.with_ansi(terminal && !no_color).try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_level_is_refused() {
        for text in ["info", "DEBUG", "debug,h2=warn", "off", "info,store[publish]=debug"] {
            assert!(checked(text.to_owned()).is_ok(), "{text}");
        }
        for text in ["", "verbose", "info,", "info,store", "store=loud", "2"] {
            assert!(checked(text.to_owned()).is_err(), "{text}");
        }
    }

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
