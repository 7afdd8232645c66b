//! `crds`: prints the CustomResourceDefinitions of the controller and the nodes.

use super::CommandError;
use super::output::print_text;
use preload::api::custom_resource_definitions;

/// Prints both definitions.
pub(super) fn run() -> Result<(), CommandError> {
    print_text(custom_resource_definitions::yaml()?.trim_end());
    Ok(())
}
