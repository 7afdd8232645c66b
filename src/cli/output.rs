//! The output of commands: text for people, or one document for programs.

use std::io::{self, Write};
use std::sync::OnceLock;

use clap::{ArgAction, Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::CommandError;
use super::logging::{self, LogFormat};
use text::printable::printable;

/// The error of the first failed write to standard output.
static WRITE_ERROR: OnceLock<io::Error> = OnceLock::new();

/// Flags of commands that print a result.
#[derive(Debug, Args)]
pub(super) struct OutputArguments {
    /// The output format.
    #[arg(short = 'o', long = "output", value_enum, default_value_t)]
    pub(super) format: OutputFormat,
    /// Print errors only, and no progress. `ls` prints references only.
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Log steps to standard error. Give it twice for details.
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
}

/// The output format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputFormat {
    /// Text for people.
    #[default]
    Table,
    /// JSON for programs.
    Json,
    /// The same document as YAML.
    Yaml,
}

impl OutputArguments {
    /// Starts the command's log.
    pub(super) fn start_log(&self) {
        let level = ["warn", "debug", "trace"][usize::from(self.verbose.min(2))];
        logging::start(level, Some(LogFormat::Text));
    }

    /// Returns whether text for people is printed.
    pub(super) fn is_text(&self) -> bool {
        self.format == OutputFormat::Table && !self.quiet
    }

    /// Prints a line of text for people.
    pub(super) fn text(&self, line: &str) {
        if self.is_text() {
            print(line);
        }
    }

    /// Prints a result: the lines for people, or the document.
    pub(super) fn result(
        &self,
        document: &impl Serialize,
        lines: impl FnOnce() -> Vec<String>,
    ) -> Result<(), CommandError> {
        if self.is_text() {
            for line in lines() {
                print(&line);
            }
            return Ok(());
        }
        let failed = |error: &dyn std::fmt::Display| format!("cannot be printed: {error}");
        let mut document = serde_json::to_value(document).map_err(|error| failed(&error))?;
        empty_to_null(&mut document);
        match self.format {
            OutputFormat::Table => {}
            OutputFormat::Json => print(&document.to_string()),
            OutputFormat::Yaml => {
                let text = serde_saphyr::to_string(&document).map_err(|error| failed(&error))?;
                text.lines().for_each(print);
            }
        }
        Ok(())
    }
}

/// Replaces empty texts by null: protobuf does not distinguish an absent text from an empty one.
fn empty_to_null(value: &mut Value) {
    match value {
        Value::String(text) if text.is_empty() => *value = Value::Null,
        Value::Array(items) => items.iter_mut().for_each(empty_to_null),
        Value::Object(fields) => fields.values_mut().for_each(empty_to_null),
        _ => {}
    }
}

/// Writes a line to standard error. A failure is ignored. Names of artifacts and files are untrusted: characters that
/// could change the terminal or begin another line are escaped.
pub(super) fn print_error(line: &str) {
    let _ = writeln!(io::stderr(), "{}", printable(line));
}

/// Writes a line to standard output, with the escapes of [`print_error`].
pub(super) fn print(line: &str) {
    print_text(&printable(line));
}

/// Writes text of this program to standard output, without escapes.
pub(super) fn print_text(text: &str) {
    record(writeln!(io::stdout(), "{text}"));
}

/// Records the result of a write to standard output.
pub(super) fn record(result: io::Result<()>) {
    if let Err(error) = result {
        let _ = WRITE_ERROR.set(error);
    }
}

/// Returns whether nothing more can be written.
pub(super) fn is_closed() -> bool {
    WRITE_ERROR.get().is_some()
}

/// Fails if standard output could not be written. A terminal that has gone, or a reader that has stopped, is no
/// failure: the exit status reports the result of the command.
pub(super) fn check() -> Result<(), CommandError> {
    match WRITE_ERROR.get() {
        Some(error)
            if error.kind() != io::ErrorKind::BrokenPipe
                && error.raw_os_error() != Some(nix::libc::EIO) =>
        {
            Err(format!("standard output cannot be written: {error}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_texts_are_null() {
        let mut document = serde_json::json!({"a": "", "b": [{"c": "", "d": "x"}], "e": 0});
        empty_to_null(&mut document);
        assert_eq!(document, serde_json::json!({"a": null, "b": [{"c": null, "d": "x"}], "e": 0}));
    }
}
