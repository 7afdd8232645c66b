//! Tests the pages of `docs` on flags, attributes and configuration, which are generated from the code or compared with it:
//! `make render` writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory as _};

use super::{CommandLine, environment};
use crate::config::{API_VERSION, KIND, NodeConfiguration};
use crate::volume::volume_attributes::{ATTRIBUTES, Attribute};

const HEADER: &str = "<!-- Made from the command line by make render. -->

# Flags of the commands

All commands with their arguments and flags, as `csi-driver-oci COMMAND --help` prints them. [Commands](commands.md) tells
what they are for, and describes the JSON that they print. If a flag has two environment variables, the second is its name
in earlier versions.
";
#[test]
fn the_page_of_flags_is_up_to_date() {
    let mut page = HEADER.to_owned();
    let mut root = CommandLine::command();
    root.build();
    for command in root.get_subcommands().flat_map(with_commands) {
        section(&mut page, command);
    }
    compare("docs/command-line.md", &page);
}

/// Returns the commands of a command, or the command if it has none. That for help has no section.
fn with_commands(command: &Command) -> Vec<&Command> {
    if command.get_name() == "help" {
        return Vec::new();
    }
    let commands: Vec<_> = command.get_subcommands().flat_map(with_commands).collect();
    if commands.is_empty() { vec![command] } else { commands }
}

#[test]
fn the_flags_of_the_node_plugin_on_the_page_of_configuration_are_up_to_date() {
    let root = CommandLine::command();
    let table = table(root.find_subcommand("node").expect("the command"));
    compare_part("docs/configuration.md", "flags", &table);
}

#[test]
fn the_page_of_attributes_is_up_to_date() {
    let mut table = "| key | default | meaning |\n| --- | --- | --- |\n".to_owned();
    for Attribute { key, default, meaning } in ATTRIBUTES {
        let (default, meaning) = (default.replace('|', "\\|"), meaning.replace('|', "\\|"));
        let _ = writeln!(table, "| `{key}` | {default} | {meaning} |");
    }
    compare_part("docs/attributes.md", "attributes", &table);
}

#[test]
fn the_page_of_configuration_has_all_keys_with_their_defaults() {
    let page = std::fs::read_to_string(file("docs/configuration.md")).expect("the page");
    let mut blocks =
        page.split("```yaml\n").map(|block| block.split("```").next().expect("its end"));
    let sample = blocks.find(|block| block.contains("kind: NodeConfiguration")).expect("a sample");
    let mut configuration = NodeConfiguration::parse(sample).expect("valid");
    // Absent, these follow the container's memory and the values of other programs.
    configuration.pull.memory = None;
    let absent = NodeConfiguration::without_file();
    configuration.registries.clone_from(&absent.registries);
    assert_eq!(configuration, absent);
    // An unknown key is refused with a list of the known ones.
    let unknown = |text: &str| NodeConfiguration::parse(text).expect_err("an unknown key");
    let keys = |text: &str| -> BTreeSet<String> {
        let (_, known) = text.split_once("expected one of ").expect("a list");
        known.split(", ").map(str::to_owned).collect()
    };
    let mut section = String::new();
    let mut sections: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in sample.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let Some((key, _)) = line.split_once(':') else { continue };
        match key.strip_prefix("  ") {
            Some(key) if !key.starts_with(' ') => {
                sections.get_mut(&section).expect("a section").insert(key.to_owned());
            }
            None => {
                key.clone_into(&mut section);
                sections.entry(section.clone()).or_default();
            }
            Some(_) => {}
        }
    }
    let head = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n");
    assert_eq!(
        sections.keys().cloned().collect::<BTreeSet<_>>(),
        keys(&unknown(&format!("{head}none: 1\n")))
    );
    for (section, documented) in sections.iter().filter(|(_, keys)| !keys.is_empty()) {
        let known = keys(&unknown(&format!("{head}{section}: {{none: 1}}\n")));
        assert_eq!(*documented, known, "{section}");
    }
}

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Compares a page with what it must be, or writes it.
fn compare(path: &str, expected: &str) {
    let page = std::fs::read_to_string(file(path)).unwrap_or_default();
    if page != expected && std::env::var_os("RENDER").is_some() {
        return std::fs::write(file(path), expected).expect("written");
    }
    assert!(page == expected, "{path} is not what the code says: run make render");
}

/// Compares the part of a page between two marks with what it must be, or writes it.
fn compare_part(path: &str, source: &str, table: &str) {
    let start = format!("<!-- Made from the {source} by make render. -->\n");
    let end = format!("<!-- End of the {source}. -->\n");
    let page = std::fs::read_to_string(file(path)).expect("the page");
    let (before, rest) = page.split_once(&start).expect("a mark");
    let (_, after) = rest.split_once(&end).expect("a mark");
    compare(path, &[before, &start, "\n", table, "\n", &end, after].concat());
}

fn section(page: &mut String, command: &Command) {
    let mut command = command.clone();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let usage =
        command.render_usage().to_string().replace("Usage: ", "").replace("\n       ", "\n");
    let name = command.get_bin_name().unwrap_or_default().replace("csi-driver-oci ", "");
    let _ = write!(page, "\n## {name}\n\n{}\n\n", sentence(&about));
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
