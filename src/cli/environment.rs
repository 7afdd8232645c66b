//! Environment variables of flags: `CSI_OCI_` and the flag's name, and the names of earlier versions.

use std::env::var_os;

use clap::{Arg, Command};

const PREFIX: &str = "CSI_OCI_";

/// Gives each flag that names a variable the one with the prefix. The named one, of earlier versions, still counts if
/// only that is set.
pub(super) fn with_prefix(command: Command) -> Command {
    command.mut_args(prefixed).mut_subcommands(with_prefix)
}

fn prefixed(flag: Arg) -> Arg {
    match (variable(&flag), flag.get_env()) {
        (Some(name), Some(earlier)) if var_os(&name).is_some() || var_os(earlier).is_none() => {
            flag.env(name)
        }
        _ => flag,
    }
}

/// Returns the variable of a flag, if it has one.
pub(super) fn variable(flag: &Arg) -> Option<String> {
    let name = flag.get_long().filter(|_| flag.get_env().is_some())?;
    Some(format!("{PREFIX}{}", name.replace('-', "_").to_ascii_uppercase()))
}
