//! `completions`: prints scripts that make a shell complete commands and flags.

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::CommandLine;
use super::output::print_text;

/// Arguments of `completions`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci completions bash > /etc/bash_completion.d/csi-driver-oci
  csi-driver-oci completions zsh > ~/.zfunc/_csi-driver-oci
  csi-driver-oci completions fish > ~/.config/fish/completions/csi-driver-oci.fish")]
pub(super) struct CompletionsArguments {
    /// The shell that reads the script.
    #[arg(value_parser = PossibleValuesParser::new(["bash", "zsh", "fish"]).try_map(|name| name.parse::<Shell>()))]
    shell: Shell,
}

pub(super) fn run(arguments: &CompletionsArguments) {
    let (mut script, mut command) = (Vec::new(), CommandLine::command());
    clap_complete::generate(arguments.shell, &mut command, "csi-driver-oci", &mut script);
    // clap_complete writes the name of a program with dashes in two ways, and completes no flags of its commands.
    let script = String::from_utf8_lossy(&script)
        .replace("csi__subcmd__driver__subcmd__oci", "csi__driver__oci");
    print_text(script.trim_end());
}
