//! `completions`: prints scripts that make a shell complete commands and flags.

use clap::{Args, CommandFactory as _, ValueEnum};

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
    shell: CompletionShell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompletionShell {
    Bash,
    Zsh,
    Fish,
}

pub(super) fn run(arguments: &CompletionsArguments) {
    let shell = match arguments.shell {
        CompletionShell::Bash => clap_complete::Shell::Bash,
        CompletionShell::Zsh => clap_complete::Shell::Zsh,
        CompletionShell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut CommandLine::command(), "csi-driver-oci", &mut script);
    // clap_complete writes the name of a program with dashes in two ways, and completes no flags of its commands.
    let script = String::from_utf8_lossy(&script)
        .replace("csi__subcmd__driver__subcmd__oci", "csi__driver__oci");
    print_text(script.trim_end());
}
