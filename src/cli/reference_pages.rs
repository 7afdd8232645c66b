//! Tests the pages of `docs` on flags, which are generated from the command line: `make render` writes them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory as _};

use super::{CommandLine, environment};

const HEADER: &str = "<!-- Made from the command line by make render. -->

# Flags of the commands

All commands with their arguments and flags, as `csi-driver-oci COMMAND --help` prints them. [Commands](commands.md) tells
what they are for, and describes the JSON that they print. If a flag has two environment variables, the second is its name
in earlier versions.
";
/// The text before and after the generated part of a page.
const MARKS: [&str; 2] =
    ["<!-- Made from the flags by make render. -->\n", "<!-- End of the flags. -->\n"];

#[test]
fn the_page_of_flags_is_up_to_date() {
    let mut page = HEADER.to_owned();
    let mut root = CommandLine::command();
    root.build();
    for command in root.get_subcommands().filter(|command| command.get_name() != "help") {
        section(&mut page, command);
    }
    compare("docs/command-line.md", &page);
}

#[test]
fn the_flags_of_the_node_plugin_on_the_page_of_configuration_are_up_to_date() {
    let path = "docs/configuration.md";
    let page = std::fs::read_to_string(file(path)).expect("the page");
    let (before, rest) = page.split_once(MARKS[0]).expect("a mark");
    let (_, after) = rest.split_once(MARKS[1]).expect("a mark");
    let root = CommandLine::command();
    let table = table(root.find_subcommand("node").expect("the command"));
    compare(path, &[before, MARKS[0], "\n", &table, "\n", MARKS[1], after].concat());
}

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Compares a page with what it must be, or writes it.
fn compare(path: &str, expected: &str) {
    if std::env::var_os("RENDER").is_some() {
        std::fs::write(file(path), expected).expect("written");
    }
    let page = std::fs::read_to_string(file(path)).unwrap_or_default();
    assert!(page == expected, "{path} is not what the flags are: run make render");
}

fn section(page: &mut String, command: &Command) {
    let mut command = command.clone();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let usage =
        command.render_usage().to_string().replace("Usage: ", "").replace("\n       ", "\n");
    let _ = write!(page, "\n## {}\n\n{}\n\n", command.get_name(), sentence(&about));
    let aliases: Vec<_> = command.get_visible_aliases().map(|name| format!("`{name}`")).collect();
    if !aliases.is_empty() {
        let _ = write!(page, "Other names: {}.\n\n", aliases.join(", "));
    }
    let _ = write!(page, "```text\n{usage}\n```\n\n");
    if command.get_name() == "node" {
        page.push_str("Its flags are on the page of [configuration](configuration.md#flags-of-csi-driver-oci-node).\n");
    } else {
        page.push_str(&table(&command));
    }
    if let Some(help) = command.get_after_help() {
        let _ = write!(page, "\n```text\n{help}\n```\n");
    }
}

/// Returns the table of a command's arguments and flags.
fn table(command: &Command) -> String {
    let shown = |argument: &&Arg| {
        !argument.is_hide_set() && !matches!(argument.get_id().as_str(), "help" | "version")
    };
    let mut rows =
        "| argument or flag | environment | default | meaning |\n| --- | --- | --- | --- |\n"
            .to_owned();
    for argument in command.get_arguments().filter(shown) {
        let help = argument.get_long_help().or(argument.get_help());
        let help = help.map(ToString::to_string).unwrap_or_default().replace('\n', " ");
        // A default that is not a value stands in the text.
        let (text, default) = match help.split_once("[default: ") {
            Some((before, rest)) => {
                let (default, after) = rest.split_once(']').expect("its end");
                (format!("{}{after}", before.trim_end()), default.to_owned())
            }
            None => (help, default(argument)),
        };
        let mut meaning = sentence(&text);
        let values = argument.get_possible_values();
        let values: Vec<_> = values.iter().map(|value| format!("`{}`", value.get_name())).collect();
        if argument.get_action().takes_values() && !values.is_empty() {
            let _ = write!(meaning, " One of {}.", values.join(", "));
        }
        let variables = environment::variable(argument).zip(argument.get_env());
        let variables =
            variables.map(|(name, earlier)| format!("`{name}`, `{}`", earlier.display()));
        let (name, meaning) = (name(argument), escaped(&meaning));
        let (variables, default) = (variables.unwrap_or_default(), escaped(&default));
        let _ = writeln!(rows, "| {name} | {variables} | {default} | {meaning} |");
    }
    rows
}

fn name(argument: &Arg) -> String {
    let value = argument.get_value_names().and_then(|names| names.first());
    let value = value.map(ToString::to_string).unwrap_or_default();
    let Some(long) = argument.get_long() else {
        let several = if argument.get_num_args().is_some_and(|count| count.max_values() > 1) {
            "..."
        } else {
            ""
        };
        return format!("`{value}{several}`");
    };
    let short = argument.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    if argument.get_action().takes_values() && value != long.replace('-', "_").to_ascii_uppercase()
    {
        format!("{short}`--{long} {value}`")
    } else {
        format!("{short}`--{long}`")
    }
}

fn default(argument: &Arg) -> String {
    let values: Vec<_> = argument
        .get_default_values()
        .iter()
        .map(|value| format!("`{}`", value.display()))
        .collect();
    let values =
        if argument.get_action().takes_values() { values.join(", ") } else { String::new() };
    if argument.is_required_set() { "required".to_owned() } else { values }
}

fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.ends_with('.') || text.is_empty() { text.to_owned() } else { format!("{text}.") }
}

/// Escapes what Markdown or HTML would take for its own, outside of code.
fn escaped(text: &str) -> String {
    let parts = text.split('`').enumerate().map(|(number, part)| {
        if number % 2 == 0 { part.replace('<', "\\<") } else { format!("`{part}`") }
    });
    parts.collect::<String>().replace('|', "\\|")
}
